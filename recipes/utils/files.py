"""Folders that can be written into, and files that are there whole or not at all."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.errors import RecipeError


def replace_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads meanwhile finds the old text or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that whoever reads meanwhile finds the old content or the new one."""
    replace_text(path, json.dumps(content, indent=2) + "\n")


def prepare_folder(folder: Path, parts: Sequence[str]) -> Path:
    """
    Make the output folder and its parts. What else lies in it stays; what an earlier run wrote will be written anew.

    Raises:
        RecipeError: if it cannot be made or written into.
    """
    folder = folder.expanduser().absolute()
    try:
        for place in (folder, *(folder / part for part in parts)):
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
    except OSError as error:
        raise RecipeError(
            f"--output_dir {folder} cannot be used ({error.strerror or error}: {error.filename}); name a folder that "
            "can be written into."
        ) from error
    return folder
