"""One person's chat with one model: replies come in pieces, can be stopped, made again and taken back."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from modeling_minigpt4 import Conversation
from processing_minigpt4 import ReplyStreamer
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.plain_conversation import PlainConversation
from recipes_minigpt4.serving.settings import ReplySettings


# torch draws from one source in a process. Who draws holds it, so that a seed gives the same reply every time.
DRAWING = threading.Lock()


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
    """

    def __init__(self, talker: Talker, system: str | None = None) -> None:
        self.talker = talker
        of_ours = talker.is_ours
        self.conversation: Any = (
            Conversation(talker.speaker.model, talker.speaker.processor, system=system)
            if of_ours
            else PlainConversation(talker.speaker, system=system)
        )

    def ask(
        self,
        text: str,
        images: Sequence[Any] = (),
        settings: ReplySettings = ReplySettings(),  # noqa: B008  # frozen
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """
        Ask, and give the reply piece by piece.

        Args:
            text: what is said.
            images: pictures, open, in front of the words.
            settings: how the reply is made.
            stop: ends the reply once it is set. What was said until then stays in the chat. So it does if the
                iterator is closed.

        Raises:
            ValueError: if the chat does not fit the model's window, among others; it is as it was before.
        """
        return self._stream(lambda **given: self.conversation.ask(text, images, **given), settings, stop)

    def retry(
        self,
        settings: ReplySettings = ReplySettings(),  # noqa: B008
        stop: threading.Event | None = None,
    ) -> Iterator[str]:
        """
        Ask the last question once more, in place of its reply; see `ask`.

        Raises:
            ValueError: if there is none.
        """
        return self._stream(self.conversation.retry, settings, stop)

    def _stream(self, ask: Callable[..., str], settings: ReplySettings, stop: threading.Event | None) -> Iterator[str]:
        stop = threading.Event() if stop is None else stop
        streamer = None if settings.num_beams > 1 else ReplyStreamer(self.talker.speaker.processor)
        pieces: queue.Queue[Any] = queue.Queue()

        def reply() -> None:
            try:
                given = {"streamer": streamer, "stopping_criteria": [Stopped(stop)], **settings.options()}
                if not settings.draws:
                    pieces.put((ask(**given), None))
                    return
                with DRAWING:
                    if settings.seed is not None:
                        torch.manual_seed(settings.seed)
                    pieces.put((ask(**given), None))
            except BaseException as error:
                pieces.put((None, error))
            finally:
                if streamer is not None:
                    streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=reply, daemon=True)
        thread.start()
        try:
            shown = ""
            for piece in streamer or ():
                shown += piece
                yield piece
            whole, error = pieces.get()
            if error is not None:
                raise error
            if len(whole) > len(shown):  # beams have nothing to tell before they end
                yield whole[len(shown) :]
        finally:
            stop.set()
            thread.join()
