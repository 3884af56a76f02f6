"""The options of whoever mends or judges. Importing this file is cheap."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range, in_range


@dataclass(frozen=True)
class ClientOptions:
    """How a client works; the metadata of a field are its range and its help."""

    base_url: str | None = field(
        default=None,
        metadata={"help": "address of an OpenAI-compatible server, such as http://localhost:8000/v1"},
    )
    api_key_env: str | None = field(
        default=None,
        metadata={
            "help": "environment variable that holds the key; default: OPENAI_API_KEY for OpenAI itself, none for a "
            "server of your own"
        },
    )
    concurrency: int = field(default=8, metadata={"range": COUNT, "help": "requests under way at a time"})
    requests_per_minute: int | None = field(
        default=None, metadata={"range": COUNT, "help": "most requests in any minute; default: no limit"}
    )
    tokens_per_minute: int | None = field(
        default=None, metadata={"range": COUNT, "help": "most tokens in any minute; default: no limit"}
    )
    attempts: int = field(default=6, metadata={"range": COUNT, "help": "how often a request is tried"})
    timeout: float = field(default=120.0, metadata={"range": POSITIVE, "help": "seconds to wait for an answer"})
    max_cost: float | None = field(
        default=None,
        metadata={"range": POSITIVE, "help": "budget, in the currency of the prices; default: no limit"},
    )
    price_per_million_prompt_tokens: float | None = field(
        default=None, metadata={"range": NOT_NEGATIVE, "help": "what a million tokens of prompts costs"}
    )
    price_per_million_completion_tokens: float | None = field(
        default=None, metadata={"range": NOT_NEGATIVE, "help": "what a million tokens of answers costs"}
    )
    tokens_per_picture: int = field(
        default=2000,
        metadata={"range": COUNT, "help": "most tokens a picture counts as, for the budget and the limits"},
    )
    cache: Path | None = field(
        default=None, metadata={"help": "folder that keeps every raw answer; what is in it is not asked again"}
    )
    device: str | None = field(
        default=None, metadata={"help": "of a local model, such as cuda:1; default: the first GPU, or the CPU"}
    )
    dtype: str = field(default="auto", metadata={"help": "of a local model, such as bfloat16"})
    batch_size: int = field(default=8, metadata={"range": COUNT, "help": "requests a local model takes at a time"})
    prefix: str = ""  # of the options' names, for what is told to people

    def flag(self, name: str) -> str:
        """The option of a field, as people write it."""
        return f"--{self.prefix}{name}"


OPTIONS = [one for one in dataclasses.fields(ClientOptions) if one.name != "prefix"]


def add_client_options(parser: argparse._ActionsContainer, prefix: str = "") -> None:
    """Give a parser an option per field of `ClientOptions`; `prefix` is "judge_" for `--judge_base_url` and so on."""
    for option in OPTIONS:
        allowed: Range | None = option.metadata.get("range")
        kind: Any = str if allowed is None else in_range(allowed, float if "float" in str(option.type) else int)
        parser.add_argument(
            f"--{prefix}{option.name}",
            type=Path if option.name == "cache" else kind,
            default=option.default,
            metavar="DIR" if option.name == "cache" else None,
            help=_help(option),
        )


def client_options(arguments: argparse.Namespace, prefix: str = "", **changes: Any) -> ClientOptions:
    """What a parser with `add_client_options(parser, prefix)` has read; `changes` are fields of `ClientOptions`."""
    read = {option.name: getattr(arguments, prefix + option.name) for option in OPTIONS}
    return ClientOptions(**{**read, **changes}, prefix=prefix)


def _help(option: dataclasses.Field) -> str:
    text: str = option.metadata["help"]
    return text if option.default is None or "default:" in text else f"{text}; default: {option.default}"
