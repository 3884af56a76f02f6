"""POPE: is an object there, yes or no (Li et al., 2023)."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Row, Suite, Verdict, WrongRowError
from recipes_minigpt4.evaluation.words import sentences_of, words_of, yes_or_no


LABELS = {"yes": True, "no": False}
_OTHERS = "no|not|only|and|but|or|nor|without|with|of"  # words behind which another thing is told
_ASKED = re.compile(r"(?:is|are) there (?:(?:an?|any|some|the) )?(.+?)(?: in (?:the|this) \w+)?$")


class Pope(Suite):
    """
    Accuracy, precision, recall and F1 of "yes", and the share of "yes".

    The published script takes every reply without a "no" for a "yes". Here a reply that is neither is not right, it
    misses the object where there is one, and its share is told.
    """

    name = "pope"
    title = "POPE, objects that may not be there"
    data = "POPE's files and COCO's pictures, or rows with `image`, `text` or `question`, and `label` or `answer`"
    measures = {
        "accuracy": Measure("accuracy", "{:.1%}", True, "Questions that are answered rightly, of all."),
        "precision": Measure("precision", "{:.1%}", True, "Objects that are there, of those answered with yes."),
        "recall": Measure("recall", "{:.1%}", True, "Objects answered with yes, of those that are there."),
        "f1": Measure("F1", "{:.1%}", True, "Harmonic mean of precision and recall."),
        "yes": Measure("share of yes", "{:.1%}", None, "Questions answered with yes, of all."),
        "unread": Measure("unread", "{:.1%}", False, "Replies that say neither yes nor no."),
    }

    def questions(self, row: Row) -> list[Question]:
        question = next((row[name] for name in ("text", "question") if isinstance(row.get(name), str)), None)
        told = str(row.get("label", row.get("answer", ""))).strip().lower()
        if question is None:
            raise WrongRowError("no `text` and no `question`")
        if told not in LABELS:
            raise WrongRowError("no `label` of yes or no")
        return [Question(row["image"], question, Sampling(32), facts={"there": LABELS[told], "times": 1})]

    def joined(self, one: Question, other: Question) -> Question:
        """The three settings ask the same about what is there; each time counts."""
        return replace(one, facts={**one.facts, "times": one.facts["times"] + other.facts["times"]})

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        told = [(said(reply), bool(reply.facts["there"]), int(reply.facts["times"])) for reply in replies]
        yes = [(times * (answer is True), times * there) for answer, there, times in told]
        hits = [times * (answer is True and there) for answer, there, times in told]
        return {
            "accuracy": [Part(times * (answer is there), times) for answer, there, times in told],
            "precision": [Part(hit, one) for hit, (one, _) in zip(hits, yes, strict=True)],
            "recall": [Part(hit, there) for hit, (_, there) in zip(hits, yes, strict=True)],
            "f1": [Part(2 * hit, one + there) for hit, (one, there) in zip(hits, yes, strict=True)],
            "yes": [Part(times * (answer is True), times) for answer, _, times in told],
            "unread": [Part(times * (answer is None), times) for answer, _, times in told],
        }


def said(reply: Reply) -> bool | None:
    """
    What the first sentence of a reply answers; None if it says neither.

    Yes and no count, and so does a sentence that says of the very thing that was asked about that it is there or not:
    "There is no dog in the image."
    """
    first = (sentences_of(reply.text) or [""])[0]
    answer = yes_or_no(first)
    asked = _ASKED.search(" ".join(words_of(reply.prompt)))
    if answer is not None or asked is None:
        return answer
    between = rf"(?: (?!(?:{_OTHERS})\b)\S+){{0,3}}"  # a number and adjectives
    restated = rf"\bthere (?:is|are)(n't| not| no)?{between} {re.escape(asked.group(1))}(?:s|es)?\b"
    found = re.search(restated, " ".join(words_of(first)).replace("’", "'"))
    return None if found is None else found.group(1) is None
