"""The command `minigpt4`: the two stages and what goes with them, each imported only when it is asked for."""

import argparse
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.errors import PreemptedError, RecipeError
from recipes_minigpt4.utils.quiet import silence_libraries
from recipes_minigpt4.utils.redaction import redact, redact_logs
from recipes_minigpt4.utils.versions import installed_versions


# Command → the module whose `main(arguments)` runs it, and a line of help.
COMMANDS = {
    "stage1": ("recipes_minigpt4.stage1_pretrain", "train the projection on many image–caption pairs"),
    "stage2": ("recipes_minigpt4.stage2_finetune", "tune it on a few thousand long descriptions in the chat template"),
    "plan": (
        "recipes_minigpt4.planning.plan",
        "print parameters, memory per GPU, steps and data of a run before it starts",
    ),
    "inspect": (
        "recipes_minigpt4.planning.inspect_data",
        "show what becomes of data: rows, tokens, what carries loss, what is skipped",
    ),
    "demo": ("recipes_minigpt4.tiny.demo", "run both stages in miniature on the CPU and write a report"),
    "convert": ("recipes_minigpt4.hub.convert", "turn the original's files into a folder that from_pretrained loads"),
    "push": ("recipes_minigpt4.hub.push", "publish a saved model on the Hub, in one commit"),
    "evaluate": (
        "recipes_minigpt4.evaluation.evaluate",
        "ask models about pictures and compute the numbers of the paper's evaluation",
    ),
    "curate": (
        "recipes_minigpt4.curation.curate",
        "make stage 2's data from pictures: describe, mend, filter, review, export",
    ),
    "describe": ("recipes_minigpt4.serving.describe", "describe pictures, in batches, into a file or the terminal"),
    "chat": ("recipes_minigpt4.serving.chat", "talk to a model about pictures, in the terminal"),
    "app": ("recipes_minigpt4.serving.app", "show models on a page: chat, compare, look at what they look at"),
    "serve": ("recipes_minigpt4.serving.serve", "serve a model to clients that speak OpenAI's language"),
    "ablate": (
        "recipes_minigpt4.evaluation.ablate",
        "run the paper's variants in miniature and compare them with the paper",
    ),
    "benchmark": ("recipes_minigpt4.benchmark", "measure speed and memory beside transformers' BLIP-2"),
}
# Command → the module that knows its options without importing what it works with: its `build_parser(command)` makes
# the parser, for help and completion.
OPTIONS = {
    "stage1": "recipes_minigpt4.training.options",
    "stage2": "recipes_minigpt4.training.options",
    "plan": "recipes_minigpt4.planning.options",
    "inspect": "recipes_minigpt4.planning.options",
    "demo": "recipes_minigpt4.tiny.options",
    "convert": "recipes_minigpt4.hub.options",
    "push": "recipes_minigpt4.hub.options",
    "evaluate": "recipes_minigpt4.evaluation.options",
    "curate": "recipes_minigpt4.curation.options",
    **dict.fromkeys(("describe", "chat", "app", "serve"), "recipes_minigpt4.serving.options"),
    "ablate": "recipes_minigpt4.evaluation.options",
    "benchmark": "recipes_minigpt4.benchmark.options",
}
# What to do after an interruption.
GO_ON = {
    "stage1": "--resume_from_checkpoint auto goes on from the last checkpoint, if one was saved",
    "stage2": "--resume_from_checkpoint auto goes on from the last checkpoint, if one was saved",
    "evaluate": "the same command goes on where it was",
    "curate": "the same command goes on where it was",
    "describe": "with --output, the same command goes on where it was",
    "ablate": "the same command goes on where it was",
}
TRAIN_MODULES = ("trl", "datasets", "peft")
EXTRAS = {"app": ("app", ("gradio",))}  # command → the extra that it needs, and the modules of that
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run it again
PATHS = {  # options that take files or folders, among other things
    "accelerate_config", "cache_features", "compare", "config", "data", "dataset_name", "image", "image_folder",
    "load", "model", "model_name_or_path", "models", "output", "output_dir", "panel_images", "pictures",
    "resume_from_checkpoint",
}  # fmt: skip
SHELLS = ("bash", "zsh", "fish")
NO_TRAINING = ("convert", "push", "describe", "chat", "app", "serve")  # commands that need none of these


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run a command.

    Args:
        arguments: the command and what it takes; those of the process if left out.

    Returns:
        Exit status: 0, 2 after a mistake of the user, 75 after SIGTERM with a checkpoint to go on from, 130 after
        Ctrl-C, all told on standard error in a sentence; 1 after anything else, with Python's traceback. Nothing that
        is told or logged has a secret in it.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] and arguments[0].partition("=")[0] == "--completion":
        return _complete(arguments)
    command = build_parser().parse_args(arguments[:1]).command
    if command in OPTIONS and {"-h", "--help"} & set(arguments[1:]):
        options_of(command, arguments[1]).parse_args(arguments[1:])  # shows it and ends
    extra, needed = EXTRAS.get(command, ("", ()) if command in NO_TRAINING else ("train", TRAIN_MODULES))
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        what = "training" if extra == "train" else "this command"
        return _refuse(
            command,
            f"{' and '.join(missing)} not found: {what} needs the extra [{extra}], so run "
            f'`pip install "minigpt4-transformers[{extra}]"`.',
        )
    redact_logs()
    silence_libraries(arguments)
    try:
        importlib.import_module(COMMANDS[command][0]).main(arguments[1:])
    except RecipeError as error:
        return _refuse(command, str(error))
    except PreemptedError as stopped:
        _refuse(command, str(stopped))
        return PREEMPTED
    except KeyboardInterrupt:
        _refuse(command, f"Interrupted; {GO_ON.get(command, 'run the command again')}.")
        return 130  # as shells have it
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        return 1  # as Python has it
    return 0


