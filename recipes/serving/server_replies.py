"""Replies on their way to a client: ended where they end, and written in OpenAI's language."""

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from recipes_minigpt4.serving.server_requests import Exchange, RefusedError


class Ending:
    """
    Lets a reply through up to the first text that ends it, without white space around it.

    What could be the beginning of such a text, or white space at the end, is held back until it is clear.

    Args:
        stops: the texts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.held, self.begun, self.ended = "", False, False

    def feed(self, piece: str) -> str:
        """What may be shown, now that `piece` has come."""
        if self.ended:
            return ""
        text = self.held + piece
        if not self.begun:
            text = text.lstrip()
        first = min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=None)
        if first is not None:
            self.ended, self.held = True, ""
            return self._shown(text[:first].rstrip())
        keep = max((_overlap(text, stop) for stop in self.stops), default=0)
        shown = text[: len(text) - keep].rstrip()
        self.held = text[len(shown) :]
        return self._shown(shown)

    def end(self) -> str:
        """What was held back, now that nothing comes any more."""
        rest, self.held = self.held.rstrip(), ""
        return "" if self.ended else self._shown(rest)

    def _shown(self, text: str) -> str:
        self.begun = self.begun or bool(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text could begin `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


class Writer:
    """
    Writes one reply for the client that asked.

    Args:
        exchange: the request.
        name: of the model.
        separator: of the model's chats.
    """

    def __init__(self, exchange: Exchange, name: str, separator: str | None) -> None:
        self.exchange = exchange
        self.ending = Ending([*exchange.stop, *([separator] if separator else [])])
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        self.begun = False

    @property
    def finish_reason(self) -> str:
        """Why the reply is over."""
        return "length" if self.exchange.cut_short and not self.ending.ended else "stop"

    def whole(self, text: str) -> dict[str, Any]:
        """The reply in one piece."""
        text = self.ending.feed(text) + self.ending.end()
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": self.finish_reason}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": self.exchange.usage}

    def piece(self, text: str) -> Iterator[bytes]:
        """Events for a piece of the reply."""
        if not self.begun:
            self.begun = True
            yield self._chunk({"role": "assistant", "content": ""})
        if shown := self.ending.feed(text):
            yield self._chunk({"content": shown})

    def end(self) -> Iterator[bytes]:
        """Events behind the last piece."""
        yield from self.piece("")
        if rest := self.ending.end():
            yield self._chunk({"content": rest})
        yield self._chunk({}, self.finish_reason)
        if self.exchange.include_usage:
            yield self._event({**self._empty(), "choices": [], "usage": self.exchange.usage})
        yield b"data: [DONE]\n\n"

    def failed(self, refused: RefusedError) -> bytes:
        """The event of an error that comes when the reply has begun."""
        return self._event(refused.body)

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._event({**self._empty(), "choices": [choice]})

    def _empty(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk"}

    @staticmethod
    def _event(value: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n\n"


class Pieces:
    """Reads the text of a streamed reply out of what the server of transformers writes."""

    def __init__(self) -> None:
        self.rest = b""

    def feed(self, body: bytes) -> list[str]:
        """The pieces of text in the events that are complete with `body`."""
        *events, self.rest = (self.rest + body).split(b"\n\n")
        pieces = []
        for event in events:
            try:
                told = json.loads(event.removeprefix(b"data: "))
            except ValueError:  # its errors are no JSON, and its model has told us
                continue
            for choice in told.get("choices", ()):
                pieces.append(choice["delta"].get("content") or "")
        return pieces
