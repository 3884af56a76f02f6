"""A chat as text and as token ids: how much of one that was computed begins another, whatever its ids."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from processing_minigpt4.conversations_minigpt4 import SEGMENT_MARK, without_marks
from processing_minigpt4.segments_minigpt4 import encode_rows


NEAR_END = 32  # tokens at the end of a reply, each of which may be the last that stays; before, every 16th may be


@dataclass(frozen=True)
class Transcript:
    """
    What a chat template writes, and ids that stand for it, not always those that a tokenizer would give now.

    Args:
        text: as the template wrote it, with the marks of the processor; the ids themselves, if the tokenizer cannot
            tell which characters a token stands for.
        ids: token ids, image placeholders included.
        cuts: place in the text → number of ids before it, wherever no token stands across.
        pictures: place in the text and picture, in their order.
    """

    text: Sequence[Any]
    ids: list[int]
    cuts: dict[int, int]
    pictures: list[tuple[int, Any]]

    def shared(self, other: "Transcript", length: int, same_ids: bool = False) -> int:
        """
        The place up to which the first `length` ids stand for what `other` begins with.

        At least one id of `other` is left, for the next token to be computed from. With `same_ids`, those before are
        the ids of `other` too, and not others that stand for the same text.
        """
        end = _shared(self.text, other.text)
        length = min(length, _shared(self.ids, other.ids)) if same_ids else length
        for (place, one), (_, another) in zip(self.pictures, other.pictures, strict=False):
            if one is not another:
                end = min(end, place)
        fits = [
            place
            for place, count in self.cuts.items()
            if place <= end and count <= length and other.cuts.get(place, len(other.ids)) < len(other.ids)
        ]
        return max(fits, default=0)

    def continued(self, other: "Transcript", place: int) -> "Transcript":
        """`other`, with ids of this one up to a place that they share."""
        kept, gone = self.cuts[place], other.cuts[place]
        cuts = {at: count for at, count in self.cuts.items() if at <= place}
        cuts |= {at: count - gone + kept for at, count in other.cuts.items() if at > place}
        return replace(other, ids=self.ids[:kept] + other.ids[gone:], cuts=cuts)

    def with_reply(self, ids: list[int], processor: Any) -> "Transcript":
        """The same with the ids of a reply behind it, whose text goes as far as ids and text tell the same."""
        if not isinstance(self.text, str):
            cuts = {count: count for count in range(len(self.ids) + len(ids) + 1)}
            return replace(self, text=[*self.text, *ids], ids=self.ids + ids, cuts=cuts)
        decode = partial(processor.decode, clean_up_tokenization_spaces=False)
        whole = decode(ids)
        # Bytes that are no character, what passes for a picture, and what the processor takes out.
        odd = [place for place, one in enumerate(whole) if one == "\ufffd" or one != without_marks(one)]
        usable = whole[: min([len(whole), *odd])].partition(processor.image_token)[0]
        start, before, cuts = len(self.text), len(self.ids), dict(self.cuts)
        if cuts.get(start) == before:  # not where the tokenizer has put an end there, as some do
            for count in range(1, len(ids) + 1):
                if count % 16 == 0 or count > len(ids) - NEAR_END:
                    text = decode(ids[:count])
                    if usable.startswith(text):
                        cuts.setdefault(start + len(text), before + count)
        return replace(self, text=self.text + usable, ids=self.ids + ids, cuts=cuts)


def write_transcript(processor: Any, messages: list[dict[str, Any]]) -> Transcript:
    """
    What the processor's chat template makes of messages that end with a question.

    The ids are those that `apply_chat_template` gives; pictures are not opened.

    Raises:
        ValueError: if the template leaves a picture out.
    """
    tokenizer, image_token = processor.tokenizer, processor.image_token
    text = processor.apply_chat_template(messages, add_generation_prompt=True, segment_mark=SEGMENT_MARK)
    whole = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    (row,) = encode_rows(
        tokenizer,
        [text],
        image_token,
        processor.image_token_id,
        processor.num_image_tokens,
        add_special_tokens=not whole,
        with_spans=tokenizer.is_fast,
    )
    ids, spans = row.joined()
    pictures = pictures_of(messages)
    places = [match.start() for match in re.finditer(re.escape(image_token), text)]
    if len(places) != len(pictures):
        raise ValueError(
            f"The chat template has {len(places)} places for the {len(pictures)} pictures of this conversation; use "
            "one that keeps them all, such as 'vicuna_v0'."
        )
    if tokenizer.is_fast:
        return Transcript(text, ids, _cuts(text, spans), list(zip(places, pictures, strict=True)))
    firsts = [place for place, token in enumerate(ids) if token == processor.image_token_id]
    firsts = firsts[:: processor.num_image_tokens]
    cuts = {count: count for count in range(len(ids) + 1)}
    return Transcript(ids, ids, cuts, list(zip(firsts, pictures, strict=True)))


def pictures_of(messages: list[dict[str, Any]]) -> list[Any]:
    """The pictures of a chat, in their order."""
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    return [part.get("image", part) for part in parts if part.get("type") == "image"]


def _shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many elements of two sequences are the same from the first on."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (here, there) in pairs if here != there), min(len(one), len(other)))


def _cuts(text: str, spans: list[tuple[int, int]]) -> dict[int, int]:
    """Where a text can be cut between two tokens: not inside of a character or picture, nor where spans have gaps."""
    starts = [len(text)] * (len(spans) + 1)
    for index in range(len(spans) - 1, -1, -1):
        starts[index] = min(spans[index][0], starts[index + 1])
    cuts, end = {0: 0}, 0
    for index, start in enumerate(starts):
        if end <= start and not without_marks(text[end:start]):
            cuts.setdefault(end, index)
        end = max(end, spans[index][1]) if index < len(spans) else end
    return cuts


__all__ = ["Transcript", "pictures_of", "write_transcript"]
