"""Folders that can be written into, and files that are there whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.errors import RecipeError


def replace_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads meanwhile finds the old text or the new one."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file so that whoever reads meanwhile finds the old content or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """
    Tell that a file of a run that can go on cannot be written.

    Raises:
        RecipeError: instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be written ({error.strerror or error}); make room and run the command again, which goes "
            "on where it was."
        ) from error


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
