"""What is wrong with the parts and the inputs of a model, in a sentence; of tensors only shapes are looked at."""

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Parameters of a model that is built, rather than loaded, from which on its size is worth a warning.
LARGE = 500_000_000


class InputError(ValueError):
    """Inputs that do not belong together or to the model."""


# ---- parts ----------------------------------------------------------------------------------------------------------


def check_part(part: str, config: PretrainedConfig, name: str) -> None:
    """
    Refuse a backbone that cannot be what it is meant for, by its configuration alone.

    Args:
        part: `"vision"` or `"language_model"`; others are not looked at.
        config: the whole configuration of the repository or folder.
        name: of that, for the message.

    Raises:
        ValueError: saying what it is instead.
    """
    if part == "vision":
        config = getattr(config, "vision_config", config)
        kind = AutoModel._model_mapping.get(type(config), None)
        takes = getattr(kind, "main_input_name", "pixel_values")
        if takes != "pixel_values":
            raise ValueError(
                f"The vision backbone {name} is a {config.model_type!r} model, which takes {takes} and no pictures; "
                "name a vision encoder, or a model that holds one."
            )
    elif part == "language_model":
        text = config.get_text_config()
        if not getattr(text, "is_decoder", False) and type(text) in AutoModelForMaskedLM._model_mapping:
            reason = "reads in both directions and writes no text"
        elif type(text) not in AutoModelForCausalLM._model_mapping and "AutoModelForCausalLM" not in _own_code(text):
            reason = "is none that AutoModelForCausalLM knows"
        else:
            return
        raise ValueError(
            f"The language_model backbone {name} is a {text.model_type!r} model, which {reason}; name a decoder "
            "(Llama, Qwen, Mistral, Gemma, GPT-2, …)."
        )


def _own_code(config: PretrainedConfig) -> Mapping[str, str]:
    return getattr(config, "auto_map", None) or {}


