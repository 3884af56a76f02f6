"""What the commands of this room take. Importing this file is cheap."""

import argparse
from pathlib import Path

from recipes_minigpt4.evaluation import evaluate_options
from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.ranges import SEED, Range, in_range


SCENES = Range("a whole number from 3 on", lambda value: value >= 3)  # one in three has a held-out pair
ABOUT = "Run the paper's variants in miniature, and compare them. Each is a few lines of YAML over the tiny stages."


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of `minigpt4 evaluate` or `minigpt4 ablate`."""
    if command == "evaluate":
        return evaluate_options.build_parser()
    parser = CommandParser(prog=f"minigpt4 {command}", description=ABOUT)
    parser.add_argument("--output_dir", type=Path, default=Path("ablation-output"), help="default: %(default)s")
    parser.add_argument(
        "--variants", type=_names, default=[], metavar="A,B", help="names, YAML files or folders; default: all shipped"
    )
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], metavar="0,1,2", help="default: 0,1,2")
    parser.add_argument(
        "--scenes",
        type=in_range(SCENES),
        default=240,
        help="number of scenes to evaluate on, a third of them with held-out pairs; default: %(default)s",
    )
    parser.add_argument(
        "--cache_features", type=Path, metavar="DIR", help="stores the features of frozen vision sides; default: none"
    )
    return parser


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("it names no variant")
    return names


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    seeds = [in_range(SEED)(part) for part in parts]
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return seeds
