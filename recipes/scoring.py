"""What a training step need not compute: positions whose output nobody reads, and waiting for the device.

A row is scored at its answer only. What a decoder of causal attention makes of other positions matters to the answer
up to the attention of the last layer, and what it makes of a row's last token not at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, masking_utils


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
        self.positions: torch.Tensor | None = None
        self._held = False
        layers = getattr(decoder, "layers", getattr(decoder, "h", None))
        last = layers[-1] if isinstance(layers, nn.ModuleList) and len(layers) else None
        attention = getattr(last, "self_attn", None)
        parts = (getattr(attention, "q_proj", None), getattr(attention, "o_proj", None), getattr(last, "mlp", None))
        self.parts = [part for part in parts if isinstance(part, nn.Module)]
        for part in self.parts:
            part.register_forward_pre_hook(self._gather)
            part.register_forward_hook(self._scatter)

    @contextmanager
    def only_at(self, positions: torch.Tensor | None) -> Iterator[None]:
        """Compute it at these places of the flattened hidden states, of shape (positions,); everywhere if None."""
        self.positions = positions
        try:
            yield
        finally:
            if not self._held:
                self.positions = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Go on with what `only_at` has set until this ends: checkpointing runs layers again in the backward pass."""
        self._held = True
        try:
            yield
        finally:
            self._held, self.positions = False, None

    def _gather(self, part: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.positions is None:
            return None
        self._rows = args[0].shape[:2]
        return tuple(self._at_positions(arg) for arg in args)  # Bloom's takes the residual as well

    def _at_positions(self, arg: Any) -> Any:
        if not isinstance(arg, torch.Tensor) or arg.shape[:2] != self._rows:
            return arg
        return arg.flatten(0, 1).index_select(0, self.positions)[None]

    def _scatter(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if self.positions is None:
            return None
        found, *rest = output if isinstance(output, tuple) else (output,)
        blank = found.new_zeros(self._rows.numel(), found.shape[-1])
        whole = blank.index_copy(0, self.positions, found.flatten(0, -2)).view(*self._rows, -1)
        return (whole, *rest) if isinstance(output, tuple) else whole


def without_last_column(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Places in flattened rows of `length` as places in the same rows without their last column."""
    return positions - positions // length


@contextmanager
def rows_are_not_packed() -> Iterator[None]:
    """
    Keep transformers from asking the device, in every forward, whether rows hold several sequences; ours never do.

    It looks at the positions for that, and waits for the answer (4.57 to 5.23, `masking_utils`).
    """
    name = "find_packed_sequence_indices"
    asked = getattr(masking_utils, name, None)
    if asked is None:
        yield
        return
    setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        setattr(masking_utils, name, asked)


@torch.no_grad()
def looks_ahead(language_model: PreTrainedModel) -> bool:
    """
    Whether a later token changes what a decoder makes of an earlier one, so that pads behind an answer matter.

    It is tried out on four positions. Where that is not possible, as with weights that lie elsewhere, the answer is
    yes.
    """
    embeddings = language_model.get_input_embeddings().weight
    try:
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(1, 4, embeddings.shape[-1], generator=generator).to(embeddings.device, embeddings.dtype)
        other = torch.cat([one[:, :-1], -one[:, -1:]], dim=1)
        first, second = (
            language_model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, :-1] for rows in (one, other)
        )
        return not torch.allclose(first, second, rtol=1e-2, atol=1e-3)
    except Exception:  # sharded, offloaded or on the meta device
        return True
