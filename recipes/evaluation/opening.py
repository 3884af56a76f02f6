"""From the options of `minigpt4 evaluate` to questions and judges."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipes_minigpt4.evaluation.human import HUMAN, open_people
from recipes_minigpt4.evaluation.judging import RULES, Judge, ModelJudge
from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.scenes import scene_rows
from recipes_minigpt4.evaluation.suite import Row, Suite, WrongRowError
from recipes_minigpt4.evaluation.tables import Places, open_rows
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError


def open_questions(suite: Suite, args: argparse.Namespace) -> list[Question]:
    """
    What a suite asks about its data.

    Raises:
        RecipeError: if it has no data, or a row is not as it needs them.
    """
    place = place_of(suite, args.data)
    rows: Sequence[Row]
    if place == TINY:
        rows = scene_rows(suite.name, args.num_samples, args.seed)
    else:
        rows = open_rows(Places(place.split(","), args.images, args.split, None, None, args.num_samples, args.seed))
    questions: dict[str, Question] = {}
    for number, row in enumerate(rows):
        try:
            for question in suite.questions(row):
                before = questions.get(question.key)
                questions[question.key] = question if before is None else suite.joined(before, question)
        except WrongRowError as error:
            raise RecipeError(
                f"Row {number} of {place} has {error}, which the suite {suite.name} needs; it takes {suite.data}."
            ) from error
    return list(questions.values())


def place_of(suite: Suite, data: Sequence[str]) -> str:
    """
    Where the data of a suite are: what is named for it, or else for all.

    Raises:
        RecipeError: if nothing is.
    """
    for_all = None
    for text in data:
        name, equals, place = text.partition("=")
        if equals and name == suite.name:
            return place
        if not equals:
            for_all = text
    if for_all is None:
        raise RecipeError(f"The suite {suite.name} has no data; name {suite.data} with --data {suite.name}=PLACE.")
    return for_all


def open_judges(args: argparse.Namespace, folder: Path) -> list[Judge]:
    """
    The judges that are named, in their order; `human` alone is none, but asks for a page.

    Raises:
        RecipeError: if one cannot be had.
    """
    people = open_people([spec for spec in args.judge if spec.startswith(f"{HUMAN}:")])
    specs = [spec for spec in args.judge if spec != HUMAN]
    return [people.pop(0) if spec.startswith(f"{HUMAN}:") else _open_judge(spec, args, folder) for spec in specs]


def _open_judge(spec: str, args: argparse.Namespace, folder: Path) -> Judge:
    """A rule, or a language model."""
    if spec in RULES:
        return RULES[spec]()
    from recipes_minigpt4.llm.client import open_client  # keeps a run without a judge free of its extra
    from recipes_minigpt4.llm.options import client_options

    client = open_client(spec, client_options(args, "judge_", cache=folder / "judge"))
    return ModelJudge(client, args.judge_repeats, args.judge_temperature)
