"""Checkpoints hold whole tensors: what several processes share is gathered first, or not written at all."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


REMEDY = (
    "nothing was written. Save with `trainer.save_model()` in all processes, or gather the tensors in all of them with "
    "`accelerator.get_state_dict(model)` and hand them over as `state_dict`."
)


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of all of a tensor, of which ZeRO-3 and FSDP2 leave a process a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def check_whole(
    tensors: Mapping[str, torch.Tensor], needed: Collection[str], shapes: Mapping[str, tuple[int, ...] | None]
) -> None:
    """
    Refuse to write a part of a tensor, or none of it.

    Args:
        tensors: name → what is about to be written.
        needed: names that have to be among them.
        shapes: name → shape that the configuration says, None or left out where it says nothing.

    Raises:
        ValueError: naming the first tensor that is missing, empty, or of another shape.
    """
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"{missing[0]} trains but is not among the tensors to save; {REMEDY}")
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        expected = shapes.get(name) or whole_shape(tensor)
        quantized = not tensor.is_floating_point()  # packed in a shape of its own
        if hasattr(tensor, "full_tensor"):
            raise ValueError(f"{name} is spread over several processes, of which this one holds a part; {REMEDY}")
        if tensor.numel() == 0 or (shape != expected and not quantized):
            raise ValueError(
                f"{name} has the shape {list(shape)} here instead of {list(expected)}, so this process does not hold "
                f"it whole; {REMEDY}"
            )


@contextmanager
def unsharded_class(model: nn.Module) -> Iterator[None]:
    """
    Give a model its own class back for a while.

    FSDP2 puts one of its own in the place, and with it torch's files in the place of the model's code.
    """
    sharded: Any = type(model)
    if sharded.__module__.startswith("torch.distributed."):
        model.__class__ = next(one for one in sharded.__mro__ if not one.__module__.startswith("torch."))
    try:
        yield
    finally:
        model.__class__ = sharded


__all__ = ["check_whole", "unsharded_class", "whole_shape"]
