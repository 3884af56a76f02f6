"""The last layer of a decoder, where positions whose output nobody reads need not be computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class LastLayer:
    """
    Lets the parts of a decoder's last layer that look at one position at a time and speak for it alone (queries, what
    comes right behind attention, the feed-forward part) see only the positions that are scored. Elsewhere the
    decoder's output is then not what it would be, and must not be read.

    Args:
        decoder: one whose layers are called `layers` or `h`, and these parts of them `self_attn.q_proj`,
            `self_attn.o_proj` and `mlp`; of others nothing is left out.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        self.positions: Any = None
        self._held = False
        self._rows: torch.Size | None = None
        self._hooks: list[RemovableHandle] = []
        self.attach(decoder)

    def attach(self, decoder: PreTrainedModel) -> None:
        """Look up the parts anew, after others were put in their places."""
        for hook in self._hooks:
            hook.remove()
        layers = getattr(decoder, "layers", getattr(decoder, "h", None))
        self.layer: Any = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
        attention, feed_forward = getattr(self.layer, "self_attn", None), getattr(self.layer, "mlp", None)
        parts = (getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), feed_forward)
        self.parts = [part for part in parts if isinstance(part, nn.Module)]
        self._hooks = [part.register_forward_pre_hook(self._gather) for part in self.parts]
        self._hooks += [part.register_forward_hook(self._scatter) for part in self.parts]

    @contextmanager
    def only_at(self, positions: torch.Tensor | None) -> Iterator[None]:
        """
        Compute them at these places of the flattened hidden states, of shape (positions,); everywhere if None.

        A layer with checkpointing is run again in the backward pass, so it needs `held` around both.
        """
        self.positions = None if self._is_checkpointed() and not self._held else positions
        try:
            yield
        finally:
            if not self._held:
                self.positions = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Go on with what `only_at` has set until this ends, through a backward pass."""
        self._held = True
        try:
            yield
        finally:
            self._held, self.positions = False, None

    def _is_checkpointed(self) -> bool:
        return bool(getattr(self.layer, "gradient_checkpointing", False) and self.layer.training)

    def _gather(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        self._rows = None  # of the call that `_scatter` ends, if there was something to leave out
        if self.positions is None or not args or args[0].ndim != 3:
            return None
        self._rows = args[0].shape[:2]
        return tuple(self._at_positions(arg) for arg in args)  # Bloom's takes the residual as well

    def _at_positions(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor) or arg.shape[:2] != self._rows:
            return arg
        return arg.flatten(0, 1).index_select(0, self.positions.to(arg.device))[None]

    def _scatter(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self._rows is None:
            return None
        found, *rest = output if isinstance(output, tuple) else (output,)
        blank = found.new_zeros(self._rows.numel(), found.shape[-1])
        whole = blank.index_copy(0, self.positions.to(blank.device), found.flatten(0, -2)).view(*self._rows, -1)
        return (whole, *rest) if isinstance(output, tuple) else whole


__all__ = ["LastLayer"]
