"""Scripted answers, for tests and runs in miniature: no model, no network, the same every time."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from recipes_minigpt4.llm.cache import Reply
from recipes_minigpt4.llm.exchange import Request, text_of
from recipes_minigpt4.llm.options import ClientOptions
from recipes_minigpt4.llm.sending import NoAnswerError, SendingClient
from recipes_minigpt4.utils.errors import RecipeError


class StubSender:
    """Answers what a function says; a token is a word."""

    def __init__(self, answer: Callable[[Request], str], name: str) -> None:
        self.name, self._answer = name, answer

    def send(self, request: Request) -> Reply:
        prompt = sum(len(text_of(message.get("content")).split()) for message in request.messages)
        words = self._answer(request).split(" ")
        finish = "length" if len(words) > request.max_tokens else "stop"
        text = " ".join(words[: request.max_tokens])
        return Reply(text, prompt, len(text.split()), finish_reason=finish)


def stub_client(
    answer: Callable[[Request], str], options: ClientOptions | None = None, name: str = "stub"
) -> SendingClient:
    """
    A client that answers what a function says, one request after the other.

    Args:
        answer: gives the answer to a request, or raises `NoAnswerError`.
        name: says which function it is: answers are kept under it.
    """
    return SendingClient(StubSender(answer, name), replace(options or ClientOptions(), concurrency=1))


def open_stub(file: str, options: ClientOptions) -> SendingClient:
    """
    A client that answers by the lines of a JSONL file: the first line that fits a request answers it.

    A line has `answer`; and, as it likes, `match`, a regular expression that is looked for in all that was said (line
    breaks count as any character), whose groups the answer may name as `\\\\1`; or `failure` in the place of `answer`.

    Raises:
        RecipeError: if the file is not there or a line is none of these.
    """
    path = Path(file).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RecipeError(f"stub:{file} cannot be read ({reason}); name a JSONL file of answers.") from error
    lines = [_read(line, number, file) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    name = f"stub:{path.name}@{sha256(text.encode()).hexdigest()[:12]}"
    return stub_client(lambda request: _answer(lines, request, path.name), options, name)


def _read(line: str, number: int, file: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        pattern = re.compile(row.get("match", ""), re.DOTALL)
        known = row.keys() <= {"match", "answer", "failure"}
        (said,) = (row[name] for name in ("answer", "failure") if name in row)
    except (ValueError, AttributeError, TypeError, re.error):
        known, said = False, None
    if not known or not isinstance(said, str):
        raise RecipeError(
            f'Line {number} of {file} is no scripted answer; write {{"answer": "..."}} or {{"failure": "..."}}, with '
            '"match": a regular expression.'
        )
    return {**row, "match": pattern}


def _answer(lines: list[dict[str, Any]], request: Request, file: str) -> str:
    said = "\n".join(text_of(message.get("content")) for message in request.messages)
    for line in lines:
        if found := line["match"].search(said):
            if "failure" in line:
                raise NoAnswerError(line["failure"], again=False, alone=True)
            try:
                return found.expand(line["answer"])
            except (re.error, IndexError) as error:
                raise RecipeError(f"An answer of {file} names a group that is not there ({error}).") from error
    raise NoAnswerError(f"no line of {file} fits", again=False, alone=True)
