"""Patches of a picture: which of an encoder's tokens they are, where they lie, and in which order they are joined."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import Blip2VisionConfig, PretrainedConfig

from .checks_minigpt4 import is_whole


LAYOUTS = ("consecutive", "square")
STRATEGIES = ("default", "full")
MOST = 4  # patches that are joined where nobody says how many, as in the released code

# What configurations call the tokens in front of the patches. An encoder whose configuration is silent has one CLS
# token or none.
_CLS = ("num_cls_tokens", "n_cls_tokens")
_REGISTERS = ("num_register_tokens", "num_registers")
_DISTILLED = ("deit",)  # one token more, behind CLS, that no field of the configuration tells
_UNORDERED = ("hiera", "vit_mae")  # by windows in windows, or shuffled


class Place(NamedTuple):
    """
    Where the patches lie among the tokens of an encoder.

    Args:
        prefix: tokens in front of them (CLS, registers); None if not known.
        grid: rows and columns of patches, one row behind the other; None if they lie otherwise, or it is not known.
    """

    prefix: int | None
    grid: tuple[int, int] | None


# ---- an encoder's output --------------------------------------------------------------------------------------------


def pair(size: Any) -> tuple[int, int]:
    """Height and width from one number or two."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def own_image_size(vision_config: PretrainedConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures an encoder is made for; 224 × 224 if its configuration is silent."""
    return pair(getattr(vision_config, "image_size", None) or 224)


def encoder_options(
    vision_config: PretrainedConfig, size: tuple[int, int], layer: int | None, arguments: frozenset[str]
) -> dict[str, Any]:
    """
    What an encoder has to be told beside the pictures.

    Args:
        vision_config: of the encoder.
        size: height and width of the pictures.
        layer: which of its hidden states is wanted; see `vision_feature_layer`.
        arguments: names of the arguments of its forward.
    """
    options = {}
    if "interpolate_pos_encoding" in arguments and size != own_image_size(vision_config):
        options["interpolate_pos_encoding"] = True
    if layer is not None and {"output_hidden_states", "kwargs"} & arguments:
        options["output_hidden_states"] = True
    return options


def select_layer(outputs: Any, layer: int | None) -> torch.Tensor:
    """
    The last hidden state of an encoder, or the one that `vision_feature_layer` names.

    Raises:
        ValueError: if there is none of that number.
    """
    if layer is None:
        last: torch.Tensor = outputs.last_hidden_state
        return last
    states = getattr(outputs, "hidden_states", None) or ()
    if not -len(states) <= layer < len(states):
        numbers = f"are numbered -{len(states)} to {len(states) - 1}" if states else "are none"
        raise ValueError(
            f"`vision_feature_layer` is {layer}, but the hidden states of this vision encoder {numbers}; name one of "
            "these, or leave it out for the last one."
        )
    state: torch.Tensor = states[layer]
    return state


# ---- where patches lie ----------------------------------------------------------------------------------------------


def find_patches(vision_config: PretrainedConfig, shape: Sequence[int], size: tuple[int, int]) -> Place:
    """
    Find the patches among the tokens of an encoder.

    Args:
        vision_config: of the encoder.
        shape: of what it gives for a picture: (tokens, channels), or (channels, rows, columns) of a feature map.
        size: height and width of the picture in pixels.
    """
    if len(shape) == 3:
        return Place(0, (shape[1], shape[2]))
    tokens, prefixes = shape[0], _prefixes(vision_config)
    patch = getattr(vision_config, "patch_size", None)
    if patch:
        grid = _divide(size, pair(patch))
        if (extra := tokens - math.prod(grid)) >= 0:
            return Place(extra, grid) if extra in prefixes else Place(None, None)
    for prefix in prefixes:  # in stages, or with patches of unknown size
        if (found := _find_grid(size, tokens - prefix)) is not None:
            return Place(prefix, None if vision_config.model_type in _UNORDERED else found)
    return Place(None, None)


def _prefixes(vision_config: PretrainedConfig) -> tuple[int, ...]:
    """How many tokens may stand in front of the patches: none, or all that the configuration tells."""
    told = getattr(vision_config, "num_prefix_tokens", None)
    if isinstance(told, int):
        return (told,)
    cls = next((found for name in _CLS if isinstance(found := getattr(vision_config, name, None), int)), 1)
    registers = next((found for name in _REGISTERS if isinstance(found := getattr(vision_config, name, None), int)), 0)
    return 0, cls + registers + (vision_config.model_type in _DISTILLED)


def _divide(size: tuple[int, int], step: tuple[int, int]) -> tuple[int, int]:
    return size[0] // step[0], size[1] // step[1]


