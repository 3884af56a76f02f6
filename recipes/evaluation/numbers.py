"""From replies and verdicts to the numbers of every model in every suite."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Estimate, Part, by_picture, difference, estimate
from recipes_minigpt4.evaluation.suite import Suite, Verdict
from recipes_minigpt4.utils.errors import RecipeError


@dataclass(frozen=True)
class Answered:
    """What one model said in one suite, and what the judge said about it, reply by reply."""

    replies: Sequence[Reply]
    verdicts: Sequence[Verdict | None]


def suite_numbers(suite: Suite, models: Mapping[str, Answered], resamples: int) -> dict[str, Any]:
    """
    The numbers of a suite.

    Args:
        suite: what is measured.
        models: label → what it said; all were asked the same.
        resamples: of the bootstrap.

    Returns:
        `pictures`, how many were counted, `left_out`, those that could not be read, `models`, label → measure →
        estimate, and `differences`, `"one - other"` → measure → estimate, on the same pictures.

    Raises:
        RecipeError: if the models were asked about different pictures.
    """
    check_alike(suite.name, {label: answered.replies for label, answered in models.items()})
    broken = {reply.digest for answered in models.values() for reply in answered.replies if reply.error}
    sums = {label: _sums(suite, answered, broken) for label, answered in models.items()}
    told = {
        label: {measure: _plain(estimate(parts, resamples=resamples)) for measure, parts in of_model.items()}
        for label, of_model in sums.items()
    }
    labels = list(models)
    pairs = [(one, other) for place, other in enumerate(labels) for one in labels[place + 1 :]]
    return {
        "title": suite.title,
        "pictures": len({reply.digest for answered in models.values() for reply in answered.replies} - broken),
        "left_out": len(broken),
        "measures": {name: measure._asdict() for name, measure in suite.measures.items()},
        "models": told,
        "differences": {
            f"{one} - {other}": {
                measure: _plain(difference(sums[one][measure], sums[other][measure], resamples=resamples))
                for measure in suite.measures
            }
            for one, other in pairs
        },
    }


def check_alike(suite: str, replies: Mapping[str, Sequence[Reply]]) -> None:
    """
    See that all models were asked the same.

    Raises:
        RecipeError: if two of them were not.
    """
    asked = {label: {(reply.digest, reply.prompt) for reply in told} for label, told in replies.items()}
    labels = list(asked)
    for label in labels[1:]:
        if asked[label] != asked[labels[0]]:
            raise RecipeError(
                f"In the suite {suite}, {labels[0]} and {label} were asked about different pictures or in different "
                "words, so their replies are of other data; ask both again with the same --data."
            )


def _sums(suite: Suite, answered: Answered, broken: set[str]) -> dict[str, dict[str, Part]]:
    """Measure → picture → its sums, without pictures that some model could not read."""
    kept = [place for place, reply in enumerate(answered.replies) if reply.digest not in broken]
    replies = [answered.replies[place] for place in kept]
    told = suite.parts(replies, [answered.verdicts[place] for place in kept])
    sums = {}
    for measure, parts in told.items():
        counted = [(part, reply.digest) for part, reply in zip(parts, replies, strict=True) if part is not None]
        sums[measure] = by_picture([part for part, _ in counted], [picture for _, picture in counted])
    return sums


def _plain(number: Estimate) -> dict[str, float | None]:
    return number._asdict()
