"""Checkpoints hold whole tensors: what several processes share is gathered first, or not written at all."""

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .peft_minigpt4 import plain_names


REMEDY = (
    "nothing was written. Save with `trainer.save_model()` in all processes, or gather tensors in all of them with "
    "`accelerator.get_state_dict(model)` and hand them over as `state_dict`."
)


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of all of a tensor, of which ZeRO-3 and FSDP2 leave a process a part."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def check_whole(
    tensors: Mapping[str, torch.Tensor], needed: Mapping[str, str], shapes: Mapping[str, tuple[int, ...] | None]
) -> None:
    """
    Refuse to write a part of a tensor, or none of it.

    Args:
        tensors: name → what is about to be written.
        needed: names that have to be among them → why.
        shapes: name → shape that the configuration says, None or left out where it says nothing.

    Raises:
        ValueError: naming the first tensor that is missing, empty, or of another shape.
    """
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"{missing[0]} {needed[missing[0]]} but is not among the tensors to save; {REMEDY}")
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
def unsharded_class(model: Any) -> Iterator[None]:
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


class WholeMixin:
    """A model of which `save_pretrained` writes whole tensors, or nothing; mixed in before `BackbonesMixin`."""

    # What the classes that this is mixed into bring.
    config: Any
    base_model_prefix: str
    state_dict: Any
    _shapes: Any
    _choose_what_to_save: Any
    _keys_to_ignore_on_save: Any
    changed_tensors: Any
    check_adapter_is_apart: Any
    tell_changed: Any
    _leave_out_tied: Any

    def save_pretrained(
        self, save_directory: "str | os.PathLike[str]", *args: Any, full: bool = False, **kwargs: Any
    ) -> None:
        """
        Save what no backbone provides, or everything; see [`~BackbonesMixin.save_pretrained`].

        Raises:
            ValueError: before anything is written, if a tensor is missing or not whole, as in one process of several
                that share the weights (FSDP, ZeRO-3); hand over gathered ones as `state_dict`. Also for an adapter
                that is merged but still there, and for a head that is tied no longer.
        """
        self.check_adapter_is_apart()
        options = {**dict(zip(("is_main_process", "state_dict"), args, strict=False)), **kwargs}
        own = self.state_dict(keep_vars=True)
        changed = set() if full else self.changed_tensors(options.get("state_dict"), own)
        self.tell_changed(changed, options.get("state_dict"))
        try:
            self._choose_what_to_save(full, changed, own)
            if options.get("is_main_process", True):
                self._check_whole(options.get("state_dict"), own, changed)
            with unsharded_class(self):
                super().save_pretrained(save_directory, *args, full=full, **kwargs)  # type: ignore[misc]
        finally:
            if full or changed:
                self._choose_what_to_save()

    def _check_whole(
        self, tensors: Mapping[str, torch.Tensor] | None, own: Mapping[str, torch.Tensor], changed: Collection[str]
    ) -> None:
        """Refuse to save what is no whole tensor of the shape that the configuration says."""
        if getattr(self, "_tp_size", None) is not None or getattr(self.config, "distributed_config", None):
            return  # transformers has split the tensors, and puts them together itself
        self._leave_out_tied({**own, **(tensors or {})})
        given = own if tensors is None else tensors
        given = {name: tensor for name, tensor in given.items() if name not in self._keys_to_ignore_on_save}
        there = {id(own[name]) for name in given.keys() & own.keys()}  # under one of the names of a tied tensor
        needed = {
            name: "trains" if own[name].requires_grad else "is no longer what its backbone provides"
            for name in own.keys() - self._keys_to_ignore_on_save
            if (own[name].requires_grad or name in changed) and (name in given or id(own[name]) not in there)
        }
        prefix = "" if hasattr(self, self.base_model_prefix) else f"{self.base_model_prefix}."
        plain = {name: f"{prefix}{inner}" for name, inner in plain_names(self, given).items() if inner is not None}  # type: ignore[arg-type]
        shapes = self._shapes(plain.values())
        check_whole(given, needed, {name: shapes.get(inner) for name, inner in plain.items()})


__all__ = ["WholeMixin", "check_whole", "unsharded_class", "whole_shape"]
