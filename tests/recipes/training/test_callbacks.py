"""Watching a run: the bar, TensorBoard's numbers, and the panel of descriptions."""

import json
import re
import sys
import types
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from transformers import TrainerState

from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.training.callbacks import ImagesProgressCallback, PanelCallback


class Page(HTMLParser):
    """Rows of a page's table as texts, its pictures, and whatever it would load."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.open = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.rows[-1][-1] += data


@pytest.fixture(autouse=True)
def short_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights do not end a description by themselves, and tests need no long ones."""
    monkeypatch.setattr("recipes_minigpt4.training.callbacks.MAX_NEW_TOKENS", 8)


def losses(trainer) -> list[tuple[float, float]]:
    return [(one["loss"], one["grad_norm"]) for one in trainer.state.log_history if "loss" in one]


@pytest.mark.parametrize("module", [stage1_pretrain, stage2_finetune])
def test_a_column_every_n_steps_and_nothing_from_elsewhere(module, stage: Callable, tmp_path: Path) -> None:
    module.main(stage(max_steps=5, panel_steps=2))
    page = Page(tmp_path / "run" / "panel.html")
    assert [row[1:] for row in page.rows[:1]] == [["step 2", "step 4"]]
    assert len(page.rows) == 1 + 4 and all(len(row) == 3 and all(row) for row in page.rows)
    for colour, row in zip(("red", "green", "blue", "black"), page.rows[1:], strict=True):
        assert colour in row[0].lower()
    assert len(page.links) == 4 and all(link.startswith("data:image/png;base64,") for link in page.links)
    text = (tmp_path / "run" / "panel.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<script|<link", text)


@pytest.mark.parametrize(("module", "name"), [(stage1_pretrain, "stage 1"), (stage2_finetune, "stage 2")])
def test_the_page_says_which_run_it_is_and_what_is_grey(module, name: str, stage: Callable, tmp_path: Path) -> None:
    module.main(stage(max_steps=1, panel_steps=1))
    text = " ".join((tmp_path / "run" / "panel.html").read_text().split())
    assert f"<title>What the model says: run, {name}</title>" in text
    assert f"Run: <strong>run, {name}</strong>." in text
    assert '<span class="soft">Grey, under each picture: its caption in the training data.</span>' in text
    assert str(tmp_path) not in text


def test_descriptions_are_those_of_the_model(stage: Callable) -> None:
    trainer = stage1_pretrain.main(stage(max_steps=3, panel_steps=3))
    (panel,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, PanelCallback)]
    assert [one["step"] for one in panel.columns] == [3]
    assert panel.columns[0]["replies"] == panel.describe() and any(panel.describe())


def test_training_is_the_same_with_and_without(stage: Callable) -> None:
    # LoRA with dropout draws random numbers in every step and minds the mode of its modules.
    lora = {"peft_type": "LORA", "r": 2, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}
    fields = {"max_steps": 5, "peft_config": json.dumps(lora)}
    without = stage1_pretrain.main(stage("without", **fields))
    watched = stage1_pretrain.main(stage("with", panel_steps=1, **fields))
    assert losses(without) == losses(watched) and len(losses(watched)) == 5
    modes = [{name: one.training for name, one in run.model.named_modules()} for run in (without, watched)]
    assert modes[0] == modes[1] and any(modes[0].values())


