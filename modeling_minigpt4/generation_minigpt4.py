"""What generation needs beside the model: the separator of replies, and words where pictures are no words."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import LogitsProcessorList, RepetitionPenaltyLogitsProcessor, StoppingCriteria

from .configuration_minigpt4 import MiniGPT4Config


class GrowingLayer(DynamicLayer):
    """
    The cache layer of transformers with room for tokens to come: it does not copy all keys and values for every token.

    `keys` and `values` are views of the room. Whoever replaces them, as beam search does, is followed.
    """

    SHARE = 4  # a new room is larger than what it has to hold by this part of it, at least by
    LEAST = 64

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states of shape (rows, heads, tokens, channels); returns all that there are."""
        if not self.is_initialized or torch.is_grad_enabled():
            self._rooms: list[torch.Tensor | None] = [None, None]
            found: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return found
        self.keys = self._append(0, self.keys, key_states)  # type: ignore[has-type]
        self.values = self._append(1, self.values, value_states)  # type: ignore[has-type]
        return self.keys, self.values

    # What comes out of these has no room, and the old one would only take memory.

    def reorder_cache(self, *args: Any, **kwargs: Any) -> None:
        super().reorder_cache(*args, **kwargs)
        self._rooms = [None, None]

    def batch_repeat_interleave(self, *args: Any, **kwargs: Any) -> None:
        super().batch_repeat_interleave(*args, **kwargs)
        self._rooms = [None, None]

    def batch_select_indices(self, *args: Any, **kwargs: Any) -> None:
        super().batch_select_indices(*args, **kwargs)
        self._rooms = [None, None]

    def _append(self, place: int, kept: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        length, needed = kept.shape[-2], kept.shape[-2] + added.shape[-2]
        room = self._rooms[place]
        # `kept` is what was given back last, perhaps cut at its end, or something else.
        same = room is not None and (kept.data_ptr(), kept.stride()) == (room.data_ptr(), room.stride())
        # A room of inference mode cannot be written to outside of it.
        closed = room is not None and room.is_inference() and not torch.is_inference_mode_enabled()
        if room is None or closed or not same or kept.shape[0] != room.shape[0] or room.shape[-2] < needed:
            spare = max(needed // self.SHARE, self.LEAST)
            room = kept.new_empty(*kept.shape[:-2], needed + spare, kept.shape[-1])
            room[..., :length, :] = kept
            self._rooms[place] = room
        room[..., length:needed, :] = added
        return room[..., :needed, :]


def with_growing_layers(cache: Any) -> None:
    """Let the plain layers of a cache of transformers grow in place; others (sliding, static, offloaded) stay."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:  # layers that come with the first token
        cache.layer_class_to_replicate = GrowingLayer


class SeparatorCriteria(StoppingCriteria):
    """
    Stop each row at the template's separator (`###`), however the tokenizer spells it.

    Args:
        separator: text at which a reply ends.
        pieces: id → text of every token that holds a character of the separator; all others break it.
        prompt_length: number of ids that belong to the prompt, in which the separator does not count.
    """

    def __init__(self, separator: str, pieces: Mapping[int, str], prompt_length: int) -> None:
        self.separator = separator
        self.pieces = pieces
        self.start = prompt_length
        self.seen = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # Assisted decoding adds several ids a step, so look at all new ones and as many before as could begin it.
        first = max(self.start, min(self.seen, input_ids.shape[1] - 1) - len(self.separator) + 1)
        self.seen = input_ids.shape[1]
        rows = input_ids[:, first:].tolist()
        found = [self.separator in "".join(self.pieces.get(token, "\0") for token in row) for row in rows]
        return torch.tensor(found, device=input_ids.device)


class WordProcessors(LogitsProcessorList):
    """
    Logits processors that do not see image placeholders, which have no score; each counts as another id of its row.

    4.57 looks every id of the prompt up in the scores, for repetition_penalty among others.
    """

    def __init__(self, processors: Sequence[Any], image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.FloatTensor:
        if input_ids.shape[1] == 0:
            return super().__call__(input_ids, scores, **kwargs)
        places = input_ids == self.image_token_id
        others = input_ids.masked_fill(places, -1).amax(-1, keepdim=True).clamp(min=0)
        return super().__call__(torch.where(places, others, input_ids), scores, **kwargs)


def penalize_replies_only(processors: Sequence[Any], prompt_length: int) -> None:
    """
    Let `repetition_penalty` count words of the reply alone.

    So does the original, which generates from embeddings: its `generate` never sees the ids of the prompt. A number
    that the caller's own processor brings stays.
    """
    for processor in processors:
        if isinstance(processor, RepetitionPenaltyLogitsProcessor):
            own = processor.prompt_ignore_length  # None, or 5.x's tensor with the numbers of pads
            processor.prompt_ignore_length = own if isinstance(own, int) else prompt_length


class TextCandidates:
    """Guesses of an assistant that knows text only, for assisted decoding; placeholders are any word to it."""

    def __init__(self, generator: Any, config: MiniGPT4Config) -> None:
        self.generator = generator
        self.config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.generator, name)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        words = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)
        candidates, logits = self.generator.get_candidates(words, **kwargs)
        return torch.cat([input_ids, candidates[:, input_ids.shape[1] :].to(input_ids.device)], dim=-1), logits


def separator_pieces(tokenizer: Any, separator: str) -> dict[int, str]:
    """
    Id → text of every token of a tokenizer whose text holds a character of `separator`.

    A token alone is decoded without the "▁" of SentencePiece, but behind others that is a space: "#" and "▁##" are no
    separator.
    """
    bytes_of_separator = {f"<0x{byte:02X}>" for byte in separator.encode()}
    candidates = {
        token: piece
        for piece, token in tokenizer.get_vocab().items()
        if piece in bytes_of_separator or any(character in piece for character in separator)
    }
    texts = {token: tokenizer.decode([token]) for token in sorted(candidates)}
    return {token: " " * candidates[token].startswith("▁") + text for token, text in texts.items()}


def compose_generation_config(
    source: Mapping[str, Any], config: MiniGPT4Config, separator: str | None, hub_options: Mapping[str, Any]
) -> GenerationConfig:
    """Token ids of the language model, the original's length of 300 tokens, and the separator spelt in tokens."""
    where = {"revision": source.get("revision"), "subfolder": source.get("subfolder") or "", **hub_options}
    where = {name: value for name, value in where.items() if value is not None}
    try:
        own = GenerationConfig.from_pretrained(source["name_or_path"], **where)
    except OSError:
        own = GenerationConfig.from_model_config(config.text_config)
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ids = {name: getattr(config.text_config, name, None) if value is None else value for name, value in ids.items()}
    if ids["pad_token_id"] is None:
        ids["pad_token_id"] = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    generation_config = GenerationConfig(**ids, max_new_tokens=300)
    if separator is None:
        return generation_config
    try:
        tokenizer = AutoTokenizer.from_pretrained(source["name_or_path"], **where)
    except (OSError, ValueError, TypeError) as error:  # TypeError: 4.57, where the vocabulary's file is missing
        if separator == "auto":
            return generation_config  # a language model without a tokenizer has no chat template either
        raise OSError(
            f"The separator {separator!r} cannot be spelt in tokens, because {source['name_or_path']} has no "
            "tokenizer; add one there, or pass `separator=None`."
        ) from error
    if separator == "auto":
        separator = None if tokenizer.chat_template else "###"
    if separator is not None:
        generation_config.separator = separator
        generation_config.separator_pieces = separator_pieces(tokenizer, separator)
    return generation_config


__all__ = [
    "SeparatorCriteria",
    "TextCandidates",
    "WordProcessors",
    "compose_generation_config",
    "penalize_replies_only",
]
