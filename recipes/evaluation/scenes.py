"""Rows of the embedded world for every suite, in the form that files have: there, what is true is known exactly."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.tiny.metrics import placed_objects
from recipes_minigpt4.tiny.scenes import COLOURS, SHAPES, Scene, article, evaluation_scenes
from recipes_minigpt4.utils.errors import RecipeError


SCENES = 240  # unless another number is asked for
HELD_OUT = 3  # one scene in so many shows a pair that no stage has seen
KINDS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]  # of objects


def scene_rows(suite: str, num_samples: int | None, seed: int) -> list[dict[str, Any]]:
    """
    Rows about scenes that nothing was trained on.

    Args:
        suite: whose rows.
        num_samples: how many scenes.
        seed: of the scenes.

    Raises:
        RecipeError: for a suite that asks about more than shapes.
    """
    if suite not in ROWS:
        raise RecipeError(f"The embedded world has nothing for the suite {suite}; name other data with --data.")
    count = num_samples or SCENES
    shown = evaluation_scenes(count, count // HELD_OUT, seed)
    return [
        {"image": Picture(f"scene {place}", image), **row}
        for place, (image, scene) in enumerate(shown)
        for row in ROWS[suite](scene)
    ]


def captions(scene: Scene) -> list[dict[str, Any]]:
    """A caption per thing, which a description covers if it tells that thing and its place."""
    things = [f"{article(thing.size)} {thing.size} {thing.colour} {thing.shape}" for thing in scene.things]
    texts = [f"{text} in the {thing.position}" for text, thing in zip(things, scene.things, strict=True)]
    return [{"captions": texts, "things": [[*thing.pair, thing.position] for thing in scene.things]}]


def told_things(text: str, things: Sequence[Sequence[str]]) -> tuple[bool, ...]:
    """For each thing, colour, shape and place, whether a description tells all three of it."""
    left = placed_objects(text)
    told = []
    for colour, shape, place in things:
        told.append(left[colour, shape, place] > 0)
        left[colour, shape, place] -= 1
    return tuple(told)


def objects(scene: Scene) -> list[dict[str, Any]]:
    """A colour and a shape are one kind of object: what is there, and all that could be."""
    return [{"objects": [" ".join(thing.pair) for thing in scene.things], "vocabulary": [[kind] for kind in KINDS]}]


def choices(scene: Scene) -> list[dict[str, Any]]:
    """Which colour, and which shape, is at a place, with four answers to choose from."""
    chance = random.Random(scene.jitter)
    rows = []
    for question, answer, others in _asked(scene):
        options = [answer, *chance.sample([other for other in others if other != answer], 3)]
        chance.shuffle(options)
        rows.append(
            {
                "question": question,
                "choices": options,
                "correct_choice_idx": options.index(answer),
                "direct_answers": [answer] * 10,
            }
        )
    return rows


def answers(scene: Scene) -> list[dict[str, Any]]:
    """The same without choices."""
    return [{"question": question, "answer": answer} for question, answer, _ in _asked(scene)]


def _asked(scene: Scene) -> list[tuple[str, str, Sequence[str]]]:
    """Two questions about one of the things: words, answer, and what it could be."""
    thing = random.Random(scene.jitter).choice(scene.things)
    return [
        (f"Which colour is in the {thing.position}?", thing.colour, tuple(COLOURS)),
        (f"Which shape is in the {thing.position}?", thing.shape, SHAPES),
    ]


def presence(scene: Scene) -> list[dict[str, Any]]:
    """Every kind of object that is there, and as many that are not."""
    there = sorted({" ".join(thing.pair) for thing in scene.things})
    absent = random.Random(scene.jitter).sample([kind for kind in KINDS if kind not in there], len(there))
    return [
        {"text": f"Is there {article(kind)} {kind} in the picture?", "label": label}
        for label, kinds in (("yes", there), ("no", absent))
        for kind in kinds
    ]


def pictures(scene: Scene) -> list[dict[str, Any]]:
    """Nothing but the picture."""
    return [{}]


ROWS: dict[str, Callable[[Scene], list[dict[str, Any]]]] = {
    "captions": captions,
    "coverage": captions,
    "failures": pictures,
    "chair": objects,
    "aokvqa": choices,
    "gqa": answers,
    "pope": presence,
}
