"""What clients ask of the server: a request in OpenAI's language, read and looked at before anything is computed."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes_minigpt4.utils.ranges import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Range, is_in


ROLES = ("system", "developer", "user", "assistant")
MAX_PICTURES = 16
MAX_STOPS = 16
MAX_CHARACTERS = 1_000_000  # of a chat, which no window of a model holds
WHOLE = Range("a whole number of at most 63 bits", lambda value: abs(value) < 2**63 and value == int(value))
# Field → what it may be. From `max_new_tokens` on it is generate's own language, which clients send as `extra_body`.
NUMBERS = {
    "max_tokens": COUNT,
    "max_completion_tokens": COUNT,
    "temperature": NOT_NEGATIVE,
    "top_p": SHARE,
    "seed": WHOLE,
    "max_new_tokens": COUNT,
    "top_k": Range("a whole number from 0 on", lambda value: value >= 0 and value == int(value)),
    "num_beams": Range("a whole number from 1 to 16", lambda value: 1 <= value <= 16 and value == int(value)),
    "repetition_penalty": POSITIVE,
    "length_penalty": Range("a number from -10 to 10", lambda value: -10 <= value <= 10),  # a power of the length
}
# The fields that tell the most tokens of a reply, the strongest first: harnesses send a number of their own as
# `max_tokens` beside the `max_new_tokens` of a task.
LENGTHS = ("max_new_tokens", "max_completion_tokens", "max_tokens")
# Fields that change no reply.
NOTES = {
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user",
}  # fmt: skip
# Field → the values that ask for nothing special; others are refused.
PLAIN: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}


class RefusedError(Exception):
    """
    What a client is told in place of a reply.

    Args:
        message: one sentence.
        status: of HTTP.
        param: the field that is wrong.
        code: a word for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass
class Exchange:
    """
    A request, and what becomes of it.

    Args:
        messages: the chat as chat templates take it; a picture has its address as `url` until it is opened.
        stream: whether the reply comes in pieces.
        include_usage: whether a streamed reply ends with the numbers of tokens.
        max_tokens: the most tokens of the reply, if the client says so.
        stop: texts that end the reply and are no part of it.
        numbers: other fields of `NUMBERS`.
    """

    messages: list[dict[str, Any]]
    stream: bool = False
    include_usage: bool = False
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    numbers: dict[str, float] = field(default_factory=dict)
    inputs: Any = None  # tensors of the chat
    gone: threading.Event = field(default_factory=threading.Event)  # nobody waits for the reply any more
    error: Exception | None = None  # of the model
    text: str = ""  # of the reply, with what ends it
    prompt_tokens: int = 0
    new_tokens: int = 0
    cut_short: bool = False  # by the number of tokens

    @property
    def images(self) -> list[dict[str, Any]]:
        """The parts of the chat that are pictures, in order."""
        parts = (part for message in self.messages for part in message["content"])
        return [part for part in parts if part["type"] == "image"]

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        told = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.new_tokens}
        return {**told, "total_tokens": sum(told.values())}


def read_request(asked: Any, name: str) -> Exchange:
    """
    Understand the body of a request.

    Args:
        asked: what its JSON holds.
        name: of the model.

    Raises:
        RefusedError: naming the first field that is wrong.
    """
    if not isinstance(asked, Mapping):
        raise RefusedError("The body of the request is no JSON object.")
    given = {key: value for key, value in asked.items() if value is not None}
    check_model(given.pop("model", name), name)
    stream, options = given.pop("stream", False), given.pop("stream_options", {})
    if not isinstance(stream, bool) or not isinstance(options, Mapping):
        raise RefusedError("`stream` is true or false, and `stream_options` an object.", param="stream")
    messages, stop = _messages(given.pop("messages", None)), _stops(given.pop("stop", ()))
    numbers = {key: _number(key, given.pop(key)) for key in NUMBERS if key in given}
    most = next((numbers[name] for name in LENGTHS if name in numbers), None)
    numbers = {key: value for key, value in numbers.items() if key not in LENGTHS}
    if stream and numbers.get("num_beams", 1) > 1:
        raise RefusedError("Beams are not streamed: leave out `stream`, or `num_beams`.", param="num_beams")
    for key, value in given.items():
        _check_plain(key, value)
    usage = bool(options.get("include_usage"))
    return Exchange(messages, stream, usage, None if most is None else int(most), stop, numbers)


def check_model(wanted: Any, name: str) -> None:
    """Refuse a request for another model."""
    if wanted != name:
        raise RefusedError(
            f"There is no model {str(wanted)[:100]!r} here; this server has one, {name!r}.",
            404,
            "model",
            "model_not_found",
        )


def _check_plain(key: str, value: Any) -> None:
    if key in NOTES or any(value == plain for plain in PLAIN.get(key, ())):
        return
    if key in PLAIN:
        given = "given" if isinstance(value, list | dict) else str(value)[:40]
        raise RefusedError(f"`{key}` cannot be {given} here; leave it out.", param=key, code="unsupported_value")
    raise RefusedError(f"The request has an unknown field `{key[:60]}`; leave it out.", param=key[:60])


def _number(key: str, value: Any) -> float:
    if not is_in(NUMBERS[key], value):
        raise RefusedError(f"`{key}` is {str(value)[:40]!r}; it has to be {NUMBERS[key].text}.", param=key)
    return value


def _stops(value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or not all(isinstance(text, str) and text for text in stops):
        raise RefusedError("`stop` is a text or a list of texts, none of them empty.", param="stop")
    if len(stops) > MAX_STOPS:
        raise RefusedError(f"`stop` has {len(stops)} texts; {MAX_STOPS} is the most.", param="stop")
    return tuple(stops)


# ---- the chat -------------------------------------------------------------------------------------------------------


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _wrong("has to be a list of at least one message")
    messages = [_message(place, message) for place, message in enumerate(value)]
    if messages[-1]["role"] == "assistant":
        raise _wrong("ends with the assistant's words; end it with a question")
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    if pictures > MAX_PICTURES:
        raise _wrong(f"has {pictures} pictures; {MAX_PICTURES} is the most")
    length = sum(len(part.get("text", "")) for message in messages for part in message["content"])
    if length > MAX_CHARACTERS:
        raise _wrong(f"has {length:,} characters; {MAX_CHARACTERS:,} is the most")
    return messages


def _message(place: int, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise _wrong(f"has at place {place} no message with a role of {', '.join(ROLES)}")
    content = message.get("content")
    if message.get("tool_calls"):
        raise _wrong(f"has calls of tools at place {place}, which this server does not know")
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, list) or not content:
        raise _wrong(f"has at place {place} a content that is neither a text nor a list of parts")
    role = "system" if message["role"] == "developer" else message["role"]
    return {"role": role, "content": [_part(place, part) for part in content]}


def _part(place: int, part: Any) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"].encode(errors="replace").decode()}  # half a character is none
    if kind == "image_url":
        address = part.get("image_url")
        address = address.get("url") if isinstance(address, Mapping) else address
        if isinstance(address, str) and address:
            return {"type": "image", "url": address}
        raise _wrong(f'has at place {place} a picture without an address; write {{"image_url": {{"url": "…"}}}}')
    shown = repr(kind)[:60] if isinstance(kind, str) else "no type"
    raise _wrong(f"has at place {place} a part of {shown}; parts are of type text, with text, or image_url")


def _wrong(reason: str) -> RefusedError:
    return RefusedError(f"`messages` {reason}.", param="messages")
