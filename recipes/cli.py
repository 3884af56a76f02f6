"""The command `minigpt4`: the two stages and what goes with them, each imported only when it is asked for."""

import argparse
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence

from recipes_minigpt4.utils.errors import PreemptedError, RecipeError
from recipes_minigpt4.utils.redaction import redact, redact_logs


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
    "ablate": (
        "recipes_minigpt4.evaluation.ablate",
        "run the paper's variants in miniature and compare them with the paper",
    ),
    "benchmark": ("recipes_minigpt4.benchmark", "measure speed and memory beside transformers' BLIP-2"),
}
# What to do after an interruption.
GO_ON = {
    "stage1": "--resume_from_checkpoint auto goes on from the last checkpoint, if one was saved",
    "stage2": "--resume_from_checkpoint auto goes on from the last checkpoint, if one was saved",
    "ablate": "the same command goes on where it was",
}
TRAIN_MODULES = ("trl", "datasets", "peft")
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run it again
NO_TRAINING = ("convert", "push")  # commands that need none of these


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
    parser = argparse.ArgumentParser(
        prog="minigpt4",
        description="MiniGPT-4 with Hugging Face tools.",
        epilog="`minigpt4 COMMAND --help` lists the options of a command. `python -m recipes_minigpt4.accelerate` "
        "prints where the launch files for several GPUs are.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, text) in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    needed = () if command in NO_TRAINING else TRAIN_MODULES
    if missing := [module for module in needed if importlib.util.find_spec(module) is None]:
        return _refuse(
            command,
            f"{' and '.join(missing)} not found: training needs the extra [train], so run "
            '`pip install "minigpt4-transformers[train]"`.',
        )
    redact_logs()
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


def _refuse(command: str, reason: str) -> int:
    print(f"minigpt4 {command}: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
