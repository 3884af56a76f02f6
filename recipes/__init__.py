"""The two training stages of MiniGPT-4 with TRL, and a world small enough to run both on a laptop.

Importing this package is cheap; the stages need the extra `[train]`: `pip install "minigpt4-transformers[train]"`.
"""

import argparse
from typing import NoReturn

from recipes_minigpt4.redaction import redact


TINY = "tiny"  # the name of everything that belongs to the embedded world


class RecipeError(ValueError):
    """A mistake in the command, the configuration or the data, told in one sentence with its remedy and no secret."""

    def __init__(self, message: object) -> None:
        super().__init__(redact(str(message)))


class PreemptedError(Exception):
    """A run was told to end by SIGTERM, has saved a checkpoint, and can go on."""


class CommandParser(argparse.ArgumentParser):
    """Reads a command line; tells mistakes in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[:1].upper()}{message[1:]}.")


def one_line(error: BaseException) -> str:
    """What an error says, on one line, without secrets and without a full stop."""
    return " ".join(redact(str(error)).split()).rstrip(".") or type(error).__name__


__all__ = ["TINY", "CommandParser", "PreemptedError", "RecipeError", "one_line"]
