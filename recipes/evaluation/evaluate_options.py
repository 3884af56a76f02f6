"""What `minigpt4 evaluate` takes, from a YAML file and the command line. Importing this file is cheap."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.evaluation.paper import MODELS
from recipes_minigpt4.llm.options import add_client_options
from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.ranges import COUNT, NOT_NEGATIVE, SEED, SHARE, in_range
from recipes_minigpt4.utils.yaml_options import parse_with_config


SUITE_NAMES = ("coverage", "failures", "abilities", "chair", "aokvqa", "gqa", "pope", "captions", "votes")
ABOUT = """Ask models about pictures, keep what they say, and compute the numbers of the paper's evaluation and of
others from it. A run that was stopped goes on where it was, and asks nothing twice."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `minigpt4 evaluate`."""
    parser = CommandParser(prog="minigpt4 evaluate", description=ABOUT)
    add = parser.add_argument
    add("--config", metavar="YAML", help="a file with these options, or the name of one that ships with the recipes")
    add(
        "--models",
        nargs="+",
        default=[],
        metavar="LABEL=MODEL",
        help="folders, repositories (with @REVISION), or openai:URL#MODEL; a label is what tables call a model",
    )
    add("--suites", nargs="+", default=[], choices=SUITE_NAMES, metavar="SUITE", help=", ".join(SUITE_NAMES))
    add(
        "--data",
        nargs="+",
        default=[],
        metavar="[SUITE=]PLACE[,PLACE]",
        help="data of a suite, or of all: a file, several COCO files about the same pictures, a folder, a dataset of "
        "the Hub, or `tiny`, the embedded world",
    )
    add("--images", type=Path, metavar="DIR", help="folder of the pictures that files name; default: beside the file")
    add("--split", default="validation", help="of a dataset; default: %(default)s")
    add(
        "--synonyms",
        type=Path,
        metavar="FILE",
        help="words for the objects of the suite chair: per line a name and other words, separated by commas; "
        "default: those of COCO's 80 categories",
    )
    add("--num_samples", type=in_range(COUNT), metavar="N", help="rows of each suite, a seeded sample; default: all")
    add("--seed", type=in_range(SEED), default=0, help="of the sample; default: %(default)s")
    add(
        "--max_bad_share",
        type=in_range(SHARE, float),
        default=0.01,
        metavar="SHARE",
        help="pictures that may be unreadable before the run stops; they are "
        "left out for all models; default: %(default)s",
    )
    add(
        "--paper_labels",
        nargs="+",
        default=[],
        metavar="NAME=LABEL",
        help="which label is which model of the paper's tables, as in stage2=mine; labels of these names need none: "
        + ", ".join(MODELS),
    )
    add("--output_dir", type=Path, default=Path("evaluation-output"), metavar="DIR", help="default: %(default)s")
    add(
        "--from_replies",
        action="store_true",
        help="compute the numbers from the replies in --output_dir again, without models and data",
    )
    add(
        "--write_card",
        nargs="+",
        default=[],
        metavar="LABEL",
        help="write the numbers into the model cards (README.md) of these models' folders, so that the Hub shows them",
    )
    add("--resamples", type=in_range(COUNT), default=2000, metavar="N", help="of the bootstrap; default: %(default)s")
    models = parser.add_argument_group("models")
    models.add_argument("--batch_size", type=in_range(COUNT), default=8, help="default: %(default)s")
    models.add_argument("--device", help="cpu, cuda, …; default: a GPU if there is one")
    models.add_argument("--dtype", default="auto", help="of the weights; default: that in which they are stored")
    models.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    judges = parser.add_argument_group("judges")
    judges.add_argument(
        "--judge",
        nargs="+",
        default=[],
        metavar="JUDGE",
        help="who says yes or no: local:MODEL, openai:MODEL, human (writes a page), human:DECISIONS.jsonl, words (a "
        "rule for captions), truth (of the embedded world, or a suite's rules); the numbers are those of the first, "
        "and its agreement with the others is told",
    )
    judges.add_argument(
        "--judge_repeats",
        type=in_range(COUNT),
        default=1,
        metavar="N",
        help="how often each is asked; default: 1",
    )
    judges.add_argument("--judge_temperature", type=in_range(NOT_NEGATIVE, float), default=0.0, help="default: 0")
    add_client_options(judges, "judge_")
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the command line, and the file that it names with --config; the command line wins.

    Raises:
        RecipeError: for options that are not understood.
    """
    return parse_with_config(build_parser(), arguments, shipped_configs())
