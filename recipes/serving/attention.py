"""Where a model looks: each query's attention over a picture, or the patches that an image token is made of.

The model is looked at through a copy that has its tensors and modules of its own. Nothing is set or hooked on the
model itself, so others may use it meanwhile.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerModel

from modeling_minigpt4.patches_minigpt4 import Place, find_patches, patch_tokens, select_layer
from recipes_minigpt4.utils.errors import RecipeError


ROLLOUT = "rollout"


@dataclass(frozen=True)
class Maps:
    """
    What each image token has of the picture.

    Args:
        patches: shares of the patches, 0 to 1, of shape (image tokens, rows, columns).
        elsewhere: share of the encoder's other tokens (CLS, registers), of shape (image tokens,). Together with the
            patches it is 1.
    """

    patches: torch.Tensor
    elsewhere: torch.Tensor


@dataclass(frozen=True)
class Look:
    """
    How a model looks at one picture.

    Args:
        place: where patches are among the encoder's tokens.
        tokens: how many tokens the encoder gives.
        kept: which of them the Q-Former sees, or are joined, in their order.
        queries: of each layer of the Q-Former, the attention of queries to queries, (queries, queries), the mean over
            heads. None without a Q-Former.
        picture: of those layers that look at the picture, layer → attention to `kept`, (queries, tokens kept).
        joined: without a Q-Former, how many of `kept` are joined into an image token.
    """

    place: Place
    tokens: int
    kept: torch.Tensor
    queries: tuple[torch.Tensor, ...] = ()
    picture: dict[int, torch.Tensor] | None = None
    joined: int = 1

    @property
    def layers(self) -> list[int]:
        """Layers of the Q-Former that look at the picture, counted from 0; none without a Q-Former."""
        return list(self.picture or ())

    def maps(self, layer: int | str | None = None) -> Maps:
        """
        The maps of all image tokens.

        Args:
            layer: of the Q-Former, one of `layers`, the last of them if left out; or "rollout": through all layers, as
                `roll_out` tells. Without a Q-Former an image token is made of whole patches, and there is one answer.

        Raises:
            RecipeError: if there is no such layer.
        """
        if self.picture is None:
            shares = torch.eye(len(self.kept) // self.joined).repeat_interleave(self.joined, 1) / self.joined
        elif layer == ROLLOUT:
            shares = roll_out(self.queries, self.picture)
        else:
            layer = self.layers[-1] if layer is None else layer
            if layer not in self.picture:
                told = ", ".join(map(str, self.layers))
                raise RecipeError(f"Layer {layer} does not look at the picture; name one of {told}, or {ROLLOUT}.")
            shares = self.picture[int(layer)]
        whole = torch.zeros(len(shares), self.tokens)
        whole[:, self.kept] = shares
        assert self.place.prefix is not None and self.place.grid is not None  # `look_at` refuses others
        patches = whole[:, self.place.prefix :]
        return Maps(patches.unflatten(1, self.place.grid), whole[:, : self.place.prefix].sum(1))


@torch.inference_mode()
def look_at(model: Any, pixel_values: torch.Tensor) -> Look:
    """
    See how a model looks at a picture.

    Args:
        model: MiniGPT-4, or transformers' BLIP-2.
        pixel_values: one processed picture, of shape (1, 3, height, width), where the model is.

    Raises:
        RecipeError: for models of other kinds, and encoders of whose tokens nobody knows where they lie.
    """
    base = _seeing(model)
    # The language model is no part of this, and may be large.
    ours = private_copy(base, shared=[base.language_model])
    encoded: list[torch.Tensor] = []
    choice = getattr(model.config, "vision_feature_layer", None)
    ours.vision_model.register_forward_hook(lambda *told: encoded.append(select_layer(told[-1], choice)))
    queries: list[torch.Tensor] = []
    picture: dict[int, torch.Tensor] = {}
    if ours.qformer is not None:
        ours.qformer.set_attn_implementation("eager")  # the others keep no weights
        for number, layer in enumerate(ours.qformer.encoder.layer):
            _hear(layer.attention, queries.append)
            if layer.has_cross_attention:
                _hear(layer.crossattention, partial(picture.__setitem__, number))
    ours.get_image_features(pixel_values=pixel_values)
    return _look(model.config, encoded[0], pixel_values.shape[-2:], tuple(queries), picture or None)


def _look(config: Any, encoded: torch.Tensor, size: Any, queries: Any, picture: Any) -> Look:
    """What was heard, and the geometry that belongs to it."""
    place = find_patches(config.vision_config, encoded.shape[1:], (size[0], size[1]))
    if place.grid is None:
        raise RecipeError(
            f"Where the {encoded.shape[1]} tokens of this vision encoder ({config.vision_config.model_type}) lie on "
            "the picture is not known, so there is nothing to draw."
        )
    tokens = encoded[0].numel() // encoded.shape[1 if encoded.ndim == 4 else 2]
    # Numbers take the way of the tokens, so the order is the model's own, however patches are dropped and joined.
    numbers = torch.arange(tokens, dtype=torch.float64)
    numbers = numbers.view(1, 1, *encoded.shape[2:]) if encoded.ndim == 4 else numbers.view(1, tokens, 1)
    is_ours = config.model_type == "minigpt4"
    kept = patch_tokens(numbers, config, (size[0], size[1])) if is_ours else numbers
    joined = config.patch_merge_size if picture is None else 1
    return Look(place, tokens, kept.flatten().long(), queries, picture, joined)


def _seeing(model: Any) -> Any:
    """The module with the vision side."""
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        knows = kind == "minigpt4" or isinstance(getattr(module, "qformer", None), Blip2QFormerModel)
        if knows and hasattr(module, "vision_model"):
            return module
    raise RecipeError(
        f"A model of the kind {model.config.model_type} cannot be looked into here; MiniGPT-4 and BLIP-2 can."
    )


def _hear(attention: Any, tell: Callable[[torch.Tensor], object]) -> None:
    """Have an attention of a private copy tell its weights, the mean over heads, whenever it computes."""
    attention.attention.register_forward_hook(lambda _, __, output: tell(output[1][0].float().mean(0).cpu()))


def private_copy(module: nn.Module, shared: Iterable[nn.Module] = ()) -> Any:
    """
    A module that computes the same from the same tensors, and whose hooks and settings are its own.

    Args:
        module: any.
        shared: modules in it that are used as they are.
    """
    memo = {id(each): each for each in (*module.parameters(), *module.buffers(), *shared)}
    return copy.deepcopy(module, memo)


def roll_out(queries: Iterable[torch.Tensor], picture: dict[int, torch.Tensor]) -> torch.Tensor:
    """
    Attention through all layers (after Abnar & Zuidema, arXiv 2005.00928): in every step, half of a query stays what
    it was, and half comes from where it looks. What comes from the picture is counted.

    Args:
        queries: of each layer, attention of queries to queries, (queries, queries).
        picture: layer → attention of queries to the picture, (queries, tokens).

    Returns:
        Shares of the picture's tokens, 1 together for each query, of shape (queries, tokens).
    """
    first = next(iter(picture.values()))
    seen = torch.zeros_like(first)
    for number, weights in enumerate(queries):
        seen = (seen + weights @ seen) / 2
        if number in picture:
            seen = (seen + picture[number]) / 2
    return seen / seen.sum(1, keepdim=True)
