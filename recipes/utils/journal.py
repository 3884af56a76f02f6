"""Append-only files of JSON lines, which a killed process leaves whole and two processes do not mix."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import writing


class Journal:
    """
    A file of JSON lines that only grows.

    Opening it cuts off half a line at its end, which a kill leaves behind. One process at a time may write into it.

    Args:
        path: the file; it and its folder are made if they are missing.

    Attributes:
        lines: all that it holds.

    Raises:
        RecipeError: if another process writes into it, it cannot be written, or a whole line of it is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0, thread_local=False)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise RecipeError(
                f"Another process writes into {path}; wait until it has ended, or name another folder."
            ) from None
        except OSError as error:
            raise RecipeError(f"{path} cannot be written ({error.strerror}); name another folder.") from error
        try:
            path.touch()
            _cut_half_line(path)
            self.lines = list(read_journal(path))
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._lock.release()
            raise RecipeError(f"{path} cannot be written ({error.strerror}); name another folder.") from error
        except BaseException:
            self._lock.release()
            raise

    def append(self, line: Mapping[str, Any]) -> None:
        """
        Write a line whole or not at all, and hand it to the operating system at once.

        Raises:
            RecipeError: if there is no room for it; what was written before stays.
        """
        # Halves of characters, of servers that cut, are written as JSON writes them.
        content = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        end, written = self.path.stat().st_size, 0
        with writing(self.path):
            try:
                while written < len(content):  # a disk that is nearly full takes a part, and then tells
                    written += self._file.write(content[written:])
            except OSError:
                os.truncate(self.path, end)
                raise
        self.lines.append(dict(line))

    def close(self) -> None:
        """Let others write."""
        self._file.close()
        self._lock.release()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> Iterator[dict[str, Any]]:
    """
    The whole lines of a journal, without changing it.

    Raises:
        RecipeError: for a file that cannot be read, and for a line that is no JSON object.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(f"{path} cannot be read ({error.strerror}).") from error
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecipeError(
                f"Line {number} of {path} is damaged ({one_line(error)}); remove it, and what it held is made again."
            ) from error
        if not isinstance(row, dict):
            raise RecipeError(f"Line {number} of {path} is no JSON object; remove it.")
        yield row


def _cut_half_line(path: Path) -> None:
    """Remove what stands behind the last line break."""
    with path.open("rb+") as file:
        size = end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 65536)
            file.seek(start)
            place = file.read(end - start).rfind(b"\n")
            if place >= 0:
                end = start + place + 1
                break
            end = start
        if end < size:
            file.truncate(end)
