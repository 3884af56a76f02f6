"""What a reply says, read from its text alone: objects, places, and whether its sentences are sound."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

from recipes_minigpt4.tiny.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Scene


_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})s?\b", re.IGNORECASE)
_PLACE = re.compile(rf"\b({'|'.join(ROWS)}) ({'|'.join(COLUMNS)})\b|\bcentre\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


SCORES = {  # measure → its title in a table, format of its values
    "object_f1": ("object F1", "{:.3f}"),
    "position_accuracy": ("position accuracy", "{:.3f}"),
    "failure_rate": ("failure rate", "{:.1%}"),
    "mean_words": ("mean words", "{:.1f}"),
}
# What the measures of the tables mean.
MEANING = """Object F1: objects named with their colour and shape. Position accuracy: share of the objects that are
named and put in the right place. Failure rate: replies with a repeated or unfinished sentence."""


class Mark(NamedTuple):
    """Characters `start` to `end` of a reply, and whether what they say is so."""

    start: int
    end: int
    right: bool


def named_objects(text: str) -> Counter[tuple[str, str]]:
    """Every (colour, shape) that stands side by side in the text, as often as it is said."""
    return Counter(_pair(found) for found in _OBJECT.finditer(text))


def placed_objects(text: str) -> Counter[tuple[str, str, str]]:
    """Every (colour, shape, place) of the sentences that name at least one object and one place.

    A sentence with as many places as objects tells them in the same order; else each object gets the place nearest
    to it, before or after.
    """
    return Counter((*_pair(found), place.group().lower()) for found, place in _placed(text))


def mark(text: str, scene: Scene) -> list[Mark]:
    """
    The objects that a reply names, and the places of those that are there, in the order of the text.

    An object is right as `object_f1` counts it, a place as `position_accuracy` does. Nothing is said about the place
    of an object that is not there.
    """
    left, left_placed = Counter(thing.pair for thing in scene.things), _placed_truth(scene)
    rights: dict[tuple[int, int], bool] = {}
    places = {found.span(): place for found, place in _placed(text)}
    for found in _OBJECT.finditer(text):
        rights[found.span()] = is_there = left[_pair(found)] > 0
        left[_pair(found)] -= 1
        if is_there and (place := places.get(found.span())):
            thing = (*_pair(found), place.group().lower())
            rights[place.span()] = rights.get(place.span(), True) and left_placed[thing] > 0
            left_placed[thing] -= 1
    return [Mark(*span, right) for span, right in sorted(rights.items())]


def unnamed_objects(text: str, scene: Scene) -> list[str]:
    """`"red circle"` for every object of the scene that a reply does not name."""
    missing = Counter(thing.pair for thing in scene.things) - named_objects(text)
    return [" ".join(pair) for pair in missing.elements()]


def _pair(found: re.Match[str]) -> tuple[str, str]:
    return found.group(1).lower(), found.group(2).lower()


def _placed_truth(scene: Scene) -> Counter[tuple[str, str, str]]:
    return Counter((*thing.pair, thing.position) for thing in scene.things)


def _placed(text: str) -> Iterator[tuple[re.Match[str], re.Match[str]]]:
    """Objects and their places, as they stand in the text."""
    start = 0
    for sentence in sentences(text):
        start = text.index(sentence, start)
        end = start + len(sentence)
        objects, places = list(_OBJECT.finditer(text, start, end)), list(_PLACE.finditer(text, start, end))
        if len(objects) != len(places):
            places = [min(places, key=partial(_gap, found)) for found in objects if places]
        yield from zip(objects, places, strict=False)
        start = end


def _gap(one: re.Match[str], other: re.Match[str]) -> int:
    """Characters between two matches in the same text."""
    return max(one.start() - other.end(), other.start() - one.end())


def object_f1(texts: Sequence[str], scenes: Sequence[Scene]) -> float:
    """F1 of the objects named (colour and shape), 0–1, counted over all scenes.

    Each scene's objects are a multiset: an object said twice but there once is one hit and one false alarm.
    """
    hits = said = there = 0
    for text, scene in zip(texts, scenes, strict=True):
        named, truth = named_objects(text), Counter(thing.pair for thing in scene.things)
        hits += (named & truth).total()
        said += named.total()
        there += truth.total()
    return 2 * hits / (said + there) if said + there else 0.0


def position_accuracy(texts: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Share of the objects in the scenes, 0–1, that are named (colour and shape) and put in the right place."""
    hits = there = 0
    for text, scene in zip(texts, scenes, strict=True):
        truth = _placed_truth(scene)
        hits += (placed_objects(text) & truth).total()
        there += truth.total()
    return hits / there if there else 0.0


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text, without surrounding spaces, empty ones left out."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def is_failure(text: str) -> bool:
    """Whether a reply is empty, leaves a sentence or line unfinished, says one twice, or stutters."""
    return is_repetitive(text) or any(part[-1] not in ".!?" for part in sentences(text))


def is_repetitive(text: str) -> bool:
    """Whether a reply is empty, says a sentence or line twice, or stutters: one to four words three times in a row."""
    plain = [" ".join(re.findall(r"\w+", part.lower())) for part in sentences(text)]
    if not plain:
        return True
    return len(set(plain)) < len(plain) or re.search(r"\b(\w+(?: \w+){0,3})(?: \1){2}\b", " ".join(plain)) is not None


def failure_rate(texts: Sequence[str]) -> float:
    """Share of the replies, 0–1, with repeated or unfinished sentences (`is_failure`)."""
    return sum(map(is_failure, texts)) / len(texts) if texts else 0.0


def repetition_rate(texts: Sequence[str]) -> float:
    """Share of the replies, 0–1, that are empty or repeat something, finished or not (`is_repetitive`)."""
    return sum(map(is_repetitive, texts)) / len(texts) if texts else 0.0


def mean_words(texts: Sequence[str]) -> float:
    """Mean number of words in a reply."""
    return sum(len(text.split()) for text in texts) / len(texts) if texts else 0.0


def score(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """All four numbers of the table: `object_f1`, `position_accuracy`, `failure_rate` (0–1 each), `mean_words`."""
    return {
        "object_f1": object_f1(texts, scenes),
        "position_accuracy": position_accuracy(texts, scenes),
        "failure_rate": failure_rate(texts),
        "mean_words": mean_words(texts),
    }