def build_parser(whole: bool = False) -> argparse.ArgumentParser:
    """
    The parser of the command itself.

    Args:
        whole: with the options of every command, for completion; otherwise a command reads what is its own.
    """
    parser = argparse.ArgumentParser(
        prog="minigpt4",
        description="MiniGPT-4 with Hugging Face tools.",
        epilog="`minigpt4 COMMAND --help` lists the options of a command. `python -m recipes_minigpt4.accelerate` "
        "prints where the launch files for several GPUs are.",
    )
    parser.add_argument(
        "--completion", choices=SHELLS, help="print what lets this shell complete commands and options"
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show this package's version, and others'")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        parents = [options_of(name)] if whole and name in OPTIONS else []
        commands.add_parser(name, help=text, add_help=False, parents=parents)
    return parser


def options_of(command: str, part: str = "") -> argparse.ArgumentParser:
    """The parser of a command of `OPTIONS`, or of its `part`, made without importing what the command works with."""
    module = importlib.import_module(OPTIONS[command])
    parts = getattr(module, "PARSERS", {})
    parser: argparse.ArgumentParser = parts[part]() if part in parts else module.build_parser(command)
    return parser


def _complete(arguments: Sequence[str]) -> int:
    """Print the script of a shell that completes commands, options and the paths that they take."""
    parser = argparse.ArgumentParser(prog="minigpt4", usage="minigpt4 --completion {bash,zsh,fish}", add_help=False)
    parser.add_argument("--completion", choices=SHELLS)
    shell = parser.parse_args(arguments).completion
    if importlib.util.find_spec("shtab") is None:
        return _refuse("--completion", "shtab not found; run `pip install shtab`.")
    shtab = importlib.import_module("shtab")
    print(shtab.complete(complete_paths(build_parser(whole=True), shtab.FILE), shell=shell))
    return 0


def complete_paths(parser: argparse.ArgumentParser, how: Any) -> argparse.ArgumentParser:
    """Tell shtab which options of a parser, and of the commands in it, take files and folders."""
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                complete_paths(command, how)
        elif action.type is Path or action.dest in PATHS:
            action.complete = how  # type: ignore[attr-defined]
    return parser


class _Version(argparse.Action):
    """Prints the versions that matter in a report, and ends."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print("\n".join(f"{name:24} {version}" for name, version in installed_versions().items()))
        parser.exit()


def _refuse(command: str, reason: str) -> int:
    print(f"minigpt4 {command}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
