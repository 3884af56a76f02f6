"""The demo: what it writes and prints, with backbones that have learned nothing and stages of a few steps."""

import io
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from recipes_minigpt4 import stage1_pretrain, tiny
from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.serving import options as serving_options
from recipes_minigpt4.tiny import demo, pretrain, report, scenes
from recipes_minigpt4.utils.runs import quiet, reproducible
from recipes_minigpt4.utils.text import format_table


SHOWN = [
    (Image.new("RGB", (8, 8), scenes.COLOURS[scene.things[0].colour]), scene)
    for scene in scenes.sample_scenes(random.Random(5), 60, lambda scene: True)
]
SHORT = [
    "--max_steps", "3", "--warmup_steps", "1", "--num_samples", "12", "--logging_steps", "1",
    "--per_device_train_batch_size", "4",
]  # fmt: skip
MEASURES = {"object_f1", "position_accuracy", "failure_rate", "mean_words"}


def perfect_and_silent() -> dict[str, list[str]]:
    """Nothing before training, one object after stage 1, whole descriptions after stage 2."""
    rng = random.Random(0)
    return {
        "untrained": ["" for _ in SHOWN],
        "stage1": [" ".join(scene.things[0].pair) for _, scene in SHOWN],
        "stage2": [scenes.describe(scene, rng) for _, scene in SHOWN],
    }


def some_results() -> dict:
    results = demo.summarize(perfect_and_silent(), [scene for _, scene in SHOWN])
    told = {"adapter_bytes": 49_872, "seconds": 72.4, "seed": 3, "machine": "a machine", "versions": {"torch": "2.0"}}
    parts = {"vision_model": 300_000, "qformer": 70_000, "query_tokens": 584, "language_projection": 12_416}
    return {**results, **told, "parameters": {**parts, "language_model": 500_000, "lm_head": 500}}


