"""What a training step need not compute: positions whose output nobody reads, and waiting for the device.

A row is scored at its answer only. Pads behind an answer tell it nothing, nor does a row's last token, as long as the
decoder's attention is causal.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import PreTrainedModel, masking_utils


def without_last_column(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Places in flattened rows of `length` as places in the same rows without their last column."""
    return positions - positions // length


_UNPACKED: ContextVar[bool] = ContextVar("unpacked", default=False)  # of this thread
_LOCK = threading.Lock()
_asked: Any = None  # transformers' own
_inside = 0  # how many threads are in `rows_are_not_packed`


@contextmanager
def rows_are_not_packed() -> Iterator[None]:
    """
    Keep transformers from asking the device, in every forward, whether rows hold several sequences; ours never do.

    It looks at the positions for that, and waits for the answer (4.57 to 5.24, `masking_utils`). There is no switch,
    so the function is replaced meanwhile, by one that other threads do not notice.
    """
    global _inside, _asked
    name = "find_packed_sequence_indices"
    with _LOCK:
        if _inside == 0 and (_asked := getattr(masking_utils, name, None)) is not None:
            asked = _asked
            setattr(masking_utils, name, lambda positions: None if _UNPACKED.get() else asked(positions))
        _inside += 1
    token = _UNPACKED.set(True)
    try:
        yield
    finally:
        _UNPACKED.reset(token)
        with _LOCK:
            _inside -= 1
            if _inside == 0 and _asked is not None:
                setattr(masking_utils, name, _asked)


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
        return not torch.allclose(first, second, rtol=1e-2, atol=1e-3)  # noqa: TID251 (wide enough for every dtype)
    except Exception:  # sharded, offloaded or on the meta device
        return True
