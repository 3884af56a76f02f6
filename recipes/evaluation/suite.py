"""What a suite is: from rows of data to questions, and from replies to numbers."""

from abc import ABC, abstractmethod
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.evaluation.statistics import Measure, Part


Row = Mapping[str, Any]  # of the data: `image` holds a Picture, the rest is as it was found
Verdict = tuple[bool | None, ...]  # an answer to each of a case's questions; None for one that cannot be read


class WrongRowError(ValueError):
    """A row of data that a suite cannot use; says what is missing."""


@dataclass(frozen=True)
class Case:
    """
    A reply that somebody has to judge.

    Args:
        reply: what was said about which picture.
        request: the words for a language model, which sees no picture.
        questions: the same for a person who sees picture and reply: each is answered with yes or no.
    """

    reply: Reply
    request: str
    questions: tuple[str, ...]


class Suite(ABC):
    """One of the paper's, or everybody's, ways to measure a model: a file, listed in `suites/__init__.py`."""

    name: ClassVar[str]
    title: ClassVar[str]  # a line for tables and help
    data: ClassVar[str]  # what its rows have to be, for help and errors
    measures: ClassVar[Mapping[str, Measure]]
    needs_judge: ClassVar[bool] = False

    @classmethod
    def from_options(cls, args: Namespace) -> Self:
        """The suite, with what the command line says about it."""
        return cls()

    @abstractmethod
    def questions(self, row: Row) -> list[Question]:
        """
        What is asked about a row of data.

        Raises:
            WrongRowError: if it has not what this suite needs.
        """

    def joined(self, one: Question, other: Question) -> Question:
        """The question of two rows that ask the same about the same picture; the first, unless both count."""
        return one

    @abstractmethod
    def parts(
        self, replies: Sequence[Reply], verdicts: Sequence[Verdict | None]
    ) -> Mapping[str, Sequence[Part | None]]:
        """
        What each reply adds to each measure.

        Args:
            replies: of one model.
            verdicts: what the judge said about each; None everywhere where a suite needs none.

        Returns:
            Measure → a part per reply, in order; None where a reply does not count for a measure.
        """

    def case(self, reply: Reply) -> Case | None:
        """What a judge is asked about a reply; None for a reply, or a suite, that needs none."""
        return None

    def read_verdict(self, reply: Reply, answer: str) -> Verdict:
        """What a language model's answer says. What cannot be read is None, never a guess."""
        raise NotImplementedError

    def own_verdict(self, reply: Reply) -> Verdict | None:
        """What this suite itself says to a case's questions, by its rules or by what is true; None if it cannot."""
        return None
