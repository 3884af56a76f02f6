"""What a conversation keeps of its turns: keys and values that the next one can go on from."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

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
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = length


def can_be_cut(cache: Any) -> bool:
    """Whether a cache holds all tokens apart in all layers: no state, no fewer bits, no window that has moved on."""
    if type(cache) is not DynamicCache or not cache.layers or getattr(cache, "offloading", False):
        return False
    kinds = {DynamicLayer, DynamicSlidingWindowLayer}
    return all(
        (type(layer) in kinds or type(layer).__name__ == GrowingLayer.__name__)  # that of a checkpoint's own code too
        and layer.is_initialized
        and layer.keys.shape[-2] == layer.get_seq_length()
        for layer in cache.layers
    )


@torch.no_grad()
def first_row(cache: Any, length: int) -> Any:
    """A cache with the first tokens of the first row of another."""
    row = DynamicCache()
    with_growing_layers(row)
    for index, layer in enumerate(cache.layers):
        row.update(layer.keys[:1, :, :length], layer.values[:1, :, :length], index)
    return row


__all__ = ["Memory", "can_be_cut", "first_row"]
