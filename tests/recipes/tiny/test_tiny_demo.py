"""The demo: what it writes and prints, with backbones that have learned nothing and stages of a few steps."""

import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from recipes_minigpt4 import tiny
from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.tiny import demo, pretrain, report, scenes
from recipes_minigpt4.utils.runs import quiet, reproducible
from recipes_minigpt4.utils.text import format_table


SHOWN = [
    (Image.new("RGB", (8, 8), scenes.COLOURS[scene.things[0].colour]), scene)
    for scene in scenes.sample_scenes(random.Random(5), 60, lambda scene: True)
]
SHORT = ["--max_steps", "3", "--num_samples", "12", "--logging_steps", "1", "--per_device_train_batch_size", "4"]
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
    return {**results, "adapter_bytes": 49_872, "seconds": 12.5, "seed": 3}


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
    assert len({example.truth for example in examples}) == 9
    assert sum(example.held_out for example in examples) == 3
    assert {demo.one_sentence(scene) for _, scene in SHOWN} >= {example.truth for example in examples}
    for example in examples:
        assert list(example.replies) == list(demo.STAGES.values())
        assert example.replies["untrained projection"] == ""


# ---- the report -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page loads from elsewhere, its visible text, and whether its tags are closed."""

    VOID = {"meta", "img", "br", "line", "polyline", "hr"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads, self.texts, self.open, self.tags = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "data", "srcset", "xlink:href")]
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
    return report.render_report(results, *demo.table(results), curves, examples)


def test_the_report_loads_nothing():
    text = some_report()
    page = Page(text)
    assert page.open == []
    assert len(page.loads) == 3
    assert all(link.startswith("data:image/png;base64,") for link in page.loads)
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)


def test_the_report_shows_the_table_the_curves_and_the_replies():
    page = Page(some_report())
    text = " ".join(page.texts)
    assert page.tags.count("svg") == page.tags.count("polyline") == 2
    for said in ("object F1", "after stage 2", "held-out pairs", "49,872", "Seed 3", "(nothing)"):
        assert said in text
    for example in demo.choose_examples(SHOWN, perfect_and_silent(), 3):
        assert example.truth in text
        assert example.replies["after stage 2"] in text


def test_replies_cannot_write_html():
    nasty = {stage: ["<script>alert('x')</script> & \"<b>\""] * len(SHOWN) for stage in demo.STAGES}
    text = some_report(nasty)
    assert "<script" not in text
    assert "<b>" not in text
    assert "<script>alert('x')</script> & \"<b>\"" in Page(text).texts


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
        patch.setattr(demo, "stage_arguments", lambda *args: [*long(*args), *SHORT])
        patch.setattr(demo, "MAX_NEW_TOKENS", 12)
        threads = torch.get_num_threads()
        assert run_command(["demo", "--output_dir", str(folder), "--seed", "11"]) == 0
        assert torch.get_num_threads() == threads
        assert not torch.are_deterministic_algorithms_enabled()
    return folder


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
