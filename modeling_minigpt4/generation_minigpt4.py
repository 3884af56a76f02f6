"""What generation needs beside the model: the separator of replies, and words where pictures are no words."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, DynamicCache, GenerationConfig, GenerationMixin
from transformers.cache_utils import DynamicLayer
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

from .backbones import fetch_options
from .checks_minigpt4 import check_length
from .compat_minigpt4 import CACHE, IS_TRANSFORMERS_4
from .configuration_minigpt4 import MiniGPT4Config
from .remote_code_minigpt4 import check_trust


# Inputs that only a model with eyes takes.
PICTURES = ("pixel_values", "vision_features")


class GrowingLayer(DynamicLayer):
    """
    The cache layer of transformers with room for tokens to come: it does not copy all keys and values for every token.

    `keys` and `values` are views of the room. Whoever replaces or cuts them is followed.
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


def end_of_reply(reply: Sequence[int], separator: str, pieces: Mapping[int, str], ends: Sequence[int]) -> int | None:
    """Where a reply's separator ends, unless it has ended before, by one of `ends`."""
    text = ""
    for place, token in enumerate(reply):
        text += pieces.get(token, "\0")
        if separator in text:
            return place + 1
        if token in ends:
            break
    return None


class WordProcessors(LogitsProcessorList):
    """
    Logits processors that do not see image placeholders, which have no score; each counts as another id of its row.

    4.57 looks every id of the prompt up in the scores, for repetition_penalty among others. Those that look at what
    follows what see placeholders, and get a score for them, lest they take them for words.
    """

    FOLLOWERS = (NoRepeatNGramLogitsProcessor, EncoderNoRepeatNGramLogitsProcessor)

    def __init__(self, processors: Sequence[Any], image_token_id: int) -> None:
        super().__init__(processors)
        self.image_token_id = image_token_id
        for processor in processors:
            if isinstance(processor, EncoderRepetitionPenaltyLogitsProcessor):
                processor.encoder_input_ids = words_only(processor.encoder_input_ids, image_token_id)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.FloatTensor:
        words, size = words_only(input_ids, self.image_token_id), scores.shape[-1]
        for processor in self:
            alone = LogitsProcessorList([processor])
            if isinstance(processor, self.FOLLOWERS):
                room = (0, self.image_token_id + 1 - size)
                scores = alone(input_ids, F.pad(scores, room, value=-torch.inf), **kwargs)[:, :size]
            else:
                scores = alone(words, scores, **kwargs)
        return scores


