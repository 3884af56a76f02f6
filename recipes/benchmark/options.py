"""What the command line of every kind of benchmark takes."""

import argparse
from pathlib import Path

import torch

from recipes_minigpt4.benchmark.models import SIZES
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import COUNT, SEED, in_range


def add_common(parser: argparse.ArgumentParser, with_models: bool) -> None:
    """Add what every kind takes, or every kind with models."""
    if with_models:
        threads = torch.get_num_threads()
        parser.add_argument("--size", choices=list(SIZES), default="mid", help="of the models; default: %(default)s")
        parser.add_argument(
            "--threads", type=in_range(COUNT), default=threads, metavar="N", help="of torch; default: %(default)s"
        )
    parser.add_argument("--rounds", type=in_range(COUNT), default=7, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=in_range(SEED), default=0, metavar="N", help="of weights and pictures; default: %(default)s"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="file for the report: a page if it ends in .html, else JSON"
    )


def check_output(path: Path | None) -> None:
    """Raise a `RecipeError` if a report cannot be written there; better before the minutes than after."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise RecipeError(f"{path} cannot be written; name a file in a folder that exists with --output.")
