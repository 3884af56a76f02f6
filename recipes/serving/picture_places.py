"""Pictures by the names that people type: files, folders, patterns, addresses, and lists of them."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from processing_minigpt4.image_opening_minigpt4 import without_content
from recipes_minigpt4.data.columns import IMAGE_ENDINGS
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.picture_fetching import FetchLimits, fetch_picture


STANDARD_INPUT = "-"
# Whoever types an address may have anything fetched that this machine can reach.
LIMITS = FetchLimits(megabytes=100, seconds=60, allow_private=True)


@dataclass(frozen=True)
class Place:
    """
    Where a picture is.

    Args:
        name: path or address.
        error: why there is none.
    """

    name: str
    error: str | None = None

    def picture(self) -> Picture:
        """
        The picture, which is opened later; what an address answers is fetched now.

        Raises:
            ValueError: if there is none.
        """
        if self.error is not None:
            raise ValueError(self.error)
        if is_address(self.name):
            return Picture(self.name, fetch_picture(self.name, LIMITS))
        if not os.path.isfile(self.name):
            raise ValueError("there is no such file" if not os.path.exists(self.name) else "it is no file")
        return Picture(self.name, Path(self.name))


def is_address(name: str) -> bool:
    """Whether a name is that of a picture on the network."""
    return name[:8].lower().startswith(("http://", "https://"))


def find_pictures(named: Sequence[str], lines: Iterable[str] = ()) -> Iterator[Place]:
    """
    The pictures that names stand for, one after the other, in an order that is the same every time.

    Args:
        named: files; folders, with all pictures in them and in their folders, but for what is hidden; patterns such
            as `*.png` and `**/*.png`; addresses; `-` for the lines of standard input, each of which is one of these.
            What exists is no pattern.
        lines: those of standard input.

    Returns:
        Places. What is not there is one too, with an `error`.
    """
    for name in named:
        if name == STANDARD_INPUT:
            yield from find_pictures([text for line in lines if (text := line.strip()) != STANDARD_INPUT and text])
        else:
            yield from _find(name)


def _find(name: str) -> Iterator[Place]:
    if is_address(name):
        yield Place(name)
        return
    path = os.path.expanduser(name)
    if os.path.exists(path):
        yield from _below(path)
    elif glob.has_magic(path):
        found = sorted(glob.glob(path, recursive=True))
        for match in found:
            yield from _below(match)
        if not found:
            yield Place(name, "nothing is called like that")
    else:
        yield Place(without_content(path), "there is no such file")


def _below(path: str) -> Iterator[Place]:
    """A file, or the pictures in a folder."""
    if not os.path.isdir(path):
        yield Place(path)
        return
    empty = True
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(tuple(f".{ending}" for ending in IMAGE_ENDINGS)):
                empty = False
                yield Place(os.path.join(folder, name))
    if empty:
        yield Place(path, f"there are no pictures in this folder ({', '.join(IMAGE_ENDINGS)})")
