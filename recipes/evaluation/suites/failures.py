"""Table 3: replies that fail, by rules that have names."""

from collections.abc import Callable, Mapping, Sequence

from recipes_minigpt4.evaluation.languages import is_english
from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Case, Row, Suite, Verdict
from recipes_minigpt4.evaluation.words import (
    is_finished,
    repeated_share,
    sentences_of,
    stutters,
    words_of,
    yes_or_no,
)


PROMPTS = {  # kind → the words (paper, section 4.3)
    "detailed": "Describe the image in detail.",
    "poem": "Can you write a beautiful poem about this image?",
}
REPEATED = 0.3  # share of repeated runs of four words from which on a reply repeats itself
REQUEST = (
    "A model was shown a picture, which you cannot see, and replied to the prompt below. Does the reply fail as a "
    "text: does it say nothing, repeat itself, break off, or change its language? Answer yes or no."
)


def is_empty(reply: Reply) -> bool:
    """Nothing is said, not a single word."""
    return not words_of(reply.text)


def is_repetitive(reply: Reply) -> bool:
    """A sentence is said twice, one to four words three times in a row, or much is said again."""
    words = words_of(reply.text)
    parts = [tuple(words_of(part)) for part in sentences_of(reply.text)]
    long = [part for part in parts if len(part) > 3]
    is_said_twice = len(set(long)) < len(long) and reply.facts["kind"] != "poem"  # where a refrain is art
    return is_said_twice or stutters(words) or repeated_share(words) > REPEATED


def is_unfinished(reply: Reply) -> bool:
    """It was cut off, or a text in prose does not end as a sentence does."""
    if reply.finished is False:
        return True
    return reply.facts["kind"] != "poem" and not is_empty(reply) and not is_finished(reply.text)


def is_foreign(reply: Reply) -> bool:
    """It is not in the language of the prompt, English, as its letters and its commonest words tell."""
    return not is_english(reply.text)


RULES: dict[str, Callable[[Reply], bool]] = {
    "empty": is_empty,
    "repetition": is_repetitive,
    "unfinished": is_unfinished,
    "language": is_foreign,
}


class Failures(Suite):
    """Share of the replies that fail, for a detailed description and a poem, and which rule found how many."""

    name = "failures"
    title = "failing replies (Table 3)"
    data = "any pictures: a folder, or rows with `image`"
    measures = {
        **{
            kind: Measure(f"failures, {kind}", "{:.1%}", False, f"Replies to {prompt!r} that any rule refuses.")
            for kind, prompt in PROMPTS.items()
        },
        **{
            rule: Measure(rule, "{:.1%}", False, (check.__doc__ or "").split("\n")[0]) for rule, check in RULES.items()
        },
    }

    def questions(self, row: Row) -> list[Question]:
        return [
            Question(row["image"], prompt, Sampling(512), facts={"kind": kind}) for kind, prompt in PROMPTS.items()
        ]

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        broken = [broken_rules(reply) for reply in replies]
        shares: dict[str, list[Part | None]] = {
            kind: [
                Part(bool(rules)) if reply.facts["kind"] == kind else None
                for reply, rules in zip(replies, broken, strict=True)
            ]
            for kind in PROMPTS
        }
        return {**shares, **{rule: [Part(rule in rules) for rules in broken] for rule in RULES}}

    def case(self, reply: Reply) -> Case:
        request = f"{REQUEST}\n\nPrompt: {reply.prompt}\nReply: {reply.text or '(nothing)'}"
        return Case(reply, request, ("Does this reply fail: nothing, repetition, unfinished, or another language?",))

    def read_verdict(self, reply: Reply, answer: str) -> Verdict:
        return (yes_or_no(answer),)

    def own_verdict(self, reply: Reply) -> Verdict:
        return (bool(broken_rules(reply)),)


def broken_rules(reply: Reply) -> list[str]:
    """The names of the rules by which a reply fails."""
    return [name for name, check in RULES.items() if check(reply)]
