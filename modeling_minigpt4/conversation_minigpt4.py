"""A chat with the model, turn by turn: questions with pictures, replies, one more try, and the way back."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from processing_minigpt4.image_processing_minigpt4 import flatten_images

from .checks_minigpt4 import max_positions
from .compat_minigpt4 import CACHE, CACHE_NAMES
from .memory_minigpt4 import Memory, can_be_cut, first_row
from .transcript_minigpt4 import Transcript, pictures_of, write_transcript


# What a conversation gives to `generate` itself.
OWN = ("inputs", "input_ids", "inputs_embeds", "attention_mask", "pixel_values", "vision_features", *CACHE_NAMES)

# Options with which `generate` has a cache of another kind, or goes back in it.
ANEW = (
    "assistant_early_exit",
    "assistant_model",
    "cache_implementation",
    "custom_generate",
    "dola_layers",
    "penalty_alpha",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "use_mtp",
)

DEFAULTS = GenerationConfig()


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
        retokenize: tokenize earlier replies anew, as a fresh start does, and do not keep them as the model spelt them.
            The text is the same, but a model may go on from other tokens in other words. Each turn then computes the
            reply before it once more.

    Attributes:
        messages: what was said, as chat templates take it; pictures are PIL images.
        turns: one [`Turn`] for each reply.

    Raises:
        ValueError: if model and processor do not go together, or there is no chat template.
    """

    def __init__(self, model: Any, processor: Any, system: str | None = None, *, retokenize: bool = False) -> None:
        _check(model, processor)
        self.model, self.processor = model, processor
        self.system, self.retokenize = system, retokenize
        self.messages: list[dict[str, Any]] = []
        self.turns: list[Turn] = []
        self._memory: Memory | None = None
        self._features: list[tuple[Any, torch.Tensor]] = []  # each picture with what the vision side makes of it
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
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise ValueError("There is no question to ask once more; ask one first.")
        return self._answer(self.messages[:-1], self.turns[:-1], streamer, generate_kwargs)

    def undo(self, turns: int = 1) -> None:
        """
        Take back the last questions and their replies.

        Raises:
            ValueError: if there are fewer.
        """
        questions = [place for place, message in enumerate(self.messages) if message["role"] == "user"]
        if not 0 < turns <= len(questions):
            raise ValueError(f"{turns} turns cannot be taken back, because there are {len(questions)}.")
        del self.messages[questions[-turns] :]
        del self.turns[max(len(self.turns) - turns, 0) :]

    def reset(self) -> None:
        """Begin anew; the system text stays."""
        self.messages, self.turns, self._memory, self._features = [], [], None, []
        if self.system is not None:
            self.messages = [{"role": "system", "content": [{"type": "text", "text": self.system}]}]

    # ---- one reply --------------------------------------------------------------------------------------------------

    def _answer(
        self, messages: list[dict[str, Any]], turns: list[Turn], streamer: Any, options: dict[str, Any]
    ) -> str:
        """The reply to messages that end with a question; what was said changes at the very end only."""
        start = time.perf_counter()
        options = self._checked({**options, "streamer": streamer})
        anew = self._option("use_cache", options) is False or any(self._option(name, options) for name in ANEW)
        transcript, place = write_transcript(self.processor, messages), 0
        if self._memory is not None and not anew and can_be_cut(self._memory.cache):
            place = self._memory.transcript.shared(transcript, self._memory.length, self.retokenize)
            transcript = self._memory.transcript.continued(transcript, place)
        length, kept = len(transcript.ids), transcript.cuts[place]
        options = self._within_window(length, options)

        pictures = pictures_of(messages)
        ids = torch.tensor([transcript.ids], device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        features, encoded = self._features, len(pictures)
        if options.get("assistant_model") is None:
            features, encoded = self._encode(pictures)
            new = [one for (_, one), (at, _) in zip(features, transcript.pictures, strict=True) if at >= place]
            inputs |= {"vision_features": torch.stack(new)} if new else {}
        elif pictures:
            inputs["pixel_values"] = self._pixels(pictures)  # an assistant may have eyes of its own
        found, computed = self._generate(inputs, kept, options)

        said = found.sequences[0, length:].tolist()
        reply: str = self.processor.post_process_image_text_to_text([said])[0]
        memory = self._memory if anew else self._remembered(found, transcript, said)
        turn = Turn(length, computed, len(said), encoded, time.perf_counter() - start)
        self._memory, self._features = memory, features
        self.messages = [*messages, {"role": "assistant", "content": [{"type": "text", "text": reply}]}]
        self.turns = [*turns, turn]
        return reply

    def _option(self, name: str, options: dict[str, Any]) -> Any:
        """What `generate` will take for an option: the caller's, or that of the model."""
        value, default = options.get(name), getattr(DEFAULTS, name, None)
        for source in (options.get("generation_config"), self.model.generation_config):
            if value is None or (name not in options and value == default):  # the model's is what others leave out
                value = getattr(source, name, None)
        return value

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """The caller's options, and what follows from them; a `ValueError` for one that does not belong here."""
        if given := [name for name in OWN if name in options]:
            raise ValueError(f"A conversation gives `{given[0]}` to the model itself; leave it out.")
        if (replies := self._option("num_return_sequences", options) or 1) != 1:
            raise ValueError(f"A conversation goes on from one reply, so `num_return_sequences` cannot be {replies}.")
        if options["streamer"] is not None and (beams := self._option("num_beams", options) or 1) > 1:
            raise ValueError(f"A `streamer` hears one reply, and not {beams} beams; leave one of them out.")
        more = {"tokenizer": self.processor.tokenizer} if self._option("stop_strings", options) else {}
        return _with({**more, **options}, "return_dict_in_generate", True)

    def _within_window(self, length: int, options: dict[str, Any]) -> dict[str, Any]:
        """Options with which a reply ends where the language model has no more positions."""
        limit, wanted = max_positions(self.model.config.text_config), self._option("max_new_tokens", options)
        if limit is not None and length >= limit:
            raise ValueError(
                f"The chat has {length:,} tokens, image tokens included, but the language model has {limit:,} "
                "positions, a reply included; ask a shorter question, take turns back with `undo`, or begin anew with "
                "`reset`."
            )
        bounded = self._option("max_length", options) not in (None, DEFAULTS.max_length)
        if limit is None or wanted is None or bounded or length + wanted <= limit:
            return options
        return _with(options, "max_new_tokens", limit - length)

    def _pixels(self, pictures: list[Any]) -> torch.Tensor:
        processor = self.processor.image_processor
        pixels: torch.Tensor = processor(processor.fetch_images(pictures), return_tensors="pt")["pixel_values"]
        return pixels.to(self.model.device)

    @torch.no_grad()
    def _encode(self, pictures: list[Any]) -> tuple[list[tuple[Any, torch.Tensor]], int]:
        """Pictures with what the vision side makes of each, and how many of them it had to look at."""
        known = {id(picture): features for picture, features in self._features}
        new = list({id(picture): picture for picture in pictures if id(picture) not in known}.values())
        if new:
            encoded = self.model.model.encode_images(self._pixels(new)).last_hidden_state
            known |= {id(picture): features for picture, features in zip(new, encoded, strict=True)}
        return [(picture, known[id(picture)]) for picture in pictures], len(new)

    def _generate(self, inputs: dict[str, Any], kept: int, options: dict[str, Any]) -> tuple[Any, int]:
        """What `generate` gives, and how many tokens went through the decoder; so many of the prompt are cached."""
        beams, length, first = self._option("num_beams", options) or 1, inputs["input_ids"].shape[1], kept
        if kept == 0 or self._memory is None:
            found = self.model.generate(**inputs, **options)
        else:
            self._memory.cut(kept)
            inputs[CACHE] = self._memory.cache
            if beams > 1:
                first = length - 1
                inputs = self._prefilled(inputs, kept, beams)
            found = self.model.generate(**inputs, **options)
        steps = found.sequences.shape[1] - length
        if self._option("use_cache", options) is False:
            return found, beams * sum(range(length, length + steps))
        cache: Any = getattr(found, CACHE, None)
        last = cache.get_seq_length() if can_be_cut(cache) else length + steps - 1
        return found, first - kept + beams * (last - first)

    @torch.no_grad()
    def _prefilled(self, inputs: dict[str, Any], kept: int, beams: int) -> dict[str, Any]:
        """Inputs whose cache has all but the last token of the prompt, computed once, for every beam."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        if kept < ids.shape[1] - 1:
            more = {name: value for name, value in inputs.items() if name in ("vision_features", CACHE)}
            self.model(ids[:, kept:-1], attention_mask=mask[:, :-1], use_cache=True, logits_to_keep=1, **more)
        cache = copy.deepcopy(inputs[CACHE])
        cache.batch_repeat_interleave(beams)
        return {"input_ids": ids, "attention_mask": mask, CACHE: cache}

    def _remembered(self, found: Any, transcript: Transcript, said: list[int]) -> Memory | None:
        """What the next turn can go on from, unless the cache is of a kind that cannot be cut."""
        cache: Any = getattr(found, CACHE, None)
        if not can_be_cut(cache):
            return None
        length = cache.get_seq_length()
        if cache.layers[0].keys.shape[0] > 1:  # beams, which have the prompt in common
            length = len(transcript.ids)
            cache = first_row(cache, length)
        return Memory(transcript.with_reply(said, self.processor), cache, min(length, len(transcript.ids) + len(said)))


def _with(options: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """Options with one more, which goes into the caller's generation config if there is one."""
    if (config := options.get("generation_config")) is None:
        return {**options, name: value}
    config = copy.deepcopy(config)
    setattr(config, name, value)
    return {**{key: given for key, given in options.items() if key != name}, "generation_config": config}


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
    processor(text=" ")  # which raises if a word of the tokenizer has the id of pictures


__all__ = ["Conversation", "Turn"]
