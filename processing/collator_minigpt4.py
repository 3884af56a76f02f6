"""Batches for trainers, with labels that hold neither pads nor image placeholders."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.processing_utils import ProcessorMixin

from .batch_minigpt4 import MiniGPT4Batch


@dataclass
class MiniGPT4DataCollator:
    """
    Make batches of rows with text and pictures, for transformers' `Trainer` and for TRL.

    A row has a chat in `messages`, or `text` with one `<image>` per picture, and its pictures in `images` (a list, or
    `None`) or `image`. Pictures of a chat fill its places in order, and stand in front of the first message of the
    user where it has none.

    Args:
        processor ([`MiniGPT4Processor`]): what makes inputs of rows.
        assistant_only_loss: learn the replies of chats alone.
        max_length: the most tokens of a row; what stands behind is cut off, but never a picture.
        pad_to_multiple_of: round the length of rows up to such a number.
    """

    processor: Any
    assistant_only_loss: bool = False
    max_length: int | None = None
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> MiniGPT4Batch:
        """
        Args:
            rows: see above; all chats or all texts.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape (rows, longest row), padded on the right, and
            `pixel_values` of shape (images, 3, height, width). Labels are -100 at pads, at image placeholders and at
            what is not learned.

        Raises:
            ValueError: for rows of another form, or pictures that do not match their places.
        """
        options = {
            "padding": True,
            "padding_side": "right",
            "pad_to_multiple_of": self.pad_to_multiple_of,
            "truncation": self.max_length is not None,
            "max_length": self.max_length,
            "return_tensors": "pt",
        }
        if all("messages" in row for row in rows):
            batch = self._chats(rows, options)
        elif all("text" in row for row in rows) and not self.assistant_only_loss:
            pictures = [_pictures(row) for row in rows]
            batch = self.processor(text=[row["text"] for row in rows], images=pictures, **options)
        else:
            needed = "`messages`, whose replies are learned" if self.assistant_only_loss else "`messages` or `text`"
            raise ValueError(f"Each row needs {needed}; one has {', '.join(sorted(map(str, rows[0])))}.")
        replies = batch.pop("assistant_masks") if self.assistant_only_loss else batch["attention_mask"]
        batch["labels"] = batch["input_ids"].masked_fill((replies * batch["attention_mask"]) == 0, -100)
        return batch

    def _chats(self, rows: Sequence[Mapping[str, Any]], options: dict[str, Any]) -> Any:
        tensors = {"return_tensors": options.pop("return_tensors")}
        options["add_special_tokens"] = False  # templates write what they need
        if "processor_kwargs" in inspect.signature(ProcessorMixin.apply_chat_template).parameters:
            options = {"processor_kwargs": options}
        return self.processor.apply_chat_template(
            [_with_pictures(row["messages"], _pictures(row)) for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=self.assistant_only_loss,
            **tensors,
            **options,
        )


def _pictures(row: Mapping[str, Any]) -> list[Any]:
    one = [] if row.get("image") is None else [row["image"]]
    return one or list(row.get("images") or [])


def _with_pictures(messages: Sequence[Mapping[str, Any]], pictures: list[Any]) -> list[dict[str, Any]]:
    """Messages whose places for pictures are filled, in order."""
    chat = [{**message, "content": _parts(message.get("content"))} for message in messages]
    places = [part for message in chat for part in message["content"] if _is_place(part)]
    if pictures and not places:
        places = [{"type": "image"} for _ in pictures]
        first = next((message for message in chat if message.get("role") == "user"), chat[0])
        first["content"] = [*places, *first["content"]]
    if len(places) != len(pictures):
        raise ValueError(
            f"A chat has {len(places)} places for pictures but {len(pictures)} pictures; give one for each "
            '{"type": "image"}, or leave these out.'
        )
    for part, picture in zip(places, pictures, strict=True):
        part["image"] = picture
    return chat


def _parts(content: Any) -> list[Any]:
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    # Arrow gives every part all fields there are, `None` where it has none.
    return [
        {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
        for part in content
    ]


def _is_place(part: Any) -> bool:
    return isinstance(part, Mapping) and part.keys() == {"type"} and part["type"] == "image"


__all__ = ["MiniGPT4DataCollator"]
