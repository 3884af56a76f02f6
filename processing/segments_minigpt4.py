"""Text with placeholders to token ids: cut at the pictures, tokenized piece by piece, truncated and padded."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils import PaddingStrategy

from .conversations_minigpt4 import LENGTH_MARK, LITERAL_MARK, SEGMENT_MARK


@dataclass
class Row:
    """
    Token ids of one text.

    `head` and `tail` are what stands around the text (BOS, and EOS where the tokenizer adds one) and survive
    truncation. `spans` are the characters of the text, as it was passed, that each id of `ids` stands for.
    """

    text: str
    head: list[int] = field(default_factory=list)
    head_spans: list[tuple[int, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)

    def joined(self) -> tuple[list[int], list[tuple[int, int]]]:
        end = len(self.text)
        return self.head + self.ids + self.tail, self.head_spans + self.spans + [(end, end)] * len(self.tail)


@dataclass
class _Piece:
    """
    A stretch of one text: a picture's place, or text with the place of each of its characters in the whole.

    Of a text with a `limit` only so many tokens are kept; a BOS right in front of it is one of them.
    """

    start: int
    end: int
    text: str | None = None
    places: Sequence[int] = ()
    limit: int | None = None


def encode_rows(
    tokenizer: Any,
    texts: list[str],
    image_token: str,
    image_token_id: int,
    num_image_tokens: int,
    add_special_tokens: bool,
    with_spans: bool,
    **options: Any,
) -> list[Row]:
    """
    Tokenize texts as the original does: what stands before, between and behind pictures apart, BOS once in front.

    A SentencePiece tokenizer thus puts its dummy prefix on every piece. `options` go to the tokenizer.
    """
    rows = [Row(text) for text in texts]
    pieces: list[tuple[Row, _Piece]] = []
    for row in rows:
        start = _peel_bos(row, tokenizer)
        pieces += [(row, piece) for piece in _split(row.text, start, image_token)]
    written = [piece.text for _, piece in pieces if piece.text is not None]
    encoded = iter(tokenize_pieces(tokenizer, written, with_spans, options))
    for row, piece in pieces:
        if piece.text is None:
            row.ids += [image_token_id] * num_image_tokens
            row.spans += [(piece.start, piece.end)] * num_image_tokens
        else:
            ids, spans = next(encoded)
            kept = piece.limit
            if kept is not None and not row.ids:  # the limit counts the BOS that stands right in front
                kept -= len(row.head)
            row.ids += ids[:kept]
            row.spans += [_in_whole(piece, span) for span in spans[:kept]]
    if add_special_tokens:
        _add_special_tokens(rows, tokenizer)
    return rows


def _peel_bos(row: Row, tokenizer: Any) -> int:
    """Take the BOS token off the front of the text; returns where the rest begins."""
    bos = tokenizer.bos_token
    if not bos or not row.text.startswith(bos):
        return 0
    row.head, row.head_spans = [tokenizer.bos_token_id], [(0, len(bos))]
    return len(bos)


def _split(text: str, start: int, image_token: str) -> list[_Piece]:
    """Cut a text at its placeholders and marks, and take the marks of literal placeholders out."""
    pieces: list[_Piece] = []
    chars: list[str] = []
    places: list[int] = []

    def close(limit: int | None = None) -> None:
        if chars:
            pieces.append(_Piece(places[0], places[-1] + 1, "".join(chars), tuple(places), limit))
            chars.clear()
            places.clear()

    at = start
    marks = f"{re.escape(image_token)}|{SEGMENT_MARK}|{LITERAL_MARK}|{LENGTH_MARK}[0-9]+"
    for match in re.finditer(marks, text[start:]):
        begin, end = match.start() + start, match.end() + start
        chars += text[at:begin]
        places += range(at, begin)
        at = end
        if match.group() == image_token:
            close()
            pieces.append(_Piece(begin, end))
        elif match.group() == SEGMENT_MARK:
            close()
        elif match.group().startswith(LENGTH_MARK):
            close(limit=int(match.group()[1:]))
    chars += text[at:]
    places += range(at, len(text))
    close()
    return pieces


def tokenize_pieces(
    tokenizer: Any, texts: list[str], with_spans: bool, options: dict[str, Any]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Ids, and spans if asked for, of each text, without special tokens and all in one call."""
    if not texts:
        return []
    added = [0] * len(texts)
    if any(text.startswith(" ") for text in texts) and _swallows_space(tokenizer):
        added = [int(text.startswith(" ")) for text in texts]
    texts = [" " * count + text for count, text in zip(added, texts, strict=True)]
    options = {**options, "return_offsets_mapping": True} if with_spans else options
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, **options)
    found = encoded["offset_mapping"] if with_spans else [[]] * len(texts)
    spans = [
        [(max(start - count, 0), max(end - count, 0)) for start, end in own]
        for count, own in zip(added, found, strict=True)
    ]
    return list(zip(encoded["input_ids"], spans, strict=True))


