"""Servers that speak OpenAI's language: OpenAI, vLLM, llama-server, Ollama, `transformers serve` and others."""

import json
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from recipes_minigpt4.llm.cache import Reply
from recipes_minigpt4.llm.exchange import Request
from recipes_minigpt4.llm.limits import Clock, pause_asked_for
from recipes_minigpt4.llm.options import ClientOptions
from recipes_minigpt4.llm.sending import NoAnswerError
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import hide_known_secrets, remember_secret


OPENAI = "https://api.openai.com/v1"
OPENAIS_KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # what a server gets that wants none; the package insists on something
SECONDS_TO_CONNECT = 10.0
SHOWN = 200  # characters of what a server says, in a reason
TRY_AGAIN = (408, 409, 425, 429)  # and all from 500 on
EMPTY_PURSE = ("insufficient_quota", "billing_hard_limit_reached")  # codes of a 429 that no waiting cures


class OpenAISender:
    """
    One model behind an OpenAI-compatible server.

    Args:
        model: its name there; `URL#NAME` for a server that `options.base_url` does not name.

    Raises:
        RecipeError: if the package `openai`, the key or the address is missing.
    """

    def __init__(self, model: str, options: ClientOptions, clock: Clock | None = None) -> None:
        try:
            import openai
        except ImportError:
            raise RecipeError(
                'openai not found; run `pip install "minigpt4-transformers[llm]"`, or name a local:MODEL.'
            ) from None
        self._openai, self.options, self._clock = openai, options, clock or Clock()
        base_url = options.base_url
        if model.startswith(("http://", "https://")):
            base_url, _, model = model.partition("#")
        if not model:
            raise RecipeError("openai: names no model; write openai:MODEL, or openai:URL#MODEL.")
        self.model = model
        address = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self.server = self._clean_address(address)
        shown = model if not model.startswith("/") else f"{Path(model).name}@{sha256(model.encode()).hexdigest()[:8]}"
        self.name = f"openai:{shown}" + ("" if self.server == OPENAI else f" at {self.server}")
        self._key = self._read_key(OPENAIS_KEY if base_url is None else None)
        self._client = openai.OpenAI(
            api_key=self._key or NO_KEY,
            base_url=address.partition("?")[0],
            default_query=dict(parse_qsl(urlsplit(address).query)),
            max_retries=0,  # attempts, pauses and their cost are counted by whoever sends
            timeout=openai.Timeout(options.timeout, connect=min(SECONDS_TO_CONNECT, options.timeout)),
        )
        self._longest = "max_tokens"  # OpenAI's newer models want another name
        self._heard = False  # whether the server has said anything

    # ---- the server and the key ----

    def _clean_address(self, address: str) -> str:
        """The address without user and password, which are secrets from now on."""
        try:
            parts = urlsplit(address)
            port = f":{parts.port}" if parts.port else ""
            whole = parts.scheme in ("http", "https") and bool(parts.hostname)
        except ValueError:  # of a port that is no number
            whole = False
        if not whole:
            flag = self.options.flag("base_url")
            raise RecipeError(f"{flag} {address} is no address; write something like http://localhost:8000/v1.")
        remember_secret(parts.password or parts.username or "")
        host = parts.netloc.rpartition("@")[2].removesuffix(port)
        return urlunsplit((parts.scheme, host + port, parts.path.rstrip("/"), "", ""))

    def _read_key(self, default: str | None) -> str | None:
        flag, variable = self.options.flag("api_key_env"), self.options.api_key_env or default
        if variable is None:
            return None
        key = os.environ.get(variable, "").strip()
        if not key:
            raise RecipeError(
                f"The environment variable {variable} is empty, and {self.name} wants a key; set it, or name another "
                f"variable with {flag}."
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise RecipeError(f"What stands in the environment variable {variable} is no key; set it anew.")
        remember_secret(key)
        return key

    # ---- one request ----

    def send(self, request: Request) -> Reply:
        openai = self._openai
        try:
            response = self._create(request)
        except openai.APIStatusError as error:
            self._heard = True
            raise self._refused(error) from None
        except openai.APIConnectionError as error:  # a timeout is one too
            cause = error.__cause__ or error
            if type(cause).__name__ in ("ConnectError", "ConnectTimeout"):
                raise self._down(one_line(cause)) from None
            if isinstance(error, openai.APITimeoutError):
                raise NoAnswerError(f"no answer within {self.options.timeout:g} s", paid="unknown") from None
            raise NoAnswerError(f"the connection broke ({one_line(cause)})", paid="unknown") from None
        self._heard = True
        return self._read(response)

    def _create(self, request: Request) -> Any:
        arguments = {
            "model": self.model,
            "messages": [dict(message) for message in request.messages],
            "temperature": request.temperature,
            **({} if request.seed is None else {"seed": request.seed}),
        }
        create = self._client.chat.completions.with_raw_response.create
        named = self._longest
        try:
            return create(**arguments, **{named: request.max_tokens}).http_response
        except self._openai.BadRequestError as error:
            if named != "max_tokens" or "max_completion_tokens" not in error.response.text:
                raise
        self._longest = "max_completion_tokens"
        return create(**arguments, max_completion_tokens=request.max_tokens).http_response

    def _read(self, response: Any) -> Reply:
        """The answer in the body of a response, whatever it may be."""
        body = response.text
        kind = response.headers.get("content-type", "no type")
        try:
            answer = json.loads(body)
            usage = answer.get("usage") or {}
            paid = [_count(usage.get(f"{part}_tokens")) for part in ("prompt", "completion")]
        except (ValueError, AttributeError):
            what = f"{kind}: {_shown(body)}" if body.strip() else "nothing"
            raise NoAnswerError(f"it answered, but not in JSON ({what})", paid="unknown", raw=body) from None
        billed: Any = {"paid": tuple(paid) if usage else "unknown", "raw": body}
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text, finish = message.get("content"), choice.get("finish_reason")
            refusal = message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise NoAnswerError(f"there is no choice in what it answered ({_shown(body)})", **billed) from None
        if isinstance(refusal, str) and refusal and not text:
            raise NoAnswerError(f"the model refuses ({_shown(refusal)})", again=False, alone=True, **billed)
        if finish == "content_filter":
            raise NoAnswerError("the server's content filter took the answer", again=False, alone=True, **billed)
        if not isinstance(text, str) or not text.strip():
            if finish == "length":
                raise NoAnswerError(
                    "the model had no token left for an answer; allow more", again=False, alone=True, **billed
                )
            raise NoAnswerError("the answer is empty", **billed)
        return Reply(hide_known_secrets(text), paid[0], paid[1], finish_reason=finish, raw=answer)

    # ---- what goes wrong ----

    def _refused(self, error: Any) -> Exception:
        """What an answer with an error's status means: for this attempt, this request, or all of them."""
        status, said = error.status_code, _shown(_message(error))
        reason = f"{status}: {said}"
        body = error.body if isinstance(error.body, Mapping) else {}
        if status == 401:
            flag = self.options.flag("api_key_env")
            which = "the key" if self._key else "a request without a key"
            return RecipeError(
                f"{self.name} refuses {which} ({said}); name the environment variable that holds the right one with "
                f"{flag}."
            )
        if status in (402, 403) or body.get("code") in EMPTY_PURSE:
            return RecipeError(f"{self.name} serves this account nothing ({reason}); look after the account there.")
        if status == 404:
            return RecipeError(
                f"There is no {self.model} at {self.server} ({said}); correct the model's name, or the address "
                f"({self.options.flag('base_url')}), which often ends in /v1."
            )
        if status == 400 and body.get("param") == "temperature":
            return RecipeError(f"{self.name} does not take this temperature ({said}); choose another one, or model.")
        again = status in TRY_AGAIN or status >= 500
        pause = pause_asked_for(error.response.headers, self._clock.today()) if again else None
        return NoAnswerError(reason, again=again, pause=pause, raw=error.response.text)

    def _down(self, why: str) -> Exception:
        """Nobody is there: at the beginning a mistake, later perhaps a server that starts again."""
        if self._heard:
            return NoAnswerError(f"nobody answers at {self.server} ({why})")
        return RecipeError(
            f"Nobody answers at {self.server} ({why}); start the server, or correct {self.options.flag('base_url')}."
        )


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _message(error: Any) -> str:
    """What a server says about an error, as it is nested by the servers there are."""
    body = error.body
    for name in ("error", "message", "detail"):
        if isinstance(body, Mapping) and body.get(name):
            body = body[name]
    return body if isinstance(body, str) else error.response.text or error.response.reason_phrase


def _shown(text: str) -> str:
    """The beginning of a text, on one line and without secrets."""
    line = one_line(ValueError(text))
    return line if len(line) <= SHOWN else line[:SHOWN] + "…"
