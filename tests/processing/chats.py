"""Chats for the tests of this folder, in few words."""

from typing import Any

import PIL.Image


def red(number: int = 0) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (9, 7), (200, number, 0))


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(value: Any = None) -> dict[str, Any]:
    return {"type": "image"} if value is None else {"type": "image", "image": value}


def user(*parts: Any) -> dict[str, Any]:
    whole = len(parts) == 1 and isinstance(parts[0], str)
    return {"role": "user", "content": parts[0] if whole else [text(p) if isinstance(p, str) else p for p in parts]}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def tokenized(processor: Any, chats: Any, **options: Any) -> Any:
    return processor.apply_chat_template(chats, tokenize=True, return_dict=True, **options)


def marked_text(processor: Any, row: Any, mask: Any) -> list[str]:
    """The stretches of a row that the mask marks, as text."""
    stretches: list[list[int]] = []
    for place, (token, marked) in enumerate(zip(row, mask, strict=True)):
        if marked and (place == 0 or not mask[place - 1]):
            stretches.append([])
        if marked:
            stretches[-1].append(int(token))
    return [processor.tokenizer.decode(stretch) for stretch in stretches]
