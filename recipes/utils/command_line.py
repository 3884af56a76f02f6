"""How a command reads its arguments."""

import argparse
from typing import NoReturn

from recipes_minigpt4.utils.errors import RecipeError


class CommandParser(argparse.ArgumentParser):
    """Reads a command line; tells mistakes in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[:1].upper()}{message[1:]}.")


class DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default of an option to its help, unless the text tells it already."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if "Default:" in (action.help or "") else super()._get_help_string(action)