def _find_grid(size: tuple[int, int], patches: int) -> tuple[int, int] | None:
    """Rows and columns of so many patches with one step for both sides; pictures are cut or filled up to the step."""
    if patches < 1:
        return None
    nearest = max(1, math.isqrt(math.prod(size) // patches))
    for step in range(nearest, 0, -1):
        if (count := math.prod(grid := _divide(size, (step, step)))) >= patches:
            if count == patches:
                return grid
            break
    for step in range(nearest, max(size) + 1):
        if (count := math.prod(grid := (-(-size[0] // step), -(-size[1] // step)))) <= patches:
            return grid if count == patches else None
    return None


def is_shrunk(size: tuple[int, int], sides: Sequence[int]) -> bool:
    """Whether rows and columns of cells are to one another as the sides of a picture are, up to a cell."""
    return abs(sides[0] * size[1] - sides[1] * size[0]) <= sum(size)


# ---- which are kept, and in which order -----------------------------------------------------------------------------


def patch_tokens(features: torch.Tensor, config: Any, size: tuple[int, int]) -> torch.Tensor:
    """
    The tokens that image tokens are made of, in the order in which they are joined.

    Args:
        features: what the encoder gives, of shape (B, N, C), or (B, C, H, W) of a feature map.
        config: the [`MiniGPT4Config`].
        size: height and width of the pictures in pixels.

    Returns:
        Tensor of shape (B, N - dropped, C).

    Raises:
        ValueError: if they cannot be found or joined.
    """
    place = find_patches(config.vision_config, features.shape[1:], size)
    if features.ndim == 4:  # (B, C, H, W) → (B, H·W, C)
        features = features.flatten(2).transpose(1, 2)
    features = features[:, dropped(config, place, features.shape[1], size) :]
    if config.qformer_config is not None or config.patch_merge_layout != "square":
        return features
    rows, columns = check_square(place, features.shape[1], config.patch_merge_size)
    side = math.isqrt(config.patch_merge_size)
    blocks = features.unflatten(1, (rows // side, side, columns // side, side))
    return blocks.transpose(2, 3).flatten(1, 4)  # a block's rows behind one another


def dropped(config: Any, place: Place, tokens: int, size: tuple[int, int]) -> int:
    """
    How many tokens `vision_feature_select_strategy` drops in front.

    Raises:
        ValueError: if that is not known.
    """
    if config.vision_feature_select_strategy == "full":
        return 0
    if place.prefix is None:
        raise ValueError(
            f"The vision encoder gives {tokens} tokens for a picture of {size[0]} × {size[1]} pixels, and which of "
            "them are patches is not known; set `num_prefix_tokens` on its configuration to how many stand in front "
            "of the patches, or `vision_feature_select_strategy` to 'full' to keep every token."
        )
    return place.prefix


def check_square(place: Place, tokens: int, merge: int) -> tuple[int, int]:
    """
    Rows and columns of patches that are joined with their neighbours.

    Raises:
        ValueError: if the tokens are no grid, or one that cannot be divided into squares.
    """
    remedy = "set `patch_merge_layout` to 'consecutive'"
    if place.grid is None or math.prod(place.grid) != tokens:
        raise ValueError(
            f"The vision encoder gives {tokens} tokens that are no grid of patches, so neighbours cannot be joined; "
            f"{remedy}, or `vision_feature_select_strategy` to 'default' if some of them are no patches."
        )
    if not _fits(place.grid, merge):
        side = math.isqrt(merge)
        raise ValueError(
            f"The vision encoder gives {place.grid[0]} × {place.grid[1]} patches, which cannot be joined as "
            f"{side} × {side} neighbours; {remedy}, or choose another `patch_merge_size` or `image_size`."
        )
    return place.grid


def _fits(grid: tuple[int, int] | None, merge: int) -> bool:
    """Whether a grid can be divided into squares of so many patches."""
    side = math.isqrt(merge)
    return grid is not None and side * side == merge and grid[0] % side == grid[1] % side == 0


def default_fields(
    vision_config: PretrainedConfig, shape: Sequence[int], size: tuple[int, int], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """
    How the patches of an encoder become image tokens where nobody says it.

    Tokens in front of the patches are dropped. As many patches are joined as possible, up to four, and as squares
    where squares fit; those of BLIP-2's own encoder as in the released code, one behind the other.

    Args:
        vision_config, shape, size: see [`find_patches`].
        chosen: fields of [`MiniGPT4Config`] that are given.

    Returns:
        Values of `vision_feature_select_strategy`, `patch_merge_size` and `patch_merge_layout`.
    """
    place = find_patches(vision_config, shape, size)
    tokens = shape[0] if len(shape) == 2 else math.prod(shape[1:])
    strategy = chosen.get("vision_feature_select_strategy") or ("default" if place.prefix else "full")
    kept = tokens - (place.prefix or 0 if strategy == "default" else 0)
    grid = place.grid if place.grid is not None and math.prod(place.grid) == kept else None
    layout, merge = chosen.get("patch_merge_layout"), chosen.get("patch_merge_size")
    if merge is None:
        fitting = [n for n in range(1, MOST + 1) if (_fits(grid, n) if layout == "square" else kept % n == 0)]
        merge = max(fitting, default=1)
    if layout is None:
        square = is_whole(merge, 2) and _fits(grid, merge)
        layout = "square" if square and not isinstance(vision_config, Blip2VisionConfig) else "consecutive"
    return {"vision_feature_select_strategy": strategy, "patch_merge_size": merge, "patch_merge_layout": layout}


__all__ = [
    "LAYOUTS",
    "MOST",
    "STRATEGIES",
    "Place",
    "check_square",
    "default_fields",
    "dropped",
    "encoder_options",
    "find_patches",
    "is_shrunk",
    "own_image_size",
    "pair",
    "patch_tokens",
    "select_layer",
]