# ---- arguments and the output folder --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "many"], "--seed.*many"),
        (["--seed", "-1"], "Argument --seed: '-1' is not a whole number from 0 to 4294967295"),
        (["--seed", str(2**32)], "Argument --seed: '4294967296' is not"),
        (["--outputdir", "x"], "outputdir"),
        (["--output_dir"], "--output_dir"),
    ],
)
def test_arguments_that_are_not_understood(arguments, message, capsys):
    assert run_command(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.search(rf"^minigpt4 demo: .*{message}", captured.err)
    assert captured.out == ""


# ---- numbers and the table ------------------------------------------------------------------------------------------


def test_scores_of_all_scenes_and_of_held_out_pairs():
    results = some_results()
    count = sum(scene.has_held_out_pair for _, scene in SHOWN)
    assert 0 < count < len(SHOWN)
    assert results["scenes"] == {"all": len(SHOWN), "held_out": count}
    for part in ("stages", "held_out"):
        assert results[part].keys() == {"untrained", "stage1", "stage2"}
        assert results[part]["untrained"]["object_f1"] == 0.0
        assert results[part]["stage2"]["object_f1"] == 1.0
        assert results[part]["stage2"]["failure_rate"] == 0.0
        assert 0 < results[part]["stage1"]["object_f1"] < 1
    assert results["stages"]["stage1"]["object_f1"] != results["held_out"]["stage1"]["object_f1"]


def test_the_table_has_a_row_per_stage_and_one_for_its_held_out_pairs():
    header, rows = demo.table(some_results())
    lines = format_table(header, rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[0].split() == ["object", "F1", "position", "accuracy", "failure", "rate", "mean", "words"]
    titles = [re.split(r"\s{2,}", line.strip())[0] for line in lines[2:]]
    assert titles == [title for stage in demo.STAGES.values() for title in (stage, "held-out pairs")]
    assert re.split(r"\s{2,}", lines[2].strip())[1:] == ["0.000", "0.000", "100.0%", "0.0"]
    assert re.split(r"\s{2,}", lines[6].strip())[1:4] == ["1.000", "1.000", "0.0%"]


def test_examples_are_different_scenes_of_every_kind():
    examples = demo.choose_examples(SHOWN, perfect_and_silent(), 9)
    assert len({example.scene for example in examples}) == 9
    assert sum(example.scene.has_held_out_pair for example in examples) == 3
    assert {scene for _, scene in SHOWN} >= {example.scene for example in examples}
    for example in examples:
        assert list(example.replies) == list(demo.STAGES.values())
        assert example.replies["untrained projection"] == ""


# ---- the report -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads from elsewhere, where it leads, its visible text, and whether its tags are closed."""

    VOID = {"meta", "img", "br", "line", "polyline", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.links, self.texts, self.open, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = [value for name, value in attrs if name in ("src", "href", "data", "srcset", "xlink:href")]
        (self.links if tag == "a" else self.loads).extend(found)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def some_report(replies: dict[str, list[str]] | None = None) -> str:
    results = some_results()
    examples = demo.choose_examples(SHOWN, replies or perfect_and_silent(), 3)
    curves = {"Stage 1": [(10, 3.0), (20, 1.5), (30, 1.25)], "Stage 2": [(5, 0.5)]}
    return report.render_report(results, *demo.table(results), curves, examples, [("Open it:", "open <page>")])


def test_the_report_loads_nothing():
    text = some_report()
    page = Page(text)
    assert page.open == []
    assert len(page.loads) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.loads)
    assert page.links == list(report.LINKS.values())
    for link in page.links:
        text = text.replace(f'<a href="{link}">', "")
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)


def plain(page: Page) -> str:
    return " ".join("".join(page.texts).split())


def test_the_report_shows_the_table_the_curves_and_the_replies():
    page = Page(some_report())
    text = plain(page)
    assert page.tags.count("svg") == page.tags.count("polyline") == 2
    for said in ("object F1", "after stage 2", "held-out pairs", "49,872", "seed 3", "(nothing)", "torch 2.0"):
        assert said in text
    for example in demo.choose_examples(SHOWN, perfect_and_silent(), 3):
        assert demo.one_sentence(example.scene) in text
        assert example.replies["after stage 2"] in text


def test_the_report_says_what_was_reached_by_training_what():
    text = plain(Page(some_report()))
    assert "0.00 → 1.00" in text
    assert "by training 12,416 of 883,500 numbers. The whole demo took 1 min 12 s" in text
    frozen = ("Vision encoderfrozen, 300,000 numbers", "Q-Formerfrozen, 70,584", "Language modelfrozen, 500,500")
    for part in (*frozen, "Projectiontrains, 12,416 numbers"):
        assert part in text
    for said in ("minigpt4 demo --seed 3", "Open it: open <page>", "loss per token", "step"):
        assert said in text


def test_right_words_are_green_and_wrong_ones_struck():
    scene = SHOWN[0][1]
    place, (colour, shape) = scene.things[0].position, scene.things[0].pair
    absent = next(one for one in scenes.SHAPES if one not in {thing.shape for thing in scene.things})
    told = {"after stage 1": f"A {colour} {absent}.", "after stage 2": f"A {colour} {shape} in the {place}."}
    example = report.Example(SHOWN[0][0], scene, told)
    results = some_results()
    text = report.render_report(results, *demo.table(results), {}, [example], [])
    assert f'A <s class="wrong">{colour} {absent}</s>.' in text
    assert f'A <span class="right">{colour} {shape}</span> in the <span class="right">{place}</span>.' in text
    assert text.index("Not named: ") < text.index("after stage 2</dt>")


def test_failures_of_stage_1_are_explained_where_they_are_shown():
    results = some_results()
    assert report.told_of_stage1(results) == []  # no reply at all is a failure as well
    results["stages"]["untrained"]["failure_rate"] = 0.45
    (sentence,) = report.told_of_stage1(results)
    assert "100% after stage 1? Its captions have no full stop" in sentence
    text = report.render_report(results, *demo.table(results), {}, [], [])
    assert text.index("100.0%") < text.index(sentence) < text.index("Loss while training")


def test_replies_cannot_write_html():
    nasty = {stage: ["<script>alert('x')</script> & \"<b>\""] * len(SHOWN) for stage in demo.STAGES}
    text = some_report(nasty)
    assert "<script" not in text
    assert "<b>" not in text
    assert "<script>alert('x')</script> & \"<b>\"" in plain(Page(text))


# ---- the whole of it, in small --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def untaught(tmp_path_factory) -> Path:
    """Backbones as `pretrain` saves them, from random weights."""
    folder = tmp_path_factory.mktemp("untaught")
    torch.manual_seed(0)
    pretrain.save_vision(pretrain.VisionSide(), folder / "blip2")
    tokenizer = pretrain.train_tokenizer(seed=0, documents=300, vocab_size=300)
    pretrain.save_language(LlamaForCausalLM(pretrain.language_config(tokenizer)), tokenizer, folder / "llama")
    return folder


@pytest.fixture(scope="module")
def short_demo(untaught, tmp_path_factory) -> Path:
    """What `minigpt4 demo` writes with stages of three steps and six pictures, in a folder that was not empty."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    (folder / "adapter").mkdir(parents=True)
    (folder / "results.json").write_text("of an earlier run")
    (folder / "notes.txt").write_text("mine")
    pictures = scenes.evaluation_scenes()[157:163]
    long = demo.stage_arguments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "VISION_BACKBONE", untaught / "blip2")
        patch.setattr(tiny, "LANGUAGE_BACKBONE", untaught / "llama")
        patch.setattr(demo, "evaluation_scenes", lambda: pictures)
        patch.setattr(demo, "stage_arguments", lambda *args, **more: [*long(*args, **more), *SHORT])
        patch.setattr(demo, "MAX_NEW_TOKENS", 12)
        threads = torch.get_num_threads()
        with redirect_stdout(io.StringIO()) as screen:
            assert run_command(["demo", "--output_dir", str(folder), "--seed", "11"]) == 0
        assert torch.get_num_threads() == threads
        assert not torch.are_deterministic_algorithms_enabled()
    (folder.parent / "screen.txt").write_text(screen.getvalue())
    return folder


def test_a_language_model_of_one_s_own_learns_to_see(untaught, tmp_path, monkeypatch):
    """Found by its folder, trained from cached features, and named where the result is told."""
    long = demo.stage_arguments
    monkeypatch.setattr(tiny, "VISION_BACKBONE", untaught / "blip2")
    monkeypatch.setattr(demo, "evaluation_scenes", lambda: scenes.evaluation_scenes(4, 2))
    monkeypatch.setattr(demo, "stage_arguments", lambda *args, **more: [*long(*args, **more), *SHORT])
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 8)
    other = shutil.copytree(untaught / "llama", tmp_path / "another")
    with redirect_stdout(io.StringIO()) as screen:
        assert run_command(["demo", "--output_dir", str(tmp_path / "out"), "--language_model", str(other)]) == 0
    assert str(other) in screen.getvalue()
    config = json.loads((tmp_path / "out" / "adapter" / "config.json").read_text())
    assert config["backbones"]["language_model"]["name_or_path"] == str(other)
    assert (config["projector_norm"], config["projector_init"]) == (True, "embeddings")
    assert any((tmp_path / "out" / "features").iterdir())
    page = plain(Page((tmp_path / "out" / "report.html").read_text()))
    assert f"minigpt4 demo --seed 0 --language_model {other}" in page


def test_the_screen_has_lines_for_every_phase_and_no_dictionary(short_demo):
    screen = (short_demo.parent / "screen.txt").read_text()
    before, _, _ = screen.partition("\n== Results")
    for number, title in enumerate(demo.PHASES.values(), 1):
        lines = [line for line in before.splitlines() if line.startswith(f"{number}/6  {title}")]
        assert lines[0].endswith("  0%") and re.search(r"  \d+ s$", lines[-1])
    assert not re.search(r"\r|'loss'|'epoch'", screen)
    log = (short_demo / "training.log").read_text()
    assert "by training" in screen and "What next" in screen
    assert log.count("trains  language_projection") == 2 and "loss" in log


def test_the_screen_ends_with_what_to_type(short_demo, monkeypatch):
    screen = (short_demo.parent / "screen.txt").read_text()
    commands = [line.strip() for line in screen.partition("== What next")[2].splitlines() if line.startswith("    ")]
    assert commands == [command for _, command in demo.next_steps(short_demo)]
    assert commands[-4:-1] == [
        f"python -m webbrowser {(short_demo / 'report.html').as_uri()}",
        f"python {short_demo / 'describe.py'} {short_demo / 'scene.png'}",
        f"minigpt4 chat {short_demo / 'adapter'} --compare {short_demo / 'stage1'} --image {short_demo / 'scene.png'}",
    ]
    page = plain(Page((short_demo / "report.html").read_text()))
    assert all((command in page) != ("webbrowser" in command) for command in commands)
    stage1_pretrain.parse(shlex.split(commands[-1])[2:])
    chat = serving_options.build_parser("chat").parse_args(shlex.split(commands[-2])[2:])
    assert all(Path(place).exists() for place in [*chat.image, *chat.compare])


def test_the_environment_is_named_unless_it_is_active(monkeypatch, tmp_path):
    (tmp_path / "my venv" / "bin").mkdir(parents=True)
    (tmp_path / "my venv" / "bin" / "activate").touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path / "my venv"))
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.chdir(tmp_path)
    assert demo.next_steps(tmp_path / "out")[0][1] == "source 'my venv/bin/activate'"
    assert demo.next_steps(tmp_path / "out")[2][1] == "python out/describe.py out/scene.png"
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "my venv"))
    assert not any("activate" in command for _, command in demo.next_steps(tmp_path / "out"))


def test_a_picture_is_described_with_the_command_of_the_screen(short_demo):
    told = [sys.executable, str(short_demo / "describe.py")]
    done = subprocess.run([*told, str(short_demo / "scene.png")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()
    without = subprocess.run(told, capture_output=True, text=True)
    assert without.returncode == 1 and "python describe.py PICTURE" in without.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_says_what_takes_long_before_it_is_silent(tmp_path):
    command = ["make", "--dry-run", "demo", f"VENV={tmp_path / 'new'}"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    text = done.stdout
    assert (
        text.index("about 60 for the demo")
        < text.index("pip")
        < text.index("some ten seconds")
        < text.index("minigpt4 demo")
    )


def test_backbones_as_pretraining_saves_them_are_ordinary_folders(untaught):
    assert set(load_file(untaught / "blip2" / "model.safetensors")) >= {"query_tokens"}
    assert not any("head" in name for name in load_file(untaught / "blip2" / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(untaught / "llama")
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(untaught / "llama")
    text = "There is a small red circle in the top left.###"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_results_json(short_demo):
    results = json.loads((short_demo / "results.json").read_text())
    assert set(results) >= {"stages", "adapter_bytes", "seconds", "seed"}
    assert set(results["stages"]) == {"untrained", "stage1", "stage2"}
    assert all(set(scores) == MEASURES for scores in results["stages"].values())
    assert results["seed"] == 11
    assert results["seconds"] > 0
    assert results["adapter_bytes"] == (short_demo / "adapter" / "model.safetensors").stat().st_size


def test_the_adapter_holds_the_projection_and_nothing_else(short_demo):
    adapter = short_demo / "adapter"
    names = set(load_file(adapter / "model.safetensors"))
    assert names == {"model.language_projection.weight", "model.language_projection.bias"}
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in adapter.iterdir()}
    trained, before = (load_file(short_demo / folder / "model.safetensors") for folder in ("adapter", "stage1"))
    assert all(not torch.equal(trained[name], before[name]) for name in names)


def test_the_card_has_the_table_and_no_path(short_demo):
    card = (short_demo / "adapter" / "README.md").read_text()
    results = json.loads((short_demo / "results.json").read_text())
    assert f"| object F1, scenes never shown | {results['stages']['stage2']['object_f1']:.3f} |" in card
    assert "This is an adapter of stage 2." in card
    assert str(short_demo) not in card


def test_the_report_and_the_picture(short_demo):
    page = Page((short_demo / "report.html").read_text())
    assert page.tags.count("article") == page.tags.count("img") >= 3
    assert page.tags.count("polyline") == 2
    assert Image.open(short_demo / "scene.png").size == (96, 96)


def test_other_files_in_the_folder_stay(short_demo):
    assert (short_demo / "notes.txt").read_text() == "mine"


def test_the_same_seed_gives_the_same_digits(short_demo, untaught, monkeypatch, tmp_path):
    monkeypatch.setattr(tiny, "VISION_BACKBONE", untaught / "blip2")
    monkeypatch.setattr(tiny, "LANGUAGE_BACKBONE", untaught / "llama")
    torch.manual_seed(99)
    random.seed(99)
    first = load_file(short_demo / "stage1" / "model.safetensors")
    for seed, same in ((11, True), (12, False)):
        folder = tmp_path / str(seed)
        with reproducible(demo.THREADS), quiet():
            demo.stage1_pretrain.main([*demo.stage_arguments("tiny_stage1", folder, seed), *SHORT])
        again = load_file(folder / "model.safetensors")
        assert all(torch.equal(again[name], first[name]) is same for name in first)


def test_replies_do_not_depend_on_the_batch(short_demo, monkeypatch):
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 6)
    model, processor = demo.load_adapter(short_demo / "adapter")
    images = [image for image, _ in scenes.evaluation_scenes(5, 1)]
    one, two = (demo.describe(model, processor, images, size) for size in (2, 5))
    assert one == two
    assert len(one) == 5


@pytest.mark.slow
def test_the_demo_meets_its_bars(tmp_path, capsys):
    assert run_command(["demo", "--output_dir", str(tmp_path), "--seed", "0"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    stages = results["stages"]
    assert stages["untrained"]["object_f1"] <= 0.35
    assert stages["stage2"]["object_f1"] >= 0.90
    assert stages["stage2"]["failure_rate"] <= 0.02
    assert stages["stage2"]["failure_rate"] < stages["stage1"]["failure_rate"]
    assert results["seconds"] <= 360
