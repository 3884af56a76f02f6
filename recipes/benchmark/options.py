"""What the command line of every kind of benchmark takes. Importing this file is cheap."""

import argparse
from pathlib import Path

from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import COUNT, SEED, in_range


ABOUT = "Speed and memory beside transformers' own BLIP-2 of equal shape, measured on this machine."
# Kind → the module that measures it, and a line of help. The module's `run(args)` returns the report.
KINDS = {
    "train": ("recipes_minigpt4.benchmark.training", "a training step: from pixels, and from cached features"),
    "generate": ("recipes_minigpt4.benchmark.generation", "the generation of replies"),
    "data": ("recipes_minigpt4.benchmark.data", "reading tar files into batches, beside Pillow alone"),
    "pads": ("recipes_minigpt4.benchmark.pads", "training in batches of rows of like length, beside any order"),
    "optimizations": ("recipes_minigpt4.benchmark.optimizations", "each larger optimisation, with it and without it"),
}
WITHOUT_MODELS = ("data",)  # so no size, and one thread
BATCH_SIZE, ANSWER_TOKENS = 8, 24  # of a training step
IMAGES, NEW_TOKENS = 8, 32  # of replies
ROWS = 128  # of captions as the web has them
PICTURES, DATA_BATCH_SIZE = 1024, 32  # of tar files
# Whole numbers that only some kinds take: kind → option → default and what it is of.
NUMBERS = {
    "train": {"batch_size": (BATCH_SIZE, ""), "answer_tokens": (ANSWER_TOKENS, "per row; ")},
    "generate": {"images": (IMAGES, ""), "new_tokens": (NEW_TOKENS, "per picture; ")},
    "pads": {"batch_size": (BATCH_SIZE, ""), "rows": (ROWS, "")},
    "data": {"pictures": (PICTURES, ""), "batch_size": (DATA_BATCH_SIZE, "")},
}
# What there is to choose from. The modules that measure have it by these names.
SIZES = ("mid", "tiny")
CHOICES = {
    "only": ("last_layer", "frozen_head", "no_pads", "byte_pictures", "growing_cache"),
    "measures": ("step", "cached step", "memory", "cached memory", "replies", "long replies", "tar to batch"),
}


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of `minigpt4 benchmark`, with one for every kind."""
    parser = CommandParser(prog=f"minigpt4 {command}", description=ABOUT)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for kind, (_, text) in KINDS.items():
        shown = kinds.add_parser(kind, help=text, description=f"Measures {text}.")
        _add_common(shown, with_models=kind not in WITHOUT_MODELS)
        for name, (default, of) in NUMBERS.get(kind, {}).items():
            told = f"{of}default: %(default)s"
            shown.add_argument(f"--{name}", type=in_range(COUNT), default=default, metavar="N", help=told)
        for name, known in CHOICES.items() if kind == "optimizations" else ():
            told = f"some of: {', '.join(known)}"
            shown.add_argument(f"--{name}", nargs="+", choices=known, default=list(known), metavar="NAME", help=told)
    return parser


def _add_common(parser: argparse.ArgumentParser, with_models: bool) -> None:
    """Add what every kind takes, or every kind with models."""
    if with_models:
        parser.add_argument("--size", choices=SIZES, default="mid", help="of the models; default: %(default)s")
        parser.add_argument("--threads", type=in_range(COUNT), metavar="N", help="of torch; default: its own number")
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
