"""What is asked of a language model and what comes back, whoever answers."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from recipes_minigpt4.utils.errors import RecipeError


@dataclass(frozen=True)
class Request:
    """
    One question to a language model.

    Args:
        messages: a chat in OpenAI's form, `{"role": ..., "content": ...}`. A content is a text or a list of parts;
            pictures are parts of type `image_url` with a data URL, for models that see.
        temperature: 0 takes the likeliest token every time.
        max_tokens: the longest answer.
        seed: of sampling. Requests that differ in nothing but the seed are different requests: that is how one asks
            for several answers.
    """

    messages: tuple[Mapping[str, Any], ...]
    temperature: float = 0.0
    max_tokens: int = 512
    seed: int | None = None

    def key(self, name: str) -> str:
        """What is asked of whom, as a SHA-256 in hexadecimal; `name` is that of a client."""
        asked = {"name": name, **asdict(self), "temperature": float(self.temperature)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """
    What a language model answered.

    Args:
        text: the answer, as it came.
        prompt_tokens, completion_tokens: as the server or the tokenizer counts them; None if a server does not tell.
        cost: what all attempts that were answered cost, at the prices given, whenever that was.
        attempts: how often it had to be asked.
        cached: whether it had been answered before, so that nothing was paid for it now.
        finish_reason: "stop", or "length" for an answer that was cut at `max_tokens`.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float = 0.0
    attempts: int = 1
    cached: bool = False
    finish_reason: str | None = None


@dataclass(frozen=True)
class Failure:
    """A request without an answer after all attempts, and why. It is not kept: the next start asks again."""

    reason: str
    attempts: int = 1
    cost: float = 0.0


class BudgetError(RecipeError):
    """The next request could cost more than is left."""


class Client(Protocol):
    """
    Whoever answers.

    Attributes:
        name: who that is, with a revision where there is one and without secrets. It is part of every cache key.
    """

    @property
    def name(self) -> str: ...

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        """
        Ask, and give each answer with the number of its request, in the order in which they end.

        Raises:
            BudgetError: when the next request could cost more than is left.
            RecipeError: if asking on makes no sense, such as with a wrong key or a server that is down.
        """
        ...


def text_of(content: Any) -> str:
    """The text of a message's content, without its pictures."""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content or () if part.get("type") == "text")


def pictures_of(request: Request) -> int:
    """How many pictures a request holds."""
    contents = [message.get("content") for message in request.messages]
    return sum(part.get("type") != "text" for parts in contents if isinstance(parts, (list, tuple)) for part in parts)
