"""Several models answer the same question about the same picture, with the same settings and the same seed."""

import queue
import random
import secrets
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import PIL.Image

from recipes_minigpt4.evaluation.pictures import SIDE
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import redact


MOST_MODELS = 4
MOST_SEED = 2**31


@dataclass
class Told:
    """
    What one model says.

    Args:
        text: the reply, as far as it came.
        new_tokens: of the whole reply; None as long as it is not whole.
        error: why there is none.
    """

    text: str = ""
    new_tokens: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """
    What was asked, and what models said to it.

    Args:
        id: a name that no other comparison has.
        picture: a small copy of the picture.
        prompt: the words.
        settings: how replies are made, with the seed that all have.
        order: labels, as they are shown side by side.
        blind: whether the labels are hidden until somebody has voted.
        told: label → what the model says.
    """

    id: str
    picture: Picture
    prompt: str
    settings: ReplySettings
    order: Sequence[str]
    blind: bool
    told: Mapping[str, Told] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        """Whether all have replied, so that there is something to vote on."""
        return all(one.new_tokens is not None for one in self.told.values())

    def title(self, place: int, voted: bool = False) -> str:
        """What a reply is called that stands at a place, from 0 on."""
        letter = "ABCD"[place]
        if not self.blind:
            return self.order[place]
        return f"{letter}: {self.order[place]}" if voted else letter


def new_comparison(
    labels: Sequence[str], name: str, picture: PIL.Image.Image, prompt: str, settings: ReplySettings, blind: bool
) -> Comparison:
    """
    A question to several models.

    Args:
        labels: of the models.
        name: what the picture is called.
        picture: upright, in RGB.
        prompt: the words.
        settings: how replies are made; without a seed one is drawn, so that all have the same.
        blind: whether people are to vote without knowing who spoke.

    Raises:
        RecipeError: if there are no words, or too few or too many models.
    """
    if not prompt.strip():
        raise RecipeError("There is no question; write one.")
    if not 1 < len(labels) <= MOST_MODELS:
        raise RecipeError(f"Two to {MOST_MODELS} models can be compared, and these are {len(labels)}.")
    order = list(labels)
    if blind:
        random.SystemRandom().shuffle(order)  # the seeds of replies and of tests say nothing about it
    if settings.seed is None:
        settings = replace(settings, seed=secrets.randbelow(MOST_SEED))
    small = picture.copy()
    small.thumbnail((SIDE, SIDE), PIL.Image.Resampling.LANCZOS)
    told = {label: Told() for label in order}
    return Comparison(secrets.token_hex(16), Picture(name, small), prompt.strip(), settings, order, blind, told)


def answers(
    comparison: Comparison, talkers: Mapping[str, Talker], picture: PIL.Image.Image, stop: threading.Event
) -> Generator[None, None, None]:
    """
    Let all models answer at once. What they say grows in `comparison.told`; each step says that there is more.

    Args:
        comparison: the question.
        talkers: label → model.
        picture: the whole picture.
        stop: ends all replies once it is set; so does closing the iterator. Nobody can vote on such a comparison.
    """
    news: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def answer(label: str) -> None:
        told = comparison.told[label]
        try:
            talk = Talk(talkers[label])
            for piece in talk.ask(comparison.prompt, [picture], comparison.settings, own_stop[label]):
                news.put((label, piece))
            if not stop.is_set():
                told.new_tokens = talk.conversation.turns[-1].new_tokens
        except Exception as error:
            told.error = redact(f"{one_line(error)}.")
        finally:
            news.put((label, None))

    # A talk sets its own when its reply has ended.
    own_stop = {label: threading.Event() for label in comparison.order}
    threads = [threading.Thread(target=answer, args=(label,), daemon=True) for label in comparison.order]
    for thread in threads:
        thread.start()
    left = set(comparison.order)
    try:
        yield
        while left:
            label, piece = _next(news)
            if stop.is_set():
                _set(own_stop.values())
            if piece is None:
                left.discard(label)
            elif piece:
                comparison.told[label].text += piece
                yield
    finally:
        _set((stop, *own_stop.values()))
        for thread in threads:
            thread.join()
    yield


def _next(news: "queue.Queue[tuple[str, str | None]]") -> tuple[str, str | None]:
    """Who says what; nothing new after a moment, in which somebody may have said stop."""
    try:
        return news.get(timeout=0.1)
    except queue.Empty:
        return "", ""


def _set(events: Iterable[threading.Event]) -> None:
    for event in events:
        event.set()