def words_only(input_ids: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Ids whose placeholders are another id of their row, 0 where there is none."""
    if input_ids.shape[1] == 0:
        return input_ids
    places = input_ids == image_token_id
    return torch.where(places, input_ids.masked_fill(places, -1).amax(-1, keepdim=True).clamp(min=0), input_ids)


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
    where = {name: value for name, value in fetch_options(source, hub_options).items() if value is not None}
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
        trusted = bool(hub_options.get("trust_remote_code"))
        tokenizer = AutoTokenizer.from_pretrained(source["name_or_path"], trust_remote_code=trusted, **where)
    except (OSError, ValueError, TypeError) as error:  # TypeError: 4.57, where the vocabulary's file is missing
        if "trust_remote_code" in str(error):
            check_trust(f"tokenizer of {source['name_or_path']}", trusted)
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


def _flat(value: Any) -> set[Any]:
    """All whole numbers in nested lists, and in the keys of a mapping."""
    if isinstance(value, (list, tuple, Mapping)):
        return set().union(*map(_flat, value))
    return {value} if isinstance(value, int) else set()


class _TextFirst:
    """A model as it is, but for the name of its main input."""

    main_input_name = "input_ids"

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class MiniGPT4GenerationMixin(GenerationMixin):
    """
    What `generate` does beside transformers': pictures get places, replies end at the template's separator.

    Everything that belongs to one call is in its arguments and in its own copy of the generation config, so that
    several threads can share a model.
    """

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Let a cache that generation makes for itself grow in place; with beams it is copied anyway."""
        given = model_kwargs.get(CACHE)
        result = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and generation_config.num_beams == 1:
            with_growing_layers(model_kwargs.get(CACHE))
        return result

    def _prepare_generated_length(self, generation_config: GenerationConfig, **kwargs: Any) -> GenerationConfig:
        """Note how long the prompt is, on the copy of the generation config that belongs to this call."""
        generation_config._prompt_length = kwargs["input_ids_length"]
        return super()._prepare_generated_length(generation_config=generation_config, **kwargs)

    def _separator(self, generation_config: GenerationConfig) -> tuple[str, dict[int, str]] | None:
        """The separator and its pieces (`SeparatorCriteria`), if replies end at one."""
        # A config that the caller made has no such field, unless to switch it off with `separator=""`.
        source = generation_config if hasattr(generation_config, "separator") else self.generation_config
        if not (separator := getattr(source, "separator", None)):
            return None
        return separator, {int(token): text for token, text in source.separator_pieces.items()}

    def _get_stopping_criteria(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """Add the template's separator, which the checkpoint's generation config spells in token ids."""
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if separator := self._separator(generation_config):
            criteria.append(SeparatorCriteria(*separator, getattr(generation_config, "_prompt_length", 0)))
        return criteria

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Any:
        """Keep image placeholders from penalties, and the whole prompt where `penalize_prompt` is False."""
        self._check_for_placeholders(generation_config, kwargs.get("negative_prompt_ids"))
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)
        source = generation_config if hasattr(generation_config, "penalize_prompt") else self.generation_config
        if not getattr(source, "penalize_prompt", True):
            penalize_replies_only(processors, getattr(generation_config, "_prompt_length", 0))
        return WordProcessors(processors, self.config.image_token_id)

    def _check_for_placeholders(self, generation_config: GenerationConfig, negative_prompt_ids: Any) -> None:
        """Raise a `ValueError` for options that ask for the score of an image placeholder, or for a second picture."""
        placeholder = self.config.image_token_id
        for name in ("bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id"):
            if placeholder in _flat(getattr(generation_config, name, None)):
                raise ValueError(
                    f"`{name}` holds the image placeholder {placeholder}, which is no word of the language model and "
                    "is never written; leave it out."
                )
        if negative_prompt_ids is not None and bool((negative_prompt_ids == placeholder).any()):
            raise ValueError(
                f"`negative_prompt_ids` hold the image placeholder {placeholder}, but only the prompt sees pictures; "
                "take it out."
            )

    def heal_tokens(self, input_ids: torch.Tensor, tokenizer: Any = None) -> Any:
        """
        See [`~transformers.GenerationMixin.heal_tokens`].

        Raises:
            ValueError: if there are pictures in the prompt, which it would lose.
        """
        if bool((input_ids == self.config.image_token_id).any()):
            raise ValueError(
                "`token_healing` writes the prompt anew as text, which would lose its image placeholders "
                f"{self.config.image_token_id}; leave it out."
            )
        return super().heal_tokens(input_ids, tokenizer)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An assistant that knows text only gets the prompt without pictures; guesses from the prompt are words."""
        assistant = kwargs.get("assistant_model")
        if assistant is None and kwargs["generation_config"].prompt_lookup_num_tokens is not None:
            return TextCandidates(super()._get_candidate_generator(*args, **kwargs), self.config)
        if assistant is None or "pixel_values" in inspect.signature(assistant.forward).parameters:
            return super()._get_candidate_generator(*args, **kwargs)
        kwargs["input_ids"] = kwargs["input_ids"].masked_fill(kwargs["input_ids"] == self.config.image_token_id, 0)
        kwargs["model_kwargs"] = {
            name: value for name, value in kwargs["model_kwargs"].items() if name not in PICTURES
        }
        return TextCandidates(super()._get_candidate_generator(*args, **kwargs), self.config)

    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Write replies; see [`~transformers.GenerationMixin.generate`].

        Each row ends at EOS or at the separator of the chat template (`generation_config.separator`, `###` for the
        original), which is kept; the processor's post-processing takes it off. `max_length`, if it is passed, holds
        even where the checkpoint's generation config has `max_new_tokens`. Where no text has a place for a
        picture, or there is no text at all, one picture per row goes in front, behind BOS: the format of stage 1.

        `generation_config.penalize_prompt = False` lets `repetition_penalty` count words of the reply alone, as in the
        original; otherwise it counts those of the prompt too, as in transformers.

        Where transformers takes a tokenizer (`stop_strings`, `token_healing`, another model's assistance), a processor
        does as well.
        """
        if inputs is not None and inputs.is_floating_point():  # as the image-to-text pipeline of 4.57 gives them
            inputs, kwargs["pixel_values"] = None, inputs
        for name in ("tokenizer", "assistant_tokenizer"):  # servers hand their processor over
            if hasattr(kwargs.get(name), "tokenizer") and not hasattr(kwargs[name], "get_vocab"):
                kwargs[name] = kwargs[name].tokenizer
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        pictures = kwargs.get("pixel_values", kwargs.get("vision_features"))
        if pictures is not None and kwargs.get("inputs_embeds") is None:
            input_ids, kwargs = self._make_places(input_ids, pictures, kwargs)
        if input_ids is not None and input_ids.ndim == 2:
            check_length(input_ids.shape[1], self.config.text_config, room=1)
        config = kwargs.get("generation_config", args[0] if args else None)
        if config is None and kwargs.get("max_length") is not None:
            kwargs.setdefault("max_new_tokens", None)  # the caller's limit, and not the one that the checkpoint brings
        found = super().generate(input_ids, *args, **kwargs)
        if config is None or self.config.image_token_id not in _flat(config.suppress_tokens):
            return found
        return self._close_replies(found, config, 0 if input_ids is None else input_ids.shape[1])

    def _close_replies(self, found: Any, generation_config: GenerationConfig, start: int) -> Any:
        """
        Put EOS behind replies that end at the separator.

        GRPO and RLOO of TRL look for it, and would take the pads there for words. They are known by the placeholder,
        which they suppress.
        """
        eos, separator = generation_config.eos_token_id, self._separator(generation_config)
        if separator is None or eos is None:
            return found
        ends = [eos] if isinstance(eos, int) else list(eos)
        rows = found if isinstance(found, torch.Tensor) else found.sequences
        places = [end_of_reply(row, *separator, ends) for row in rows[:, start:].tolist()]
        if rows.shape[1] - start in places:
            pad = (
                self.generation_config.pad_token_id
                if generation_config.pad_token_id is None
                else generation_config.pad_token_id
            )
            rows = F.pad(rows, (0, 1), value=ends[0] if pad is None else pad)
        for row, place in zip(rows, places, strict=True):
            if place is not None:
                row[start + place] = ends[0]
        if isinstance(found, torch.Tensor):
            return rows
        found.sequences = rows
        return found

    def estimate_tokens(self, input_dict: Any) -> int:
        """Tokens of a batch, for the Trainer's count of operations: text and placeholders, not pixels."""
        ids = input_dict.get("input_ids") if isinstance(input_dict, Mapping) else None  # GRPO's batches are lists
        return 0 if ids is None else int(ids.numel())

    if IS_TRANSFORMERS_4:
        main_input_name = "pixel_values"  # what pipeline("image-to-text"), gone from 5.x, hands to `generate` first

        def _prepare_model_inputs(self, *args: Any, **kwargs: Any) -> Any:
            """Generation is about text, whatever `main_input_name` tells that pipeline."""
            return GenerationMixin._prepare_model_inputs(_TextFirst(self), *args, **kwargs)

    def _make_places(
        self, input_ids: torch.Tensor | None, pictures: torch.Tensor, kwargs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Put image placeholders behind BOS where `input_ids` have none and there is one picture per row."""
        bos = (kwargs.get("generation_config") or self.generation_config).bos_token_id
        if input_ids is None:
            start = [[] if bos is None else [bos]] * len(pictures)
            input_ids = torch.tensor(start, dtype=torch.long, device=pictures.device)
        image_token = self.config.image_token_id
        if len(pictures) != len(input_ids) or bool((input_ids == image_token).any()):
            return input_ids, kwargs
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        width = pictures.shape[1] if kwargs.get("pixel_values") is None else self.config.num_image_tokens
        rows, masks = [], []
        for ids, real in zip(input_ids.long(), mask.long(), strict=True):
            first = int(real.argmax()) if len(real) else 0
            first += int(first < len(ids) and bos is not None and int(ids[first]) == bos)
            rows.append(torch.cat([ids[:first], ids.new_full((width,), image_token), ids[first:]]))
            masks.append(torch.cat([real[:first], real.new_ones(width), real[first:]]))
        return torch.stack(rows), {**kwargs, "attention_mask": torch.stack(masks)}

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        *args: Any,
        inputs_embeds: torch.Tensor | None = None,  # named, because `generate` looks for it in this signature
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give pictures to the steps whose slice of `input_ids` has places for them: the first, or all if uncached."""
        kwargs["inputs_embeds"] = inputs_embeds
        model_inputs: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        ids = model_inputs.get("input_ids")
        if ids is not None and bool((ids == self.config.image_token_id).any()):
            model_inputs.update(pixel_values=pixel_values, vision_features=vision_features)
        return model_inputs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        """Repeat rows for beams; pictures are encoded once and repeated with their row, however many it has."""
        pixels, features = model_kwargs.pop("pixel_values", None), model_kwargs.pop("vision_features", None)
        if expand_size > 1 and input_ids is not None and (pixels is not None or features is not None):
            if features is None:
                features = self.model.encode_images(pixels).last_hidden_state
            places = (input_ids == self.config.image_token_id).sum(-1)
            per_row = (places // features.shape[1]).tolist()
            if sum(per_row) == features.shape[0]:  # otherwise the first forward says what is wrong
                rows = features.split(per_row)
                features = torch.cat([row for row in rows for _ in range(expand_size)])
            pixels = None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        given = {"pixel_values": pixels, "vision_features": features}
        return input_ids, {**model_kwargs, **{name: value for name, value in given.items() if value is not None}}


__all__ = [
    "MiniGPT4GenerationMixin",
    "SeparatorCriteria",
    "TextCandidates",
    "WordProcessors",
    "compose_generation_config",
    "penalize_replies_only",
]
