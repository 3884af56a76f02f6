"""What `minigpt4 curate`, `curate review` and `curate export` take. Importing this file is cheap."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recipes_minigpt4.llm.options import add_client_options
from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.ranges import COUNT, INTEGER, NATURAL, NOT_NEGATIVE, PORT, SEED, SHARE, Range, in_range


ABOUT = """Make stage 2's data from pictures alone: a stage-1 model describes them, a language model mends what it
said, rules tell what is no good, and people pick. A run that was stopped goes on where it was, and pays for nothing
twice."""
MORE = """`minigpt4 curate review DIR` writes the page on which people decide, and `minigpt4 curate export DIR` the
data that stage 2 reads; each has its own --help."""
HASH_DISTANCE = Range("a whole number from -1 to 19", lambda value: -1 <= value <= 19 and INTEGER.holds(value))
FORMATS = ("cc_sbu_align", "imagefolder", "parquet", "messages")


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of `minigpt4 curate`."""
    parser = CommandParser(prog=f"minigpt4 {command}", description=ABOUT, epilog=MORE)
    add = parser.add_argument
    add("--config", metavar="YAML", help="a file with these options, or the name of one that ships with the recipes")
    add("--model", metavar="MODEL", help="folder or repository of the model that describes, such as runs/stage1")
    add("--dataset_name", metavar="PLACE", help="pictures: a folder, a table, tar files, a dataset of the Hub, `tiny`")
    add("--images", type=Path, metavar="DIR", help="folder of the pictures that a table names; default: the table's")
    add("--dataset_split", default="train", metavar="SPLIT", help="of a dataset; default: %(default)s")
    add("--dataset_config", metavar="NAME", help="of a dataset that has several")
    add("--dataset_revision", metavar="REVISION", help="of a dataset of the Hub")
    add("--streaming", action="store_true", help="read a dataset of the Hub without fetching it whole")
    add("--num_samples", type=in_range(COUNT), metavar="N", help="pictures that are drawn; default: all")
    add("--seed", type=in_range(SEED), default=0, help="of what is drawn; default: %(default)s")
    add(
        "--max_hash_distance",
        type=in_range(HASH_DISTANCE),
        default=6,
        metavar="BITS",
        help="pictures whose perceptual hashes differ in so few of 240 bits are doubles, of which one is kept; -1 "
        "leaves out equal files alone; default: %(default)s",
    )
    add("--output_dir", type=Path, default=Path("curated"), metavar="DIR", help="default: %(default)s")
    add(
        "--dry_run",
        type=in_range(COUNT),
        metavar="N",
        help="do N pictures, and tell time, tokens and cost of all of them",
    )
    describing = parser.add_argument_group("describe")
    describing.add_argument("--batch_size", type=in_range(COUNT), default=8, help="default: %(default)s")
    describing.add_argument("--max_new_tokens", type=in_range(COUNT), default=300, help="of a turn; default: 300")
    describing.add_argument(
        "--continue_up_to",
        type=in_range(NATURAL),
        default=80,
        metavar="TOKENS",
        help="a reply of no more is continued once; default: %(default)s",
    )
    describing.add_argument("--num_beams", type=in_range(COUNT), default=1, help="default: %(default)s")
    describing.add_argument("--device", help="cpu, cuda, …; default: a GPU if there is one")
    describing.add_argument("--dtype", default="auto", help="of the weights; default: that in which they are stored")
    describing.add_argument("--trust_remote_code", action="store_true", help="run code that comes with a model")
    describing.add_argument("--describe_prompt", type=Path, metavar="FILE", help="other words than the paper's")
    describing.add_argument("--continue_prompt", type=Path, metavar="FILE", help="other words than the paper's")
    mending = parser.add_argument_group("mend")
    mending.add_argument("--mender", metavar="MENDER", help="local:MODEL, openai:MODEL, stub:FILE; `tiny`: of scenes")
    mending.add_argument("--mend_prompt", type=Path, metavar="FILE", help="other words than the paper's")
    mending.add_argument("--mend_temperature", type=in_range(NOT_NEGATIVE, float), default=0.7, help="default: 0.7")
    mending.add_argument("--mend_max_tokens", type=in_range(COUNT), default=200, help="of an answer; default: 200")
    add_client_options(mending, "mender_")
    scoring = parser.add_argument_group("score, which drops nothing by itself")
    scoring.add_argument(
        "--match",
        metavar="MODEL",
        help="CLIP, SigLIP, BLIP-2's matching head, or a model of stage 1, for each sentence",
    )
    scoring.add_argument("--score_judge", metavar="JUDGE", help="who gives 1 to 5 for relevance, correctness and form")
    scoring.add_argument("--score_with_picture", action="store_true", help="show the judge the picture, if it can see")
    scoring.add_argument("--score_prompt", type=Path, metavar="FILE", help="what the judge is told")
    add_client_options(scoring, "score_")
    return parser


