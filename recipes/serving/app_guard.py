"""What the page's server refuses before Gradio sees it: requests that would have it fetch addresses."""

import json
from collections.abc import Awaitable, Callable

from recipes_minigpt4.serving.asgi import (
    HungUpError,
    Message,
    Receive,
    Send,
    TooLargeError,
    headers_of,
    read_body,
    send_json,
    with_body,
)


MOST_BYTES = 1 << 20  # of a request that is no upload
FETCHES = ("/file=http:", "/file=https:", "/file/http:", "/file/https:", "/proxy=")  # in paths
NO_FETCHING = "This page fetches no addresses; upload the picture itself."


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
                return await send_json(send, 403, {"detail": NO_FETCHING})
            if scope["method"] == "POST" and not _is_upload(scope):
                try:
                    body = await read_body(receive, MOST_BYTES)
                except TooLargeError:
                    return await send_json(send, 413, {"detail": "The request is too large."})
                except HungUpError:
                    return None
                if _names_an_address(body):
                    return await send_json(send, 400, {"detail": NO_FETCHING})
                receive = with_body(body, receive)
        return await self.app(scope, receive, send)


def _is_upload(scope: Message) -> bool:
    """Whether a request brings files; one that says several things of its content is looked at as any other."""
    kinds = headers_of(scope, b"content-type")
    return len(kinds) == 1 and kinds[0].startswith(b"multipart/")


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
