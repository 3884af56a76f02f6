"""Numbers that are ratios of sums over pictures, with bootstrap intervals, alone and between models.

A share, a mean, CHAIR, precision, recall and F1 are all a sum over a sum. So a suite tells two numbers for every
reply, and whatever is asked of a measure is computed here, in one way.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np


RESAMPLES = 2000
CHUNK = 250  # resamples that are added up at once, for memory
INTERVAL = (2.5, 97.5)  # percent


class Measure(NamedTuple):
    """
    Args:
        title: as a table has it.
        style: how its values are written, for `str.format`.
        higher_is_better: None for numbers that are neither.
        meaning: a sentence that tells what is counted.
    """

    title: str
    style: str = "{:.1%}"
    higher_is_better: bool | None = True
    meaning: str = ""


class Part(NamedTuple):
    """What one reply adds to both sums of a measure."""

    above: float
    below: float = 1.0


class Estimate(NamedTuple):
    """A number and the 95 % interval around it; all None where there is nothing to count."""

    value: float | None
    low: float | None = None
    high: float | None = None


def by_picture(parts: Sequence[Part], pictures: Sequence[str]) -> dict[str, Part]:
    """The parts of all replies about a picture, added: replies about the same one do not vary by chance alone."""
    sums: dict[str, Part] = {}
    for part, picture in zip(parts, pictures, strict=True):
        before = sums.get(picture, Part(0, 0))
        sums[picture] = Part(before.above + part.above, before.below + part.below)
    return sums


def estimate(parts: Mapping[str, Part], seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """
    A measure and its interval: pictures are drawn again, as many as there are.

    Args:
        parts: picture → what it adds, as `by_picture` tells it.
        seed: of what is drawn.
        resamples: how often.
    """
    (drawn,) = _drawn([parts], seed, resamples)
    return _summary(*drawn)


def difference(
    ours: Mapping[str, Part], theirs: Mapping[str, Part], seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """
    How much more `ours` is than `theirs`, on the pictures that both have, each drawn for both at once.

    What pictures have in common, hard ones among them, so does not widen the interval.
    """
    (our_value, our_drawn), (their_value, their_drawn) = _drawn([ours, theirs], seed, resamples)
    if our_value is None or their_value is None:
        return Estimate(None)
    return _summary(our_value - their_value, our_drawn - their_drawn)


def _drawn(sides: Sequence[Mapping[str, Part]], seed: int, resamples: int) -> list[tuple[float | None, np.ndarray]]:
    """The measure of every side, and its values over the same draws of pictures."""
    pictures = sorted(set.intersection(*(set(side) for side in sides)))
    tables = np.array([[side[picture] for picture in pictures] for side in sides], float).reshape(len(sides), -1, 2)
    both = np.concatenate(tables, 1)  # (pictures, 2 × sides)
    times = _times_drawn(len(pictures), resamples, seed)
    sums = [times[start : start + CHUNK].astype(float) @ both for start in range(0, len(times), CHUNK)]
    drawn = np.concatenate([np.empty((0, both.shape[1])), *sums]).reshape(-1, len(sides), 2)
    return [(_ratio(table.sum(0)), _ratios(drawn[:, side])) for side, table in enumerate(tables)]


@lru_cache(maxsize=2)  # all measures of a suite have the same pictures, and their draws take longest
def _times_drawn(pictures: int, resamples: int, seed: int) -> np.ndarray:
    """How often each picture is drawn in each resample, of shape (resamples, pictures)."""
    rng = np.random.default_rng(seed)
    times = np.zeros((resamples if pictures else 0, pictures), np.uint16)
    for row in times:
        row[:] = np.bincount(rng.integers(pictures, size=pictures), minlength=pictures)
    return times


def _ratio(sums: np.ndarray) -> float | None:
    return float(sums[0] / sums[1]) if sums[1] else None


def _ratios(sums: np.ndarray) -> np.ndarray:
    """Ratios of draws; NaN where a draw has nothing to count."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios: np.ndarray = np.where(sums[:, 1] != 0, sums[:, 0] / sums[:, 1], np.nan)
    return ratios


def _summary(value: float | None, drawn: np.ndarray) -> Estimate:
    if value is None:
        return Estimate(None)
    counted = drawn[~np.isnan(drawn)]
    low, high = np.percentile(counted, INTERVAL) if len(counted) else (value, value)
    return Estimate(value, float(low), float(high))
