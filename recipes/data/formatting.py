"""The rows that TRL trains on, made of image–text pairs: captions cleaned and cut, prompts from the chat template.

A row is TRL's prompt–completion with `images`, so only the answer carries loss. Rows are made when they are asked for:
no picture is decoded ahead of its batch. A pair that cannot be used gives a row whose `skipped` tells why; the
collator leaves it out and the trainer counts it (`bad_samples.py`).
"""

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import PIL.Image
from datasets import Dataset, Image, IterableDataset
from datasets.utils.file_utils import xopen

from processing_minigpt4.conversations_minigpt4 import LENGTH_MARK, SEGMENT_MARK, protect_text, without_marks
from processing_minigpt4.image_opening_minigpt4 import open_image, without_content
from processing_minigpt4.segments_minigpt4 import encode_rows, tokenize_pieces
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.bad_samples import NO_CAPTION, NO_PICTURE, BadSampleError, picture_error
from recipes_minigpt4.data.chat_format import ChatFormat, ChatText, chat_format, chat_text, ended_once
from recipes_minigpt4.data.grouping import EXPECTED, Grouping, add_lengths, group_stream
from recipes_minigpt4.data.sources import PAIR
from recipes_minigpt4.utils.errors import RecipeError


# Stage 2 asks one of these (released code, `prompts/alignment.txt`).
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)

BLANK = PIL.Image.new("RGB", (1, 1))  # stands in the row of a pair that is skipped