def test_resuming_keeps_earlier_columns_and_a_new_run_does_not(stage: Callable, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "panel_steps": 1, "save_strategy": "steps", "save_steps": 2}
    stage1_pretrain.main(stage(**fields))
    whole = json.loads((tmp_path / "run" / "panel.json").read_text())
    assert [one["step"] for one in whole["columns"]] == [1, 2, 3, 4]
    stage1_pretrain.main(stage(**fields, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2"))
    assert json.loads((tmp_path / "run" / "panel.json").read_text()) == whole
    assert Page(tmp_path / "run" / "panel.html").rows[0][1:] == ["step 1", "step 2", "step 3", "step 4"]
    stage1_pretrain.main(stage(max_steps=1, panel_steps=1))
    assert Page(tmp_path / "run" / "panel.html").rows[0][1:] == ["step 1"]


def test_pictures_are_shown_when_training_from_stored_features(stage: Callable, tmp_path: Path) -> None:
    for name, fields in (("plain", {}), ("cached", {"cache_features": tmp_path / "features"})):
        stage1_pretrain.main(stage(name, max_steps=2, panel_steps=1, **fields))
    plain, cached = (json.loads((tmp_path / name / "panel.json").read_text()) for name in ("plain", "cached"))
    assert plain == cached and len(cached["columns"]) == 2


def test_pictures_of_a_folder(stage: Callable, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    Image.new("L", (500, 300), 90).save(folder / "b<i>.png")
    Image.new("RGBA", (20, 20)).save(folder / "a.png")
    (folder / "notes.txt").write_text("no picture")
    stage1_pretrain.main(stage(max_steps=1, panel_steps=1, panel_images=folder))
    assert [row[0].strip() for row in Page(tmp_path / "run" / "panel.html").rows] == ["picture", "a.png", "b<i>.png"]
    assert "Grey, under each picture: the name of its file." in (tmp_path / "run" / "panel.html").read_text()


def test_tensorboard_gets_numbers_pictures_and_descriptions(stage, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = stage1_pretrain.main(stage(max_steps=4, panel_steps=2, report_to="tensorboard"))
    (file,) = (tmp_path / "run").rglob("events.out.tfevents*")
    events = accumulator.EventAccumulator(str(file))
    events.Reload()
    logged = [one for one in trainer.state.log_history if "loss" in one]
    for name in ("loss", "learning_rate", "images_per_second"):
        seen = [(one.step, one.value) for one in events.Scalars(f"train/{name}")]
        assert [step for step, _ in seen] == [1, 2, 3, 4]
        assert [value for _, value in seen] == pytest.approx([one[name] for one in logged], rel=1e-6)
    columns = json.loads((tmp_path / "run" / "panel.json").read_text())["columns"]
    texts = events.Tensors("panel/descriptions/text_summary")
    assert [one.step for one in texts] == [one["step"] for one in columns] == [2, 4]
    table = texts[-1].tensor_proto.string_val[0].decode().splitlines()
    assert len(table) == 2 + 4 and table[0] == "| picture | title | description |"
    assert events.Tags()["images"] == [f"panel/picture_{number}" for number in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_get_a_table(name: str, stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither is installed: a stand-in with the calls that both have takes the table."""
    trainer = stage1_pretrain.main(stage(max_steps=1, panel_steps=1))
    (panel,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, PanelCallback)]
    logged: list[dict] = []
    tracker = types.ModuleType(name)
    tracker.__dict__.update(Image=lambda image: image.size, Table=lambda dataframe: dataframe, log=logged.append)
    monkeypatch.setitem(sys.modules, name, tracker)
    trainer.args.report_to = [name]
    panel.report(1, panel.columns[0]["replies"])
    (entry,) = logged
    assert entry["train/global_step"] == 1
    assert entry["panel"]["description"].tolist() == panel.columns[0]["replies"]
    assert entry["panel"]["image"].tolist() == [(32, 28)] * 4


def test_the_bar_tells_images_per_second_and_time_left(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    stage1_pretrain.main(stage(max_steps=3, disable_tqdm=False))
    bar = [line for line in re.split(r"[\r\n]", capsys.readouterr().err) if "images/s" in line]
    assert bar and re.search(r"\d/3 \[\d\d:\d\d<\d\d:\d\d.*, loss [\d.]+, [\d.]+ images/s\]", bar[0]), bar


def test_a_resumed_bar_tells_the_time_that_is_left(
    stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": False}
    stage1_pretrain.main(stage(**fields))
    capsys.readouterr()
    trainer = stage1_pretrain.main(stage(**fields, resume_from_checkpoint=tmp_path / "run" / "checkpoint-2"))
    bars = re.findall(r"(\d+)/4 \[", capsys.readouterr().err)
    assert bars and set(bars) <= {"2", "3", "4"}, bars
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, ImagesProgressCallback)]
    state, now = TrainerState(global_step=400, max_steps=500, is_world_process_zero=True), 0.0
    callback.on_train_begin(trainer.args, state, trainer.control)
    bar = callback.training_bar
    bar._time, bar.start_t, bar.last_print_t = lambda: now, 0.0, 0.0  # tqdm's clock
    for second in range(1, 11):
        now, state.global_step = float(second), 400 + second
        callback.on_step_end(trainer.args, state, trainer.control)
    assert "410/500 [00:10<01:30" in str(bar)
    bar.close()


def test_time_of_the_panel_does_not_count(stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def slow(self) -> list[str]:
        now[0] += 100
        return [""] * len(self.watched)

    monkeypatch.setattr(PanelCallback, "describe", slow)

    class Trainer(stage1_pretrain.MiniGPT4Trainer):
        def training_step(self, *args, **kwargs):
            now[0] += 1
            return super().training_step(*args, **kwargs)

    monkeypatch.setattr(stage1_pretrain, "MiniGPT4Trainer", Trainer)
    history = stage1_pretrain.main(stage(max_steps=2, panel_steps=1)).state.log_history
    assert [one["images_per_second"] for one in history if "loss" in one] == [2, 2]  # two images in a second


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"panel_steps": 0}, ("panel_steps", "0")),
        ({"panel_steps": -3}, ("panel_steps", "-3")),
        ({"panel_images": "."}, ("panel_images", "panel_steps")),
        ({"panel_steps": 1, "panel_images": "EMPTY"}, ("--panel_images", "no pictures")),
        ({"panel_steps": 1, "panel_images": "./nowhere"}, ("--panel_images", "nowhere")),
        ({"panel_steps": 1, "panel_images": "BROKEN"}, ("bad.png", "cannot be read")),
    ],
)
def test_mistakes_are_told_in_one_sentence(fields, named, stage, tmp_path: Path, capsys) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "bad.png").write_bytes(b"\x89PNG")
    given = str(fields.get("panel_images", ""))
    if (tmp_path / given).is_dir() and given.isupper():
        fields = {**fields, "panel_images": tmp_path / given}
    assert cli.main(["stage1", *stage(**fields)]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("minigpt4 stage1: ") and told.endswith(".") and told.count(". ") == 0
    assert all(word in told for word in named), told
