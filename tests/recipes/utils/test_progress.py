"""Progress lines: one that is redrawn in a terminal, a few whole ones in a file."""

import io
import os
import subprocess
import sys

import pytest

from recipes_minigpt4.utils import progress
from recipes_minigpt4.utils.text import duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that bars see, in a list of one."""
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (72, "1 min 12 s"),
        (3599.7, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_times_as_people_read_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_file_gets_whole_lines_and_few_of_them(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.phase("Describe", 100, stream) as line:
        for done in range(1, 101):
            clock[0] += 0.25
            line.reach(done)
    assert stream.getvalue().splitlines() == [
        "Describe    0%",
        "Describe   40%, about 15 s left",
        "Describe   80%, about 5 s left",
        "Describe  25 s",
    ]
    assert "\r" not in stream.getvalue() and stream.getvalue().endswith("\n")


def test_a_terminal_has_one_line_that_ends_with_the_time_spent(clock: list[float]) -> None:
    stream = Terminal()
    with progress.phase("Describe", 4, stream) as line:
        clock[0] += 30
        line.reach(1)
        clock[0] += 60
    drawn = [text.rstrip() for text in stream.getvalue().split("\r") if text.strip()]
    assert drawn[:2] == ["Describe    0%", "Describe   25%, about 1 min 30 s left"]
    assert drawn[-1] == "Describe  1 min 30 s"
    assert stream.getvalue().count("\n") == 1


def test_a_preparation_tells_nothing_about_the_time_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.phase("Train", 1, stream) as line:
        clock[0] += 1000
        line.begin(10)
        clock[0] += 20
        line.reach(5)
    assert stream.getvalue().splitlines()[1:] == ["Train   50%, about 20 s left", "Train  17 min 0 s"]


def test_speed_and_a_note_are_told(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.phase("Mend", 100, stream, "answers") as line:
        clock[0] += 20
        line.note = ", cost so far 0.12"
        line.reach(40)
        clock[0] += 100
        line.reach(80)
    assert stream.getvalue().splitlines() == [
        "Mend    0%",
        "Mend   40%, 2.0 answers/s, about 30 s left, cost so far 0.12",
        "Mend   80%, 40.0 answers/min, about 30 s left, cost so far 0.12",
        "Mend  2 min 0 s, 40.0 answers/min, cost so far 0.12",
    ]


def test_where_nobody_knows_how_many_there_are_those_that_are_done_are_told(clock: list[float]) -> None:
    stream = io.StringIO()
    with progress.phase("Look", None, stream) as line:
        clock[0] += 20
        line.reach(1234)
    assert stream.getvalue().splitlines() == ["Look  0", "Look  1,234", "Look  20 s"]


def test_a_terminal_of_unknown_width_shows_the_line_too() -> None:
    master, slave = os.openpty()  # its width is 0
    code = "from recipes_minigpt4.utils.progress import phase\nwith phase('Describe', 2) as line: line.reach(2)"
    unset = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    subprocess.run([sys.executable, "-c", code], stdout=slave, env=unset, check=True)
    os.close(slave)
    drawn = os.read(master, 10_000).decode()
    os.close(master)
    assert drawn.startswith("\rDescribe    0%") and drawn.endswith("\rDescribe  0 s\r\n")
