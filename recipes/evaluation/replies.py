"""What models said, on disk: one growing file per model and suite, from which every number can be made again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal, read_journal


FILE = "replies.jsonl"


@dataclass(frozen=True)
class Said:
    """
    What a model answers to a question.

    Args:
        text: its reply, without special tokens; empty where there is none.
        finished: whether it ended by itself, not at the most tokens; None where that is not known.
        scores: log-likelihood per token of every choice, in their order.
    """

    text: str
    finished: bool | None = None
    scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reply:
    """
    A line of the file: who was asked what about which picture, what is true, and what was said.

    Args:
        key: that of the question.
        revision: what tells the model's weights from others.
        picture, digest: its name and its SHA-256.
        error: why there is no reply, for a picture that cannot be read.
    """

    key: str
    revision: str
    picture: str
    digest: str
    prompt: str
    sampling: Mapping[str, Any]
    choices: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    finished: bool | None = None
    scores: Sequence[float] = ()
    error: str | None = None


Replies = dict[str, list[Reply]]  # label of a model → what it said in a suite


def reply_to(question: Question, revision: str, said: Said | None, error: str | None = None) -> Reply:
    """The line of a question and what was said to it."""
    asked = (question.key, revision, question.picture.name, question.picture.digest, question.prompt)
    said = said or Said("")
    return Reply(
        *asked,
        asdict(question.sampling),
        question.choices,
        question.facts,
        said.text,
        said.finished,
        said.scores,
        error,
    )


class ReplyStore:
    """
    The replies of one model in one suite.

    Args:
        folder: where `replies.jsonl` is.

    Raises:
        RecipeError: see `Journal`; also for lines that are no replies.
    """

    def __init__(self, folder: Path) -> None:
        self._journal = Journal(folder / FILE)
        self._known = {(reply.key, reply.revision): reply for reply in map(_as_reply, self._journal.lines)}

    def get(self, question: Question, revision: str) -> Reply | None:
        """The reply of a model of this revision; None if it was not asked yet."""
        return self._known.get((question.key, revision))

    def has(self, reply: Reply) -> bool:
        """Whether a reply is written down, or another to the same question."""
        return (reply.key, reply.revision) in self._known

    def append(self, reply: Reply) -> None:
        """Write a reply down."""
        self._journal.append(asdict(reply))
        self._known[reply.key, reply.revision] = reply

    def close(self) -> None:
        self._journal.close()


def read_replies(folder: Path) -> list[Reply]:
    """
    The replies in a folder, those of the revision that spoke last, each once.

    Raises:
        RecipeError: if there are none.
    """
    replies = [_as_reply(line) for line in read_journal(folder / FILE)]
    if not replies:
        raise RecipeError(f"{folder / FILE} holds no replies; run `minigpt4 evaluate` with --models first.")
    last = replies[-1].revision
    return list({reply.key: reply for reply in replies if reply.revision == last}.values())


def _as_reply(line: Mapping[str, Any]) -> Reply:
    try:
        return Reply(**line)
    except TypeError as error:
        raise RecipeError(
            f"A line of {FILE} is no reply ({', '.join(list(line)[:4])}, …); name a folder that `minigpt4 evaluate` "
            "wrote."
        ) from error
