"""A chat with the model, turn by turn: questions with pictures, replies, one more try, and the way back."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from processing_minigpt4.image_processing_minigpt4 import flatten_images


@dataclass(frozen=True)
class Turn:
    """
    What one reply took.

    Args:
        prompt_tokens: of the whole chat before the reply, image tokens included.
        computed_tokens: that went through the decoder, of the prompt and of the reply.
        new_tokens: of the reply, with what ends it.
        encoded_pictures: that went through the vision side.
        seconds: from the question to the end of the reply.
    """

    prompt_tokens: int
    computed_tokens: int
    new_tokens: int
    encoded_pictures: int
    seconds: float


class Conversation:
    """
    One chat with a model of ours. It is not to be shared by threads, but many on one model may run at once.

    Args:
        model ([`MiniGPT4ForConditionalGeneration`]): who answers.
        processor ([`MiniGPT4Processor`]): the processor of that model, with a chat template.
        system: system text, instead of the template's own.

    Attributes:
        messages: what was said, as chat templates take it; pictures are PIL images.
        turns: one [`Turn`] for each reply.

    Raises:
        ValueError: if model and processor do not go together, or there is no chat template.
    """

    def __init__(self, model: Any, processor: Any, system: str | None = None) -> None:
        _check(model, processor)
        self.model = model
        self.processor = processor
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.turns: list[Turn] = []
        self.reset()

    def ask(self, text: str, images: Sequence[Any] = (), *, streamer: Any = None, **generate_kwargs: Any) -> str:
        """
        Ask a question; returns the reply.

        An error, or Ctrl-C, leaves the conversation as it was before the question.

        Args:
            text: the question.
            images: new pictures, which stand in front of it: PIL images, arrays, paths, URLs or base64.
            streamer: gets the reply token by token.
            **generate_kwargs: options of `generate`, such as `max_new_tokens`, `temperature` or `num_beams`.

        Raises:
            ValueError: if there is no question, a picture cannot be read, or the chat does not fit the model.
        """
        pictures = self.processor.image_processor.fetch_images(flatten_images(images))
        if not text and not pictures:
            raise ValueError("There is no question; pass `text`, `images` or both.")
        content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
        content += [{"type": "text", "text": text}] if text else []
        return self._answer(
            [*self.messages, {"role": "user", "content": content}], self.turns, streamer, generate_kwargs
        )

    def retry(self, *, streamer: Any = None, **generate_kwargs: Any) -> str:
        """
        Ask the last question once more; the new reply takes the place of the old one.

        Raises:
            ValueError: if there was none.
        """
        if not self.turns:
            raise ValueError("There is no question to ask once more; ask one first.")
        return self._answer(self.messages[:-1], self.turns[:-1], streamer, generate_kwargs)

    def undo(self, turns: int = 1) -> None:
        """
        Take back the last questions and their replies.

        Raises:
            ValueError: if there are fewer.
        """
        if not 0 < turns <= len(self.turns):
            raise ValueError(f"{turns} turns cannot be taken back of {len(self.turns)}.")
        del self.messages[len(self.messages) - 2 * turns :]
        del self.turns[len(self.turns) - turns :]

    def reset(self) -> None:
        """Begin anew; the system text stays."""
        self.messages, self.turns = [], []
        if self.system is not None:
            self.messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}]

    def _answer(
        self, messages: list[dict[str, Any]], turns: list[Turn], streamer: Any, options: dict[str, Any]
    ) -> str:
        """The reply to messages that end with a question; what was said changes at the very end only."""
        start = time.perf_counter()
        if options.get("num_return_sequences", 1) not in (None, 1):
            raise ValueError("A conversation goes on from one reply; leave `num_return_sequences` out.")
        inputs = self.processor.apply_chat_template(
            [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            found = self.model.generate(**inputs, streamer=streamer, **options, return_dict_in_generate=True)
        ids = found.sequences[0, length:].tolist()
        reply: str = self.processor.post_process_image_text_to_text([ids])[0]
        turn = Turn(
            prompt_tokens=length,
            computed_tokens=length + max(len(ids) - 1, 0),
            new_tokens=len(ids),
            encoded_pictures=len(inputs.get("pixel_values", ())),
            seconds=time.perf_counter() - start,
        )
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
        self.turns = [*turns, turn]
        return reply


def _check(model: Any, processor: Any) -> None:
    """Raise a `ValueError` if a model and a processor cannot chat with each other."""
    config = getattr(model, "config", None)
    if not hasattr(getattr(model, "model", None), "encode_images"):
        raise ValueError(
            f"A conversation needs a MiniGPT4ForConditionalGeneration, but the model is a {type(model).__name__}."
        )
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            "The processor has no chat template; load it with one, such as "
            "`AutoProcessor.from_pretrained(folder, chat_template='vicuna_v0')`."
        )
    for name in ("image_token_id", "num_image_tokens"):
        wanted, given = getattr(config, name), getattr(processor, name, None)
        if wanted != given:
            raise ValueError(
                f"The processor's `{name}` is {given}, but the model's is {wanted}; load both from one folder."
            )


__all__ = ["Conversation", "Turn"]
