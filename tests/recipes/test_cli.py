"""The command `minigpt4`: help, and mistakes told in one sentence with exit status 2."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

from recipes_minigpt4 import cli
from recipes_minigpt4.utils.errors import RecipeError


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for command in ("stage1", "stage2", "inspect", "demo", "convert", "push", "ablate"):
        assert command in printed


@pytest.mark.parametrize("arguments", [[], ["stage3"]])
def test_missing_and_unknown_commands_list_what_there_is(arguments, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("missing", [("trl",), ("datasets",), ("peft",), ("trl", "datasets")])
def test_missing_extra_is_named(missing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None):
        return None if name in missing else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    assert cli.main(["stage1", "--config", "tiny_stage1"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("minigpt4 stage1: ") and told.count("\n") == 1
    assert 'pip install "minigpt4-transformers[train]"' in told
    assert all(name in told for name in missing)


def test_mistakes_become_one_line_and_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from recipes_minigpt4 import stage2_finetune

    def refuse(arguments):
        raise RecipeError(f"No good: {arguments}.")

    monkeypatch.setattr(stage2_finetune, "main", refuse)
    assert cli.main(["stage2", "--seed", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.err == "minigpt4 stage2: No good: ['--seed', '1'].\n"
    assert printed.out == ""


@pytest.mark.parametrize(
    "command, told",
    [
        ("ablate", "the same command goes on"),
        ("stage1", "--resume_from_checkpoint auto"),
        ("demo", "run the command again"),
    ],
)
def test_an_interruption_is_told_in_one_line(command, told, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module(cli.COMMANDS[command][0]), "main", interrupt)
    assert cli.main([command]) == 130
    printed = capsys.readouterr().err
    assert printed.startswith(f"minigpt4 {command}: Interrupted; {told}") and printed.count("\n") == 1


@pytest.mark.parametrize("command, field", [("stage1", "--min_learning_rate"), ("stage2", "--instruction_template")])
def test_help_of_a_stage_lists_its_fields(command: str, field: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert field in capsys.readouterr().out


def test_help_tells_every_default_once(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main(["stage1", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "as in the original. Default: never. --" in printed and "on matrices only. (default: 0.05)" in printed
    assert not re.findall(r"Default: [^.(]*\. \(default: [^)]*\)", printed)


def test_importing_the_command_imports_no_training_library() -> None:
    code = (
        "import sys, recipes_minigpt4.cli; "
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
