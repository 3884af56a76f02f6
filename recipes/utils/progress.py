"""Progress of a command that works in phases: one line per phase, with the time left."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm  # type: ignore[import-untyped]

from recipes_minigpt4.utils.text import duration


SECONDS_BETWEEN_LINES = 10.0  # in a file; a terminal is redrawn ten times a second
GOING_ON = "{desc}  {share}{left}{note}"
DONE = "{desc}  {spent}{note}"
NO_UNIT = "it"  # what tqdm calls parts that have no name


class WholeLines:
    """A stream that gets a line wherever a bar would go back to the beginning of the last one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self.last:
            self.stream.write(line + "\n")
        self.last = line or self.last

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class Phase(tqdm):
    """
    A bar of tqdm that tells the time left, and at the end the time that was spent, in words.

    Attributes:
        before: seconds of preparation, which tell nothing about the time left.
        note: what else is told, such as the cost so far.
    """

    before, note = 0.0, ""
    ended: float | None = None  # seconds after which it did: what is drawn from then on is the same

    def begin(self, total: int | None) -> None:
        """Start counting after a preparation of unknown length."""
        self.total, self.before = total, super().format_dict["elapsed"]

    @property
    def format_dict(self) -> dict[str, Any]:
        told: dict[str, Any] = super().format_dict
        elapsed = told["elapsed"] if self.ended is None else self.ended
        seconds, left = elapsed - self.before, ""
        share = f"{self.n:,}" if self.total is None else f"{100 * self.n / max(1, self.total):3.0f}%"
        speed = "" if self.unit == NO_UNIT or not self.n or not seconds else f", {_speed(self.n / seconds, self.unit)}"
        if self.total and 0 < self.n < self.total:
            left = f", about {duration(seconds * (self.total - self.n) / self.n)} left"
        spent = f"{duration(elapsed)}{speed}"
        return {**told, "share": share, "left": speed + left, "note": self.note, "spent": spent}

    def reach(self, place: int) -> None:
        """Show that so many parts are done."""
        self.update(place - self.n)


def _speed(per_second: float, unit: str) -> str:
    return f"{per_second:.1f} {unit}/s" if per_second >= 1 else f"{60 * per_second:.1f} {unit}/min"


@contextmanager
def phase(title: str, total: int | None, stream: TextIO | None = None, unit: str = NO_UNIT) -> Iterator[Phase]:
    """
    One phase of a command: a line that is redrawn in a terminal, and whole lines, few of them, in a file.

    Args:
        title: what is being done.
        total: number of its parts, of which `reach` shows how many are done; None if nobody knows.
        stream: where to; default: standard output.
        unit: what parts are called where their number per second is worth telling.
    """
    stream = sys.stdout if stream is None else stream
    # Some terminals of containers do not know their size and call it 0 × 0, where tqdm shows nothing.
    size = {"ncols": shutil.get_terminal_size().columns, "nrows": 20}
    options: dict[str, Any] = {"file": stream, **size, "mininterval": 0.1}
    if not stream.isatty():
        options |= {"file": WholeLines(stream), "ncols": 200, "mininterval": SECONDS_BETWEEN_LINES}
    with Phase(total=total, desc=title, bar_format=GOING_ON, miniters=1, unit=unit, **options) as line:
        yield line
        line.bar_format, line.ended = DONE, line.format_dict["elapsed"]
        line.refresh()
