"""What goes on in the terminal between a person and one model or several."""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import PIL.Image

from recipes_minigpt4.serving.picture_places import Place
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.utils.errors import RecipeError, one_line


@dataclass(frozen=True)
class Exchange:
    """
    A question.

    Args:
        pictures: names of those that came with it.
        labels: of the models that have answered.
    """

    pictures: tuple[str, ...]
    labels: tuple[str, ...]


class Session:
    """
    Chats with models that are asked the same.

    Args:
        talks: label → chat.
        settings: how replies are made.
        stats: whether tokens and time are told behind each reply.

    Attributes:
        waiting: name → picture, for the next question.
        exchanges: what was asked so far.
        failed: label → why that model has not answered the last question.
        notes: where all but replies is printed; None for where they are.
    """

    def __init__(self, talks: Mapping[str, Talk], settings: ReplySettings, stats: bool = False) -> None:
        self.talks, self.settings, self.stats = talks, settings, stats
        self.waiting: dict[str, PIL.Image.Image] = {}
        self.exchanges: list[Exchange] = []
        self.failed: dict[str, str] = {}
        self.notes: TextIO | None = None

    # ---- questions --------------------------------------------------------------------------------------------------

    def ask(self, text: str) -> None:
        """Ask all models, with the pictures that wait, and print their replies as they come."""
        pictures = list(self.waiting.values())
        labels = self._print_replies(
            lambda talk, stop: talk.ask(text, pictures, self.settings, stop), list(self.talks)
        )
        if labels:
            self.exchanges.append(Exchange(tuple(self.waiting), labels))
            self.waiting.clear()

    def retry(self) -> None:
        """
        Ask the last question once more.

        Raises:
            RecipeError: if there is none.
        """
        if not self.exchanges:
            raise RecipeError("There is no question to ask once more; ask one first.")
        labels = self.exchanges[-1].labels
        self._print_replies(lambda talk, stop: talk.retry(self.settings, stop), labels)

    def undo(self, turns: int) -> None:
        """
        Take questions and their replies back.

        Raises:
            RecipeError: if there are fewer.
        """
        if not self.exchanges:
            raise RecipeError("There is no turn to take back.")
        if not 0 < turns <= len(self.exchanges):
            raise RecipeError(f"{turns} turns cannot be taken back; the chat has {len(self.exchanges)}.")
        taken: tuple[str, ...] = ()
        for _ in range(turns):
            exchange = self.exchanges.pop()
            taken = exchange.pictures + taken
            for label in exchange.labels:
                self.talks[label].conversation.undo()
        if taken:
            print(f"Taken back, and {', '.join(taken)} with it.", file=self.notes, flush=True)

    def reset(self) -> None:
        """Begin anew, without pictures."""
        for talk in self.talks.values():
            talk.conversation.reset()
        self.exchanges.clear()
        self.waiting.clear()

    def _print_replies(
        self, ask: Callable[[Talk, threading.Event], Iterator[str]], labels: Sequence[str]
    ) -> tuple[str, ...]:
        """Print what models say; returns the labels of those that have said something."""
        self.failed, answered = {}, []
        for label in labels:
            named = f"{label}: " if len(self.talks) > 1 else ""
            print(named, end="", flush=True)
            try:
                if not self._print_reply(self.talks[label], ask):
                    break
            except Exception as error:  # what a model or its template raises ends no chat
                known = isinstance(error, (ValueError, RuntimeError))  # a chat that does not fit, a GPU that is full
                reason = f"{one_line(error)}." if known else f"{type(error).__name__}: {one_line(error)}."
                self.failed[label] = reason
                if self.notes is None:
                    print(reason, flush=True)
                elif named:
                    print(flush=True)
                    print(named + reason, file=self.notes, flush=True)
                continue
            answered.append(label)
        return tuple(answered)

    def _print_reply(self, talk: Talk, ask: Callable[[Talk, threading.Event], Iterator[str]]) -> bool:
        """Print what a model says; False if the user has no patience for it, and it has said nothing yet."""
        before = talk.conversation.messages
        with ctrl_c_stops() as stop:
            try:
                for piece in ask(talk, stop):
                    print(piece, end="", flush=True)
            except KeyboardInterrupt:
                if talk.conversation.messages is before:
                    print(flush=True)
                    return False
        print(flush=True)
        if self.stats:
            print(told_of(talk), file=self.notes, flush=True)
        return True

    # ---- pictures ---------------------------------------------------------------------------------------------------

    def add_pictures(self, names: Sequence[str]) -> None:
        """
        Open pictures for the next question, all of them or none.

        Raises:
            RecipeError: if one cannot be read.
        """
        try:
            self.waiting.update({name: open_picture(name) for name in names})
        except ValueError as error:
            raise RecipeError(f"{one_line(error)}.") from error
        self.tell_waiting()

    def tell_waiting(self) -> None:
        """Print which pictures go with the next question."""
        if self.waiting:
            named = ", ".join(f"{name} ({picture.width} × {picture.height})" for name, picture in self.waiting.items())
            print(f"With your next question: {named}", file=self.notes, flush=True)


def open_picture(name: str) -> PIL.Image.Image:
    """
    A picture by its path or address; `~` is the home folder.

    Raises:
        ValueError: that names it and says why it cannot be read.
    """
    place = Place(os.path.expanduser(name))
    try:
        return place.picture().open()
    except (ValueError, OSError) as error:
        reason = one_line(error).partition("; pass a file")[0]
        raise ValueError(reason if place.name in reason else f"{place.name}: {reason}") from error


def told_of(talk: Talk) -> str:
    """Tokens and time of the last reply."""
    turn = talk.conversation.turns[-1]
    pictures = "1 picture" if turn.encoded_pictures == 1 else f"{turn.encoded_pictures} pictures"
    return (
        f"[{turn.prompt_tokens} tokens asked, {turn.new_tokens} answered, {turn.computed_tokens} computed; {pictures} "
        f"encoded; {turn.seconds:.2f} s, {turn.new_tokens / max(turn.seconds, 1e-9):.1f} tokens/s]"
    )


@contextmanager
def ctrl_c_stops() -> Iterator[threading.Event]:
    """Let Ctrl-C set an event; a second one interrupts, and more wait for what goes on."""
    stop, pressed = threading.Event(), 0
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(*_: object) -> None:
        nonlocal pressed
        stop.set()
        pressed += 1
        if pressed == 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
