"""What judges say about the replies of all models in a suite, and how far they agree."""

from collections.abc import Mapping, Sequence
from typing import Any

from recipes_minigpt4.evaluation.judging import Judge, ModelJudge, TruthJudge, agreement
from recipes_minigpt4.evaluation.replies import Replies
from recipes_minigpt4.evaluation.suite import Case, Suite, Verdict


def cases_of(suite: Suite, replies: Replies) -> list[Case]:
    """What a judge is asked about the replies of all models."""
    found = (suite.case(reply) for said in replies.values() for reply in said)
    return [case for case in found if case is not None]


def judge_replies(
    suite: Suite, replies: Replies, judges: Sequence[Judge]
) -> dict[str, dict[str, list[Verdict | None]]]:
    """Judge → label → a verdict per reply; None for one that needs none."""
    told: dict[str, dict[str, list[Verdict | None]]] = {}
    cases = [(label, suite.case(reply)) for label, said in replies.items() for reply in said]
    wanted = [case for _, case in cases if case is not None]
    for judge in judges if wanted else ():
        answers = iter(judge.verdicts(suite, wanted))
        of_judge: dict[str, list[Verdict | None]] = {label: [] for label in replies}
        for label, case in cases:
            of_judge[label].append(next(answers) if case is not None else None)
        told[judge.name] = of_judge
    return told


def judges_told(
    suite: Suite,
    replies: Replies,
    verdicts: Mapping[str, Mapping[str, Sequence[Verdict | None]]],
    judges: Sequence[Judge],
) -> dict[str, Any]:
    """
    How good the judges are.

    Returns:
        `first`, the judge whose verdicts the numbers are, None for a suite that needs none; `unread`, judge → answers
        that could not be read; `repeats`, judge → how far its answers to the same question agree, where it was asked
        several times; `agreement` of each two judges, the suite's own rules or truth among them.
    """
    flat: dict[str, list[Verdict | None]] = {
        name: [verdict for label in replies for verdict in of_judge[label]] for name, of_judge in verdicts.items()
    }
    own = [suite.own_verdict(reply) for said in replies.values() for reply in said]
    if flat and TruthJudge.name not in flat and any(verdict is not None for verdict in own):
        flat["the suite itself"] = own
    names = list(flat)
    repeats = {judge.name: judge.agreement for judge in judges if isinstance(judge, ModelJudge)}
    return {
        "first": next(iter(verdicts), None) if suite.needs_judge else None,
        "unread": {
            name: sum(answer is None for verdict in flat[name] for answer in verdict or ()) for name in verdicts
        },
        "repeats": {name: share for name, share in repeats.items() if share is not None and name in verdicts},
        "agreement": [
            {"one": one, "other": other, **agreement(flat[one], flat[other])}
            for place, one in enumerate(names)
            for other in names[place + 1 :]
        ],
    }
