"""What stands in front of the server of transformers: keys, pictures, errors in a sentence, and where replies end."""

import asyncio
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jinja2.exceptions import TemplateError

from recipes_minigpt4.serving.asgi import (
    HungUpError,
    Message,
    Receive,
    Send,
    TooLargeError,
    has_key,
    headers_of,
    read_body,
    send_json,
)
from recipes_minigpt4.serving.sent_pictures import open_sent
from recipes_minigpt4.serving.server_compat import PLACEHOLDER
from recipes_minigpt4.serving.server_model import EXCHANGE, Loaded
from recipes_minigpt4.serving.server_replies import Pieces, Writer
from recipes_minigpt4.serving.server_requests import Exchange, RefusedError, check_model, read_request
from recipes_minigpt4.utils.errors import one_line
from recipes_minigpt4.utils.picture_fetching import FetchLimits, PictureError, fetch_picture, shown_name


CHAT = "/v1/chat/completions"
ROUTES = {CHAT: "POST", "/v1/models": "GET", "/health": "GET"}
MAX_PARTS = 4  # a request may be as large as this many of the largest pictures
MAX_WAITING = 64  # requests at a time
FETCHERS = 16  # pictures that are fetched at a time
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontSettings:
    """
    Args:
        api_key: what clients have to send, if anything.
        limits: of files and addresses.
        megapixels: the most of a picture (10⁶ pixels).
    """

    api_key: str | None = field(default=None, repr=False)
    limits: FetchLimits = field(default_factory=FetchLimits)
    megapixels: float = 50.0


