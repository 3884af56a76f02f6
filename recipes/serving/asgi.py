"""What layers in front of a server (ASGI) have in common: they read a request, and pass it on or refuse it."""

import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class TooLargeError(Exception):
    """A body has more bytes than are taken."""


class HungUpError(Exception):
    """A client has gone in the middle of its request."""


def headers_of(scope: Message, name: bytes) -> list[bytes]:
    """All values of a header, whose name is in small letters."""
    return [value for key, value in scope["headers"] if key.lower() == name]


def has_key(scope: Message, key: str) -> bool:
    """Whether a request sends `Authorization: Bearer KEY`."""
    kind, _, sent = b"".join(headers_of(scope, b"authorization")[:1]).partition(b" ")
    return hmac.compare_digest(sent.strip(), key.encode()) and kind.lower() == b"bearer"


async def read_body(receive: Receive, most: int) -> bytes:
    """
    The body of a request.

    Args:
        receive: gives its messages.
        most: how many bytes are taken.

    Raises:
        TooLargeError: if it has more.
        HungUpError: if it has no end.
    """
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise HungUpError
        body += message.get("body", b"")
        if len(body) > most:
            raise TooLargeError
        more = message.get("more_body", False)
    return bytes(body)


def with_body(body: bytes, receive: Receive) -> Receive:
    """What gives a body once, and then whatever comes, such as that the client has hung up."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message


async def send_json(send: Send, status: int, value: Any) -> None:
    """Answer with JSON."""
    body = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
