"""Answers that are kept: lines of a file that only grows, whatever happens to the process or the disk."""

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from recipes_minigpt4.llm import cache as cache_module
from recipes_minigpt4.llm.client import ClientOptions, Request
from recipes_minigpt4.llm.sending import SendingClient
from recipes_minigpt4.llm.stub import stub_client
from recipes_minigpt4.utils.errors import RecipeError


@pytest.fixture
def said() -> list[str]:
    """What the client was really asked."""
    return []


@pytest.fixture
def connect(tmp_path: Path, said: list[str]) -> Callable[[], SendingClient]:
    """A client as after a new start: it says what it is told, in capitals."""

    def answer(request: Request) -> str:
        said.append(request.messages[0]["content"])
        return said[-1].upper()

    return lambda **options: stub_client(answer, ClientOptions(cache=tmp_path / "answers", **options))


def requests(texts: str) -> list[Request]:
    return [Request(({"role": "user", "content": text},)) for text in texts]


def texts(client: SendingClient, asked: str) -> list[Any]:
    return [answer.text for _, answer in sorted(client.ask(requests(asked)))]


def file_of(folder: Path) -> Path:
    (file,) = (folder / "answers").glob("*.jsonl")
    return file


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_half_a_line_is_cut_off_and_asked_again(connect: Callable, said: list, tmp_path: Path, cut: int) -> None:
    texts(connect(), "abc")
    file = file_of(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    assert texts(connect(), "abcd") == ["A", "B", "C", "D"] and said == [*"abc", *"cd"]
    rows = [json.loads(line) for line in file.read_bytes().splitlines()]
    assert [row["text"] for row in rows] == ["A", "B", "C", "D"]


def test_what_is_under_way_when_nobody_listens_any_more_is_kept(tmp_path: Path) -> None:
    said, second_is_asked, go_on = [], threading.Event(), threading.Event()

    def answer(request: Request) -> str:
        said.append(request.messages[0]["content"])
        if len(said) == 2:
            second_is_asked.set()
            go_on.wait(10)
        return said[-1].upper()

    client = stub_client(answer, ClientOptions(cache=tmp_path))
    asking = client.ask(requests("abcd"))
    next(asking)
    assert second_is_asked.wait(10)
    asking.close()
    threading.Timer(0.2, go_on.set).start()
    assert texts(client, "abcd") == ["A", "B", "C", "D"] and said == [*"abcd"]


def test_a_killed_process_loses_nothing_that_it_was_answered(
    connect: Callable, said: list, other_process: subprocess.Popen
) -> None:
    """It is killed with an answer in hand and, perhaps, the next one there too."""
    assert other_process.stdout and other_process.stdout.readline() == "asking\n"
    other_process.kill()
    other_process.wait()
    assert texts(connect(), "a") == ["from the other"] and said == []


def test_a_damaged_line_is_told_and_nothing_asked(connect: Callable, said: list, tmp_path: Path) -> None:
    texts(connect(), "a")
    file = file_of(tmp_path)
    file.write_text('{"key": 1}\n' + file.read_text())
    with pytest.raises(RecipeError, match=r"\.jsonl has a line that is no answer: '\{\"key\": 1\}'; delete that line"):
        texts(connect(), "b")
    assert said == ["a"]


def test_a_full_disk_is_told_and_leaves_whole_lines(
    connect: Callable, said: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts(connect(), "ab")
    before = file_of(tmp_path).read_bytes()
    client = connect()

    def write_half(self: Any, file: Any, line: bytes) -> None:
        class FullDisk:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, content: bytes) -> int:
                if len(content) < len(line):
                    raise OSError(28, "No space left on device")
                return file.write(content[:20])

        append(self, FullDisk(), line)

    append = cache_module.AnswerCache._append
    with monkeypatch.context() as patch:
        patch.setattr(cache_module.AnswerCache, "_append", write_half)
        with pytest.raises(
            RecipeError, match=r"^--cache \S+ cannot be used \(No space left on device\); make room, or"
        ):
            texts(client, "abc")
    assert file_of(tmp_path).read_bytes() == before
    assert texts(client, "abc") == ["A", "B", "C"] and said == [*"ab", "c", "c"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    client = stub_client(lambda request: "", ClientOptions(cache=tmp_path / "file", prefix="judge_"))
    with pytest.raises(RecipeError, match=r"^--judge_cache \S+file cannot be used \(File exists\)"):
        texts(client, "a")


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """Another process that is in the midst of asking the same."""
    script = """
    import sys
    from pathlib import Path
    from recipes_minigpt4.llm.client import ClientOptions, Request
    from recipes_minigpt4.llm.stub import stub_client
    client = stub_client(lambda request: "from the other", ClientOptions(cache=Path(sys.argv[1])))
    for _ in client.ask([Request(({"role": "user", "content": text},)) for text in "ab"]):
        print("asking", flush=True)
        sys.stdin.readline()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "answers")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_two_processes_do_not_pay_for_the_same(
    connect: Callable, said: list, tmp_path: Path, other_process: subprocess.Popen
) -> None:
    assert other_process.stdout and other_process.stdout.readline() == "asking\n"
    client = connect()
    with pytest.raises(
        RecipeError, match=r"^Another process asks stub and keeps the answers in \S+answers; wait until"
    ):
        texts(client, "a")
    other_process.communicate("\n\n")
    assert texts(client, "ab") == ["from the other"] * 2 and said == []


def test_clients_of_one_process_share_what_they_are_told(connect: Callable, said: list) -> None:
    first, second = connect(), connect()
    asking = first.ask(requests("ab"))
    next(asking)
    assert texts(second, "xa")[0] == "X"
    list(asking)
    assert texts(first, "x") == ["X"] and texts(second, "b") == ["B"]
    assert sorted(said) == [*"abx"]


def test_without_a_folder_answers_are_kept_as_long_as_the_process_runs(said: list) -> None:
    client = stub_client(lambda request: said.append("asked") or "yes")  # type: ignore[func-returns-value]
    assert texts(client, "aa") + texts(client, "a") == ["yes"] * 3 and said == ["asked"]


def test_answers_of_any_language_and_half_characters_come_back_as_they_were(tmp_path: Path) -> None:
    odd = "ein „Löwe“ 🦁 \ud83e\u2028 \x00 end"
    for _ in range(2):
        client = stub_client(lambda request: odd, ClientOptions(cache=tmp_path))
        assert texts(client, "a") == [odd]


def test_a_key_says_all_that_is_asked_and_of_whom() -> None:
    chat = ({"role": "user", "content": "a"},)
    picture = ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]},)
    different = [
        Request(chat),
        Request(({"role": "system", "content": "a"},)),
        Request(picture),
        Request(chat, temperature=0.7),
        Request(chat, max_tokens=9),
        Request(chat, seed=0),
    ]
    keys = {request.key("judge") for request in different} | {Request(chat).key("other")}
    assert len(keys) == 7
    assert Request(({"content": "a", "role": "user"},), temperature=0).key("judge") == Request(chat).key("judge")
