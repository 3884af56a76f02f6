"""Run MiniGPT-4 in miniature: both stages on the CPU, a table of what each taught, and an adapter to load.

    minigpt4 demo --output_dir demo-output --seed 0
    minigpt4 demo --output_dir demo-smollm2 --language_model HuggingFaceTB/SmolLM2-135M-Instruct

The two stages are the recipes themselves, with `tiny_stage1` and `tiny_stage2`, or `tiny_smollm2_stage1` and
`tiny_smollm2_stage2` for another language model than the embedded one. The output folder gets

    report.html   what was trained, the numbers, descriptions before and after, and loss curves
    results.json  the numbers
    adapter/      what one would publish: the projection, the processor, the model card
    describe.py   describes a picture with it
    scene.png     a picture to describe
    untrained/    the adapter before stage 1, whose projection is new
    stage1/       the adapter after stage 1
    training.log  what both stages printed
"""

import argparse
import os
import platform
import shlex
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import modeling_minigpt4  # noqa: F401  # registers the model with the Auto classes
from modeling_minigpt4.version import __version__
from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.tiny import BACKBONES
from recipes_minigpt4.tiny.corpus import one_sentence
from recipes_minigpt4.tiny.metrics import SCORES, score
from recipes_minigpt4.tiny.options import build_parser
from recipes_minigpt4.tiny.reload import reload_adapter
from recipes_minigpt4.tiny.report import STAGES, Example, render_report, told_of_stage1
from recipes_minigpt4.tiny.scenes import Scene, evaluation_scenes
from recipes_minigpt4.training.model import load_model
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.files import prepare_folder, write_json
from recipes_minigpt4.utils.html import Curve
from recipes_minigpt4.utils.progress import Phase, phase
from recipes_minigpt4.utils.runs import quiet, reproducible
from recipes_minigpt4.utils.text import format_table, heading


INSTRUCTION = "Describe this image in detail."
MAX_NEW_TOKENS = 120  # a description of three things takes at most about 90
THREADS = 1  # models this small gain little from a second one, and lose much when something else runs
PHASES = {
    "untrained": "Untrained projection: describe the scenes",
    "train1": "Stage 1: train on short, noisy captions",
    "stage1": "After stage 1: describe the scenes",
    "train2": "Stage 2: train on few careful descriptions",
    "stage2": "After stage 2: describe the scenes",
    "reload": "Load the adapter in a new process",
}

Shown = Sequence[tuple[Image.Image, Scene]]
Scores = Mapping[str, float]


