"""The command `minigpt4`: help, and mistakes told in one sentence with exit status 2."""

import dataclasses
import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

from modeling_minigpt4 import convert_minigpt4_to_hf
from recipes_minigpt4 import cli
from recipes_minigpt4.benchmark import models, optimizations
from recipes_minigpt4.benchmark import options as benchmark_options
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.hub import options as hub_options
from recipes_minigpt4.planning import plan
from recipes_minigpt4.planning.options import PlanArguments
from recipes_minigpt4.stage2_finetune import Stage2Arguments
from recipes_minigpt4.training.argument_checks import is_offered
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments
from recipes_minigpt4.training.options import EXAMPLES, stage_options
from recipes_minigpt4.utils import versions
from recipes_minigpt4.utils.errors import RecipeError


def test_help_names_every_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for command in ("stage1", "stage2", "inspect", "demo", "convert", "push", "ablate", "describe", "chat"):
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
        ("describe", "with --output, the same command goes on"),
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


# ---- help -----------------------------------------------------------------------------------------------------------

HEAVY = ("accelerate", "datasets", "modeling_minigpt4", "peft", "torch", "transformers", "trl")
KINDS = [["benchmark", kind] for kind in benchmark_options.KINDS]
STAGES = {
    "stage1": (ModelArguments, DataArguments, StageArguments),
    "stage2": (ModelArguments, DataArguments, Stage2Arguments),
    "plan": (ModelArguments, DataArguments, StageArguments, PlanArguments),
}