def _swallows_space(tokenizer: Any) -> bool:
    """
    Whether the first space of a text serves as its dummy prefix, so that one more is needed.

    SentencePiece puts a prefix in front of a space too; the `tokenizers` library, for LLaMA with `legacy=False` and in
    transformers 5, does not.
    """
    none, one, two = tokenizer(["a", " a", "  a"], add_special_tokens=False)["input_ids"]
    return none == one != two and str(tokenizer.convert_ids_to_tokens(none[0])).startswith("▁")


def _in_whole(piece: _Piece, span: tuple[int, int]) -> tuple[int, int]:
    """A span of a piece as a span of the whole text; an empty one stays empty."""
    start, end = span
    if end > start:
        return piece.places[start], piece.places[end - 1] + 1
    place = piece.places[start] if start < len(piece.places) else piece.end
    return place, place


def _add_special_tokens(rows: list[Row], tokenizer: Any) -> None:
    """Put what the tokenizer adds in front and behind; what a text brings already is not added twice."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), len(full))
    front, behind = full[:start], full[start + len(plain) :]
    for row in rows:
        present = row.head + row.ids[: len(front)]
        if front and present[: len(front)] != front and not (row.head and row.head[0] in front):
            row.head, row.head_spans = front + row.head, [(0, 0)] * len(front) + row.head_spans
        row.tail = list(behind)


def truncate_rows(rows: list[Row], max_length: int, side: str, image_token_id: int) -> None:
    """
    Cut every row to `max_length` ids, at the `side` named, never into or through a picture.

    Raises:
        ValueError: if a picture would have to go.
    """
    for index, row in enumerate(rows):
        room = max(max_length - len(row.head) - len(row.tail), 0)
        gone = len(row.ids) - room
        if gone <= 0:
            continue
        cut = row.ids[:gone] if side == "left" else row.ids[room:]
        if image_token_id in cut:
            around = len(row.head) + len(row.tail)
            images = [place for place, token in enumerate(row.ids) if token == image_token_id]
            needed = around + (len(row.ids) - images[0] if side == "left" else images[-1] + 1)
            raise ValueError(
                f"Truncating row {index} to max_length={max_length} would cut a picture; set `max_length` to {needed} "
                "or more, or shorten the text that stands before the picture."
            )
        kept = slice(gone, None) if side == "left" else slice(0, room)
        row.ids, row.spans = row.ids[kept], row.spans[kept]


def padded_length(
    lengths: list[int], padding: Any, max_length: int | None, pad_to_multiple_of: int | None
) -> int | None:
    """Length that every row is padded to; `None` where there is no padding."""
    strategy = PaddingStrategy.LONGEST if padding is True else PaddingStrategy(padding or "do_not_pad")
    if strategy == PaddingStrategy.DO_NOT_PAD:
        return None
    length = max(lengths)
    if strategy == PaddingStrategy.MAX_LENGTH and max_length is not None:
        length = max(max_length, length)
    multiple = pad_to_multiple_of or 1
    return -(-length // multiple) * multiple


def decode_ids(
    tokenizer: Any,
    ids: list[int],
    placeholder: str,
    image_token_id: int,
    num_image_tokens: int,
    options: dict[str, Any],
) -> str:
    """Text of ids: what stands between pictures decoded apart, as it was tokenized, and each picture `placeholder`."""
    texts, start, own = [], 0, type(tokenizer).decode  # its object cuts a separator off every piece
    while start < len(ids):
        end = start
        is_image = ids[start] == image_token_id
        while end < len(ids) and (ids[end] == image_token_id) is is_image:
            end += 1
        pictures = -(-(end - start) // num_image_tokens)
        texts.append(placeholder * pictures if is_image else own(tokenizer, ids[start:end], **options))
        start = end
    return "".join(texts)


__all__ = ["Row", "decode_ids", "encode_rows", "padded_length", "tokenize_pieces", "truncate_rows"]
