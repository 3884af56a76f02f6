"""What a conversation keeps of its turns: keys and values that the next one can go on from."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from .generation_minigpt4 import GrowingLayer, with_growing_layers
from .transcript_minigpt4 import Transcript


@dataclass
class Memory:
    """A cache of one row, whose first `length` tokens are those of a transcript."""

    transcript: Transcript
    cache: Any
    length: int

    def cut(self, length: int) -> None:
        """Let go of all tokens but the first, and of what an interrupted step has left in some of the layers."""
        self.length = length
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]


def can_be_cut(cache: Any) -> bool:
    """Whether a cache has all tokens apart in all layers: none with a window, a state, or fewer bits."""
    kinds = {type(layer) for layer in cache.layers} if type(cache) is DynamicCache else {None}
    if not kinds <= {DynamicLayer, GrowingLayer} or getattr(cache, "offloading", False):
        return False
    return all(layer.is_initialized for layer in cache.layers)


@torch.no_grad()
def copied(cache: Any, length: int, rows: int = 1) -> Any:
    """The first tokens of a cache's first row, so many times."""
    copy = DynamicCache()
    with_growing_layers(copy)
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys[:1, :, :length], layer.values[:1, :, :length]
        copy.update(keys.repeat(rows, 1, 1, 1), values.repeat(rows, 1, 1, 1), index)
    return copy


__all__ = ["Memory", "can_be_cut", "copied"]
