"""What the commands of this room take. Importing this file is cheap."""

import argparse
import sys
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.ranges import COUNT, NOT_NEGATIVE, NUMBER, PORT, POSITIVE, SEED, SHARE, Range, in_range


ABOUT = {
    "describe": "Describe pictures: files, folders, patterns, addresses, or a list on standard input.",
    "chat": "Talk to a model about pictures, in the terminal.",
    "app": "Show models on a page: chat, compare them, look at what they look at.",
    "serve": "Serve a model to clients that speak OpenAI's language.",
}
# Parts of our models that may have moved → what people call them.
PARTS = {"vision": "vision encoder", "qformer": "Q-Former", "language_model": "language model"}
PROMPT = "Describe this image in detail."  # of stage 2


class EngineParser(CommandParser):
    """A parser that leaves what stands behind `--` to an engine, word by word, as `engine_arguments`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        found, unknown = super().parse_known_args(words[:end], namespace)
        found.engine_arguments = words[end + 1 :]
        return found, unknown


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of a command of this room."""
    kind = EngineParser if command == "serve" else CommandParser
    parser = kind(prog=f"minigpt4 {command}", description=ABOUT[command])
    {"describe": _describe, "chat": _chat, "app": _app, "serve": _serve}[command](parser)
    return parser


def _describe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="files, folders and what is in them, patterns, addresses, or -")
    add("--model", required=True, metavar="MODEL", help="folder or repository")
    add("--prompt", default=PROMPT, metavar="TEXT", help="default: %(default)s")
    add("--output", metavar="FILE", help="JSON lines, to which a later run adds what is missing; -: standard output")
    add("--batch_size", type=in_range(COUNT), default=8, help="pictures at once; default: %(default)s")
    add("--max_new_tokens", type=in_range(COUNT), default=300, help="the most of a reply; default: %(default)s")
    add("--num_beams", type=in_range(COUNT), default=1, help="default: %(default)s")
    add("--temperature", type=in_range(NOT_NEGATIVE, float), default=0.0, help="0: no draws; default: %(default)s")
    add_model_options(parser)


def _chat(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or repository; LABEL=MODEL tells what it is called")
    add("--image", nargs="+", action="extend", default=[], metavar="PICTURE", help="files or addresses to begin with")
    add("--compare", nargs="+", action="extend", default=[], metavar="MODEL", help="others that answer beside it")
    add("--prompt", metavar="TEXT", help="ask this and end; so does text on standard input")
    add("--load", metavar="FILE", help="go on with a chat that /save wrote")
    add("--stats", action="store_true", help="tokens and time behind each reply")
    add_model_options(parser)
    add_reply_options(parser)


def _app(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="folders or repositories; LABEL=MODEL tells what it is called")
    add("--examples", type=Path, metavar="DIR", help="folder of pictures that people may begin with")
    add("--output_dir", type=Path, default=Path("app-output"), metavar="DIR", help="for votes; default: %(default)s")
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
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or repository; NAME=MODEL tells what clients call it")
    add("--host", default="127.0.0.1", help="address to listen on; default: %(default)s, this machine alone")
    add("--port", type=in_range(PORT), default=8000, help="default: %(default)s; 0: any that is free")
    add("--api_key", metavar="KEY", help="what clients have to send; better: the variable MINIGPT4_API_KEY")
    add("--allow_origins", nargs="+", default=[], metavar="URL", help="web pages that may ask, or *; default: none")
    add("--engine", default="transformers", choices=("transformers", "vllm"), help="default: %(default)s")
    parser.epilog = "What stands behind -- is for the engine vllm, as in: -- --seed 1"
    add("--max_picture_mb", type=in_range(POSITIVE, float), default=20.0, help="of a file; default: %(default)s")
    add("--max_megapixels", type=in_range(POSITIVE, float), default=50.0, help="of a picture; default: %(default)s")
    add("--fetch_seconds", type=in_range(POSITIVE, float), default=10.0, help="for an address; default: %(default)s")
    add("--allow_private_addresses", action="store_true", help="fetch pictures from this machine and its network too")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded: the fields of `ModelOptions`."""
    add = parser.add_argument
    add("--device", metavar="NAME", help="where models compute: cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: as stored")
    add("--quantization", choices=("bnb-int8", "bnb-nf4", "torchao-int8"), help="of the language model")
    for part, words in PARTS.items():
        add(f"--{part}", metavar="PLACE", help=f"where the {words} is now, if it has moved")
    add("--trust_remote_code", action="store_true", help="run code that comes with a model")


# Field of `ReplySettings` → its range, its kind, its default, and what it is.
REPLY_FIELDS: dict[str, tuple[Range, type, float | None, str]] = {
    "temperature": (NOT_NEGATIVE, float, 1.0, "0: no draws"),
    "top_p": (SHARE, float, 0.9, "share of the likeliest tokens that are drawn from"),
    "num_beams": (COUNT, int, 1, "beams of the search"),
    "repetition_penalty": (POSITIVE, float, 1.05, "what a word of the reply loses that comes again"),
    "length_penalty": (NUMBER, float, 1.0, "what beams gain by length"),
    "max_new_tokens": (COUNT, int, 300, "the most of a reply"),
    "seed": (SEED, int, None, "of the draws"),
}


def add_reply_options(parser: argparse.ArgumentParser) -> None:
    """How replies are made: the fields of `ReplySettings`."""
    for name, (allowed, kind, default, about) in REPLY_FIELDS.items():
        told = "others every time" if default is None else "%(default)s"
        parser.add_argument(
            f"--{name}", type=in_range(allowed, kind), default=default, help=f"{about}; default: {told}"
        )
