"""Options of a command from a YAML file, whose fields are the options' names; the command line wins."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes_minigpt4.utils.command_line import one_spelling
from recipes_minigpt4.utils.errors import RecipeError, one_line


def parse_with_config(
    parser: argparse.ArgumentParser, arguments: Sequence[str], shipped: Mapping[str, Path]
) -> argparse.Namespace:
    """
    Read a command line, and the file that it names with `--config`.

    Args:
        parser: has an option `--config`.
        arguments: the command line.
        shipped: name → path of the files that ship with the recipes.

    Raises:
        RecipeError: for a file that cannot be read, and for fields that are no options.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    config = first.parse_known_args(one_spelling(arguments))[0].config
    return parser.parse_args([*(_options_of(config, parser, shipped) if config else ()), *arguments])


def _options_of(config: str, parser: argparse.ArgumentParser, shipped: Mapping[str, Path]) -> list[str]:
    """The fields of a YAML file as a command line has them."""
    path = Path(config).expanduser()
    path = path if path.is_file() else shipped.get(config.removesuffix(".yaml"), path)
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"--config {config} cannot be read ({one_line(error)}); name a YAML file.") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"--config {config} holds no fields; write names of options and their values into it.")
    known = {action.dest: action for action in parser._actions}
    options: list[str] = []
    for name, value in fields.items():
        if name not in known or name in ("config", "help"):
            raise RecipeError(f"--config {config} has the field {name!r}, which is no option of `{parser.prog}`.")
        if known[name].nargs == 0:
            options += [f"--{name}"] if value else []
        elif value is not None:
            options += [f"--{name}", *_texts(value)]
    return options


def _texts(value: Any) -> list[str]:
    """A field as arguments: a list is several, and a mapping has a label before each."""
    if isinstance(value, dict):
        return [f"{label}={','.join(_texts(place))}" for label, place in value.items()]
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]
