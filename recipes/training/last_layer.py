"""In training, a decoder's last layer computes only the positions that are scored: nothing reads the others."""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel


class LastLayer:
    """
    Lets the parts of a decoder's last layer that look at one position at a time and speak for it alone (queries, what
    comes right behind attention, the feed-forward part) see only the positions that are scored, while it is entered.
    Elsewhere the decoder's output is then not what it would be, and must not be read.

    Which positions these are comes with each call, as the argument `answer_positions` that decoders hand on to their
    layers: places in the flattened hidden states. Calls without it, such as replies that another thread writes, are
    left alone. A layer that checkpointing runs again in the backward pass, in whatever thread, gets it again.

    Args:
        decoder: one whose layers are called `layers` or `h`, and these parts of them `self_attn`, its `q_proj` and
            `o_proj`, and `mlp`; of others nothing is left out.
    """

    def __init__(self, decoder: PreTrainedModel) -> None:
        layers = getattr(decoder, "layers", getattr(decoder, "h", None))
        layer: Any = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
        self.attention, feed_forward = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        parts = (getattr(self.attention, "q_proj", None), getattr(self.attention, "o_proj", None), feed_forward)
        self.parts = [part for part in parts if isinstance(part, nn.Module)]
        self._positions: ContextVar[torch.Tensor | None] = ContextVar("positions", default=None)
        self._rows: ContextVar[torch.Size | None] = ContextVar("rows", default=None)
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "LastLayer":
        if isinstance(self.attention, nn.Module):
            self._hooks = [self.attention.register_forward_pre_hook(self._begin, with_kwargs=True)]
            self._hooks += [part.register_forward_pre_hook(self._gather) for part in self.parts]
            self._hooks += [part.register_forward_hook(self._scatter) for part in self.parts]
        return self

    def __exit__(self, *error: Any) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Attention comes first, and is the one part that sees the arguments of the call."""
        self._positions.set(kwargs.pop("answer_positions", None))
        return args, kwargs

    def _gather(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        positions = self._positions.get()
        self._rows.set(None)  # of the call that `_scatter` ends, if there was something to leave out
        if positions is None or not args or args[0].ndim != 3:
            return None
        rows = args[0].shape[:2]
        self._rows.set(rows)

        def scored(arg: Any) -> Any:  # Bloom's feed-forward part takes the residual as well
            if not isinstance(arg, torch.Tensor) or arg.shape[:2] != rows:
                return arg
            return arg.flatten(0, 1).index_select(0, positions.to(arg.device))[None]

        return tuple(scored(arg) for arg in args)

    def _scatter(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        positions, rows = self._positions.get(), self._rows.get()
        if positions is None or rows is None:
            return None
        found, *rest = output if isinstance(output, tuple) else (output,)
        blank = found.new_zeros(rows.numel(), found.shape[-1])
        whole = blank.index_copy(0, positions.to(blank.device), found.flatten(0, -2)).view(*rows, -1)
        if part is self.parts[-1]:
            self._positions.set(None)  # the layer is done
        return (whole, *rest) if isinstance(output, tuple) else whole
