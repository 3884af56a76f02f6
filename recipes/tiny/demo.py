"""Run MiniGPT-4 in miniature: both stages on the CPU, a table of what each taught, and an adapter to load.

    minigpt4 demo --output_dir demo-output --seed 0

The two stages are the recipes themselves with `tiny_stage1` and `tiny_stage2`. The output folder gets

    results.json  the numbers of the table
    report.html   the same with pictures, descriptions before and after, and loss curves
    adapter/      what one would publish: the projection, the processor, the model card
    scene.png     a picture to describe
    stage1/       the adapter after stage 1
"""

import argparse
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_minigpt4  # noqa: F401  # registers the model with the Auto classes
from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.tiny import BACKBONES
from recipes_minigpt4.tiny.corpus import one_sentence
from recipes_minigpt4.tiny.metrics import SCORES, score
from recipes_minigpt4.tiny.options import build_parser
from recipes_minigpt4.tiny.report import Example, render_report
from recipes_minigpt4.tiny.scenes import Scene, evaluation_scenes
from recipes_minigpt4.training.model import load_model
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.files import prepare_folder, write_json
from recipes_minigpt4.utils.html import Curve
from recipes_minigpt4.utils.runs import quiet, reproducible
from recipes_minigpt4.utils.text import format_table, heading


STAGES = {"untrained": "untrained projection", "stage1": "after stage 1", "stage2": "after stage 2"}
INSTRUCTION = "Describe this image in detail."
MAX_NEW_TOKENS = 120  # a description of three things takes at most about 90
THREADS = 1  # models this small gain little from a second one, and lose much when something else runs

Shown = Sequence[tuple[Image.Image, Scene]]
Scores = Mapping[str, float]

# What everyone else does with a published adapter; runs in a process of its own, which knows nothing of the training.
RELOAD = """
import json, sys
import modeling_minigpt4
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder, picture, instruction, length = sys.argv[1:]
options = {"max_new_tokens": int(length), "do_sample": False}
content = [{"type": "image", "path": picture}, {"type": "text", "text": instruction}]

model = AutoModelForImageTextToText.from_pretrained(folder)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
reply = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
(generated,) = processor.post_process_image_text_to_text(reply)

chat = [{"role": "user", "content": content}]
describe = pipeline("image-text-to-text", model=folder, device="cpu")
(answer,) = describe(text=chat, return_full_text=False, generate_kwargs=options)
print(json.dumps([generated, answer["generated_text"]]))
"""


def main(arguments: Sequence[str]) -> None:
    """
    Run the demo.

    Raises:
        RecipeError: for arguments that are not understood and an output folder that cannot be written.
    """
    args = parse(arguments)
    folder = prepare_folder(args.output_dir, parts=("stage1", "adapter"))
    started = time.perf_counter()
    with reproducible(THREADS), quiet():
        shown = evaluation_scenes()
        replies, trainers = train_and_describe(folder, args.seed, shown)
    scene = next(image for image, scene in shown if len(scene.things) == 3)
    scene.save(folder / "scene.png")
    generated, piped = reload_adapter(folder / "adapter", folder / "scene.png")

    results = summarize(replies, [scene for _, scene in shown])
    trainers["stage2"].create_model_card(results=card_results(results))
    results["adapter_bytes"] = adapter_bytes(folder / "adapter")
    results["seconds"] = round(time.perf_counter() - started, 1)
    results["seed"] = args.seed
    curves = {f"Stage {number}": loss_curve(trainers[f"stage{number}"]) for number in (1, 2)}
    write_results(folder, results, curves, choose_examples(shown, replies, 12))

    print_results(results, choose_examples(shown, replies, 3))
    print_reload(folder, results["adapter_bytes"], generated, piped)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of the command."""
    return build_parser("demo").parse_args(arguments)


def train_and_describe(
    folder: Path, seed: int, shown: Shown
) -> tuple[dict[str, list[str]], dict[str, MiniGPT4Trainer]]:
    """Run both stages; let the model describe the pictures before, between and after. Replies, trainers by stage."""
    stage1 = stage_arguments("tiny_stage1", folder / "stage1", seed)
    stage2 = [
        *stage_arguments("tiny_stage2", folder / "adapter", seed),
        "--model_name_or_path",
        str(folder / "stage1"),
    ]
    images = [image for image, _ in shown]
    replies, trainers = {}, {}

    model_args, _, training_args = stage1_pretrain.parse(stage1)
    heading(f"Untrained projection: describing {len(images)} scenes")
    replies["untrained"] = describe(*load_model(model_args, training_args), images)
    heading("Stage 1: short, noisy captions")
    trainers["stage1"] = stage1_pretrain.main(stage1)
    heading(f"After stage 1: describing {len(images)} scenes")
    replies["stage1"] = describe(*load_adapter(folder / "stage1"), images)
    heading("Stage 2: few careful descriptions")
    trainers["stage2"] = stage2_finetune.main(stage2)
    heading(f"After stage 2: describing {len(images)} scenes")
    replies["stage2"] = describe(*load_adapter(folder / "adapter"), images)
    return replies, trainers


def stage_arguments(config: str, folder: Path, seed: int) -> list[str]:
    """Command line of a stage."""
    return ["--config", config, "--output_dir", str(folder), "--seed", str(seed)]


def load_adapter(folder: Path) -> tuple[Any, Any]:
    """A published adapter with its frozen backbones, and its processor."""
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def describe(model: Any, processor: Any, images: Sequence[Image.Image], batch_size: int = 80) -> list[str]:
    """Greedy replies to `INSTRUCTION` in the processor's chat template, one per picture."""
    model.eval()
    replies: list[str] = []
    for start in range(0, len(images), batch_size):
        chats = []
        for image in images[start : start + batch_size]:
            content = [{"type": "image", "image": image}, {"type": "text", "text": INSTRUCTION}]
            chats.append([{"role": "user", "content": content}])
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        replies += processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
    return replies


