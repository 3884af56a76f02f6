"""What is true about texts of the embedded world, and which defects they really have."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.curation.scripted_mender import parts_of
from recipes_minigpt4.evaluation.words import words_of
from recipes_minigpt4.tiny.metrics import is_repetitive, mark, placed_objects
from recipes_minigpt4.tiny.scenes import BACKGROUNDS, CARELESS_SIZES, COLOURS, NUMBERS, SHAPES, Scene


_SIZES = {word: size for size, words in CARELESS_SIZES.items() for word in words}
_SIZED = re.compile(rf"\b({'|'.join(_SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", re.I)
_COUNT = re.compile(rf"\b({'|'.join(NUMBERS[1:])}) coloured shapes?\b", re.I)
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)}) back(?:ground|drop)\b", re.I)


def statements(text: str, scene: Scene) -> list[bool]:
    """
    For each sentence that says something that can be checked, whether all of it is so: objects, places, sizes, how
    many there are, background.
    """
    checked = [list(_checks(part, scene)) for part in parts_of(text)]
    return [all(checks) for checks in checked if checks]


def false_share(texts: Sequence[str], scenes: Sequence[Scene]) -> float:
    """Share of false sentences, 0–1, of those that can be checked; each sentence counts alike."""
    told = [right for text, scene in zip(texts, scenes, strict=True) for right in statements(text, scene)]
    return 1 - sum(told) / len(told) if told else 0.0


def _checks(sentence: str, scene: Scene) -> Iterator[bool]:
    yield from (one.right for one in mark(sentence, scene))
    there = {(thing.size, *thing.pair) for thing in scene.things}
    for size, colour, shape in _SIZED.findall(sentence.lower()):
        yield (_SIZES[size], colour, shape) in there
    for number in _COUNT.findall(sentence.lower()):
        yield NUMBERS.index(number) == len(scene.things)
    for background in _BACKGROUND.findall(sentence.lower()):
        yield background == scene.background


# ---- defects --------------------------------------------------------------------------------------------------------


def says_twice(text: str) -> bool:
    """Whether a sentence, or a thing with its place, is told twice."""
    told = Counter(thing for part in parts_of(text) for thing in set(placed_objects(part)))
    return is_repetitive(text) or max(told.values(), default=0) > 1


def breaks_off(text: str) -> bool:
    """Whether a sentence has no end, the last one or another."""
    return any(part.rstrip('"')[-1:] not in tuple(".!?") for part in parts_of(text))


def tells_no_place(text: str) -> bool:
    """Whether it is no description: nothing that it names has a place."""
    return not placed_objects(text)


MADE = {  # rule → what the mender does that the rule is there for
    "unmended": ("nothing",),
    "apology": ("apology",),
    "refusal": ("refusal",),
    "already_correct": ("correct but",),
    "incomplete": ("incomplete",),
    "marks": ("marks",),
    "language": ("language",),
    "preamble": ("preamble", "quotes"),
    "drifted": ("drifted",),
    "shared": ("shared",),
}
SEEN: dict[str, Callable[[str], bool]] = {  # rule → the defect of a text that it is there for
    "short": tells_no_place,
    "repetition": says_twice,
    "unfinished": breaks_off,
}


def defects(row: CuratedRow, manner: str) -> set[str]:
    """
    The rules that ought to refuse a text.

    Args:
        row: the row.
        manner: what the mender did, see `scripted_mender.MANNERS`.
    """
    made = {rule for rule, manners in MADE.items() if manner in manners}
    if not words_of(row.text or ""):
        return made
    return made | {rule for rule, has in SEEN.items() if has(row.text or "")}


def is_flawless(row: CuratedRow, manner: str, scene: Scene) -> bool:
    """Whether nothing is wrong with a text: no defect, nothing invented, no false sentence."""
    return not defects(row, manner) and manner != "invented" and all(statements(row.text or "", scene))
