"""Rows of the embedded world for every suite, in the form that files have: there, what is true is known exactly."""

from collections.abc import Callable
from typing import Any

from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.tiny.scenes import Scene, article, evaluation_scenes
from recipes_minigpt4.utils.errors import RecipeError


SCENES = 240  # unless another number is asked for
HELD_OUT = 3  # one scene in so many shows a pair that no stage has seen


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
    return [{"captions": texts}]


def pictures(scene: Scene) -> list[dict[str, Any]]:
    """Nothing but the picture."""
    return [{}]


ROWS: dict[str, Callable[[Scene], list[dict[str, Any]]]] = {
    "captions": captions,
    "coverage": captions,
    "failures": pictures,
}