# ---- results --------------------------------------------------------------------------------------------------------


def summarize(replies: Mapping[str, Sequence[str]], scenes: Sequence[Scene]) -> dict[str, Any]:
    """The four measures of every stage: `stages` on all scenes, `held_out` on those with a held-out pair."""
    places = [place for place, scene in enumerate(scenes) if scene.has_held_out_pair]
    held_out = [scenes[place] for place in places]
    return {
        "stages": {stage: score(texts, scenes) for stage, texts in replies.items()},
        "held_out": {stage: score([texts[place] for place in places], held_out) for stage, texts in replies.items()},
        "scenes": {"all": len(scenes), "held_out": len(held_out)},
    }


def loss_curve(trainer: MiniGPT4Trainer) -> Curve:
    """(step, loss) of every log entry."""
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def adapter_bytes(folder: Path) -> int:
    """Size of the weights that an adapter folder holds, with those of PEFT if there are any."""
    files = [*folder.glob("*.safetensors"), *folder.glob("*/adapter_model.safetensors")]
    return sum(path.stat().st_size for path in files)


def card_results(results: Mapping[str, Any]) -> dict[str, str]:
    """Measure → value of the trained adapter, for the model card."""
    told = {}
    for key, title in (("stages", "scenes never shown"), ("held_out", "those with a held-out colour–shape pair")):
        for measure, text in zip(SCORES, format_scores(results[key]["stage2"]), strict=True):
            told[f"{SCORES[measure][0]}, {title}"] = text
    return told


def format_scores(scores: Scores) -> list[str]:
    return [style.format(scores[measure]) for measure, (_, style) in SCORES.items()]


def table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each stage a row for all scenes, and one for those with held-out pairs."""
    rows = []
    for stage, title in STAGES.items():
        rows.append([title, *format_scores(results["stages"][stage])])
        rows.append(["  held-out pairs", *format_scores(results["held_out"][stage])])
    return ["", *(title for title, _ in SCORES.values())], rows


def choose_examples(shown: Shown, replies: Mapping[str, Sequence[str]], count: int) -> list[Example]:
    """Scenes with one, two and three things, the first of each kind; every third has a held-out pair."""
    left = dict(enumerate(shown))
    examples = []
    for number in range(count):
        things, held_out = 1 + (number + number // 3) % 3, number % 3 == 2
        kinds = {place: (len(scene.things), scene.has_held_out_pair) for place, (_, scene) in left.items()}
        place = next((place for place, kind in kinds.items() if kind == (things, held_out)), None)
        if place is None:
            continue
        image, scene = left.pop(place)
        told = {title: replies[stage][place] for stage, title in STAGES.items()}
        examples.append(Example(image, one_sentence(scene), held_out, told))
    return examples


def write_results(folder: Path, results: Mapping[str, Any], curves: Mapping[str, Curve], examples: Any) -> None:
    """Write `results.json` and `report.html`."""
    write_json(folder / "results.json", results)
    header, rows = table(results)
    page = render_report(results, header, rows, curves, examples)
    (folder / "report.html").write_text(page, encoding="utf-8")


def print_results(results: Mapping[str, Any], examples: Sequence[Example]) -> None:
    count = results["scenes"]
    heading(f"Results on {count['all']} scenes never shown, {count['held_out']} with held-out colour–shape pairs\n")
    print(format_table(*table(results)))
    for example in examples:
        note = " (held-out pair)" if example.held_out else ""
        print(f"\n{example.truth}{note}")
        for title, reply in example.replies.items():
            print(quote(title, reply))


def quote(title: str, text: str, width: int = 110) -> str:
    """A title and a text beside it, in lines of at most `width` characters."""
    margin = " " * (2 + max(map(len, STAGES.values())) + 2)
    start = f"  {title}".ljust(len(margin))
    plain = " ".join(text.split()) or "(nothing)"
    return textwrap.fill(plain, width, initial_indent=start, subsequent_indent=margin)


def print_reload(folder: Path, size: int, generated: str, piped: str) -> None:
    heading(f"The adapter: {size:,} bytes in {folder / 'adapter'}, loaded in a new process\n")
    print(quote("from_pretrained", generated))
    print(quote("pipeline", piped))
    print(
        f"\nIts frozen parts are those in {BACKBONES}."
        "\nTo publish an adapter, push its backbones first and name them by repository, or save with full=True."
        f"\nPictures, descriptions and loss curves: {folder / 'report.html'}"
    )


# ---- the adapter in a new process -----------------------------------------------------------------------------------


def reload_adapter(adapter: Path, picture: Path) -> tuple[str, str]:
    """
    Let a new process load the adapter and describe a picture, with `generate` and with `pipeline`.

    Raises:
        RuntimeError: if it fails or the two differ.
    """
    command = [sys.executable, "-c", RELOAD, str(adapter), str(picture), INSTRUCTION, str(MAX_NEW_TOKENS)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"The adapter in {adapter} could not be loaded in a new process:\n{done.stderr}")
    generated, piped = json.loads(done.stdout.splitlines()[-1])
    if generated != piped:
        raise RuntimeError(f"generate and pipeline differ: {generated!r} and {piped!r}.")
    return generated, piped
