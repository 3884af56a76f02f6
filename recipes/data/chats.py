"""Chats about pictures, read from the forms in which people have them.

LLaVA's `conversations`, whose turns have `from` and `value` with `<image>` where a picture goes, and `messages` with
`role` and `content`, a text or a list of parts. Pictures stand in the row (`image`, `images`) or in the parts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from recipes_minigpt4.data.bad_samples import BROKEN_CHAT, NO_ANSWER, NO_PICTURE, BadSampleError
from recipes_minigpt4.data.columns import CHATS, PICTURES


PLACE = "<image>"  # LLaVA's, in texts
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot"), "assistant"),
    "system": "system",
}
SOURCES = ("image", "url", "path", "base64", "image_url")  # of a picture in a part


def chat_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a .json file; of chats the columns that matter, as types that do not change from row to row."""
    if not rows or not any(name.lower() in CHATS for name in rows[0]):
        return rows
    known = {name for names in PICTURES for name in names}
    table = []
    for row in rows:
        chats = {name: json.dumps(value) for name, value in row.items() if name.lower() in CHATS}
        pictures = {name: _listed(value) for name, value in row.items() if name.lower() in known}
        table.append({**pictures, **chats})
    names = dict.fromkeys(name for row in table for name in row)
    return [{name: row.get(name) for name in names} for row in table]


def read_chat(messages: Any, images: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    A chat in one form.

    Args:
        messages: the turns, or a JSON text of them.
        images: the picture or pictures of the row, or None.

    Returns:
        Messages up to the last answer, whose contents are lists of parts, `{"type": "image"}` where a picture goes;
        and the pictures, in order, as they were given.

    Raises:
        BadSampleError: if it cannot be trained on.
    """
    try:
        turns = json.loads(messages) if isinstance(messages, str) else messages
    except ValueError as error:
        raise BadSampleError(BROKEN_CHAT, "no JSON") from error
    if not isinstance(turns, Sequence) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadSampleError(BROKEN_CHAT, "no messages")
    chat = [_message(turn) for turn in turns]
    while chat and chat[-1]["role"] != "assistant":
        chat.pop()
    if not chat or not any(message["role"] == "user" for message in chat):
        raise BadSampleError(NO_ANSWER)
    return _placed(chat, _listed(images))


def _placed(chat: list[dict[str, Any]], images: list[Any]) -> tuple[list[dict[str, Any]], list[Any]]:
    """A chat with bare places, and a picture for each of them."""
    places = [part for message in chat for part in message["content"] if part["type"] == "image"]
    waiting = [part for part in places if "image" not in part]
    if images and not places:
        first = next(message for message in chat if message["role"] == "user")
        places = waiting = [{"type": "image"} for _ in images]
        first["content"] = [*places, *first["content"]]
    if len(waiting) != len(images):
        raise BadSampleError(BROKEN_CHAT, f"{len(images)} pictures for {len(waiting)} places")
    if not places:
        raise BadSampleError(NO_PICTURE)
    for part, image in zip(waiting, images, strict=True):
        part["image"] = image
    return chat, [part.pop("image") for part in places]


def _listed(images: Any) -> list[Any]:
    if isinstance(images, list):
        return images
    return [] if images is None or images == "" else [images]


def _message(turn: Mapping[str, Any]) -> dict[str, Any]:
    said = turn.get("role") or turn.get("from")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    role = ROLES.get(str(said).lower())
    if role is None:
        raise BadSampleError(BROKEN_CHAT, f"the role {said!r}")
    if content is None:
        raise BadSampleError(BROKEN_CHAT, "a message without content")
    if role == "assistant":  # in which `<image>` is text
        content = " ".join(part["text"] for part in _parts(content) if part["type"] == "text")
        return {"role": role, "content": [{"type": "text", "text": content}]}
    parts = list(_parts(content))
    if not any(part["type"] == "image" for part in parts):  # otherwise `<image>` is text here as well
        parts = [piece for part in parts for piece in _cut(part["text"])]
    stripped = [{**part, "text": part["text"].strip()} if part["type"] == "text" else part for part in parts]
    return {"role": role, "content": [part for part in stripped if part["type"] == "image" or part["text"]]}


def _cut(text: str) -> Iterator[dict[str, Any]]:
    """A text cut at LLaVA's `<image>`."""
    for number, piece in enumerate(text.split(PLACE)):
        if number:
            yield {"type": "image"}
        yield {"type": "text", "text": piece}


def _parts(content: Any) -> Iterator[dict[str, Any]]:
    """The parts of a content: texts, and pictures with `image` if they bring it."""
    if not isinstance(content, Sequence):
        raise BadSampleError(BROKEN_CHAT, "a content that is neither text nor parts")
    for part in [content] if isinstance(content, str) else content:
        if isinstance(part, str):
            yield {"type": "text", "text": part}
        elif isinstance(part, Mapping) and part.get("type") in ("image", "image_url"):
            image = next((part[name] for name in SOURCES if part.get(name) is not None), None)
            image = (image.get("url") or image) if isinstance(image, Mapping) else image
            yield {"type": "image"} if image is None else {"type": "image", "image": image}
        elif isinstance(part, Mapping) and isinstance(part.get("text"), str):
            yield {"type": "text", "text": part["text"]}
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise BadSampleError(BROKEN_CHAT, f"a part of the type {kind!r}")
