"""Table 6: objects that a description names and the picture does not show."""

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

from recipes_minigpt4.evaluation.objects import COCO_SYNONYMS, Synonyms, open_synonyms
from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part
from recipes_minigpt4.evaluation.suite import Row, Suite, Verdict, WrongRowError
from recipes_minigpt4.evaluation.suites.captions import captions_of
from recipes_minigpt4.evaluation.words import words_of
from recipes_minigpt4.utils.errors import RecipeError


PROMPTS = {  # kind → the words and the most tokens of a reply (paper, Table 6)
    "long": ("Please describe this image as detailed as possible.", 512),
    "short": ("Please describe the image shortly and precisely, in less than 20 words.", 64),
}


class Counted(NamedTuple):
    """What a reply names: every mention, how many of them are wrong, and the objects of the picture among them."""

    said: int
    wrong: int
    found: int
    there: int
    words: int


class Chair(Suite):
    """
    CHAIR (Rohrbach et al., 2018), for a long and a short description.

    An object is there if an annotation says so or if a person's caption names it. Every mention counts.

    Args:
        synonyms: a file of words for objects, see `open_synonyms`.
    """

    name = "chair"
    title = "objects that are not there (Table 6)"
    data = "COCO instances, best with captions (JSON and pictures), or rows with `image` and a list of `objects`"
    measures = {
        f"{name}_{kind}": Measure(f"{title}, {kind}", style, better, meaning)
        for kind in PROMPTS
        for name, title, style, better, meaning in (
            ("chair_i", "CHAIR_i", "{:.1%}", False, "Mentions of objects that are not there, of all mentions."),
            ("chair_s", "CHAIR_s", "{:.1%}", False, "Replies that name an object that is not there."),
            ("recall", "recall", "{:.1%}", True, "Objects of the pictures that replies name."),
            ("words", "mean words", "{:.1f}", None, "Words of a reply."),
        )
    }

    def __init__(self, synonyms: Path = COCO_SYNONYMS) -> None:
        self.synonyms = open_synonyms(synonyms)

    @classmethod
    def from_options(cls, args: Namespace) -> Self:
        return cls(args.synonyms or COCO_SYNONYMS)

    def questions(self, row: Row) -> list[Question]:
        named = row.get("objects")
        if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
            raise WrongRowError("no list of `objects`")
        vocabulary = row.get("vocabulary") or ()
        synonyms = _of_lines(_frozen(vocabulary)) if vocabulary else self.synonyms
        objects = {name: synonyms.kind(name) for name in named}
        for name, kind in objects.items():
            if kind is None:
                raise WrongRowError(f"an object {name!r} and no word for it in the file of --synonyms")
        captions = captions_of(row) if any(row.get(name) for name in ("captions", "caption", "sentences")) else []
        there = {*objects.values(), *(kind for caption in captions for kind in synonyms.named(caption))}
        facts = {"objects": sorted(map(str, there)), **({"vocabulary": vocabulary} if vocabulary else {})}
        return [
            Question(row["image"], prompt, Sampling(tokens), facts={"kind": kind, **facts})
            for kind, (prompt, tokens) in PROMPTS.items()
        ]

    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        return dict(self._parts([(reply.facts["kind"], self.count(reply)) for reply in replies]))

    def count(self, reply: Reply) -> Counted:
        """
        What a reply names and what it misses.

        Raises:
            RecipeError: if it was collected with words for other objects.
        """
        vocabulary = reply.facts.get("vocabulary")
        synonyms = _of_lines(_frozen(vocabulary)) if vocabulary else self.synonyms
        named, there = synonyms.named(reply.text), set(reply.facts["objects"])
        if unknown := there - synonyms.kinds:
            raise RecipeError(
                f"The replies of the suite chair are about {min(unknown)!r}, for which the file of --synonyms has no "
                "line; name the file that they were collected with."
            )
        wrong = sum(kind not in there for kind in named)
        return Counted(len(named), wrong, len(there & set(named)), len(there), len(words_of(reply.text)))

    def _parts(self, counts: Sequence[tuple[str, Counted]]) -> Iterator[tuple[str, list[Part | None]]]:
        for wanted in PROMPTS:
            of_kind = [counted if kind == wanted else None for kind, counted in counts]
            yield f"chair_i_{wanted}", [one and Part(one.wrong, one.said) for one in of_kind]
            yield f"chair_s_{wanted}", [one and Part(one.wrong > 0) for one in of_kind]
            yield f"recall_{wanted}", [one and Part(one.found, one.there) for one in of_kind]
            yield f"words_{wanted}", [one and Part(one.words) for one in of_kind]


def _frozen(lines: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    return tuple(map(tuple, lines))


@lru_cache(maxsize=8)
def _of_lines(lines: tuple[tuple[str, ...], ...]) -> Synonyms:
    return Synonyms(lines)
