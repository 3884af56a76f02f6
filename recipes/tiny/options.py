"""What the demo takes. Importing this file is cheap."""

import argparse
from pathlib import Path

from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.ranges import SEED, in_range


ABOUT = "Run MiniGPT-4 in miniature: both stages on the CPU, what each taught, and an adapter to load."


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of `minigpt4 demo`."""
    parser = CommandParser(prog=f"minigpt4 {command}", description=ABOUT)
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"), help="default: %(default)s")
    parser.add_argument(
        "--language_model",
        default=TINY,
        help="`tiny`, or a language model that was not made for this, repository or folder: it takes an hour or two "
        "where it is small, such as HuggingFaceTB/SmolLM2-135M-Instruct; default: %(default)s",
    )
    parser.add_argument("--seed", type=in_range(SEED), default=0, help="seed of both stages; default: %(default)s")
    return parser
