"""What the page's server refuses before Gradio sees it: requests that would have it fetch addresses."""

import json
from collections.abc import Awaitable, Callable
from typing import Any


MOST_BYTES = 1 << 20  # of a request that is no upload
FETCHES = ("/file=http:", "/file=https:", "/file/http:", "/file/https:", "/proxy=")  # in paths
NO_FETCHING = "This page fetches no addresses; upload the picture itself."

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """
    A layer around the server (ASGI).

    Gradio would fetch a picture that is named by its address, of any size, if that is public; and it offers itself
    as a proxy. Nobody needs either here.

    Args:
        app: the server.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if any(part in scope["path"].lower() for part in FETCHES):
                return await _refuse(send, 403, NO_FETCHING)
            kind = dict(scope["headers"]).get(b"content-type", b"")
            if scope["method"] == "POST" and not kind.startswith(b"multipart/"):
                body = await _read(receive)
                if body is None:
                    return await _refuse(send, 413, "The request is too large.")
                if _names_an_address(body):
                    return await _refuse(send, 400, NO_FETCHING)
                receive = _again(body, receive)
        return await self.app(scope, receive, send)


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too large."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > MOST_BYTES:
            return None
        if not message.get("more_body"):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """A source of messages that gives a body that was read, and goes on from there."""
    given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return given.pop() if given else await receive()

    return next_message


def _names_an_address(body: bytes) -> bool:
    """Whether a file in a request is one of the web."""
    try:
        rest = [json.loads(body)]
    except ValueError:
        return False  # which Gradio tells
    while rest:
        value = rest.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(("http:", "https:")):
                return True
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
    return False


async def _refuse(send: Send, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