def clean_caption(text: str, max_words: int = 50) -> str:
    """
    Clean a caption of the web as BLIP does, whose cleaner stage 1 of the original uses.

    Lower case; each of `. ! " ( ) * # : ; ~` becomes a space; runs of white space collapse; the first `max_words`
    words, which only spaces part, are kept. A single tab or line break stays, except a line break at the end.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    words = re.sub(r"\s{2,}", " ", text).removesuffix("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


@dataclass(frozen=True)
class Rows:
    """
    Turns pairs into TRL's prompt–completion rows; applied to a batch when it is asked for.

    Args:
        tokenizer: the language model's.
        image_token: what marks a picture; in a caption it is text and stays so.
        prompts: texts with it; a pair's `prompt` says which it gets.
        start: text that the template puts between prompt and answer, mostly none.
        end: text that ends an answer.
        max_txt_len: longest answer in tokens, `end` included, or None.
        clean: whether captions pass `clean_caption`.
        seed: of the prompts that are drawn.
        format: the chat template, for chats and for instructions that rows bring.
        image_tokens: of a picture, for the lengths of rows.
    """

    tokenizer: Any
    image_token: str
    prompts: tuple[str, ...]
    start: str
    end: str
    max_txt_len: int | None
    clean: bool
    seed: int = 42
    format: ChatFormat | None = None
    image_tokens: int = 0

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        pairs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        rows = [self.row(pair) for pair in pairs]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def row(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """
        The row of a pair, or a blank one with `skipped`, a mapping of `cause` and `name`, if it cannot be used.

        Args:
            pair: `image` as `datasets` stores it, or the number of its `feature` (see `with_features`); `text`; in
                data of known length `prompt`, the number of its prompt; in streams `name`, and `cause` where there is
                nothing to read. In stage 2 also `question`, its instruction; or `chat` and `images`, whose rows have
                `learned`, the stretches of the completion that carry loss, and `asked`, how many of the pictures stand
                in the prompt. `expected` of a pair that is grouped by length is handed on.
        """
        if EXPECTED in pair:
            plain = {name: value for name, value in pair.items() if name != EXPECTED}
            return {**self.row(plain), EXPECTED: pair[EXPECTED]}
        if "chat" in pair:
            return self.chat_row(pair)
        prompt = self.prompt(pair)
        blank = pair.get("feature", BLANK)
        try:
            if pair.get("cause"):
                raise BadSampleError(pair["cause"])
            completion = self.completion(pair["text"])
            image = blank if "feature" in pair else self.picture(pair["image"])
        except BadSampleError as error:
            skipped = error.record(name_of(pair))
            return {"prompt": prompt, "completion": self.end or "-", "images": [blank], "skipped": skipped}
        return {"prompt": prompt, "completion": completion, "images": [image], "skipped": None}

    def is_cut(self, row: Mapping[str, Any]) -> bool:
        """Whether something of a row's last answer, or of its end, is gone."""
        completion = str(row["completion"])
        return LENGTH_MARK in completion or not completion.endswith(protect_text(self.end, self.image_token))

    def chat_row(self, pair: Mapping[str, Any]) -> dict[str, Any]:
        """The row of a chat, or of a pair from a source that is mixed with chats."""
        if _is_plain(pair):
            plain = {name: value for name, value in pair.items() if name not in ("chat", "images")}
            return {**self.row(plain), "learned": None, "asked": None}
        try:
            text = self.chat_text(pair)
            images = [self.picture(image) for image in pair["images"]]
            images = images[: (text.prompt + text.completion).count(self.image_token)]
        except BadSampleError as error:
            skipped = error.record(name_of(pair))
            blank = {"prompt": self.prompts[0], "completion": self.end or "-", "images": [BLANK]}
            return {**blank, "skipped": skipped, "learned": None, "asked": None}
        row = {"prompt": text.prompt, "completion": text.completion, "images": images, "skipped": None}
        return {**row, "learned": list(text.learned), "asked": text.prompt.count(self.image_token)}

    def chat_text(self, pair: Mapping[str, Any]) -> ChatText:
        """The text of a pair's chat, or a `BadSampleError` that tells why there is none."""
        assert self.format is not None  # stage 1 reads no chats
        if pair["cause"]:
            raise BadSampleError(pair["cause"])
        return chat_text(self.format, json.loads(pair["chat"]), self.end, self.cut, self.image_token)

    def measure(self, batch: Mapping[str, Sequence[Any]]) -> list[tuple[int, int] | None]:
        """
        How long rows will be, without reading a picture.

        Args:
            batch: columns of pairs, see `row`; those of pictures may be missing.

        Returns:
            For each tokens of the row, those of its pictures included, and tokens that carry loss; None if it has no
            row.
        """
        pairs = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found: list[tuple[int, int] | None] = []
        for pair in pairs:
            try:
                found.append(self._measure(pair))
            except BadSampleError:
                found.append(None)
        return found

    def _measure(self, pair: Mapping[str, Any]) -> tuple[int, int]:
        if "chat" in pair and not _is_plain(pair):
            text = self.chat_text(pair)
            learned = sum(self._tokens(text.completion[begin:end]) for begin, end in text.learned)
            return self._tokens(text.prompt + SEGMENT_MARK + text.completion), learned
        if pair.get("cause"):
            raise BadSampleError(pair["cause"])
        answer = self._tokens(self.completion(pair["text"]))
        return self._tokens(self.prompt(pair)) + answer, answer

    def _tokens(self, text: str) -> int:
        """Tokens of a text as the processor makes them, those of its pictures included."""
        image = (self.image_token, -1, self.image_tokens)
        (row,) = encode_rows(self.tokenizer, [text], *image, add_special_tokens=False, with_spans=False)
        return len(row.joined()[0])

    def prompt(self, pair: Mapping[str, Any]) -> str:
        """The prompt of a pair: with its own instruction, or with one of those of all."""
        question = str(pair.get("question") or "").replace(self.image_token, "").strip()
        if question and self.format is not None:
            return self.format.prompt(question)
        number = pair.get("prompt")
        return self.prompts[self.draw(pair["text"]) if number is None else number]

    def draw(self, text: str | None) -> int:
        """One of the prompts for a sample of a stream, always the same."""
        digest = hashlib.blake2b(f"{self.seed} {text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % len(self.prompts)

    def picture(self, stored: Mapping[str, Any] | None) -> PIL.Image.Image:
        """
        Decode a picture: RGB, or RGBA if it has transparency, turned as its EXIF data say.

        Raises:
            BadSampleError: if there is none, or it cannot be read.
        """
        content = self.content(stored)
        try:
            if not content:
                raise ValueError
            return open_image(content, keep_transparency=True)
        except ValueError as error:
            raise picture_error(error.__cause__ or error, content) from error

    def content(self, stored: Mapping[str, Any] | None) -> bytes:
        """
        The bytes of a picture's file, not decoded.

        Raises:
            BadSampleError: if there are none.
        """
        if stored is None or (stored["bytes"] is None and not stored["path"]):
            raise BadSampleError(NO_PICTURE)
        try:
            return bytes(_file_content(stored["path"]) if stored["bytes"] is None else stored["bytes"])
        except Exception as error:  # whatever file systems and networks raise
            raise picture_error(error, None) from error

    def completion(self, text: str | None) -> str:
        """
        An answer as it is trained: cleaned, ended once, and cut to `max_txt_len` tokens.

        Raises:
            BadSampleError: if nothing is left of it.
        """
        text = without_marks(text) if isinstance(text, str) else ""
        text = clean_caption(text) if self.clean else text
        text = ended_once(text, self.end)
        if not text.strip():
            raise BadSampleError(NO_CAPTION)
        return self.cut(self.start + text + self.end)[0]

    def cut(self, whole: str) -> tuple[str, bool]:
        """An answer with its end, of at most `max_txt_len` tokens, without placeholders; and whether it is cut."""
        shorter = truncate(whole, self.tokenizer, self.max_txt_len)
        kept, *length = shorter.partition(LENGTH_MARK)
        return "".join((protect_text(kept, self.image_token), *length)), shorter != whole


def _is_plain(pair: Mapping[str, Any]) -> bool:
    """Whether what comes from a source that is mixed with chats is a picture with a text."""
    return pair["chat"] is None and (not pair["cause"] or bool(pair.get("image")))


def name_of(pair: Mapping[str, Any]) -> str:
    """What people call a sample that is skipped: its name, the file of its picture, or the start of its text."""
    stored = pair.get("image") or next(iter(pair.get("images") or ()), None) or {}
    if named := pair.get("name") or stored.get("path"):
        return without_content(str(named))
    return f"a picture described as {without_content(str(pair.get('text')))[:40]!r}"


def _file_content(path: str) -> bytes:
    # `xopen` would take `::` in a path for an archive's.
    with xopen(path, "rb") if "://" in path else open(path, "rb") as file:
        return bytes(file.read())


def truncate(text: str, tokenizer: Any, max_tokens: int | None) -> str:
    """
    Cut a text behind its first `max_tokens` tokens (released code: `end_sym` counts and can be cut off).

    Returns:
        The text of these tokens; where no text has just them (half a character, a lone dummy prefix), the whole text
        with a mark that tells the processor how many tokens to keep.
    """

    def ids_of(text: str) -> list[int]:
        return tokenize_pieces(tokenizer, [text], with_spans=False, options={})[0][0]

    ids = ids_of(text)
    if max_tokens is None or len(ids) <= max_tokens:
        return text
    shorter = str(tokenizer.decode(ids[:max_tokens], clean_up_tokenization_spaces=False))
    return shorter if ids_of(shorter) == ids[:max_tokens] else f"{text}{LENGTH_MARK}{max_tokens}"


Pairs: TypeAlias = Dataset | IterableDataset


def stage1_rows(pairs: Pairs, processor: Any, args: DataArguments, grouping: Grouping | None = None) -> Pairs:
    """
    Rows of stage 1, `[BOS][image][caption][line break]`, with cleaned captions of at most 32 tokens.

    With `grouping` they come in batches of like length (`grouping.py`).
    """
    return _with_rows(pairs, rows_maker(1, processor, args), grouping)


def stage2_rows(
    pairs: Pairs, processor: Any, args: DataArguments, seed: int = 42, grouping: Grouping | None = None
) -> Pairs:
    """
    Rows of stage 2: an instruction about the picture, and an answer of at most 160 tokens.

    With `grouping` they come in batches of like length (`grouping.py`).

    A row without an instruction of its own has one of the four `INSTRUCTIONS`, drawn once from `seed`; the original
    draws one per batch. Of chats, every answer is at most that long, and the first that is longer ends its chat.

    Raises:
        RecipeError: if the chat template cannot be used for training, or the tokenizer not for chats.
    """
    if "chat" in (pairs.column_names or ()) and not processor.tokenizer.is_fast:
        raise RecipeError(
            "Chats need a fast tokenizer, which tells where answers stand in a text, and that of the language model "
            "is none; write single questions and answers in its place."
        )
    return _with_rows(pairs, rows_maker(2, processor, args, seed), grouping)


def rows_maker(stage: int, processor: Any, args: DataArguments, seed: int = 42) -> Rows:
    """What makes the rows of a stage, 1 or 2; see `stage1_rows` and `stage2_rows`."""
    if stage == 1:
        return Rows(
            tokenizer=processor.tokenizer,
            image_token=processor.image_token,
            prompts=((processor.tokenizer.bos_token or "") + processor.image_token,),
            start="",
            end="\n" if args.end_sym is None else args.end_sym,
            max_txt_len=args.max_txt_len or 32,
            clean=True,
            image_tokens=processor.num_image_tokens,
        )
    written = chat_format(processor, args.instruction_template)
    return Rows(
        tokenizer=processor.tokenizer,
        image_token=processor.image_token,
        prompts=tuple(map(written.prompt, INSTRUCTIONS)),
        start=written.start,
        end=written.end if args.end_sym is None else args.end_sym,
        max_txt_len=args.max_txt_len or 160,
        clean=False,
        seed=seed,
        format=written,
        image_tokens=processor.num_image_tokens,
    )


def _with_rows(pairs: Pairs, rows: Rows, grouping: Grouping | None) -> Pairs:
    """Number the prompt of every pair, which costs no copy of the pictures, and make rows on access."""
    # Rows are tokenized one by one, in workers that share the cores: threads for each would cost more than the tokens.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(pairs, IterableDataset):
        columns = pairs.column_names or list(PAIR)
        grouped = pairs if grouping is None else group_stream(pairs, rows.measure, grouping)
        return grouped.map(rows.row, remove_columns=columns)
    draw = random.Random(rows.seed)
    prompts = [draw.randrange(len(rows.prompts)) for _ in range(len(pairs))]
    # `rows` decodes by itself, so that it can say which picture cannot be read.
    stored = pairs.cast_column("image", Image(decode=False)) if "image" in pairs.column_names else pairs
    stored = stored.add_column("prompt", prompts)
    return (stored if grouping is None else add_lengths(stored, rows.measure)).with_transform(rows)


def rows_of(rows: Dataset) -> tuple[Rows, Dataset]:
    """
    What makes the rows of `stage1_rows` or `stage2_rows`, and their pictures as stored, in the column `image`.

    Raises:
        RecipeError: for chats, which may have several pictures.
    """
    if "chat" in rows.column_names:
        raise RecipeError("Features are cached for rows of one picture, not for chats; leave out --cache_features.")
    return rows.format["format_kwargs"]["transform"], rows.with_format(None).select_columns("image")


def with_features(rows: Dataset, numbers: list[int]) -> Dataset:
    """The same rows with numbers of stored features in `images`; the pictures are neither read nor decoded."""
    make, _ = rows_of(rows)
    return rows.with_format(None).remove_columns("image").add_column("feature", numbers).with_transform(make)


def instruction_format(processor: Any, template: str | None = None) -> tuple[tuple[str, ...], str, str]:
    """
    What a chat template puts around a picture, an instruction and an answer.

    Args:
        processor, template: see `chat_format`.

    Returns:
        One prompt per instruction, with the image token in its place; the text between prompt and answer, mostly
        none; the text that ends an answer: a separator, the end-of-turn token, or EOS.

    Raises:
        RecipeError: if there is no such template, or if it writes another prompt once the answer is there.
    """
    written = chat_format(processor, template)
    return tuple(map(written.prompt, INSTRUCTIONS)), written.start, written.end
