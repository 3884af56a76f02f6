"""Chats of the people who look at the page, each with a model of its own choice and out of sight of the others."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.utils.errors import RecipeError


MOST_CHATS = 64  # that are kept; of more, those that have rested longest are forgotten
PATIENCE = 30.0  # seconds for a reply to end that has been told to


@dataclass(frozen=True)
class Question:
    """
    What a person asked.

    Args:
        text: the words.
        uploads: files of the pictures, as they were sent.
        shown: files of the pictures, as the page shows them.
    """

    text: str
    uploads: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()


class PageChat:
    """
    One person's chat on the page. Its turns are those of `talk.conversation`; what a browser sends is no part of it.

    Attributes:
        talk: with the model that was asked last; None before the first question.
        questions: one for each turn.
    """

    def __init__(self) -> None:
        self.talk: Talk | None = None
        self.questions: list[Question] = []
        self._stop = threading.Event()
        self._busy = threading.Lock()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """
        Have the chat to oneself.

        Raises:
            RecipeError: if a reply is under way that nobody has stopped.
        """
        if not self._busy.acquire(timeout=PATIENCE if self._stop.is_set() else 0):
            raise RecipeError("A reply is still under way in this chat; wait for its end, or stop it.")
        self._stop.clear()
        try:
            yield
        finally:
            self._busy.release()

    @property
    def is_busy(self) -> bool:
        """Whether a reply is under way."""
        return self._busy.locked()

    def stop(self) -> None:
        """End the reply that is under way; what was said stays."""
        self._stop.set()

    def exchanges(self) -> list[tuple[Question, str]]:
        """Questions and replies."""
        if self.talk is None:
            return []
        replies = [told for told in self.talk.conversation.messages if told["role"] == "assistant"]
        return [(question, _text(reply)) for question, reply in zip(self.questions, replies, strict=True)]

    # The following are for who has the turn.

    def begin(self, talker: Talker) -> None:
        """Begin anew with a model."""
        self.talk, self.questions = Talk(talker), []

    def forget(self) -> None:
        """Be as before the first question."""
        self.talk, self.questions = None, []

    def ask(
        self, talker: Talker, question: Question, pictures: Sequence[Any], settings: ReplySettings
    ) -> Iterator[list[tuple[Question, str]]]:
        """
        Ask; a model that is not that of the chat begins a new one.

        Args:
            talker: the model.
            question: what is asked.
            pictures: its pictures, open.
            settings: how the reply is made.

        Returns:
            The exchanges, again and again while the reply grows.
        """
        if self.talk is None or self.talk.talker is not talker:
            self.begin(talker)
        assert self.talk is not None
        pieces = self.talk.ask(question.text, pictures, settings, self._stop)
        return self._grow(self.exchanges(), question, pieces)

    def retry(self, settings: ReplySettings) -> Iterator[list[tuple[Question, str]]]:
        """
        Ask the last question once more; see `ask`.

        Raises:
            RecipeError: if there is none.
        """
        if self.talk is None or not self.questions:
            raise RecipeError("There is no question yet; ask one.")
        return self._grow(self.exchanges()[:-1], self.questions[-1], self.talk.retry(settings, self._stop))

    def undo(self, turns: int = 1) -> Question:
        """
        Take back the last turns.

        Returns:
            The question that the first of them began with.

        Raises:
            RecipeError: if there are fewer.
        """
        if self.talk is None or not 0 < turns <= len(self.questions):
            raise RecipeError("There is nothing to take back.")
        self.talk.conversation.undo(turns)
        question = self.questions[-turns]
        del self.questions[-turns:]
        return question

    def _grow(
        self, before: list[tuple[Question, str]], question: Question, pieces: Generator[str, None, None]
    ) -> Iterator[list[tuple[Question, str]]]:
        assert self.talk is not None
        said = ""
        try:
            yield [*before, (question, "")]
            with contextlib.closing(pieces):
                for piece in pieces:
                    said += piece
                    yield [*before, (question, said)]
        finally:
            # A reply that was stopped has its place in the chat, and one that failed has none.
            if len(self.talk.conversation.turns) > len(self.questions):
                self.questions.append(question)
        yield self.exchanges()


class PageChats:
    """The chats of all who look at the page, by the name that Gradio gives to a tab of a browser."""

    def __init__(self) -> None:
        self._chats: OrderedDict[str, PageChat] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, name: str) -> PageChat:
        """Somebody's chat, which begins with the first look at it."""
        with self._lock:
            chat = self._chats.setdefault(name, PageChat())
            self._chats.move_to_end(name)
            forgotten = [self._chats.popitem(last=False)[1] for _ in range(len(self._chats) - MOST_CHATS)]
        for old in forgotten:
            old.stop()
        return chat

    def close(self, name: str) -> None:
        """Forget somebody who has left; a reply under way ends."""
        with self._lock:
            chat = self._chats.pop(name, None)
        if chat is not None:
            chat.stop()

    def close_all(self) -> None:
        """Forget everybody."""
        for name in list(self._chats):
            self.close(name)

    def __iter__(self) -> Iterator[PageChat]:
        return iter(list(self._chats.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._chats

    def __len__(self) -> int:
        return len(self._chats)


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
