"""Suites on a few rows while a stage trains: `--eval_suites failures captions`.

The stages know this file by name alone, as they know the embedded world, for training stands below evaluation.
"""

from collections.abc import Sequence
from typing import Any

from datasets import Image

from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.replies import reply_to
from recipes_minigpt4.evaluation.speakers import ChatSpeaker
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.utils.errors import RecipeError


BATCH_SIZE = 8


class SuitesOnRows:
    """
    Asks a model that is trained about the first rows of the held-out data.

    Args:
        names: of suites that need no judge and no data but captions.
        pairs: held-out pairs, columns `image` and `text`.
        count: how many of their first rows.

    Raises:
        RecipeError: for another suite, and for chats, which have no caption.
    """

    def __init__(self, names: Sequence[str], pairs: Any, count: int) -> None:
        if unknown := [name for name in names if name not in ("failures", "captions")]:
            raise RecipeError(
                f"--eval_suites names {', '.join(unknown)}; while a run trains, failures and captions can be computed."
            )
        if "image" not in pairs.column_names:
            raise RecipeError("--eval_suites needs pairs of a picture and a text to evaluate on; chats are no such.")
        rows = pairs.select(range(min(count, len(pairs)))).cast_column("image", Image(decode=False))
        known = [{"image": _picture(place, row["image"]), "captions": [row["text"]]} for place, row in enumerate(rows)]
        self.suites = {name: SUITES[name]() for name in names}
        self.asked = {name: _readable(suite.questions, known) for name, suite in self.suites.items()}

    def measure(self, model: Any, processor: Any) -> dict[str, float]:
        """`SUITE_MEASURE` → its value, for the model as it is, which has to be in evaluation mode."""
        speaker, found = ChatSpeaker(model, processor, "in training"), {}
        for name, suite in self.suites.items():
            questions = self.asked[name]
            replies = []
            for start in range(0, len(questions), BATCH_SIZE):
                batch = questions[start : start + BATCH_SIZE]
                told = speaker.answer(batch, [question.picture.open() for question in batch])
                replies += [reply_to(question, "", said) for question, said in zip(batch, told, strict=True)]
            for measure, parts in suite.parts(replies, [None] * len(replies)).items():
                counted = [part for part in parts if part is not None]
                if below := sum(part.below for part in counted):
                    found[f"{name}_{measure}"] = sum(part.above for part in counted) / below
        return found

    def is_better_higher(self, metric: str) -> bool | None:
        """
        Whether a larger value of a metric is better; None for one that the stages compute themselves.

        Raises:
            RecipeError: for a measure that there is not, or that tells neither good nor bad.
        """
        wanted = metric.removeprefix("eval_")
        if wanted in ("loss", "mean_token_accuracy", "entropy"):
            return None
        known = {
            f"{name}_{measure}": told.higher_is_better
            for name, suite in self.suites.items()
            for measure, told in suite.measures.items()
            if told.higher_is_better is not None
        }
        if wanted not in known:
            raise RecipeError(f"--metric_for_best_model is {metric!r}; the suites tell {', '.join(known)}.")
        return known[wanted]


def _picture(place: int, stored: Any) -> Picture:
    return Picture(str(place), stored["bytes"] if stored["bytes"] is not None else stored["path"])


def _readable(questions: Any, rows: Sequence[Any]) -> list[Question]:
    """What is asked about the pictures that can be opened; a run leaves out the others too, and tells how many."""
    asked = []
    for row in rows:
        try:
            row["image"].open()
        except (ValueError, OSError):
            continue
        asked += questions(row)
    return asked