class Front:
    """
    An ASGI application around that of transformers.

    Args:
        app: see `build_app`.
        loaded: its model.
        settings: see `FrontSettings`.
    """

    def __init__(self, app: Any, loaded: Loaded, settings: FrontSettings) -> None:
        self.app, self.loaded, self.settings = app, loaded, settings
        self.fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="pictures")
        self.preparing = ThreadPoolExecutor(1, thread_name_prefix="prompts")  # tokenizers are no good at two at a time
        self.most = MAX_PARTS * settings.limits.bytes * 4 // 3  # in base64
        self.waiting = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        try:
            await self._answer(scope, receive, send)
        except RefusedError as refused:
            await send_json(send, refused.status, refused.body)

    async def _answer(self, scope: Message, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        if path != "/health":
            self._check_key(scope)
        if path.startswith("/v1/models/") and method == "GET":
            check_model(path.removeprefix("/v1/models/"), self.loaded.name)
            await send_json(send, 200, self.loaded.card)
        elif path not in ROUTES:
            raise RefusedError(f"There is no {path[:100]} here; this server knows {', '.join(ROUTES)}.", 404)
        elif method != ROUTES[path]:
            raise RefusedError(f"{path} takes {ROUTES[path]}, not {method[:20]}.", 405)
        elif path == CHAT:
            await self._chat(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check_key(self, scope: Message) -> None:
        if (key := self.settings.api_key) is None:
            return
        if not has_key(scope, key):
            raise RefusedError(
                "The key is missing or wrong; send it as `Authorization: Bearer KEY`, the `api_key` of clients.",
                401,
                code="invalid_api_key",
            )

    # ---- chats ----------------------------------------------------------------------------------------------------

    async def _chat(self, scope: Message, receive: Receive, send: Send) -> None:
        if b"".join(headers_of(scope, b"content-type")).partition(b";")[0].strip().lower() != b"application/json":
            raise RefusedError("Send the request as JSON, with the header `Content-Type: application/json`.", 415)
        if self.waiting >= MAX_WAITING:
            raise RefusedError(f"There are {MAX_WAITING} requests waiting already; come again later.", 429)
        self.waiting += 1
        watch = None
        try:
            exchange = read_request(_json(await _body(receive, self.most)), self.loaded.name)
            watch = asyncio.create_task(_watch(receive, exchange))
            await self._prepare(exchange)
            await self._reply(scope, exchange, watch, send)
        finally:
            self.waiting -= 1
            if watch is not None:
                watch.cancel()

    async def _prepare(self, exchange: Exchange) -> None:
        """Fetch the pictures of the chat, and make tensors of it."""
        loop, addresses = asyncio.get_running_loop(), [image["url"] for image in exchange.images]
        calls = [partial(fetch_picture, address, self.settings.limits) for address in addresses]
        try:
            contents = await asyncio.gather(*(loop.run_in_executor(self.fetchers, call) for call in calls))
            await loop.run_in_executor(self.preparing, self._open, exchange, contents)
        except PictureError as error:
            raise RefusedError(str(error), param="messages", code="invalid_image_url") from error
        except Exception as error:
            raise as_refused(error) from error

    def _open(self, exchange: Exchange, contents: list[bytes]) -> None:
        """Open the pictures of a chat, and make tensors of it: of one chat at a time, as pictures are large."""
        for image, content in zip(exchange.images, contents, strict=True):
            image["image"] = open_sent(content, shown_name(image.pop("url")), self.settings.megapixels)
        self.loaded.prepare(exchange)
        exchange.messages.clear()

    async def _reply(self, scope: Message, exchange: Exchange, watch: asyncio.Task, send: Send) -> None:
        """Let the server of transformers answer, and send on what it says."""
        sending = _Sending(exchange, Writer(exchange, self.loaded.name, self.loaded.separator), send)
        asked = {"model": self.loaded.name, "messages": PLACEHOLDER, "stream": exchange.stream}
        told = iter([{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}])

        async def receive() -> Message:
            if (message := next(told, None)) is not None:
                return message
            await asyncio.wait([watch])
            return {"type": "http.disconnect"}

        headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
        EXCHANGE.set(exchange)
        try:
            await self.app({**scope, "headers": headers}, receive, sending)
        except Exception as error:  # what transformers' handlers do not expect
            exchange.error = exchange.error or error
        await sending.end()


class _Sending:
    """Reads what the server of transformers sends, and sends it as the client asked for it."""

    def __init__(self, exchange: Exchange, writer: Writer, send: Send) -> None:
        self.exchange, self.writer, self.send = exchange, writer, send
        self.status, self.streamed, self.begun = 500, False, False
        self.pieces, self.body = Pieces(), b""
        self.shown = ""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streamed = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
        elif not self.streamed or self.status != 200:
            self.body += message.get("body", b"")
        else:
            for piece in self.pieces.feed(message.get("body", b"")):
                self.shown += piece
                if self.exchange.stream and self.exchange.error is None:
                    await self._events(self.writer.piece(piece))

    async def end(self) -> None:
        """
        Send the rest.

        Raises:
            RefusedError: if nothing was sent yet, and there is an error in place of a reply.
        """
        if self.exchange.error is not None or self.status != 200:
            refused = as_refused(self.exchange.error, self.body)
            if not self.begun:
                raise refused
            await self._events([self.writer.failed(refused)])
        elif self.exchange.stream:
            # Streamers keep a character to themselves whose last token never came.
            whole = self.exchange.text
            rest = whole[len(self.shown) :] if whole.startswith(self.shown) else ""
            await self._events([*self.writer.piece(rest), *self.writer.end()])
        else:
            await send_json(self.send, 200, self.writer.whole(self.exchange.text))
            return
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self, events: Any) -> None:
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        if content := b"".join(events):
            await self.send({"type": "http.response.body", "body": content, "more_body": True})


def as_refused(error: Exception | None, body: bytes = b"") -> RefusedError:
    """What a client is told about an error of the model: the sentence of one that is its own."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, (ValueError, OSError, TemplateError)):  # the last: a template that takes no such chat
        return RefusedError(f"{one_line(error)}.")
    logger.error("A request failed: %s", body.decode(errors="replace")[:200] or error, exc_info=error)
    return RefusedError("The server failed at this request; its log tells why.", 500)


# ---- ASGI -----------------------------------------------------------------------------------------------------------


async def _body(receive: Receive, most: int) -> bytes:
    """The body of a request, of at most so many bytes."""
    try:
        return await read_body(receive, most)
    except TooLargeError as error:
        raise RefusedError(f"The request is larger than {most / 1e6:.0f} MB, the most that is taken.", 413) from error
    except HungUpError as error:
        raise RefusedError("The request has no end.") from error


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError("The body of the request is no JSON.") from error


async def _watch(receive: Receive, exchange: Exchange) -> None:
    """Tell the model when its client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    exchange.gone.set()
