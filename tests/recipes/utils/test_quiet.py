"""What a command shows: its own words and bars, and no line of a library that looks broken."""

import importlib.util
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.utils import quiet


STAGE = (
    "--config",
    "tiny_stage1",
    "--max_steps",
    "1",
    "--warmup_steps",
    "1",
    "--num_samples",
    "4",
    "--use_cpu",
    "true",
)
HAS_TORCHAO = importlib.util.find_spec("torchao") is not None
BAR = re.compile(r"^[\w ]*:? *\d+%\|.*\]$")  # of tqdm
OURS = "This checkpoint holds no backbone weights"  # what a stage says at its end


def lines_of(program: tuple[str, ...], *arguments: str, warnings: str = "default") -> list[str]:
    """What a program writes to standard error as a user sees it, without bars."""
    environment = {**os.environ, "PYTHONWARNINGS": warnings, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("TOKENIZERS_PARALLELISM", "TRANSFORMERS_VERBOSITY"):
        environment.pop(name, None)
    done = subprocess.run([sys.executable, *program, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.strip() for line in re.split(r"[\r\n]", done.stderr)]
    return [line for line in lines if line and not BAR.match(line) and not line.startswith(OURS)]


@pytest.mark.parametrize("module", [("cli", "stage1"), ("stage1_pretrain",)], ids=["command", "module"])
def test_a_stage_shows_no_line_of_a_library(module: tuple[str, ...], tmp_path: Path) -> None:
    """With a data loader that forks, checkpoints, and a panel; as a module, with warnings that are errors."""
    name, *command = module
    more = ("--dataloader_num_workers", "1", "--save_steps", "1", "--panel_steps", "1", "--output_dir", str(tmp_path))
    program = ("-m", f"recipes_minigpt4.{name}", *command)
    assert lines_of(program, *STAGE, *more, warnings="default" if command else "error") == []


def test_nor_does_a_plan() -> None:
    command = ("-m", "recipes_minigpt4.cli", "plan")
    assert lines_of(command, "--config", "tiny_stage1", warnings="error") == []


@pytest.mark.skipif(not HAS_TORCHAO, reason="needs torchao")
def test_torchao_is_imported_when_it_is_asked_for(tmp_path: Path) -> None:
    program = (
        "-c",
        "import sys; from recipes_minigpt4 import cli; status = cli.main(sys.argv[1:]); "
        "sys.exit(status or 3 * (sys.modules.get('torchao') is None))",
        "stage1",
    )
    asked = (*STAGE, "--output_dir", str(tmp_path), "--quantization", "torchao-int8")
    assert lines_of(program, *asked) == []


@pytest.mark.parametrize(
    "arguments, asks",
    [
        (["--config", "tiny_stage1"], False),
        (["--quantization", "torchao-int8"], True),
        (["--optim=adamw_8bit"], True),
        (["--config", "own.yaml"], True),
        (["--config=own.yaml"], True),
        (["--config", "plain.yaml"], False),
    ],
)
def test_packages_are_hidden_where_nothing_asks_for_them(
    arguments, asks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text("max_steps: 1\nquantization: bnb-nf4\n", encoding="utf-8")
    (tmp_path / "plain.yaml").write_text("max_steps: 1  # no quantization\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    modules: dict = {}
    monkeypatch.setattr(sys, "modules", modules)
    quiet.silence_libraries(arguments)
    assert modules == ({} if asks else {"torchao": None, "bitsandbytes": None})


def test_no_shipped_configuration_asks_for_them() -> None:
    assert not any(quiet.ASKING.search(path.read_text(encoding="utf-8")) for path in shipped_configs().values())


def test_other_lines_of_the_same_loggers_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    quiet.silence_libraries([])
    logger = logging.getLogger("torchao")
    with caplog.at_level(logging.WARNING, logger="torchao"):
        logger.warning("Failed to load %s: no such file", "_C.so")
        logger.warning("This release is too old.")
    assert [record.getMessage() for record in caplog.records] == ["This release is too old."]
