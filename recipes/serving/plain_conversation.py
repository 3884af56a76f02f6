"""Chats with models of other kinds, computed anew every turn."""

import time
from collections.abc import Sequence
from typing import Any

from modeling_minigpt4 import Turn
from recipes_minigpt4.evaluation.speakers import ChatSpeaker


class PlainConversation:
    """
    A chat with a model of another kind, with the methods of `modeling_minigpt4.Conversation`.

    Args:
        speaker: the model.
        system: what stands in front of the chat.
    """

    def __init__(self, speaker: ChatSpeaker, system: str | None = None) -> None:
        self.speaker, self.system = speaker, system
        self.messages: list[dict[str, Any]] = []
        self.turns: list[Turn] = []

    def ask(self, text: str, images: Sequence[Any] = (), *, streamer: Any = None, **generate_kwargs: Any) -> str:
        """See `Conversation.ask`."""
        raise NotImplementedError(time.time())
