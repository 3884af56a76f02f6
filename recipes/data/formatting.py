"""The rows that TRL trains on, made of image–text pairs: captions cleaned and cut, prompts from the chat template.

A row is TRL's prompt–completion with `images`, so only the answer carries loss. Rows are made when they are asked for:
no picture is decoded ahead of its batch. A pair that cannot be used gives a row whose `skipped` tells why; the
collator leaves it out and the trainer counts it (`bad_samples.py`).
"""

import hashlib
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import PIL.Image
from datasets import Dataset, Image, IterableDataset
from datasets.utils.file_utils import xopen

from processing_minigpt4 import load_chat_template
from processing_minigpt4.conversations_minigpt4 import LENGTH_MARK, protect_text, without_marks
from processing_minigpt4.image_opening_minigpt4 import open_image, without_content
from processing_minigpt4.segments_minigpt4 import tokenize_pieces
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.bad_samples import NO_CAPTION, NO_PICTURE, BadSampleError, picture_error
from recipes_minigpt4.data.sources import PAIR
from recipes_minigpt4.utils.errors import RecipeError, one_line


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
    """

    tokenizer: Any
    image_token: str
    prompts: tuple[str, ...]
    start: str
    end: str
    max_txt_len: int | None
    clean: bool
    seed: int = 42

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
                nothing to read.
        """
        number = pair.get("prompt")
        prompt = self.prompts[self.draw(pair["text"]) if number is None else number]
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
        An answer as it is trained: cleaned, ended, and cut to `max_txt_len` tokens.

        Raises:
            BadSampleError: if nothing is left of it.
        """
        text = without_marks(text) if isinstance(text, str) else ""
        text = clean_caption(text) if self.clean else text
        if not text.strip():
            raise BadSampleError(NO_CAPTION)
        whole = self.start + text + self.end
        kept, *length = truncate(whole, self.tokenizer, self.max_txt_len).partition(LENGTH_MARK)
        return "".join((protect_text(kept, self.image_token), *length))


def name_of(pair: Mapping[str, Any]) -> str:
    """What people call a sample that is skipped: its name, the file of its picture, or the start of its text."""
    stored = pair.get("image") or {}
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


def stage1_rows(pairs: Pairs, processor: Any, args: DataArguments) -> Pairs:
    """Rows of stage 1, `[BOS][image][caption][line break]`, with cleaned captions of at most 32 tokens."""
    rows = Rows(
        tokenizer=processor.tokenizer,
        image_token=processor.image_token,
        prompts=((processor.tokenizer.bos_token or "") + processor.image_token,),
        start="",
        end="\n" if args.end_sym is None else args.end_sym,
        max_txt_len=args.max_txt_len or 32,
        clean=True,
    )
    return _with_rows(pairs, rows)


def stage2_rows(pairs: Pairs, processor: Any, args: DataArguments, seed: int = 42) -> Pairs:
    """
    Rows of stage 2: an instruction about the picture, and an answer of at most 160 tokens.

    Each row has one of the four `INSTRUCTIONS`, drawn once from `seed`; the original draws one per batch.

    Raises:
        RecipeError: if the chat template cannot be used for training.
    """
    prompts, start, end = instruction_format(processor, args.instruction_template)
    rows = Rows(
        tokenizer=processor.tokenizer,
        image_token=processor.image_token,
        prompts=prompts,
        start=start,
        end=end if args.end_sym is None else args.end_sym,
        max_txt_len=args.max_txt_len or 160,
        clean=False,
        seed=seed,
    )
    return _with_rows(pairs, rows)


def _with_rows(pairs: Pairs, rows: Rows) -> Pairs:
    """Number the prompt of every pair, which costs no copy of the pictures, and make rows on access."""
    # Rows are tokenized one by one, in workers that share the cores: threads for each would cost more than the tokens.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if isinstance(pairs, IterableDataset):
        return pairs.map(rows.row, remove_columns=list(PAIR))
    draw = random.Random(rows.seed)
    prompts = [draw.randrange(len(rows.prompts)) for _ in range(len(pairs))]
    # `rows` decodes by itself, so that it can say which picture cannot be read.
    return pairs.cast_column("image", Image(decode=False)).add_column("prompt", prompts).with_transform(rows)


def rows_of(rows: Dataset) -> tuple[Rows, Dataset]:
    """What makes the rows of `stage1_rows` or `stage2_rows`, and their pictures as stored, in the column `image`."""
    return rows.format["format_kwargs"]["transform"], rows.with_format(None).select_columns("image")


def with_features(rows: Dataset, numbers: list[int]) -> Dataset:
    """The same rows with numbers of stored features in `images`; the pictures are neither read nor decoded."""
    make, _ = rows_of(rows)
    return rows.with_format(None).remove_columns("image").add_column("feature", numbers).with_transform(make)


def instruction_format(processor: Any, template: str | None = None) -> tuple[tuple[str, ...], str, str]:
    """
    What a chat template puts around a picture, an instruction and an answer.

    Args:
        processor: the model's processor.
        template: name or Jinja text of the template; None is the processor's own, except that a processor that chats
            in `vicuna_v0` trains in `vicuna_v0_alignment`, as the original does.

    Returns:
        One prompt per instruction, with the image token in its place; the text between prompt and answer, mostly
        none; the text that ends an answer: a separator, the end-of-turn token, or EOS.

    Raises:
        RecipeError: if there is no such template, or if it writes another prompt once the answer is there.
    """
    own = processor.chat_template
    try:
        if template is None:
            template = "vicuna_v0_alignment" if own == load_chat_template("vicuna_v0") else own
        text = template if "{" in template else load_chat_template(template, processor.tokenizer)
    except ValueError as error:
        raise RecipeError(f"{one_line(error)}.") from error
    # The system text of `llama2` is for chats; the original trains without.
    system = [{"role": "system", "content": ""}] if text == load_chat_template("llama2") else []

    def render(instruction: str, *answer: dict[str, Any]) -> str:
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        chat = [*system, {"role": "user", "content": content}, *answer]
        return str(
            processor.apply_chat_template(chat, chat_template=text, tokenize=False, add_generation_prompt=not answer)
        )

    prompts = tuple(render(instruction) for instruction in INSTRUCTIONS)
    answer = "ANSWER"
    whole = render(INSTRUCTIONS[0], {"role": "assistant", "content": [{"type": "text", "text": answer}]})
    start, found, end = whole.removeprefix(prompts[0]).partition(answer)
    if not whole.startswith(prompts[0]) or not found:
        raise RecipeError(
            "The chat template writes another prompt once the answer is there, so it cannot be trained; choose one "
            "with --instruction_template."
        )
    eos = processor.tokenizer.eos_token or ""
    end = end.partition(eos)[0] + eos if eos and eos in end else end.strip() or eos
    return prompts, start, end
