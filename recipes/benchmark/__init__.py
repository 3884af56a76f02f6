"""Speed and memory beside transformers' own BLIP-2 of equal shape, measured on this machine.

    minigpt4 benchmark train
    minigpt4 benchmark generate --output generate.json
    minigpt4 benchmark data
    minigpt4 benchmark pads
    minigpt4 benchmark optimizations

Every side has the same weights and the same rows, and is asked for the same result before it is timed. Sides take
turns in one process, so that a busy minute of the machine hits all of them; the report has medians over the rounds.
Peak memory is measured in a process of its own for each side.
"""

import argparse
import importlib
from collections.abc import Sequence
from typing import Any

from recipes_minigpt4.benchmark.options import KINDS, build_parser, check_output


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """
    Run a benchmark, print its report, and write it as JSON if asked to; a bar that is missed is a fact, no failure.

    Raises:
        RecipeError: for arguments that make no sense, and if the sides do not come to the same result.
    """
    from recipes_minigpt4.benchmark.report import format_report, write_report  # here, so that help is quick

    args = parse(arguments)
    report: dict[str, Any] = args.run(args)
    print(format_report(report), flush=True)
    if args.output is not None:
        write_report(report, args.output)
    return report


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the kind and what it takes; `run` of the result is the function that measures."""
    args = build_parser("benchmark").parse_args(arguments)
    check_output(args.output)
    if getattr(args, "threads", 0) is None:
        import torch  # here, so that help is quick

        args.threads = torch.get_num_threads()
    args.run = importlib.import_module(KINDS[args.kind][0]).run
    return args
