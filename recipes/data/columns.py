"""Which columns of a data set hold pictures and text: those that are named, or found by the names that people use."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.redaction import redact


IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
# Names, without regard to case; those of a later line count where none of an earlier one is there.
PICTURES = (
    ("image", "images", "img", "picture", "pictures", "photo", "pixel_values", *IMAGE_ENDINGS),
    ("image_path", "img_path", "image_file", "file_name", "filename", "file", "filepath", "path"),
    ("image_url", "img_url", "url", "uri"),
)
TEXTS = (
    ("caption", "captions", "text", "txt", "answer", "description", "response", "output"),
    ("answers", "title", "alt", "alt_text", "sentence", "label_text"),
)
QUESTIONS = (("question", "instruction"),)
CHATS = ("conversations", "messages", "conversation")

EXAMPLE = 'a row is like {"image": "1.jpg", "caption": "A red square."}'
METADATA = (
    "write a metadata.csv beside the pictures, whose first line is `file_name,caption` and every other one like "
    "`1.jpg,A red square.`, or a text of the same name beside each picture, such as 1.txt for 1.jpg"
)


@dataclass(frozen=True)
class Columns:
    """
    The columns of a data set that are read.

    Args:
        image: with pictures or their paths; None where the messages of chats name them.
        text: with captions, answers, or chats.
        question: with the instruction of every row, if there is one.
        is_chat: whether `text` holds chats.
    """

    image: str | None
    text: str
    question: str | None = None
    is_chat: bool = False

    @property
    def names(self) -> list[str]:
        return [name for name in (self.image, self.question, self.text) if name is not None]


def choose_columns(
    found: Sequence[str], name: str, image: str | None, text: str | None, stage: int, classes: Sequence[str] = ()
) -> Columns:
    """
    The columns that are named, and for each that is not the one that people use for it.

    Args:
        found: the columns that there are.
        name: of the data set.
        image, text: what `--image_column` and `--text_column` name, or None.
        stage: 1 or 2; chats and questions are read for 2.
        classes: names of the class folders, if pictures lie in such.

    Raises:
        RecipeError: if a column is not there, none fits, or several do.
    """
    for option, column in (("image_column", image), ("text_column", text)):
        if column is not None and column not in found:
            raise RecipeError(
                f"{name} has no column {column!r}; it has {', '.join(found) or 'none'}, so name the right one with "
                f"--{option}."
            )
    chat = text if text is not None else next((column for column in found if column.lower() in CHATS), None)
    if chat is not None and chat.lower() in CHATS and (stage == 2 or text or not _fitting(found, TEXTS, (image,))):
        if stage == 1:
            raise RecipeError(
                f"{name} holds chats in the column {chat!r}, which stage 2 reads; stage 1 needs captions, where "
                f"{EXAMPLE}."
            )
        return Columns(image or _pick(found, PICTURES, (chat,), name, "image_column", False), chat, is_chat=True)
    image = image or _pick(found, PICTURES, (text,), name, "image_column")
    has_text = text is not None or _fitting(found, TEXTS, (image,))
    if classes and not has_text:
        shown = ", ".join(classes[:3]) + (", …" if len(classes) > 3 else "")
        raise RecipeError(f"{name} has pictures in class folders ({shown}) and no captions; {METADATA}.")
    if not has_text and set(found) == {image}:
        raise RecipeError(f"{name} has pictures and no captions; {METADATA}.")
    text = text or _pick(found, TEXTS, (image,), name, "text_column")
    assert image is not None and text is not None  # or `_pick` had refused
    questions = _fitting(found, QUESTIONS, (image, text)) if stage == 2 else []
    if len(questions) > 1:
        raise RecipeError(f"{name} has several columns of instructions, {' and '.join(questions)}; remove one.")
    return Columns(image, text, questions[0] if questions else None)


def _fitting(found: Sequence[str], tiers: Sequence[Sequence[str]], others: Sequence[str | None]) -> list[str]:
    """The columns that have names of the first line of which there is any."""
    for names in tiers:
        if fitting := [column for column in found if column.lower() in names and column not in others]:
            return fitting
    return []


def _pick(
    found: Sequence[str],
    tiers: Sequence[Sequence[str]],
    others: Sequence[str | None],
    name: str,
    option: str,
    needed: bool = True,
) -> str | None:
    fitting = _fitting(found, tiers, others)
    if len(fitting) > 1:
        raise RecipeError(
            f"{name} has several columns that could be meant, {' and '.join(fitting)}; name one with --{option}."
        )
    if not fitting and needed:
        kind = "pictures" if option == "image_column" else "captions"
        raise RecipeError(
            f"{name} has no column with a name that is known for {kind}; it has {', '.join(found) or 'none'}, so name "
            f"the right one with --{option}, or write the data so that {EXAMPLE}."
        )
    return fitting[0] if fitting else None


def tell_columns(name: str, columns: Sequence[str]) -> None:
    """A line that says what is read, once in a run."""
    if os.environ.get("RANK", "0") == "0":
        shown = ", ".join(columns[:-1]) + " and " + columns[-1] if len(columns) > 1 else columns[0]
        print(f"data: {shown} of {redact(name)}", flush=True)
