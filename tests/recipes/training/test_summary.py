"""What a run says of itself: its first lines, its log, its last lines, and what it refuses to overwrite."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes_minigpt4 import cli
from recipes_minigpt4.tiny import BACKBONES
from recipes_minigpt4.utils.text import duration


def run(command: str, arguments: list[str], capsys: pytest.CaptureFixture) -> dict[str, str]:
    """First word of every line → the rest of it."""
    assert cli.main([command, *arguments]) == 0
    return {line[:8].strip(): line[8:] for line in capsys.readouterr().out.splitlines()}


def test_a_run_begins_with_five_lines_and_ends_with_what_comes_next(
    stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "run"
    lines = run("stage1", stage(panel_steps=1, save_strategy="steps", save_steps=2), capsys)
    _, *names = lines  # the first says which columns are read
    assert names[:5] == ["model", "trains", "data", "steps", "output"]
    assert "language model" in lines["model"] and "llama" in lines["model"]
    trained, frozen = lines["trains"].split(" parameters; frozen: ")
    assert trained == "language_projection 408"  # 16 × 24 + 24
    assert {part.split()[0] for part in frozen.split(", ")} == {
        "vision_model", "qformer", "query_tokens", "language_model", "lm_head",
    }  # fmt: skip
    assert lines["data"].endswith(" samples") and "pairs" in lines["data"]
    assert lines["steps"] == "2 of 2 pictures (1 × 2 rows × 1 accumulated)"
    assert lines["output"] == f"{folder}, a checkpoint every 2 steps"
    assert lines["done"].startswith("2 steps in ")
    size = (folder / "model.safetensors").stat().st_size
    assert lines["adapter"] == f"{folder}, {size:,} bytes"
    assert lines["load"].startswith(f'AutoModelForImageTextToText.from_pretrained("{folder}")')
    assert lines["next"].startswith(f"minigpt4 stage2 --model_name_or_path {folder} ")
    assert Path(lines["panel"]).is_file() and Path(lines["log"]).is_file()


def test_after_stage2_comes_publishing(stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run("stage1", stage("one"), capsys)
    lines = run("stage2", stage("two", model_name_or_path=tmp_path / "one"), capsys)
    assert lines["next"] == f"minigpt4 push {tmp_path / 'two'} you/your-adapter"
    assert "panel" not in lines


def test_backbones_of_this_machine_are_told_once(
    stage: Callable, capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    lines = run("stage1", stage(save_strategy="steps", save_steps=1), capsys)
    assert "llama" in lines["note"] and "push these backbones" in lines["note"]
    assert "folders of this machine" not in caplog.text
    shipped = {name: str(BACKBONES / place) for name, place in
               (("vision", "blip2"), ("qformer", "blip2"), ("language_model", "llama"))}  # fmt: skip
    lines = run("stage1", stage(**shipped, dataset_name="tiny", num_samples=4), capsys)
    assert "note" not in lines and lines["model"] == "vision, qformer, language model tiny"
    assert "folders of this machine" not in caplog.text


def test_logged_numbers_are_few_and_aligned(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["stage1", *stage(max_steps=10)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    number = r"loss \d+\.\d{4}  learning rate \d\.\d\de-\d\d  accuracy \d\.\d{3}  images/s \d+\.\d"
    assert len(lines) == 10
    assert all(re.fullmatch(rf"step [ \d]\d/10  {number}", line) for line in lines)


def test_the_result_of_an_earlier_run_is_not_overwritten(
    stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = stage(overwrite_output_dir=None, save_strategy="steps", save_steps=1)
    run("stage1", arguments, capsys)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert cli.main(["stage1", *arguments]) == 2
    said = capsys.readouterr().err
    assert "holds the result of an earlier run" in said and "--overwrite_output_dir true" in said
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before
    run("stage1", [*arguments, "--resume_from_checkpoint", "auto"], capsys)  # which goes on
    run("stage1", [*arguments, "--overwrite_output_dir", "true"], capsys)


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (72, "1 min 12 s"), (3600, "1 h 0 min"), (7500, "2 h 5 min")]
)
def test_times_are_those_that_people_read(seconds: float, text: str) -> None:
    assert duration(seconds) == text