class SignsParser(CommandParser):
    """A parser for which `-drifted` behind `--rules` is no option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        told, of_rules = [], False
        for text in sys.argv[1:] if args is None else args:
            of_rules = text == "--rules" or (of_rules and not text.startswith("--"))
            told.append(f" {text}" if of_rules and text.startswith("-") and text != "--rules" else text)
        return super().parse_known_args(told, namespace)


def build_export_parser() -> argparse.ArgumentParser:
    """The parser of `minigpt4 curate export`."""
    parser = SignsParser(prog="minigpt4 curate export", description="Write what stage 2 reads, and its card.")
    add = parser.add_argument
    add("folder", type=Path, help="--output_dir of `minigpt4 curate`")
    add("--to", choices=FORMATS, default="cc_sbu_align", help="default: %(default)s")
    add("--output_dir", type=Path, metavar="DIR", help="default: export/FORMAT in the folder")
    add(
        "--rules",
        nargs="+",
        default=[],
        metavar="±RULE",
        help="-NAME takes a rule away, +NAME first lets only it count",
    )
    add("--keep", type=in_range(COUNT), metavar="N", help="rows at most; default: all that are left")
    add("--keep_share", type=in_range(SHARE, float), metavar="SHARE", help="share of the rows that are left")
    add("--by", choices=("score", "random", "diverse"), default="random", help="which; default: %(default)s")
    add("--score", metavar="NAME", help="which score is meant; default: match_mean, or judge if there is none")
    add("--min_score", type=float, metavar="VALUE", help="rows of at least this score")
    add("--seed", type=in_range(SEED), default=0, help="of --by random; default: %(default)s")
    add(
        "--decisions",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="what people decided, which overrules the rules; of several files the last counts, and without a file "
        "nobody's; default: decisions.jsonl in the folder, if it is there",
    )
    add("--text", choices=("picked", "mended", "draft"), default="picked", help="which text is exported")
    add("--license", default="other", help="of the data, for the card; default: %(default)s")
    add("--language", default="en", help="of the texts, for the card; default: %(default)s")
    add("--push_to_hub", metavar="REPO", help="publish it, in one commit")
    add("--private", action="store_true", help="make a new repository private")
    return parser


def build_review_parser() -> argparse.ArgumentParser:
    """The parser of `minigpt4 curate review`."""
    parser = CommandParser(prog="minigpt4 curate review", description="Write the page on which people decide.")
    parser.add_argument("folder", type=Path, help="--output_dir of `minigpt4 curate`")
    parser.add_argument("--serve", action="store_true", help="serve it on this machine, and write decisions at once")
    parser.add_argument("--port", type=in_range(PORT), default=0, help="of --serve; default: a free one")
    parser.add_argument(
        "--decisions",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="what people decided: the page begins with one file, or writes into it with --serve (default: "
        "decisions.jsonl in the folder); of several, agreement and conflicts are told",
    )
    return parser


PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "review": build_review_parser,
    "export": build_export_parser,
}
