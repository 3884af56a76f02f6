"""Parts that bring their own code, on the command line: trained, cached, resumed, planned, looked at and published."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from foreign_parts import bring_own_code, write_code, write_encoder
from hub_server import HubServer
from safetensors.torch import load_file

from recipes_minigpt4 import cli, stage1_pretrain


TRUST = {"trust_remote_code": "true"}


@pytest.fixture
def foreign(parts: dict[str, str], tmp_path: Path) -> dict[str, str | None]:
    """Fields of a stage: an encoder and a language model of types that transformers does not know, no Q-Former."""
    speaker = Path(shutil.copytree(parts["language_model"], tmp_path / "speaker"))
    return {
        "vision": write_encoder(tmp_path / "lantern"), "language_model": bring_own_code(speaker), "qformer": None
    }  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable:
    """Run a command; returns what it printed, or the last line of its errors."""

    def call(command: str, arguments: list[str], status: int = 0) -> str:
        assert cli.main([command, *arguments]) == status
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if status else printed.out

    return call


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- the loop -------------------------------------------------------------------------------------------------------


def test_stages_train_parts_with_code(stage: Callable, foreign, run: Callable, tmp_path: Path, hub: HubServer) -> None:
    told = run("stage1", stage("first", **foreign, **TRUST))
    assert "trust_remote_code=True)  # after" in told and "--output_dir DIR --trust_remote_code true" in told
    first = tmp_path / "first"
    assert load_file(first / "model.safetensors").keys() == {
        "model.language_projection.weight", "model.language_projection.bias"
    }  # fmt: skip
    told = run("stage2", stage("second", model_name_or_path=first, dataset_name="tiny", num_samples=4, **TRUST))
    assert "minigpt4 push" in told and told.count("--trust_remote_code true") == 1
    assert 'num_image_tokens": 4' in (tmp_path / "second" / "processor_config.json").read_text()

    refused = run("push", [str(tmp_path / "second"), "you/adapter"], status=2)
    assert "brings its own code" in refused and "--trust_remote_code true" in refused
    told = run("push", [str(tmp_path / "second"), "you/adapter", "--trust_remote_code", "true"])
    assert '"you/adapter", trust_remote_code=True' in told
    card = hub.files("you/adapter")["README.md"].decode()
    assert "- vision encoder: code of a local folder or file (lantern)" in card
    assert "- language model: code of a local folder or file (speaker)" in card

    # Whoever has the folder loads it in a process that has seen none of this code.
    code = f"""
    import modeling_minigpt4
    from transformers import AutoModelForImageTextToText, AutoProcessor
    folder = {str(tmp_path / "second")!r}
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    print(float(model.model.language_projection.weight.sum()), processor.num_image_tokens)
    """
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code.replace("\n    ", "\n")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    weight = load_file(tmp_path / "second" / "model.safetensors")["model.language_projection.weight"]
    assert done.stdout.split() == [str(float(weight.sum())), "4"], done.stderr


def test_features_and_resuming_are_as_ever(stage: Callable, foreign, tmp_path: Path, own_cache) -> None:
    fields = {**foreign, **TRUST, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    pixels = stage1_pretrain.main(stage("pixels", **fields))
    cached = stage1_pretrain.main(stage("cached", cache_features=tmp_path / "features", **fields))
    assert losses_of(cached) == pytest.approx(losses_of(pixels), rel=1e-5)
    resumed = stage1_pretrain.main(
        stage(
            "cached", cache_features=tmp_path / "features", resume_from_checkpoint="auto", **fields | {"max_steps": 6}
        )
    )
    assert losses_of(resumed)[:4] == losses_of(cached) and len(losses_of(resumed)) == 6


def test_features_of_other_code_are_not_used(stage: Callable, foreign, tmp_path: Path, own_cache) -> None:
    # Not normalized, after which features have no size.
    where = {"cache_features": tmp_path / "features", "projector_norm": False, **foreign, **TRUST}
    first = losses_of(stage1_pretrain.main(stage(**where)))
    assert losses_of(stage1_pretrain.main(stage(**where))) == first
    assert len(list((tmp_path / "features").iterdir())) == 1
    write_code(tmp_path / "lantern", factor=2.0)  # the weights are the same
    assert losses_of(stage1_pretrain.main(stage(**where))) != first
    assert len(list((tmp_path / "features").iterdir())) == 2


# ---- before a run ---------------------------------------------------------------------------------------------------


def test_plan_and_inspection_read_parts_with_code(stage: Callable, foreign, run: Callable, tmp_path: Path) -> None:
    assert "a red square" in run("inspect", stage(**foreign, **TRUST)).lower()
    told = run("plan", stage(language_model=foreign["language_model"], **TRUST))
    assert "language model" in told
    run("stage1", stage("first", language_model=foreign["language_model"], **TRUST))
    assert run("plan", stage(model_name_or_path=tmp_path / "first", **TRUST, stage=1)) == told


@pytest.mark.parametrize("command", ["stage1", "plan", "inspect"])
@pytest.mark.parametrize("part", ["vision", "language_model"])
def test_commands_name_the_option(command, part, stage: Callable, foreign, run: Callable, monkeypatch) -> None:
    def ask(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)
    told = run(command, stage(**{part: foreign[part], "qformer": None}), status=2)
    assert f"{part} backbone {foreign[part]} brings its own code" in told
    assert told.endswith("`trust_remote_code=True` (on the command line `--trust_remote_code true`).")
    assert "configuration" not in told


def test_the_yaml_file_may_trust_too(stage: Callable, foreign, run: Callable, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**foreign, "trust_remote_code": True, "use_cpu": True}))
    run("inspect", ["--config", str(file), "--dataset_name", str(stage()[stage().index("--dataset_name") + 1])])


def test_other_commands_do_not_run_code_by_default(foreign, tmp_path: Path, run: Callable, stage: Callable) -> None:
    run("stage1", stage("first", **foreign, **TRUST))
    for command in ("stage2", "plan"):
        told = run(command, stage("second", model_name_or_path=tmp_path / "first"), status=2)
        assert "brings its own code" in told and "--trust_remote_code true" in told
    run("inspect", stage(model_name_or_path=tmp_path / "first"))  # which runs none of it
