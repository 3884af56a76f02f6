"""How a command reads its arguments."""

import argparse
from typing import NoReturn

from recipes_minigpt4.utils.errors import RecipeError


class CommandParser(argparse.ArgumentParser):
    """Reads a command line; tells mistakes in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message[:1].upper()}{message[1:]}.")
