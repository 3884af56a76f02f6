"""Ratios of sums, their intervals beside closed forms, and differences between models on the same pictures."""

import math
import time

import numpy as np
import pytest

from recipes_minigpt4.evaluation.statistics import Estimate, Part, by_picture, difference, estimate


def shares(wins: np.ndarray) -> dict[str, Part]:
    return {f"{number:05}": Part(float(win)) for number, win in enumerate(wins)}


def test_a_ratio_of_sums() -> None:
    parts = by_picture([Part(1, 2), Part(0, 3), Part(2, 5)], ["a", "b", "a"])
    assert parts == {"a": (3, 7), "b": (0, 3)}
    assert estimate(parts).value == 3 / 10


def test_nothing_to_count_has_no_number() -> None:
    assert estimate({}) == Estimate(None) == difference({}, {}) == difference({"a": Part(1)}, {"b": Part(1)})
    assert estimate({"a": Part(0, 0)}) == Estimate(None)


@pytest.mark.parametrize(("share", "pictures"), [(0.3, 400), (0.5, 100), (0.05, 2000)])
def test_the_interval_of_a_share_is_that_of_the_closed_form(share: float, pictures: int) -> None:
    told = estimate(shares(np.arange(pictures) < share * pictures))
    half = 1.96 * math.sqrt(share * (1 - share) / pictures)
    assert told.value == share
    assert (told.low, told.high) == (
        pytest.approx(share - half, abs=half / 8),
        pytest.approx(share + half, abs=half / 8),
    )


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says() -> None:
    chance = np.random.default_rng(0)
    told = [estimate(shares(chance.normal(5, 2, 60)), resamples=400) for _ in range(200)]
    covered = sum(one.low <= 5 <= one.high for one in told if one.low is not None and one.high is not None)
    assert 180 <= covered <= 199  # 95 % of 200, and of the bootstrap's few short of it


def test_pairing_narrows_the_interval_of_a_difference() -> None:
    chance = np.random.default_rng(1)
    hard = chance.random(400) < 0.5
    theirs = shares(hard & (chance.random(400) < 0.9))
    ours = {picture: Part(max(part.above, float(chance.random() < 0.1))) for picture, part in theirs.items()}
    paired = difference(ours, theirs)
    one, other = estimate(ours), estimate(theirs)
    assert paired.value == pytest.approx(one.value - other.value)
    unpaired = math.hypot(one.high - one.low, other.high - other.low)
    assert paired.high - paired.low < unpaired / 2
    assert paired.low > 0
    same = difference(ours, ours)
    assert same == Estimate(0, 0, 0)


def test_a_difference_is_about_the_pictures_that_both_have() -> None:
    told = difference({"a": Part(1), "b": Part(0)}, {"a": Part(0), "c": Part(1)})
    assert told == Estimate(1, 1, 1)


def test_f1_is_a_ratio_of_sums() -> None:
    """2 TP / (2 TP + FP + FN) over all pictures, whose interval is that of F1 computed in every resample."""
    chance = np.random.default_rng(2)
    hits, said, there = (chance.integers(low, high, 80) for low, high in ((0, 3), (3, 5), (3, 6)))
    told = estimate({f"{n:02}": Part(2 * hits[n], said[n] + there[n]) for n in range(80)}, seed=3, resamples=500)
    precision, recall = hits.sum() / said.sum(), hits.sum() / there.sum()
    assert told.value == pytest.approx(2 * precision * recall / (precision + recall))
    draws = np.random.default_rng(3)
    drawn = [draws.integers(80, size=80) for _ in range(500)]
    scores = [2 * hits[chosen].sum() / (said[chosen].sum() + there[chosen].sum()) for chosen in drawn]
    assert (told.low, told.high) == (
        pytest.approx(np.percentile(scores, 2.5)),
        pytest.approx(np.percentile(scores, 97.5)),
    )


def test_the_same_seed_gives_the_same_interval() -> None:
    parts = shares(np.arange(50) % 3 == 0)
    assert estimate(parts, seed=1) == estimate(dict(reversed(parts.items())), seed=1) != estimate(parts, seed=2)


def test_five_thousand_pictures_take_seconds() -> None:
    parts = shares(np.arange(5000) % 4 == 0)
    start = time.process_time()
    for _ in range(4):  # a loop in Python over pictures and resamples would take a minute
        estimate(parts)
    assert time.process_time() - start < 10
