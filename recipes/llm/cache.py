"""Every raw answer, kept in a file that only grows: nothing that was answered is asked, or paid for, again."""

import json
import os
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from recipes_minigpt4.llm.exchange import Answer, Failure, Request
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.redaction import hide_known_secrets


@dataclass(frozen=True)
class Reply:
    """What a model said to one attempt, and the raw answer that this was read from."""

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    raw: Any = None


KEPT = ("text", "prompt_tokens", "completion_tokens", "cost", "attempts", "finish_reason")  # of an answer


class AnswerCache:
    """
    The answers of one client, in memory and in a file of its own.

    A line of the file is an answer, or what came instead of one. Half a line at the end, of a process that was killed,
    is cut off.

    Args:
        folder: where the file lies; without one, answers are kept as long as the process runs.
        name: that of the client.
        flag: the option that names the folder, for what is told to people.
    """

    def __init__(self, folder: Path | None, name: str, flag: str = "--cache") -> None:
        self.name, self.flag = name, flag
        self._answers: dict[str, Answer] = {}
        self._costs: dict[str, float] = defaultdict(float)
        self._place = threading.Lock()  # of threads that write
        self._read = 0  # bytes of the file that are in memory
        self.path: Path | None = None
        if folder is not None:
            slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60]
            self.path = Path(folder).expanduser() / f"{slug}-{sha256(name.encode()).hexdigest()[:8]}.jsonl"

    @contextmanager
    def held(self) -> Iterator[None]:
        """
        Keep other processes from asking the same, and know what they were answered before.

        Raises:
            RecipeError: if another process is at it, or the file cannot be used.
        """
        if self.path is None:
            yield
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path.with_suffix(".lock"), timeout=0, thread_local=False, is_singleton=True)
            lock.acquire()
        except Timeout:
            raise RecipeError(
                f"Another process asks {self.name} and keeps the answers in {self.path.parent}; wait until it has "
                f"ended, or name another folder with {self.flag}."
            ) from None
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._load()
            yield
        finally:
            lock.release()

    def _load(self) -> None:
        """Read what is in the file, and cut off half a line."""
        assert self.path is not None
        try:
            with self._place, open(self.path, "a+b", buffering=0) as file:
                if half := self._take(file):
                    file.truncate(file.seek(0, os.SEEK_END) - half)
        except OSError as error:
            raise self._unusable(error) from error

    def answer(self, key: str) -> Answer | None:
        """What was answered to a request before, with all that it cost."""
        kept = self._answers.get(key)
        return None if kept is None else replace(kept, cost=self._costs[key], cached=True)

    def cost(self, key: str) -> float:
        """What all answers to a request cost, those among them that could not be used."""
        return self._costs[key]

    def keep(self, key: str, reply: Reply, cost: float, attempts: int) -> Answer:
        """Keep an answer, before anybody sees it."""
        told = {name: getattr(reply, name) for name in KEPT if hasattr(reply, name)}
        row = {"key": key, "name": self.name, **told, "cost": cost, "attempts": attempts, "raw": reply.raw}
        answer = self._keep(row)
        assert answer is not None
        return replace(answer, cost=self._costs[key])

    def keep_failure(self, key: str, reason: str, cost: float, raw: str | None) -> None:
        """Keep what came instead of an answer: it tells what is wrong, and it may have cost something."""
        self._keep({"key": key, "name": self.name, "failure": reason, "cost": cost, "raw": raw})

    def _keep(self, row: Mapping[str, Any]) -> Answer | None:
        line = hide_known_secrets(json.dumps(row, ensure_ascii=False)).encode("utf-8", "backslashreplace") + b"\n"
        with self._place:
            if self.path is None:
                return self._remember(json.loads(line))
            try:
                with open(self.path, "a+b", buffering=0) as file:
                    self._take(file)
                    self._append(file, line)
            except OSError as error:
                raise self._unusable(error) from error
            self._read += len(line)
            return self._remember(json.loads(line))

    def _append(self, file: BinaryIO, line: bytes) -> None:
        """Write a line whole or not at all."""
        end = file.seek(0, os.SEEK_END)
        written = 0
        try:
            while written < len(line):  # a disk that is nearly full takes a part, and then tells
                written += file.write(line[written:])
        except OSError:
            file.truncate(end)
            raise

    def _take(self, file: BinaryIO) -> int:
        """Read the lines that were added since the last time; returns how many bytes of half a line follow."""
        file.seek(self._read)
        new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                self._remember(json.loads(line))
            except (ValueError, TypeError, KeyError):
                raise RecipeError(
                    f"{self.path} has a line that is no answer: {line[:60].decode(errors='replace')!r}; delete that "
                    f"line, or name another folder with {self.flag}."
                ) from None
        self._read += len(whole)
        return len(new) - len(whole)

    def _remember(self, row: Mapping[str, Any]) -> Answer | None:
        key = row["key"]
        self._costs[key] += row["cost"]
        if "failure" in row:
            return None
        self._answers[key] = Answer(cached=False, **{name: row[name] for name in KEPT})
        return self._answers[key]

    def _unusable(self, error: OSError) -> RecipeError:
        folder = None if self.path is None else self.path.parent
        return RecipeError(
            f"{self.flag} {folder} cannot be used ({error.strerror or error}); make room, or name another folder. "
            "What was answered before is kept."
        )


AskNew = Callable[[Sequence[Request]], Iterator[tuple[int, Answer | Failure]]]


def ask_what_is_new(
    cache: AnswerCache, requests: Sequence[Request], ask: AskNew, count: Callable[[Sequence[str]], None] | None = None
) -> Iterator[tuple[int, Answer | Failure]]:
    """
    Answer from the cache first, then ask what is not in it; requests that are equal are asked once.

    Args:
        ask: asks what is new, keeps every answer, and gives it with the number of its request.
        count: is told the keys of all requests before anything is asked.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for number, request in enumerate(requests):
        places[request.key(cache.name)].append(number)
    with cache.held():
        if count is not None:
            count(list(places))
        new = []
        for key, numbers in places.items():
            if (answer := cache.answer(key)) is None:
                new.append(numbers)
            else:
                yield from _everywhere(numbers, answer)
        for number, outcome in ask([requests[numbers[0]] for numbers in new]):
            yield from _everywhere(new[number], outcome)


def _everywhere(numbers: Sequence[int], outcome: Answer | Failure) -> Iterator[tuple[int, Answer | Failure]]:
    """An outcome for the first of the requests that are equal; for the others it cost nothing."""
    yield numbers[0], outcome
    free = replace(outcome, cost=0.0)
    for number in numbers[1:]:
        yield number, replace(free, cached=True) if isinstance(free, Answer) else free