def main(arguments: Sequence[str]) -> None:
    """
    Run the demo.

    Raises:
        RecipeError: for arguments that are not understood and an output folder that cannot be written.
    """
    args = parse(arguments)
    folder = prepare_folder(args.output_dir, parts=("untrained", "stage1", "adapter"))
    started = time.perf_counter()
    is_tiny = args.language_model == TINY
    threads = THREADS if is_tiny else torch.get_num_threads()
    long = "offline. This takes about a minute" if is_tiny else "with a real language model. This takes an hour or two"
    print(f"MiniGPT-4 in miniature: both training stages on the CPU, {long}.\n", flush=True)
    with reproducible(threads), quiet():
        shown = evaluation_scenes()
        replies, trainers = train_and_describe(folder, args.seed, shown, args.language_model)
    scene = next(image for image, scene in shown if len(scene.things) == 3)
    scene.save(folder / "scene.png")
    with numbered_phase("reload", 1):
        generated, piped = reload_adapter(folder, folder / "scene.png", INSTRUCTION, MAX_NEW_TOKENS)

    results = summarize(replies, [scene for _, scene in shown])
    trainers["stage2"].create_model_card(results=card_results(results))
    results["adapter_bytes"] = adapter_bytes(folder / "adapter")
    results["parameters"] = count_parameters(trainers["stage2"].model)
    results["seconds"] = round(time.perf_counter() - started, 1)
    results |= {"seed": args.seed, "versions": versions(), "machine": machine(threads)}
    results["language_model"] = args.language_model
    curves = {f"Stage {number}": loss_curve(trainers[f"stage{number}"]) for number in (1, 2)}
    write_results(folder, results, curves, choose_examples(shown, replies, 6))

    print_results(results, choose_examples(shown, replies, 3))
    print_reload(folder, results["adapter_bytes"], generated, piped, args.language_model)
    print_next_steps(folder)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of the command."""
    return build_parser("demo").parse_args(arguments)


def train_and_describe(
    folder: Path, seed: int, shown: Shown, language_model: str = TINY
) -> tuple[dict[str, list[str]], dict[str, MiniGPT4Trainer]]:
    """Run both stages; let the model describe the pictures before, between and after. Replies, trainers by stage."""
    run, more = ("tiny", {}) if language_model == TINY else ("tiny_smollm2", {"cache_features": folder / "features"})
    parts = more if language_model == TINY else {**more, "language_model": language_model}
    stage1 = stage_arguments(f"{run}_stage1", folder / "stage1", seed, **parts)
    stage2 = stage_arguments(f"{run}_stage2", folder / "adapter", seed, model_name_or_path=folder / "stage1", **more)
    images = [image for image, _ in shown]
    replies, trainers = {}, {}

    model_args, _, training_args = stage1_pretrain.parse(stage1)
    with numbered_phase("untrained", len(images)) as line:
        model, processor = load_model(model_args, training_args)
        replies["untrained"] = describe(model, processor, images, reach=line.reach)
    for part in (model, processor):
        part.save_pretrained(folder / "untrained")
    with (folder / "training.log").open("w", encoding="utf-8") as log:
        with numbered_phase("train1", 1) as line, redirect_stdout(log):
            trainers["stage1"] = stage1_pretrain.main(stage1, callbacks=[StepsCallback(line)])
        with numbered_phase("stage1", len(images)) as line:
            replies["stage1"] = describe(*load_adapter(folder / "stage1"), images, reach=line.reach)
        with numbered_phase("train2", 1) as line, redirect_stdout(log):
            trainers["stage2"] = stage2_finetune.main(stage2, callbacks=[StepsCallback(line)])
    with numbered_phase("stage2", len(images)) as line:
        replies["stage2"] = describe(*load_adapter(folder / "adapter"), images, reach=line.reach)
    return replies, trainers


@contextmanager
def numbered_phase(name: str, total: int) -> Iterator[Phase]:
    """One of `PHASES` with its number; `total` counts its parts."""
    number, width = list(PHASES).index(name) + 1, max(map(len, PHASES.values()))
    with phase(f"{number}/{len(PHASES)}  {PHASES[name]:<{width}}", total) as line:
        yield line


class StepsCallback(TrainerCallback):
    """Shows the steps of a stage on the line of its phase."""

    def __init__(self, line: Phase) -> None:
        self.line = line

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.begin(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.line.reach(state.global_step)


def stage_arguments(config: str, folder: Path, seed: int, **more: Any) -> list[str]:
    """Command line of a stage; `more` are options of it."""
    settings = {"config": config, "output_dir": folder, "overwrite_output_dir": True, "seed": seed, **more}
    return [text for name, value in settings.items() for text in (f"--{name}", str(value))]


def load_adapter(folder: Path) -> tuple[Any, Any]:
    """A published adapter with its frozen backbones, and its processor."""
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


@torch.inference_mode()
def describe(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    batch_size: int = 80,
    reach: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy replies to `INSTRUCTION` in the processor's chat template, one per picture; `reach` hears how many."""
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
        if reach is not None:
            reach(len(replies))
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


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Part of the model → the number of its parameters; tensors that two parts share count once."""
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[name.removeprefix("model.").split(".")[0]] += parameter.numel()
    return dict(counts)


def versions() -> dict[str, str]:
    """Versions of what a run depends on."""
    libraries = [name for name in ("torch", "transformers", "trl", "peft") if find_spec(name)]
    return {"minigpt4-transformers": __version__, **{name: metadata.version(name) for name in libraries}}


def machine(threads: int) -> str:
    """Where and on how many threads of its processor this runs."""
    return f"{platform.system()} {platform.machine()}, {threads} of {os.cpu_count()} threads"


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
        examples.append(Example(image, scene, told))
    return examples


def write_results(folder: Path, results: Mapping[str, Any], curves: Mapping[str, Curve], examples: Any) -> None:
    """Write `results.json` and `report.html`."""
    write_json(folder / "results.json", results)
    header, rows = table(results)
    steps = [step for step in next_steps(folder) if "webbrowser" not in step[1]]  # who reads it has opened it
    page = render_report(results, header, rows, curves, examples, steps)
    (folder / "report.html").write_text(page, encoding="utf-8")


def print_results(results: Mapping[str, Any], examples: Sequence[Example]) -> None:
    count = results["scenes"]
    heading(f"Results on {count['all']} scenes never shown, {count['held_out']} with held-out colour–shape pairs\n")
    print(format_table(*table(results)))
    before, after = (results["stages"][stage]["object_f1"] for stage in ("untrained", "stage2"))
    trained, numbers = results["parameters"]["language_projection"], sum(results["parameters"].values())
    print(f"\nObject F1 went from {before:.2f} to {after:.2f} by training {trained:,} of {numbers:,} numbers.")
    for sentence in told_of_stage1(results):
        print(f"\n{textwrap.fill(sentence, 110)}")
    for example in examples:
        note = " (held-out pair)" if example.scene.has_held_out_pair else ""
        print(f"\n{one_sentence(example.scene)}{note}")
        for title, reply in example.replies.items():
            print(quote(title, reply))


def quote(title: str, text: str, width: int = 110) -> str:
    """A title and a text beside it, in lines of at most `width` characters."""
    margin = " " * (2 + max(map(len, STAGES.values())) + 2)
    start = f"  {title}".ljust(len(margin))
    plain = " ".join(text.split()) or "(nothing)"
    return textwrap.fill(plain, width, initial_indent=start, subsequent_indent=margin)


def print_reload(folder: Path, size: int, generated: str, piped: str, language_model: str) -> None:
    other = "" if language_model == TINY else f" and the language model {language_model}"
    heading(f"The adapter: {size:,} bytes in {short_path(folder / 'adapter')}, loaded in a new process\n")
    print(quote("from_pretrained", generated))
    print(quote("pipeline", piped))
    print(
        f"\nIts frozen parts are those in {BACKBONES}{other}."
        "\nTo publish an adapter, push its backbones first and name them by repository, or save with full=True."
    )


def next_steps(folder: Path) -> list[tuple[str, str]]:
    """What to do after the demo, and the command for it, which runs where the demo ran."""
    steps = []
    activate = Path(sys.prefix, "bin", "activate")
    if os.environ.get("VIRTUAL_ENV") != sys.prefix and activate.is_file():
        steps.append(("Activate the environment, which knows this package:", f"source {short_path(activate)}"))
    page, script, picture = (folder / name for name in ("report.html", "describe.py", "scene.png"))
    return [
        *steps,
        ("Open the page with pictures, curves and descriptions:", f"python -m webbrowser {page.as_uri()}"),
        (
            "Describe a picture; try one of your own. This world knows coloured shapes only:",
            f"python {short_path(script)} {short_path(picture)}",
        ),
        (
            "Talk to it, beside what it was after stage 1:",
            f"minigpt4 chat {short_path(folder / 'adapter')} --compare {short_path(folder / 'stage1')} "
            f"--image {short_path(picture)}",
        ),
        ("Train a stage with settings of your own:", "minigpt4 stage1 --config tiny_stage1 --max_steps 100"),
    ]


def print_next_steps(folder: Path) -> None:
    heading("What next")
    for title, command in next_steps(folder):
        print(f"\n{title}\n    {command}")


def short_path(path: Path) -> str:
    """A path as one types it here, quoted where the shell needs it."""
    path, here = path.absolute(), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))