def check_dtype(options: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a `dtype` that torch does not have; transformers' own would be an AttributeError."""
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(
            f"`dtype` is {dtype!r}, which torch does not have; use 'auto', 'bfloat16', 'float16' or 'float32'."
        )


def warn_about_size(config: Any, skeleton: Callable[[], torch.nn.Module]) -> None:
    """
    Tell the size of a large model that is about to be filled with random numbers, as of `MiniGPT4Config()`.

    Loading builds without memory, on the meta device, and is not told of.

    Args:
        config: of the model.
        skeleton: builds the model on the meta device.
    """
    text = config.text_config
    width = getattr(text, "hidden_size", 0)
    about = 12 * getattr(text, "num_hidden_layers", 0) * width**2 + getattr(text, "vocab_size", 0) * width
    if about < LARGE or is_deepspeed_zero3_enabled():
        return
    probe = torch.nn.Module()
    probe.register_parameter("weight", torch.nn.Parameter(torch.empty(0)))  # accelerate moves it as it is registered
    if probe.weight.device.type == "meta":
        return
    count = sum(parameter.numel() for parameter in skeleton().parameters())
    size = count * torch.get_default_dtype().itemsize / 1e9
    logger.warning(
        f"This builds a MiniGPT-4 of {count:,} random parameters, {size:.0f} GB; `from_pretrained` loads a trained "
        "one, and `from_backbones` joins trained parts."
    )


# ---- tensors --------------------------------------------------------------------------------------------------------


def max_positions(text_config: PretrainedConfig) -> int | None:
    """Tokens that a language model has positions for, or None where there is no such limit, or it is not told."""
    rope = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    scaled = {str(kind.get("rope_type") or kind.get("type") or "default") for kind in kinds} - {"default", "llama3"}
    if scaled or getattr(text_config, "alibi", False):  # positions go on, beyond what the configuration says
        return None
    limit = getattr(text_config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def has_learned_positions(text_config: PretrainedConfig) -> bool:
    """Whether a language model looks positions up in a table, rather than to rotate or bias by them."""
    names = ("rope_parameters", "rope_theta", "rotary_dim", "rotary_pct", "rotary_emb_base", "alibi", "rotary")
    return max_positions(text_config) is not None and not any(getattr(text_config, name, None) for name in names)


def check_length(tokens: int, text_config: PretrainedConfig, room: int = 0, may_go_beyond: bool = False) -> None:
    """
    Raise an `InputError` if there are more tokens than positions.

    Args:
        tokens: of the longest row.
        text_config: of the language model.
        room: tokens of a reply that has to fit too.
        may_go_beyond: whether positions that are computed may be more than those that the model was trained with.
    """
    limit = None if may_go_beyond and not has_learned_positions(text_config) else max_positions(text_config)
    if limit is not None and tokens + room > limit:
        raise InputError(
            f"The text has {tokens:,} tokens, image tokens included, but the language model has {limit:,} positions"
            f"{', a reply included' if room else ''}; shorten it, or let the processor cut it with `truncation=True` "
            "and `max_length`."
        )


def check_pixels(pixel_values: torch.Tensor, config: Any) -> None:
    """
    Look at the shape and the type of pictures.

    Raises:
        InputError: saying how they have to be.
    """
    vision, shape = config.vision_config, tuple(pixel_values.shape)
    channels = getattr(vision, "num_channels", 3)
    height, width = config.image_size
    fixed = vars(config).get("image_size") or getattr(vision, "image_size", None)
    if not pixel_values.is_floating_point():
        reason = f"are {str(pixel_values.dtype).removeprefix('torch.')}, not normalized numbers"
    elif len(shape) == 5:
        reason = f"have the shape {shape}; join its first two axes"
    elif len(shape) != 4:
        reason = f"have the shape {shape}"
    elif shape[1] != channels:
        reason = f"have the shape {shape}{', with channels last' if shape[3] == channels else ''}"
    elif fixed and shape[2:] != (height, width):
        reason = f"have the shape {shape}"
    else:
        return
    raise InputError(
        f"`pixel_values` {reason}; they have to be numbers of shape (pictures, {channels}, {height}, {width}), as "
        "this model's processor makes them."
    )


def check_given(input_ids: Any, inputs_embeds: Any, has_pictures: bool, image_token_id: int) -> None:
    """Raise a `ValueError` if there is no text, or two of them, or no ids that tell the places of pictures."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if has_pictures and input_ids is None:
        raise ValueError(
            f"Pictures need `input_ids`, whose placeholders {image_token_id} tell their places; embeddings given as "
            "`inputs_embeds` must hold the image tokens already, which those of PEFT's prompt tuning and P-tuning do "
            "not (LoRA, IA3 and prefix tuning work)."
        )


def check_inputs(
    rows: torch.Tensor | None,
    attention_mask: Any = None,
    labels: torch.Tensor | None = None,
    vision_features: torch.Tensor | None = None,
    image_positions: torch.Tensor | None = None,
    cached: bool = False,
) -> None:
    """
    Look at how inputs of a forward pass go together.

    Args:
        rows: ids of shape (batch, length), or embeddings of shape (batch, length, width).
        attention_mask: of shape (batch, length), or longer where something is cached; others are not looked at.
        labels: of shape (batch, length).
        vision_features: of shape (pictures, image tokens, channels).
        image_positions: of shape (image tokens of all pictures,).
        cached: whether there is a cache, which may hold what the rows go on from.

    Raises:
        InputError: naming both shapes.
    """
    if rows is None:
        return
    if rows.ndim != (3 if rows.is_floating_point() else 2):
        raise InputError(
            f"{_named(rows)} have the shape {tuple(rows.shape)}; ids are of shape (batch, length), as integers, and "
            "embeddings of shape (batch, length, width)."
        )
    shape = tuple(rows.shape[:2])
    if labels is not None and tuple(labels.shape) != shape:
        raise InputError(
            f"`labels` have the shape {tuple(labels.shape)}, but {_named(rows)} are of {shape[0]} rows and {shape[1]} "
            "tokens; give every token a label, -100 where there is nothing to learn."
        )
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim != 4:
        mask = tuple(attention_mask.shape)
        fits = len(mask) == 2 and mask[0] == shape[0] and (mask[1] == shape[1] or (cached and mask[1] > shape[1]))
        if not fits:
            raise InputError(
                f"`attention_mask` has the shape {mask}, but {_named(rows)} are of {shape[0]} rows and {shape[1]} "
                "tokens; it has a number for every token, those in the cache included."
            )
    if vision_features is not None and vision_features.ndim != 3:
        raise InputError(
            f"`vision_features` have the shape {tuple(vision_features.shape)}; they have to be of shape (pictures, "
            "image tokens, channels), as `encode_images` gives them."
        )
    if image_positions is not None and (image_positions.ndim != 1 or image_positions.is_floating_point()):
        raise InputError(
            f"`image_positions` have the shape {tuple(image_positions.shape)}; they are places in the flattened "
            "`input_ids`, one integer for each image token."
        )


def _named(rows: torch.Tensor) -> str:
    return "`inputs_embeds`" if rows.ndim > 2 and rows.is_floating_point() else "`input_ids`"


def tells_out_of_range(embed: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a method of ids, image tokens and their places say which of them are out of range, on the CPU."""

    @functools.wraps(embed)
    def embed_or_tell(
        model: Any, input_ids: torch.Tensor, image_tokens: torch.Tensor | None, places: torch.Tensor | None
    ) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return embed(model, input_ids, image_tokens, places)
        try:
            return embed(model, input_ids, image_tokens, places)
        except IndexError as error:
            raise _out_of_range(input_ids, places, model.config) from error

    return embed_or_tell


def _out_of_range(input_ids: torch.Tensor, places: torch.Tensor | None, config: Any) -> InputError:
    """The error for an id without a row in the embedding, or a place outside; looks at values, so for afterwards."""
    size, image_token_id = config.text_config.vocab_size, config.image_token_id
    wrong = input_ids[((input_ids < 0) | (input_ids >= size)) & (input_ids != image_token_id)]
    if wrong.numel() == 0:
        return InputError(
            f"`image_positions` are not all from 0 to {input_ids.numel() - 1}; they are places in the flattened "
            "`input_ids`."
        )
    return InputError(
        f"`input_ids` hold {int(wrong[0])}, which is no token of the language model's vocabulary (0 to {size - 1}) "
        f"and not the image placeholder, {image_token_id}; prepare text with this model's processor."
    )


def describe_mismatch(places: int, tokens: int, image_token_id: int) -> str:
    """What to say of more or fewer places than image tokens."""
    return (
        f"Image features and image tokens do not match, tokens: {places}, features: {tokens}; `input_ids` need "
        f"{image_token_id} exactly once per image token, so prepare text and images together with this model's "
        f"processor (with `processor.image_token_id = {image_token_id}`, which moves when tokens are added), and do "
        "not let truncation cut an image."
    )


# ---- configuration --------------------------------------------------------------------------------------------------


def check_joins(tokens: int, merge: int) -> None:
    """Raise a `ValueError` if patch tokens cannot be joined `merge` at a time without remainder."""
    if tokens % merge:
        raise ValueError(
            f"The vision encoder gives {tokens} tokens, which cannot be joined {merge} at a time; set "
            "`patch_merge_size` to a divisor, or look whether all of them are patches: "
            "`vision_feature_select_strategy` 'default' drops CLS and registers, 'full' keeps every token."
        )


def is_whole(value: Any, least: float = -math.inf) -> bool:
    """Whether a value is an integer from `least` on; a truth value is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_square(value: int) -> bool:
    """Whether a whole number is a square, as 1, 4 and 9 are."""
    return math.isqrt(value) ** 2 == value


def is_image_size(value: Any) -> bool:
    """Whether a value is a number of pixels, or two of them: height and width."""
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)
    return all(is_whole(side, 1) for side in sides)


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def why_missing(name: str) -> str:
    """Why a folder or repository cannot be opened, as far as its name and the disk tell."""
    if os.path.isfile(name):
        return "it is a file"
    if os.path.isdir(name):
        return "the folder has no configuration, or no weights"
    if os.path.isabs(name) or name.startswith((".", "~")):
        return "there is no such folder"
    return "there is no such folder here, and no such repository could be reached"


__all__ = [
    "InputError",
    "check_dtype",
    "check_given",
    "check_inputs",
    "check_joins",
    "check_length",
    "check_part",
    "check_pixels",
    "describe_mismatch",
    "is_image_size",
    "is_positive",
    "is_square",
    "is_whole",
    "max_positions",
    "tells_out_of_range",
    "warn_about_size",
    "why_missing",
]
