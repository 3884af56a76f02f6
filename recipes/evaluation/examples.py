"""The worst and the best replies of a model, beside what the others said about the same pictures."""

from collections.abc import Mapping
from typing import Any

from recipes_minigpt4.evaluation.numbers import Answered
from recipes_minigpt4.evaluation.suite import Suite


COUNT = 3  # worst replies, and best ones


def choose_examples(suite: Suite, models: Mapping[str, Answered], focus: str) -> dict[str, Any]:
    """
    Which questions to show.

    Args:
        suite: what is measured.
        models: label → what it said.
        focus: label of the model whose scores decide. A reply's score is the first of the suite's measures that can be
            better or worse and counts this reply.

    Returns:
        `label`, that of the model, `worst` and `best`: lists of `key`, that of the question, `measure`, and `scores`,
        label → value.
    """
    scores = {label: _scores(suite, answered) for label, answered in models.items()}
    order = sorted(scores[focus], key=lambda key: (_goodness(suite, *scores[focus][key]), key))
    worst = order[:COUNT]
    best = [key for key in reversed(order) if key not in worst][:COUNT]

    def told(key: str) -> dict[str, Any]:
        of_models = {label: of_model[key][1] for label, of_model in scores.items() if key in of_model}
        return {"key": key, "measure": scores[focus][key][0], "scores": of_models}

    return {"label": focus, "worst": [told(key) for key in worst], "best": [told(key) for key in best]}


def _scores(suite: Suite, answered: Answered) -> dict[str, tuple[str, float]]:
    """Question → the measure that counts its reply, and the reply's part of it."""
    kept = [place for place, reply in enumerate(answered.replies) if not reply.error]
    replies = [answered.replies[place] for place in kept]
    told = suite.parts(replies, [answered.verdicts[place] for place in kept])
    found: dict[str, tuple[str, float]] = {}
    for name, measure in suite.measures.items():
        if measure.higher_is_better is None:
            continue
        for reply, part in zip(replies, told[name], strict=True):
            if part is not None and part.below:
                found.setdefault(reply.key, (name, part.above / part.below))
    return found


def _goodness(suite: Suite, measure: str, score: float) -> float:
    return score if suite.measures[measure].higher_is_better else -score
