"""Judges: a language model, or people, who say whether replies are as they should be; and how far judges agree."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from recipes_minigpt4.evaluation.suite import Case, Suite, Verdict
from recipes_minigpt4.evaluation.words import content_share
from recipes_minigpt4.llm.exchange import Answer, Client, Request


MAX_TOKENS = 256  # of an answer, which is a few words
MOST = 0.75  # share of a caption's content words from which on the rule judge takes it for covered


class Judge(Protocol):
    """Whoever says yes or no to a case's questions."""

    name: str

    def knows(self, suite: Suite) -> bool:
        """Whether it says anything about a suite."""

    def verdicts(self, suite: Suite, cases: Sequence[Case]) -> list[Verdict]:
        """A verdict for each case; None in it for what was not answered or cannot be read."""


class ModelJudge:
    """
    A language model that reads a reply and sees no picture.

    Args:
        client: who is asked; it keeps every raw answer.
        repeats: how often each case is asked; the answer of the majority counts, and a tie is None.
        temperature: of its answers. Repeats are all the same at 0 for most models.
    """

    def __init__(self, client: Client, repeats: int = 1, temperature: float = 0.0) -> None:
        self.client, self.repeats, self.temperature = client, repeats, temperature
        self.name = client.name
        self.agreement: float | None = None  # of repeats: the mean share of pairs that say the same

    def knows(self, suite: Suite) -> bool:
        """It can be asked about any."""
        return True

    def verdicts(self, suite: Suite, cases: Sequence[Case]) -> list[Verdict]:
        requests = [
            Request(
                ({"role": "user", "content": case.request},),
                temperature=self.temperature,
                max_tokens=MAX_TOKENS,
                seed=repeat,
            )
            for case in cases
            for repeat in range(self.repeats)
        ]
        told: dict[int, Verdict] = {}
        for place, answer in self.client.ask(requests):
            case = cases[place // self.repeats]
            unread: Verdict = (None,) * len(case.questions)
            told[place] = suite.read_verdict(case.reply, answer.text) if isinstance(answer, Answer) else unread
        rounds = [
            [told[place * self.repeats + repeat] for repeat in range(self.repeats)] for place in range(len(cases))
        ]
        self.agreement = _agreement_of_rounds(rounds) if self.repeats > 1 else None
        return [tuple(_majority(said) for said in zip(*of_case, strict=True)) for of_case in rounds]


class WordsJudge:
    """
    A rule without a model, for comparison: a caption is covered if a reply has most of its content words, wherever.

    It says nothing about replies that have no captions.
    """

    name = "words"

    def knows(self, suite: Suite) -> bool:
        """Captions alone."""
        return suite.name == "coverage"

    def verdicts(self, suite: Suite, cases: Sequence[Case]) -> list[Verdict]:
        return [
            tuple(content_share(caption, case.reply.text) >= MOST for caption in captions[: len(case.questions)])
            or (None,) * len(case.questions)
            for case in cases
            for captions in [case.reply.facts.get("captions", ())]
        ]


class TruthJudge:
    """What a suite itself knows to be so: the truth about the embedded world, or its own rules."""

    name = "truth"

    def knows(self, suite: Suite) -> bool:
        """What suites know themselves."""
        return type(suite).own_verdict is not Suite.own_verdict

    def verdicts(self, suite: Suite, cases: Sequence[Case]) -> list[Verdict]:
        return [suite.own_verdict(case.reply) or (None,) * len(case.questions) for case in cases]


RULES: dict[str, type[WordsJudge | TruthJudge]] = {judge.name: judge for judge in (WordsJudge, TruthJudge)}


def _majority(said: Sequence[bool | None]) -> bool | None:
    counts = Counter(answer for answer in said if answer is not None)
    return None if counts[True] == counts[False] else counts[True] > counts[False]


def _agreement_of_rounds(rounds: Sequence[Sequence[Verdict]]) -> float | None:
    """Share of pairs of rounds that say the same about the same question, 0 to 1, of those that could be read."""
    same = all_ = 0
    for of_case in rounds:
        for said in zip(*of_case, strict=True):
            counts = Counter(answer for answer in said if answer is not None)
            read = counts.total()
            all_ += read * (read - 1) // 2
            same += sum(count * (count - 1) // 2 for count in counts.values())
    return same / all_ if all_ else None


def agreement(ones: Sequence[Sequence[Any] | None], others: Sequence[Sequence[Any] | None]) -> dict[str, Any]:
    """
    How far two judges agree about the same cases, whichever answers there are.

    Returns:
        `answers`, how many questions both answered; `same`, the share of them that both answer alike; `kappa`,
        Cohen's κ, 1 for full agreement and 0 for that of chance; None where nothing can be said.
    """
    pairs = [
        (one, other)
        for verdict, counterpart in zip(ones, others, strict=True)
        for one, other in zip(verdict or (), counterpart or (), strict=False)
        if one is not None and other is not None
    ]
    if not pairs:
        return {"answers": 0, "same": None, "kappa": None}
    same = sum(one == other for one, other in pairs) / len(pairs)
    one, other = (Counter(said) for said in zip(*pairs, strict=True))
    chance = sum(one[answer] * other[answer] for answer in one) / len(pairs) ** 2
    return {"answers": len(pairs), "same": same, "kappa": (same - chance) / (1 - chance) if chance < 1 else None}
