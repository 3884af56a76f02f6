"""Chats with models of other kinds, computed anew every turn."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from modeling_minigpt4 import Turn
from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.speakers import BlipSpeaker, ChatSpeaker


class PlainConversation:
    """
    A chat with a model of another kind, with the methods of `modeling_minigpt4.Conversation`.

    A model with a chat template sees the whole chat and all its pictures. BLIP-2 and InstructBLIP have none: they
    answer each question alone, about the newest picture.

    Args:
        speaker: the model.
        system: what stands in front of the chat.

    Raises:
        ValueError: if the model has no place for `system`.
    """

    def __init__(self, speaker: ChatSpeaker, system: str | None = None) -> None:
        if system is not None and isinstance(speaker, BlipSpeaker):
            raise ValueError("BLIP-2 and InstructBLIP answer each question alone; leave the system's words out.")
        self.speaker, self.system = speaker, system
        self.messages: list[dict[str, Any]] = []
        self.turns: list[Turn] = []
        self.reset()

    def ask(self, text: str, images: Sequence[Any] = (), *, streamer: Any = None, **generate_kwargs: Any) -> str:
        """See `Conversation.ask`; pictures are PIL images, and the model's own mark of a picture is refused."""
        if not text and not images:
            raise ValueError("There is no question; pass `text`, `images` or both.")
        place = str(getattr(self.speaker.processor, "image_token", None) or "")
        if place and place in text:
            raise ValueError(f"This model takes {place} for the place of a picture; ask without it.")
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in images]
        content += [{"type": "text", "text": text}] if text else []
        asked = [*self.messages, {"role": "user", "content": content}]
        return self._answer(asked, self.turns, streamer, generate_kwargs)

    def retry(self, *, streamer: Any = None, **generate_kwargs: Any) -> str:
        """See `Conversation.retry`."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("There is no question to ask once more; ask one first.")
        return self._answer(self.messages[:-1], self.turns[:-1], streamer, generate_kwargs)

    def undo(self, turns: int = 1) -> None:
        """See `Conversation.undo`."""
        questions = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not 0 < turns <= len(questions):
            raise ValueError(f"{turns} turns cannot be taken back, because there are {len(questions)}.")
        del self.messages[questions[-turns] :]
        del self.turns[max(len(self.turns) - turns, 0) :]

    def reset(self) -> None:
        """See `Conversation.reset`."""
        system = [] if self.system is None else [{"type": "text", "text": self.system}]
        self.messages, self.turns = [{"role": "system", "content": system}] if system else [], []

    @torch.inference_mode()
    def _answer(
        self, messages: list[dict[str, Any]], turns: list[Turn], streamer: Any, options: dict[str, Any]
    ) -> str:
        """The reply to messages that end with a question; what was said changes at the very end only."""
        start = time.perf_counter()
        inputs, pictures = self._inputs(messages)
        prompt = inputs["input_ids"]
        ids = self.speaker.model.generate(**inputs, streamer=streamer, **options)
        if ids.shape[1] >= prompt.shape[1] and torch.equal(ids[:, : prompt.shape[1]], prompt):
            ids = ids[:, prompt.shape[1] :]  # some give the prompt back
        text: str = self.speaker.processor.post_process_image_text_to_text(ids, skip_special_tokens=True)[0].strip()
        new = ids.shape[1]
        seconds = time.perf_counter() - start
        turn = Turn(prompt.shape[1], prompt.shape[1] + max(new - 1, 0), new, pictures, seconds)
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        self.turns = [*turns, turn]
        return text

    def _inputs(self, messages: Sequence[dict[str, Any]]) -> tuple[Any, int]:
        """What the model reads, and how many pictures are in it."""
        seen = [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
        if not isinstance(self.speaker, BlipSpeaker):
            read = self.speaker.processor.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
            return self.speaker.on_device(read), len(seen)
        words = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
        if not seen:
            raise ValueError("This model answers questions about pictures only; give it one.")
        question = Question(Picture("", seen[-1]), words)
        return self.speaker.inputs([self.speaker.written(question)], [seen[-1]]), 1
