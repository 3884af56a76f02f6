"""What stands in front of vLLM's own server: the key, what is answered at all, and where replies end."""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any


Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

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
        elif (body := await _read(receive)) is None:
            await _refuse(scope, send, 413, f"The request is larger than {MAX_BODY // 10**6} MB.")
        else:
            body = end_at(body, self.separator)
            headers = [(name, value) for name, value in scope["headers"] if name.lower() != b"content-length"]
            headers.append((b"content-length", str(len(body)).encode()))
            await self.app({**scope, "headers": headers}, _again(body, receive), send)

    def _may_enter(self, scope: Message) -> bool:
        """Whether a request has the key, if there is one; browsers ask without it whether they may ask."""
        if not self.key or scope["method"] == "OPTIONS":
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, f"Bearer {self.key}".encode())


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


async def _read(receive: Receive) -> bytes | None:
    """The body of a request; None if it is too large."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return bytes(body)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives the body once, and then whatever comes, such as that the client has hung up."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return first.pop() if first else await receive()

    return again


async def _refuse(scope: Message, send: Send, status: int, reason: str) -> None:
    """Answer with a sentence, in OpenAI's form."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    error = {"message": reason, "type": "invalid_request_error", "param": None, "code": None}
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"error": error}).encode()})
