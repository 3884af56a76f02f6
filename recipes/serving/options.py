"""What the commands of this room take. Importing this file is cheap."""

import argparse
from pathlib import Path

from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.ranges import COUNT, NOT_NEGATIVE, PORT, POSITIVE, SEED, SHARE, in_range


ABOUT = {
    "describe": "Describe pictures: files, folders, patterns, addresses, or a list on standard input.",
    "chat": "Talk to a model about pictures, in the terminal.",
    "app": "Show models on a page: chat, compare them, look at what they look at.",
    "serve": "Serve a model to clients that speak OpenAI's language.",
}


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command of this room."""
    parser = CommandParser(prog=f"minigpt4 {command}", description=ABOUT[command])
    {"describe": _describe, "chat": _chat, "app": _app, "serve": _serve}[command](parser)
    return parser


def _describe(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add_reply_options(parser)


def _app(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders or repositories; LABEL=MODEL tells what it is called")
    add("--examples", type=Path, metavar="DIR", help="folder of pictures that people may begin with")
    add("--output_dir", type=Path, default=Path("app"), metavar="DIR", help="for votes; default: %(default)s")
    add("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine alone")
    add("--port", type=in_range(PORT), help="default: 7860, or the next that is free; 0: any")
    add("--share", action="store_true", help="make it public, through a tunnel of Gradio's")
    space = parser.add_argument_group("a Space of the Hub, instead of a page of this machine")
    space.add_argument("--space", metavar="OWNER/NAME", help="push the page there, in one commit")
    space.add_argument("--space_dir", type=Path, metavar="DIR", help="write its files here, to look at or to keep")
    space.add_argument("--private", action="store_true", help="make the Space private")
    add_model_options(parser)
    add_reply_options(parser)


def _serve(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded: the fields of `ModelOptions`."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="where models compute: cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: as stored")
    add("--quantization", metavar="NAME", help="of the language model: bnb-int8, bnb-nf4, torchao-int8")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")


def add_reply_options(parser: argparse.ArgumentParser) -> None:
    """How replies are made: the fields of `ReplySettings`, which has the defaults."""
    add = parser.add_argument
    add("--temperature", type=in_range(NOT_NEGATIVE, float), default=1.0, help="0: no draws; default: %(default)s")
    add("--top_p", type=in_range(SHARE, float), default=0.9, help="default: %(default)s")
    add("--num_beams", type=in_range(COUNT), default=1, help="default: %(default)s")
    add("--repetition_penalty", type=in_range(POSITIVE, float), default=1.05, help="default: %(default)s")
    add("--length_penalty", type=float, default=1.0, help="of beams; default: %(default)s")
    add("--max_new_tokens", type=in_range(COUNT), default=300, help="the most of a reply; default: %(default)s")
    add("--seed", type=in_range(SEED), help="of the draws; default: others every time")
