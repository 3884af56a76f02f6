"""Where descriptions go: a file of JSON lines that a later run goes on with, standard output, or the terminal."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.replies import Said
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal
from recipes_minigpt4.utils.progress import Phase


STANDARD_OUTPUT = "-"
ENDINGS = (".jsonl", ".ndjson")


class Output:
    """
    Text for people: `PATH: text` in one line for each of several pictures, the text alone for one.

    Args:
        alone: whether there is one picture.

    Attributes:
        bad: names of pictures that could not be read.
        count: of all pictures so far.
    """

    def __init__(self, alone: bool = False) -> None:
        self.alone, self.bad, self.count = alone, list[str](), 0

    def has(self, name: str, key: str) -> bool:
        """Whether a picture has its line from an earlier run."""
        return False

    def said(self, key: str) -> Said | None:
        """What was said to a question before, about the same picture under whatever name."""
        return None

    def write(self, told: Mapping[str, Any], line: Phase) -> None:
        """Write a line, or tell why there is none."""
        self.count += 1
        if "error" in told:
            self.bad.append(told["picture"])
            named = "" if told["picture"] in told["error"] else f"{told['picture']}: "
            line.write(printable(named + told["error"]), file=sys.stderr)
        self.keep(told, line)

    def keep(self, told: Mapping[str, Any], line: Phase) -> None:
        """Write a line."""
        if "error" not in told:
            text = told["text"] if self.alone else f"{told['picture']}: {' '.join(told['text'].split())}"
            line.write(printable(text), file=sys.stdout)

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""


class LinesOutput(Output):
    """JSON lines on standard output."""

    def keep(self, told: Mapping[str, Any], line: Phase) -> None:
        line.write(json.dumps(told, ensure_ascii=True), file=sys.stdout)


class FileOutput(Output):
    """
    JSON lines in a file, which the same command adds to.

    A picture that could not be read is tried again, and gets a line if something else comes of it.

    Raises:
        RecipeError: see `Journal`; also for a name that is none of such a file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if path.suffix.lower() not in ENDINGS:  # half a line at the end of another file would be cut off
            raise RecipeError(
                f"--output {path} has to end in {' or '.join(ENDINGS)}, or to be -; name it {path}.jsonl."
            )
        self._journal = Journal(path)
        self._said: dict[str, Said] = {}
        self._lines: dict[str, set[str]] = {}  # picture → the keys, or errors, of its lines
        for told in self._journal.lines:
            self._remember(told)

    def _remember(self, told: Mapping[str, Any]) -> None:
        self._lines.setdefault(str(told.get("picture")), set()).add(told.get("error") or told.get("key") or "")
        if "error" not in told and told.get("key"):
            self._said[told["key"]] = Said(told.get("text", ""), told.get("finished"))

    def has(self, name: str, key: str) -> bool:
        return key in self._lines.get(name, ())

    def said(self, key: str) -> Said | None:
        return self._said.get(key)

    def keep(self, told: Mapping[str, Any], line: Phase) -> None:
        if (told.get("error") or told["key"]) in self._lines.get(told["picture"], ()):
            return  # named twice, or as wrong as before
        self._journal.append(told)
        self._remember(told)

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def open_output(name: str | None, alone: bool) -> Output:
    """
    Where the command writes.

    Args:
        name: a file, `-` for JSON lines on standard output, None for text there.
        alone: whether there is one picture.

    Raises:
        RecipeError: if a file cannot be written.
    """
    if name is None:
        return Output(alone)
    return LinesOutput() if name == STANDARD_OUTPUT else FileOutput(Path(name).expanduser())


def printable(text: str) -> str:
    """A text whose characters standard output knows; names of files may have others."""
    return text.encode(sys.stdout.encoding or "utf-8", "backslashreplace").decode(sys.stdout.encoding or "utf-8")
