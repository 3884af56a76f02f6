"""Tables 5 and 7: A-OKVQA, questions that need knowledge of the world (Schwenk et al., 2022)."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.short_answers import ASKED, MAX_TOKENS, chosen, normalized
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Row, Suite, Verdict, WrongRowError


LISTED = "{} Choose one of these answers: {}."
AGREEING = 3  # of the ten people who answered; an answer that so many gave counts whole


class Aokvqa(Suite):
    """
    Multiple choice by likelihood and by generation, and direct answers.

    By likelihood, the choice counts whose tokens are the likeliest on average after the question alone. By generation,
    the choices are listed, and the reply has to say one of them. Direct answers count as the data's authors have it, a
    third for each of the people who gave the same and at most one; both are normalised as in VQA.
    """

    name = "aokvqa"
    title = "A-OKVQA (Tables 5, 7)"
    data = "the public JSON and COCO's pictures, or rows with `image`, `question`, `choices` and `correct_choice_idx`"
    measures = {
        "likelihood": Measure(
            "choice by likelihood", "{:.1%}", True, "Questions whose right choice is the likeliest."
        ),
        "generated": Measure("choice by reply", "{:.1%}", True, "Questions to which the reply says the right choice."),
        "unread": Measure("unread", "{:.1%}", False, "Replies that say none of the listed choices, or several."),
        "direct": Measure("direct answer", "{:.1%}", True, "Agreement with ten people's answers, without choices."),
    }

    def questions(self, row: Row) -> list[Question]:
        question, choices, right = _choices_of(row)
        facts = {"right": right, "answers": _listed(row.get("direct_answers"))}
        listed = LISTED.format(question, ", ".join(choices))
        return [
            Question(row["image"], ASKED.format(question), Sampling(MAX_TOKENS), choices, {"kind": "open", **facts}),
            Question(row["image"], listed, Sampling(MAX_TOKENS), facts={"kind": "listed", "listed": choices, **facts}),
        ]

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        is_open = [reply.facts["kind"] == "open" for reply in replies]
        said = [
            None if opened else (chosen(reply.text, list(reply.facts["listed"])),)
            for reply, opened in zip(replies, is_open, strict=True)
        ]
        return {
            "likelihood": [
                Part(likeliest(reply.scores) == reply.facts["right"]) if opened and reply.scores else None
                for reply, opened in zip(replies, is_open, strict=True)
            ],
            "generated": [
                one and Part(one[0] == reply.facts["right"]) for reply, one in zip(replies, said, strict=True)
            ],
            "unread": [one and Part(one[0] is None) for one in said],
            "direct": [
                Part(agreement_with(reply.text, reply.facts["answers"])) if opened and reply.facts["answers"] else None
                for reply, opened in zip(replies, is_open, strict=True)
            ],
        }


def likeliest(scores: Sequence[float]) -> int:
    """The place of the highest score, the first of several."""
    return max(range(len(scores)), key=lambda place: scores[place])


def agreement_with(text: str, answers: Sequence[str]) -> float:
    """How far a reply agrees with people's answers, 0 to 1."""
    said = normalized(text)
    return min(1.0, sum(said == normalized(answer) for answer in answers) / AGREEING)


def _choices_of(row: Row) -> tuple[str, tuple[str, ...], int]:
    question, choices, right = row.get("question"), _listed(row.get("choices")), row.get("correct_choice_idx")
    if not isinstance(question, str):
        raise WrongRowError("no `question`")
    if len(choices) < 2:
        raise WrongRowError("no `choices`")
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise WrongRowError("no `correct_choice_idx`")  # the public test split does not tell
    return question, tuple(choices), right


def _listed(value: Any) -> list[str]:
    """A list, which the table on the Hub has as text; empty for anything else."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            return []
    return [str(one) for one in value] if isinstance(value, (list, tuple)) else []
