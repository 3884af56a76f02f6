"""Descriptions beside what several people wrote about the same picture."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Row, Suite, Verdict, WrongRowError
from recipes_minigpt4.evaluation.words import ngrams, repeated_share, words_of


PROMPT = "Please describe the image shortly and precisely, in less than 20 words."
BETA = 1.2  # weight of recall in ROUGE-L, that of the COCO caption evaluation
HAS_CIDER = importlib.util.find_spec("pycocoevalcap") is not None


class Captions(Suite):
    """ROUGE-L and CIDEr beside references, and how varied the words of a reply are."""

    name = "captions"
    title = "captions beside several references"
    data = "COCO captions (JSON and pictures), or rows with `image` and a list of `captions`"
    measures = {
        "rouge_l": Measure("ROUGE-L", "{:.3f}", True, "Longest common run of words with the best of the references."),
        **(
            {"cider": Measure("CIDEr", "{:.3f}", True, "Weighted common n-grams (pycocoevalcap).")}
            if HAS_CIDER
            else {}
        ),
        "self_repetition": Measure("repetition", "{:.1%}", False, "Share of runs of four words that stood before."),
        "distinct_2": Measure("distinct-2", "{:.3f}", None, "Different pairs of words of a reply, of all its pairs."),
        "mean_words": Measure("mean words", "{:.1f}", None, "Words of a reply."),
    }

    def questions(self, row: Row) -> list[Question]:
        return [Question(row["image"], PROMPT, Sampling(64), facts={"captions": captions_of(row)})]

    def joined(self, one: Question, other: Question) -> Question:
        return with_captions_of_both(one, other)

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        told = [words_of(reply.text) for reply in replies]
        references = [[words_of(text) for text in reply.facts["captions"]] for reply in replies]
        pairs = [ngrams(words, 2) for words in told]
        return {
            "rouge_l": [Part(rouge_l(words, wanted)) for words, wanted in zip(told, references, strict=True)],
            **({"cider": [Part(score) for score in cider(told, references)]} if HAS_CIDER else {}),
            "self_repetition": [Part(repeated_share(words)) for words in told],
            "distinct_2": [Part(len(set(runs)), len(runs)) for runs in pairs],
            "mean_words": [Part(len(words)) for words in told],
        }


def captions_of(row: Row) -> list[str]:
    """
    The references of a row.

    Raises:
        WrongRowError: if there are none.
    """
    found = next((row[name] for name in ("captions", "caption", "sentences", "answer") if row.get(name)), None)
    texts = [found] if isinstance(found, str) else list(found or ())
    if not texts or not all(isinstance(text, str) for text in texts):
        raise WrongRowError("no `captions`")
    return texts


def with_captions_of_both(one: Question, other: Question) -> Question:
    """The question of a picture that has several rows, a caption in each."""
    captions = list(dict.fromkeys([*one.facts["captions"], *other.facts["captions"]]))
    return replace(one, facts={**one.facts, "captions": captions})


def rouge_l(words: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """
    ROUGE-L of a text, 0 to 1 (Lin, 2004).

    As the COCO caption evaluation has it, precision and recall are each the best over the references, and recall
    weighs 1.2.
    """
    common = [_longest_common(tuple(words), tuple(reference)) for reference in references]
    precision = max((length / len(words) for length in common if words), default=0.0)
    recall = max(
        (length / len(reference) for length, reference in zip(common, references, strict=True) if reference),
        default=0.0,
    )
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


@lru_cache(maxsize=4096)
def _longest_common(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    """Length of the longest run of words that both have in this order, with gaps."""
    last = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for place, candidate in enumerate(other):
            row.append(last[place] + 1 if word == candidate else max(last[place + 1], row[-1]))
        last = row
    return last[-1]


def cider(told: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of every reply, with the weights of words counted over the references of all (Vedantam et al., 2015)."""
    from pycocoevalcap.cider.cider import Cider  # a package that few need

    wanted = {place: [" ".join(words) for words in texts] for place, texts in enumerate(references)}
    _, scores = Cider().compute_score(wanted, {place: [" ".join(words)] for place, words in enumerate(told)})
    return [float(score) for score in scores]
