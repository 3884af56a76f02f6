"""Folders as `minigpt4 evaluate` leaves them, made without a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from recipes_minigpt4.evaluation.pictures import keep_pictures
from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.replies import ReplyStore, Said, reply_to
from recipes_minigpt4.evaluation.suite import Suite


def picture_of(number: int) -> Picture:
    """A picture that no other number has."""
    return Picture(f"picture {number}", Image.new("RGB", (40, 30), (number % 256, number // 256, 90)))


def store_replies(
    folder: Path,
    suite: Suite,
    said: Mapping[str, Sequence[str]],
    captions: Sequence[str] = ("a dog", "a red ball"),
    revision: str | None = None,
) -> list[Question]:
    """
    Write the replies of models, and the pictures.

    Args:
        folder: the output folder.
        suite: whose questions, about `picture_of(0)` and so on.
        said: label → a reply per picture, the same to all questions about it.
        captions: of every picture.
        revision: of all models; default: one of each label's own.
    """
    count = len(next(iter(said.values())))
    rows = [{"image": picture_of(number), "captions": list(captions)} for number in range(count)]
    questions = [suite.questions(row) for row in rows]
    for label, texts in said.items():
        store = ReplyStore(folder / label / suite.name)
        for asked, text in zip(questions, texts, strict=True):
            for question in asked:
                store.append(reply_to(question, revision or f"revision of {label}", Said(text, True)))
        store.close()
    every = [question for asked in questions for question in asked]
    keep_pictures(folder, every)
    return every
