"""Files of JSON lines that only grow: half a line, a full disk, two processes, damage."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal, read_journal


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    with Journal(path) as journal:
        journal.append({"text": "größer\nals"})
    with Journal(path) as journal:
        journal.append({"text": "2"})
        assert journal.lines == [{"text": "größer\nals"}, {"text": "2"}]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("half", [b'{"a": 2', b"\xc3", b"x" * 200_000])
def test_half_a_line_is_cut_off(tmp_path: Path, half: bytes) -> None:
    (path := tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n' + half)
    with Journal(path) as journal:
        journal.append({"a": 3})
    assert list(read_journal(path)) == [{"a": 1}, {"a": 3}]


def test_a_file_of_half_a_line_is_empty(tmp_path: Path) -> None:
    (path := tmp_path / "rows.jsonl").write_bytes(b'{"a"')
    with Journal(path) as journal:
        assert journal.lines == []


def test_another_process_has_to_wait(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from recipes_minigpt4.utils.journal import Journal; Journal(pathlib.Path(sys.argv[1]))"
    )
    with Journal(path := tmp_path / "rows.jsonl"):
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "RecipeError: Another process writes into" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """A file that takes five bytes more and then no other, as the last block of a disk does."""

    class Full(io.FileIO):
        room = 5

        def write(self, content: bytes) -> int:  # type: ignore[override]
            if not self.room:
                raise OSError(28, "No space left on device")
            written = super().write(content[: self.room])
            self.room -= written
            return written

    with Journal(path := tmp_path / "rows.jsonl") as journal:
        journal.append({"a": 1})
        journal._file.close()
        journal._file = Full(path, "ab")
        with pytest.raises(RecipeError, match=r"No space left on device\); make room and run the command again"):
            journal.append({"a": 2})
    assert path.read_text() == '{"a": 1}\n'


@pytest.mark.parametrize("line, reason", [("{a}", "is damaged"), ("[1]", "is no JSON object")])
def test_damage_is_told_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    (path := tmp_path / "rows.jsonl").write_text(json.dumps({}) + f"\n{line}\n{{}}\n")
    with pytest.raises(RecipeError, match=rf"Line 2 of .*rows.jsonl {reason}"):
        Journal(path)
    path.write_text("{}\n")
    Journal(path).close()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot be written \(.*\); name another folder"):
        Journal(tmp_path / "file" / "rows.jsonl")
