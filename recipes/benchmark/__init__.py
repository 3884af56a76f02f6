"""Speed and memory beside transformers' own BLIP-2 of equal shape, measured on this machine.

    minigpt4 benchmark train
    minigpt4 benchmark generate --output generate.json
    minigpt4 benchmark data
    minigpt4 benchmark optimizations

Every side has the same weights and the same rows, and is asked for the same result before it is timed. Sides take
turns in one process, so that a busy minute of the machine hits all of them; the report has medians over the rounds.
Peak memory is measured in a process of its own for each side.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from recipes_minigpt4.benchmark.options import add_common, check_output
from recipes_minigpt4.benchmark.report import format_report, write_report
from recipes_minigpt4.utils.command_line import CommandParser


# Kind → the module that measures it, and a line of help. A module has `add_arguments(parser)`, which adds what only it
# takes, `run(args)`, which returns the report, and `WITH_MODELS = False` if it has no models.
KINDS = {
    "train": ("recipes_minigpt4.benchmark.training", "a training step: from pixels, and from cached features"),
    "generate": ("recipes_minigpt4.benchmark.generation", "the generation of replies"),
    "data": ("recipes_minigpt4.benchmark.data", "reading tar files into batches, beside Pillow alone"),
    "optimizations": ("recipes_minigpt4.benchmark.optimizations", "each larger optimisation, with it and without it"),
}


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """
    Run a benchmark, print its report, and write it as JSON if asked to; a bar that is missed is a fact, no failure.

    Raises:
        RecipeError: for arguments that make no sense, and if the sides do not come to the same result.
    """
    args = parse(arguments)
    report: dict[str, Any] = args.run(args)
    print(format_report(report), flush=True)
    if args.output is not None:
        write_report(report, args.output)
    return report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the kind and what it takes; `run` of the result is the function that measures."""
    parser = CommandParser(prog="minigpt4 benchmark", description=(__doc__ or "").partition("\n")[0])
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, (_, text) in KINDS.items():
        kinds.add_parser(name, help=text, add_help=False)
    kind = parser.parse_args(arguments[:1]).kind
    name, text = KINDS[kind]
    module = importlib.import_module(name)
    parser = CommandParser(prog=f"minigpt4 benchmark {kind}", description=f"Measures {text}.")
    add_common(parser, with_models=getattr(module, "WITH_MODELS", True))
    module.add_arguments(parser)
    args = parser.parse_args(arguments[1:])
    check_output(args.output)
    args.run = module.run
    return args
