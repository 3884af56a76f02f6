"""How a command reads its arguments, and how its help looks."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from recipes_minigpt4.utils.errors import RecipeError


WIDTH = 82  # of the text behind an option, where every option has one line
COLUMN = 34  # where it begins


def one_spelling(arguments: Sequence[str]) -> list[str]:
    """Arguments with the names of options as help shows them: `--output-dir` is `--output_dir`."""
    spelled = []
    for text in arguments:
        name, equals, value = text.partition("=")
        spelled.append(f"--{name[2:].replace('-', '_')}{equals}{value}" if name.startswith("--") else text)
    return spelled


class SpellingParser(argparse.ArgumentParser):
    """Reads a command line, in which options have either spelling."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        return super().add_argument(*one_spelling(names), **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(one_spelling(sys.argv[1:] if args is None else args), namespace)


class CommandParser(SpellingParser):
    """A `SpellingParser` that tells mistakes in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[:1].upper()}{message[1:]}.")


class DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of an option to its help, unless the text tells it already; shows one spelling of its name."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "Default:" in (action.help or "") else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [name for name in action.option_strings if "-" not in name[2:]]
        return ", ".join(shown) or super()._format_action_invocation(action)


class OneLineHelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One line per option, and no empty ones between groups."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=COLUMN, width=COLUMN + WIDTH + 2)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return ", ".join(action.option_strings) or super()._format_action_invocation(action)

    def format_help(self) -> str:
        return super().format_help().replace("\n\n", "\n")
