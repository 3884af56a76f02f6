"""Conversations in one form: every message a list of text and image parts, and no text that passes for a picture."""

import os
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from .image_opening_minigpt4 import without_content


# Unicode reserves these code points for internal use: no text has them, and none of them reaches the tokenizer.
LITERAL_MARK = "\ufdd0"  # inside "<image>" that a user typed: not a picture
SEGMENT_MARK = "\ufdd1"  # where a template begins a reply, which is tokenized on its own
LENGTH_MARK = "\ufdd4"  # behind a text, with a number: how many of its tokens are kept
_RESERVED = dict.fromkeys(map(ord, "\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4"))

# What a part of a picture may hold beside it: columns of `datasets`, OpenAI's and others' hints.
_BESIDE_IMAGE = ("type", "text", "detail", "index", "cache_control", "min_pixels", "max_pixels")
_IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def normalize_conversations(conversation: Any, image_token: str) -> tuple[list[list[dict[str, Any]]], bool]:
    """
    Bring one conversation, or a batch of them, into the form that the chat templates know.

    Args:
        conversation: a list of messages, or a list of such lists; a message has `role` and `content`, which is a
            string or a list of parts (`text`, `image`, OpenAI's `image_url`, or Gradio's files and strings).
        image_token: the placeholder; where a text has it, it is marked as not being a picture.

    Returns:
        The conversations as new lists and dicts (the caller's stay as they are), and whether they came as a batch.

    Raises:
        ValueError: if there is no message, or one is not understood.
    """
    chats = getattr(conversation, "messages", conversation)
    if not isinstance(chats, (list, tuple)) or len(chats) == 0:
        raise ValueError(
            "There is no conversation to render; pass a list of messages, each with `role` and `content`."
        )
    batched = isinstance(chats[0], (list, tuple)) or hasattr(chats[0], "messages")
    normalized = []
    for chat in chats if batched else [chats]:
        messages = getattr(chat, "messages", chat)
        if not isinstance(messages, (list, tuple)) or len(messages) == 0:
            raise ValueError("A conversation of the batch has no messages; leave it out, or give it at least one.")
        normalized.append([_normalize_message(message, image_token) for message in messages])
    return normalized, batched


def place_images(chats: Sequence[Sequence[Mapping[str, Any]]], images: Sequence[Any]) -> int:
    """Put pictures that came apart from normalized chats into the parts that wait for one; returns how many do."""
    parts = [part for chat in chats for message in chat for part in message["content"] if part == {"type": "image"}]
    for part, image in zip(parts, images, strict=False):
        part["image"] = image
    return len(parts)


def without_marks(text: str) -> str:
    """A text without the code points that mean something here."""
    return text.translate(_RESERVED)


