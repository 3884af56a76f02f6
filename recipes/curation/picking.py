"""Which rows are exported: those that people and rules leave, and of these the best, any, or the most different."""

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.curation.rules import RULES
from recipes_minigpt4.utils.errors import RecipeError


USUAL = ("match_mean", "judge")  # the score that is meant where none is named, the first of them that there is
KEEP, DROP, EDIT = "keep", "drop", "edit"  # what people answer


@dataclass(frozen=True)
class Decision:
    """What a person decided about a row; `text` is the new one of an edit."""

    answer: str
    text: str | None = None


@dataclass(frozen=True)
class Picks:
    """
    What is to be exported.

    Args:
        rules: those that count.
        decisions: digest of a picture → what people decided.
        text: which text: `picked`, `mended` or `draft`.
        keep, keep_share: how many rows at most, or which share of those that are left.
        by: `score`, `random` or `diverse`.
        score: name of the score; None for the usual one.
        min_score: the least that a row may have.
        seed: of `random`.
    """

    rules: tuple[str, ...] = tuple(RULES)
    decisions: Mapping[str, Decision] | None = None
    text: str = "picked"
    keep: int | None = None
    keep_share: float | None = None
    by: str = "random"
    score: str | None = None
    min_score: float | None = None
    seed: int = 0


def rules_of(changes: Sequence[str]) -> tuple[str, ...]:
    """
    The rules that count.

    Args:
        changes: `-rule` takes one away from all, `+rule` adds one; if the first is a `+rule`, to none. `-all` and
            `+all` are all of them.

    Raises:
        RecipeError: for a rule that is none.
    """
    changes = [change.strip() for change in changes]
    counting = set[str]() if changes and changes[0].startswith("+") else set(RULES)
    for change in changes:
        sign, name = change[:1], change[1:]
        if sign not in ("+", "-") or name not in (*RULES, "all"):
            raise RecipeError(
                f"--rules {change} names no rule; write +NAME or -NAME, where NAME is one of {', '.join(RULES)}, all."
            )
        named = set(RULES) if name == "all" else {name}
        counting = counting | named if sign == "+" else counting - named
    return tuple(name for name in RULES if name in counting)


def pick(
    rows: Sequence[CuratedRow], picks: Picks, features: Callable[[Sequence[CuratedRow]], np.ndarray]
) -> tuple[list[CuratedRow], dict[str, int]]:
    """
    Choose rows.

    Args:
        rows: all that there are.
        picks: what is wanted.
        features: gives the vectors of rows, for `diverse`.

    Returns:
        The rows in their order, with the text that is exported; and reason → how many are not among them.

    Raises:
        RecipeError: if a score is asked for that they do not have, or nothing is left.
    """
    reasons: Counter[str] = Counter()
    left = []
    for row in rows:
        row, reason = _judged(row, picks)
        reasons[reason or ""] += 1
        if reason is None:
            left.append(row)
    score = _score_name(left, picks)
    if picks.min_score is not None:
        enough = [row for row in left if row.scores.get(score, -np.inf) >= picks.min_score]
        reasons[f"{score} below {picks.min_score:g}"] += len(left) - len(enough)
        left = enough
    if not left:
        raise RecipeError("No row is left; let fewer rules count with --rules -NAME, or lower --min_score.")
    share = 1.0 if picks.keep_share is None else picks.keep_share
    count = min(len(left), picks.keep or len(left), math.ceil(share * len(left)))
    if not count:
        raise RecipeError("--keep_share 0 leaves no row; name a share above 0.")
    chosen = sorted(_best(left, count, picks, score, features))
    reasons[f"not picked ({picks.by})"] += len(left) - count
    del reasons[""]
    return [left[place] for place in chosen], {reason: number for reason, number in reasons.items() if number}


def _judged(row: CuratedRow, picks: Picks) -> tuple[CuratedRow, str | None]:
    """A row with its text, and why it is left out: people's word counts before that of rules."""
    if picks.text != "picked":
        row = replace(row, text=row.draft if picks.text == "draft" else (row.mended or "").strip() or None)
    decided = (picks.decisions or {}).get(row.picture)
    if decided is not None and decided.answer == DROP:
        return row, "dropped by people"
    if decided is not None and decided.answer == EDIT and decided.text:
        return replace(row, text=decided.text.strip()), None
    if not row.text:
        return row, "no text"
    if decided is not None:
        return row, None if decided.answer == KEEP else "people disagree"
    told = [name for name in picks.rules if name in row.verdicts]
    return row, f"rule: {told[0]}" if told else None


def _score_name(rows: Sequence[CuratedRow], picks: Picks) -> str:
    """The score that is meant, if one is needed."""
    if picks.by != "score" and picks.min_score is None:
        return ""
    known = dict.fromkeys(name for row in rows for name in row.scores)
    name = picks.score or next((one for one in USUAL if one in known), None)
    if rows and name not in known:
        what = f"no score {name!r}" if name else "no score that tells how good they are"
        raise RecipeError(
            f"The rows have {what}; they have {', '.join(known) or 'none'}. Name one with --score, or run `minigpt4 "
            "curate` again with --match or --score_judge, which makes nothing else anew."
        )
    return name or ""


def _best(
    rows: Sequence[CuratedRow],
    count: int,
    picks: Picks,
    score: str,
    features: Callable[[Sequence[CuratedRow]], np.ndarray],
) -> list[int]:
    """The places of the rows that are taken. Rows without the score come last; equal ones in their order."""
    if count == len(rows):
        return list(range(count))
    if picks.by == "diverse":
        return most_different(features(rows), count)
    if picks.by == "score":
        return sorted(range(len(rows)), key=lambda place: -rows[place].scores.get(score, -np.inf))[:count]
    # By the picture and not by the place, so that rows that come in or go change nothing about the others.
    drawn = [random.Random(f"{picks.seed} {row.picture}").random() for row in rows]
    return sorted(range(len(rows)), key=lambda place: drawn[place])[:count]


def most_different(vectors: np.ndarray, count: int) -> list[int]:
    """
    Places of vectors that differ much from each other: the most usual one, and then always the one that is farthest
    from all that were taken (greedy k-center).

    Args:
        vectors: (rows, channels), each of length 1.
        count: how many.
    """
    places = [int(np.argmax(vectors @ vectors.mean(0)))]
    nearest = 1 - vectors @ vectors[places[0]]
    nearest[places[0]] = -np.inf
    while len(places) < count:
        places.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, 1 - vectors @ vectors[places[-1]])
        nearest[places[-1]] = -np.inf
    return places
