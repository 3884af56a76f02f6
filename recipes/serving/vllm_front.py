"""What stands in front of vLLM's own server: the key, what is answered at all, and where replies end."""

import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

from recipes_minigpt4.serving.asgi import (
    HungUpError,
    Message,
    Receive,
    Send,
    TooLargeError,
    has_key,
    read_body,
    send_json,
    with_body,
)


ASKED = ("/v1/chat/completions", "/v1/completions")
OPEN = ("/health", "/ping")  # for what watches over servers, which has no key
ROUTES = (*ASKED, *OPEN, "/v1/models", "/version", "/metrics", "/tokenize", "/detokenize")
MAX_BODY = 256_000_000  # bytes
# Variables of the environment, by which `minigpt4 serve` tells its child what the command line would show.
KEY, SEPARATOR = "VLLM_API_KEY", "MINIGPT4_SEPARATOR"
LIMITS = "MINIGPT4_PICTURES"  # see vllm_pictures.py


class Front:
    """
    An ASGI application around vLLM's, for its option `--middleware`.

    Only what ends replies at the separator is answered. vLLM itself asks for the key under some paths alone.

    Args:
        app: vLLM's.
    """

    def __init__(self, app: Callable[[Any, Receive, Send], Awaitable[None]]) -> None:
        self.app = app
        self.key, self.separator = os.environ.get(KEY, ""), os.environ.get(SEPARATOR, "")

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        path = scope["path"].rstrip("/")
        if scope["type"] != "http" or path not in ROUTES:
            await _refuse(scope, send, 404, f"This server answers {', '.join(ROUTES[:2])} and /v1/models only.")
        elif path not in OPEN and not self._may_enter(scope):
            await _refuse(scope, send, 401, "The API key is wrong or missing; send it as `Authorization: Bearer KEY`.")
        elif path not in ASKED or scope["method"] != "POST" or not self.separator:
            await self.app(scope, receive, send)
        else:
            await self._ask(scope, receive, send)

    async def _ask(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request for a reply on, which is told where to end."""
        try:
            body = end_at(await read_body(receive, MAX_BODY), self.separator)
        except TooLargeError:
            return await _refuse(scope, send, 413, f"The request is larger than {MAX_BODY // 10**6} MB.")
        except HungUpError:
            return None
        headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        return await self.app({**scope, "headers": headers}, with_body(body, receive), send)

    def _may_enter(self, scope: Message) -> bool:
        """Whether a request has the key, if there is one; browsers ask without it whether they may ask."""
        return not self.key or scope["method"] == "OPTIONS" or has_key(scope, self.key)


def end_at(body: bytes, separator: str) -> bytes:
    """The body of a request whose reply ends at the separator too; one that is no such request stays as it is."""
    try:
        asked = json.loads(body)
    except ValueError:
        return body
    if not isinstance(asked, dict):
        return body
    given = asked.get("stop")
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list):
        return body  # which vLLM refuses, saying why
    asked["stop"] = [*stops, *([] if separator in stops else [separator])]
    return json.dumps(asked).encode()


async def _refuse(scope: Message, send: Send, status: int, reason: str) -> None:
    """Answer with a sentence, in OpenAI's form."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
    await send_json(send, status, {"error": error})