def protect_text(value: Any, image_token: str) -> Any:
    """Mark the placeholder wherever it stands in strings, however nested, as text; everything else stays as it is."""
    if isinstance(value, str):
        return without_marks(value).replace(image_token, image_token[0] + LITERAL_MARK + image_token[1:])
    if isinstance(value, dict):
        return {key: protect_text(entry, image_token) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [protect_text(entry, image_token) for entry in value]
    return value


def _fields(value: Any) -> Any:
    """A message or part that is an object, such as those of OpenAI's client, as a dict; everything else as it is."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return value.model_dump() if callable(getattr(value, "model_dump", None)) else value  # of pydantic


def _normalize_message(message: Any, image_token: str) -> dict[str, Any]:
    message = _fields(message)
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(
            f"A message must be a dict with `role` and `content`, but one is {_shown(message)}; a batch is a list of "
            "lists of messages."
        )
    # A `None` comes from APIs and from columns of `datasets`, and means that there is nothing.
    others = {key: value for key, value in message.items() if value is not None and key != "content"}
    normalized: dict[str, Any] = protect_text(others, image_token)
    content = _fields(message.get("content"))
    if isinstance(content, Mapping) and content.get("type", "file") == "file" and {"path", "file"} & content.keys():
        content = [content]  # Gradio writes a file alone so
    if isinstance(content, str):
        normalized["content"] = [{"type": "text", "text": protect_text(content, image_token)}]
    elif isinstance(content, (list, tuple)):
        normalized["content"] = [_normalize_part(part, image_token) for part in content]
    elif "content" not in message and not message.get("tool_calls"):
        raise ValueError(f"A message has no `content`, only {', '.join(sorted(map(str, message)))}; write it there.")
    elif content is None:
        normalized["content"] = []  # as of a message that calls tools only; 4.57 reads the field of every message
    else:
        raise ValueError(
            f"The content of a message must be a string or a list of parts, but one is {_shown(content)}; a picture "
            'goes into a part: {"type": "image", "image": picture}.'
        )
    return normalized


def _normalize_part(part: Any, image_token: str) -> dict[str, Any]:
    part = {"type": "text", "text": part} if isinstance(part, str) else _fields(part)
    if not isinstance(part, Mapping):
        raise ValueError(
            f'A part of a message is {_shown(part)}; it must be a dict such as {{"type": "text", "text": "…"}} or '
            '{"type": "image", "image": picture}.'
        )
    part = _from_gradio({key: _fields(value) for key, value in part.items() if value is not None})
    kind = part.get("type", "text" if "text" in part else None)
    if kind == "text" and isinstance(part.get("text"), str):
        return protect_text({**part, "type": "text"}, image_token)
    if kind in ("image", "image_url"):
        found = [key for key in _IMAGE_KEYS if key in part]
        if not found:
            if unknown := sorted(str(key) for key in part if key not in _BESIDE_IMAGE):
                raise ValueError(
                    f"A part of the type {kind!r} has the key {unknown[0]!r}, which is none for a picture; use one of "
                    f'{", ".join(_IMAGE_KEYS)}, as in {{"type": "image", "image": picture}}.'
                )
            return {"type": "image"}  # a place for a picture that is passed apart
        image, name = part[found[0]], found[0].removeprefix("image_")
        if kind == "image_url" and isinstance(image, Mapping):
            if not image.get("url"):
                raise ValueError(
                    f"An image_url part has no `url`, only {', '.join(sorted(map(str, image))) or 'nothing'}; write "
                    '{"type": "image_url", "image_url": {"url": "https://…"}}.'
                )
            image = image["url"]
        return {"type": "image", name: image}
    raise ValueError(
        f"A part of a message has the type {kind!r} and the keys {sorted(map(str, part))}; MiniGPT-4 takes text and "
        'images: {"type": "text", "text": "…"} or {"type": "image", "image": picture}.'
    )


def _from_gradio(part: dict[str, Any]) -> dict[str, Any]:
    """The picture that a part of Gradio's histories holds, as a file or as a component; other parts as they are."""
    kind = part.get("type")
    if kind == "component":
        if str(part.get("component")).lower() != "image":
            raise ValueError(
                f"A message shows the Gradio component {part.get('component')!r}, which MiniGPT-4 cannot read; leave "
                "it out of the history, or write what it says as text."
            )
        file = part.get("value")
        if not isinstance(file, Mapping):
            return {"type": "image", "image": file}
    elif kind == "file" or (kind is None and "path" in part):
        file = part.get("file", part)
    else:
        return part
    source = next((key for key in ("path", "url") if isinstance(file, Mapping) and file.get(key)), None)
    if source is None:
        raise ValueError(
            f"A file of a message is {_shown(file)}, which names no picture; pass its `path` or `url`, as in "
            '{"type": "file", "file": {"path": "cat.png"}}.'
        )
    if not str(file.get("mime_type") or "image/").startswith("image/"):
        name = os.path.basename(str(file.get("orig_name") or without_content(str(file[source]))))
        raise ValueError(
            f"The file {name!r} of a message is of the type {file['mime_type']} and no picture; MiniGPT-4 takes text "
            "and images."
        )
    return {"type": "image", source: file[source]}


def _shown(value: Any) -> str:
    """What an error calls a value, in a few words and without the content of a picture."""
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value)} bytes"
    shorten = reprlib.Repr()
    shorten.maxstring = shorten.maxother = 30  # of what stands inside of a value
    shown = without_content(value) if isinstance(value, str) else value
    text = repr(shown) if isinstance(shown, str) else shorten.repr(shown)
    return text if len(text) <= 80 else f"{text[:77]}..."


__all__ = [
    "LENGTH_MARK",
    "LITERAL_MARK",
    "SEGMENT_MARK",
    "normalize_conversations",
    "place_images",
    "protect_text",
    "without_marks",
]
