"""Scenes of the embedded world as rows of a harness, and what its tasks make of replies about them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import datasets

from recipes_minigpt4.evaluation.harness.served import checked
from recipes_minigpt4.tiny import metrics
from recipes_minigpt4.tiny.scenes import Scene, Thing, evaluation_scenes


Judged = tuple[str, str]  # a reply, and the scene that it is about as JSON


def scene_rows(count: int = 240, seed: int = 0) -> datasets.Dataset:
    """The demo's scenes, a third of them with a pair that no training shows: `image`, and the truth as JSON."""
    found = evaluation_scenes(count, held_out=count // 3, seed=seed)
    rows = {"image": [image for image, _ in found], "scene": [json.dumps(asdict(scene)) for _, scene in found]}
    kinds = {"image": datasets.Image(), "scene": datasets.Value("string")}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))


def read_scene(text: str) -> Scene:
    """The scene that `scene_rows` wrote."""
    fields = json.loads(text)
    return Scene(**{**fields, "things": tuple(Thing(**thing) for thing in fields["things"])})


def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Judged]:
    """Reply and truth for every measure: each is a ratio of sums over all pictures, and not a mean of ratios."""
    return dict.fromkeys(metrics.SCORES, (checked(results[0]), doc["scene"]))


def object_f1(judged: Sequence[Judged]) -> float:
    """F1 of the objects that are named with their colour and shape, as in the demo's report."""
    return metrics.object_f1(*_split(judged))


def position_accuracy(judged: Sequence[Judged]) -> float:
    """Share of the objects that are named and put in the right place."""
    return metrics.position_accuracy(*_split(judged))


def failure_rate(judged: Sequence[Judged]) -> float:
    """Share of the replies with a repeated or unfinished sentence."""
    return metrics.failure_rate(_split(judged)[0])


def mean_words(judged: Sequence[Judged]) -> float:
    """Mean number of words in a reply."""
    return metrics.mean_words(_split(judged)[0])


def _split(judged: Sequence[Judged]) -> tuple[list[str], list[Scene]]:
    return [reply for reply, _ in judged], [read_scene(scene) for _, scene in judged]
