"""One person's chat with one model: replies come in pieces, can be stopped, made again and taken back."""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from modeling_minigpt4 import Conversation
from processing_minigpt4 import ReplyStreamer
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.plain_conversation import PlainConversation
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.utils.errors import RecipeError


# Beams that are drawn take torch's own random numbers, of which a process has one source: one such reply at a time.
DRAWING_BEAMS = threading.Lock()


class Stopped(StoppingCriteria):
    """Ends a reply once somebody has said so."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class Talk:
    """
    A chat with a model. Several talks with one model may go on at once, each in a thread.

    Args:
        talker: the model.
        system: what stands in front of the chat in place of the template's own words.

    Attributes:
        conversation: what was said: its `messages` and `turns`, `undo(turns)` and `reset()`.

    Raises:
        RecipeError: if the model cannot be talked to.
    """

    def __init__(self, talker: Talker, system: str | None = None) -> None:
        self.talker = talker
        self._making: threading.Thread | None = None  # the last reply
        try:
            self.conversation: Any = (
                Conversation(talker.speaker.model, talker.speaker.processor, system=system)
                if talker.is_ours
                else PlainConversation(talker.speaker, system=system)
            )
        except ValueError as error:
            raise RecipeError(f"{talker.name}: {error}") from error

    def ask(
        self,
        text: str,
        images: Sequence[Any] = (),
        settings: ReplySettings = ReplySettings(),  # noqa: B008  # frozen
        stop: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        """
        Ask, and give the reply piece by piece. What `generate` raises is raised here, and leaves the chat as it was.

        Args:
            text: what is said.
            images: pictures, open, in front of the words.
            settings: how the reply is made. Beams come in one piece, at the end.
            stop: ends the reply once it is set. What was said until then stays in the chat. So it does if the
                iterator is closed, or interrupted.

        Raises:
            ValueError: if the chat does not fit the model's window, among others; it is as it was before.
        """
        return self._stream(lambda **given: self.conversation.ask(text, images, **given), settings, stop)

    def retry(
        self,
        settings: ReplySettings = ReplySettings(),  # noqa: B008
        stop: threading.Event | None = None,
    ) -> Generator[str, None, None]:
        """
        Ask the last question once more, in place of its reply; see `ask`.

        Raises:
            ValueError: if there is none.
        """
        return self._stream(lambda **given: self.conversation.retry(**given), settings, stop)

    def _stream(
        self, ask: Callable[..., str], settings: ReplySettings, stop: threading.Event | None
    ) -> Generator[str, None, None]:
        if self._making is not None:
            self._making.join()  # a reply that nobody waited for
        stop = threading.Event() if stop is None else stop
        streamer = None if settings.num_beams > 1 else ReplyStreamer(self.talker.speaker.processor)
        made: queue.Queue[tuple[str, BaseException | None]] = queue.Queue()

        def reply() -> None:
            try:
                made.put((_made(ask, settings, streamer=streamer, stopping_criteria=[Stopped(stop)]), None))
            except BaseException as error:
                made.put(("", error))
            finally:
                if streamer is not None:
                    streamer.text_queue.put(streamer.stop_signal)

        self._making = threading.Thread(target=reply, daemon=True)
        self._making.start()
        try:
            shown = ""
            for piece in streamer or ():
                shown += piece
                yield piece
            whole, error = made.get()
            if error is not None:
                raise error
            if whole != shown and whole.startswith(shown):  # beams have nothing to tell before they end
                yield whole[len(shown) :]
        finally:
            stop.set()
            self._making.join()


def _made(ask: Callable[..., str], settings: ReplySettings, **given: Any) -> str:
    """A reply, drawn with the seed that was asked for."""
    given |= settings.options()
    if not given["do_sample"]:
        return ask(**given)
    with DRAWING_BEAMS:
        if settings.seed is None:
            torch.seed()
        else:
            torch.manual_seed(settings.seed)
        return ask(**given)