def help_of(command: list[str], capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        *([command, "--help"] for command in cli.COMMANDS),
        *([*kind, "--help"] for kind in KINDS),
        ["stage1", "--config", "tiny_stage1", "-h"],
    ],
    ids=" ".join,
)
def test_help_and_version_import_no_library_that_takes_seconds(arguments: list[str]) -> None:
    code = (
        "import atexit, sys; from recipes_minigpt4 import cli\n"
        f"atexit.register(lambda: print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr))\n"
        "cli.main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout
    assert done.stderr == "[]\n"


def test_version_tells_what_a_report_needs(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = help_of(["--version"], capsys)
    told = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert list(told) == ["minigpt4-transformers", "transformers", "trl", "torch", "CUDA"]
    assert told["torch"] == torch.__version__ and told["transformers"] == transformers.__version__
    assert told["CUDA"] == (torch.version.cuda or "none: torch is built for CPUs")
    monkeypatch.setattr(versions, "PACKAGES", ("no-such-package",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert versions.installed_versions() == {"no-such-package": "not installed", "CUDA": "unknown"}


@pytest.mark.parametrize("command", STAGES)
def test_help_of_a_stage_fits_on_a_screen_and_tells_what_is_so(command: str, capsys: pytest.CaptureFixture) -> None:
    printed = help_of([command, "--help"], capsys)
    lines = printed.splitlines()
    assert len(lines) <= 80 and max(map(len, lines)) <= 119
    assert not [line for line in lines if line.endswith(" …") or " … (" in line]  # nothing is cut off
    titles = [line.removesuffix(":") for line in lines if re.match(r"[A-Z]\w+:$", line)]
    expected = ["Model", "Data", "Schedule", "Watching", "Checkpoints", "Publishing"]
    assert titles == (["Plan", *expected] if command == "plan" else expected)
    defaults = {field.name: field.default for kind in STAGES[command] for field in dataclasses.fields(kind)}
    for title, options in stage_options(command).items():
        for name, option in options.items():
            assert name in defaults, f"{title} has {name}, which no settings have"
            if defaults[name] is not dataclasses.MISSING:
                assert option.default == defaults[name], name
            assert len([line for line in lines if line.split()[:1] == [f"--{name}"]]) == 1
    assert not [name for name in re.findall(r"^  --(\w+)", printed, re.MULTILINE) if not is_offered(name)]


@pytest.mark.parametrize("command", STAGES)
def test_the_example_of_a_stage_is_understood(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # settings of a stage change it
    program, name, *arguments = EXAMPLES[command].split()
    assert (program, name) == ("minigpt4", command)
    importlib.import_module(cli.COMMANDS[name][0]).parse(arguments)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("spelling", ["--help-all", "--help_all"])
def test_all_options_are_listed_on_demand_but_for_those_that_cannot_work(spelling, capsys) -> None:
    printed = help_of(["stage1", spelling], capsys)
    listed = set(re.findall(r"^  --([\w-]+)", printed, re.MULTILINE))
    assert {"max_txt_len", "adam_beta1", "cache_features_dtype", "lr_scheduler_type", "output_dir"} <= listed
    assert {"eval_strategy", "eval_delay", "eval_text_column", "per_device_eval_batch_size"} <= listed
    assert not {"packing", "use_liger_kernel", "do_eval", "eval_accumulation_steps"} & listed
    assert not [name for name in listed if "-" in name]  # one spelling
    assert not re.findall(r"Default: [^.(]*\. \(default: [^)]*\)", " ".join(printed.split()))


@pytest.mark.parametrize(
    "command, arguments, field, value",
    [
        ("demo", ["--output-dir", "a-b"], "output_dir", Path("a-b")),
        ("demo", ["--output_dir=a-b"], "output_dir", Path("a-b")),
        ("push", ["folder", "you/it", "--commit-message=Use --this-option"], "commit_message", "Use --this-option"),
        ("benchmark", ["data", "--batch-size", "3"], "batch_size", 3),
        ("benchmark", ["data", "--batch_size", "3"], "batch_size", 3),
    ],
)
def test_options_are_read_in_either_spelling(command: str, arguments: list[str], field: str, value: object) -> None:
    assert getattr(cli.options_of(command).parse_args(arguments), field) == value


@pytest.mark.parametrize("command", cli.OPTIONS)
def test_help_shows_one_spelling(command: str) -> None:
    assert not re.findall(r"--\w+-\w+", cli.options_of(command).format_help())


def test_a_stage_and_a_plan_read_either_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    given = [
        "--config=tiny_stage1",
        "--output-dir",
        str(tmp_path),
        "--max-txt-len=7",
        "--max_steps",
        "30",
        "--use-cpu",
    ]
    for command in ("stage1", "plan"):
        parsed = importlib.import_module(cli.COMMANDS[command][0]).parse(given)
        assert (parsed[1].max_txt_len, parsed[2].max_steps, parsed[2].output_dir) == (7, 30, str(tmp_path))
    assert plan.parse([*given, "--instruction-template", "vicuna_v0"])[-1] == 2
    AcceleratorState._reset_state(reset_partial_state=True)


# ---- completion -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--completion", shell]) == 0
    printed = capsys.readouterr().out
    for word in (*cli.COMMANDS, "dataset_name", "push_to_hub", "batch_size", "optimizations", "completion"):
        assert word in printed


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    "typed, completed",
    [
        (["sta"], ["stage1", "stage2"]),
        (["stage1", "--max_t"], ["--max_txt_len"]),
        (["plan", "--ho"], ["--hours"]),
        (["benchmark", "op"], ["optimizations"]),
        (["benchmark", "train", "--ans"], ["--answer_tokens"]),
        (["stage1", "--config", "own"], ["own.yaml"]),
        (["describe", "own.yaml", "--out"], ["--output"]),
        (["describe", "ow"], ["own.yaml"]),
        (["chat", "--num_b"], ["--num_beams"]),
        (["chat", "own.yaml", "--image", "ow"], ["own.yaml"]),
    ],
    ids=str,
)
def test_bash_completes(typed: list[str], completed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "own.yaml").touch()
    cli.main(["--completion", "bash"])
    script = (
        f"{capsys.readouterr().out}\nCOMP_WORDS=(minigpt4 {' '.join(typed)}); COMP_CWORD={len(typed)}\n"
        'name=$(complete -p minigpt4 | sed "s/.*-F \\([^ ]*\\).*/\\1/"); $name\nprintf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert sorted(done.stdout.split()) == completed, done.stderr


def test_completion_without_its_package_and_for_another_shell(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--completion", "powershell"])
    assert stop.value.code == 2 and "bash" in capsys.readouterr().err
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "shtab" else find_spec(name))
    assert cli.main(["--completion", "bash"]) == 2
    assert capsys.readouterr().err == "minigpt4 --completion: shtab not found; run `pip install shtab`.\n"


# ---- the table of options -------------------------------------------------------------------------------------------


def test_what_the_options_of_other_commands_offer_is_there() -> None:
    assert tuple(convert_minigpt4_to_hf.PRESETS) == hub_options.PRESETS
    assert tuple(models.SIZES) == benchmark_options.SIZES
    assert {
        "only": tuple(optimizations.OPTIMIZATIONS), "measures": tuple(optimizations.MEASURES)
    } == benchmark_options.CHOICES  # fmt: skip
    for command, module in cli.OPTIONS.items():
        assert command in cli.COMMANDS and importlib.util.find_spec(module)


def test_importing_the_command_imports_no_training_library() -> None:
    code = (
        "import sys, recipes_minigpt4.cli; "
        "print(sorted({'torch', 'transformers', 'trl', 'datasets', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
