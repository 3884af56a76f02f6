"""
Whether frozen weights still are what their backbones provide.

Their content decides: a merged adapter, averaged weights and edits in place show neither in `requires_grad` nor in the
version counter of a tensor. A digest of every tensor is taken when the model is loaded and compared at every save,
which reads no file. Only for tensors that were cast since, and for large models on the CPU, the backbone's file is
read, once.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .backbones import Checkpoint, describe, match_names, part_of
from .digest_minigpt4 import digests
from .peft_minigpt4 import plain_names
from .projector_minigpt4 import new_projection
from .quantization_minigpt4 import is_exact


logger = logging.get_logger(__name__)

HEAD = "lm_head.weight"
_DECODER = ("model.language_model.", "language_model.", "lm_head.")

# Bytes of weights on the CPU from which on loading leaves them in their files, unread until they are used. They are
# compared with these files at the first save.
READ_AT_ONCE = 2 << 30


class Provided(NamedTuple):
    """
    What a backbone has provided for one tensor.

    Attributes:
        shape: of the tensor.
        dtype: that it was loaded in.
        digests: dtype and shape of what a process holds of it → the digest of that, as far as they are known.
    """

    shape: torch.Size
    dtype: torch.dtype
    digests: dict[tuple[torch.dtype, torch.Size], int]


class Part(NamedTuple):
    """What a process holds of a tensor, and where in the tensor that begins (in rows, or in values of a flat one)."""

    tensor: torch.Tensor
    first: int = 0


def is_spread(tensor: torch.Tensor) -> bool:
    """Whether several processes share a tensor, by FSDP2 or ZeRO-3."""
    return hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_shape")


def whole_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """
    Names of tensors → their names in [`MiniGPT4ForConditionalGeneration`] without an adapter.

    Tensors of an adapter are left out.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model is model else ""
    return {name: prefix + inner for name, inner in plain_names(model, names).items() if inner is not None}


def names_of_backbones(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names of `whole_names`, of tensors whose part has a backbone."""
    return {name: full for name, full in whole_names(model, names).items() if part_of(full) in model.config.backbones}


def remember_backbones(model: Any) -> None:
    """Note what has just been loaded of backbones."""
    tensors = model.state_dict(keep_vars=True)
    names = names_of_backbones(model, tensors)
    there = {name: _local(tensor) for name in names if not (tensor := tensors[name]).is_meta}
    on_cpu = sum(tensor.nbytes for tensor in there.values() if tensor.device.type == "cpu")
    read = {name for name, one in there.items() if one.device.type != "cpu" or on_cpu <= READ_AT_ONCE}
    found = digests({name: there[name] for name in read if _is_comparable(model, name, there[name])})
    model._provided = {
        full: Provided(
            getattr(tensors[name], "ds_shape", tensors[name].shape),
            tensors[name].dtype,
            {(there[name].dtype, there[name].shape): found[name]} if name in found else {},
        )
        for name, full in names.items()
        if full not in model._own_tensors
    }


def _is_comparable(model: Any, name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is an ordinary one: of a quantized decoder, neither packed weights nor their scales."""
    if isinstance(tensor, nn.Parameter):
        return is_exact(tensor)
    return not (name.startswith(_DECODER) and model.is_language_model_quantized)


def frozen_tensors(
    model: Any, given: Mapping[str, torch.Tensor] | None = None, own: Mapping[str, torch.Tensor] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    The tensors that a checkpoint leaves out as long as they are what their backbones provide.

    Args:
        model: a model of this package.
        given: tensors that are to be saved in the place of the model's own.
        own: the model's own, if they are at hand.

    Returns:
        The tensors, and their names in the whole model without an adapter.
    """
    own = model.state_dict(keep_vars=True) if own is None else own
    tensors = {**own, **(given or {})}
    names = names_of_backbones(model, tensors)
    frozen = {}
    for name, full in names.items():
        trained = name in own and own[name].requires_grad
        exact = _is_comparable(model, name, own.get(name, tensors[name]))
        if full not in model._own_tensors and not trained and exact:
            frozen[name] = tensors[name]
    frozen.update(_offloaded(model, {name for name, tensor in frozen.items() if tensor.is_meta}))
    return frozen, names


def changed_tensors(
    model: Any, given: Mapping[str, torch.Tensor] | None = None, own: Mapping[str, torch.Tensor] | None = None
) -> set[str]:
    """
    Names of frozen tensors that are no longer what their backbones provide.

    Tensors that several processes share are passed over, unless they are `given` whole.

    Args:
        model, given, own: see `frozen_tensors`.
    """
    frozen, names = frozen_tensors(model, given, own)
    parts = {name: Part(tensor) for name, tensor in frozen.items() if not is_spread(tensor) and not tensor.is_meta}
    shapes: dict[str, torch.Size] | None = None
    changed = set()
    for name in list(parts):
        known = model._provided.get(names[name])
        if known is not None and parts[name].tensor.shape != known.shape:
            shapes = expected_shapes(model, names.values()) if shapes is None else shapes
            if parts.pop(name).tensor.shape == shapes.get(names[name]):  # otherwise it is a part of a tensor
                changed.add(name)
    found = digests({name: part.tensor for name, part in parts.items()})
    return changed | compare(model, parts, names, found)


def compare(
    model: Any,
    parts: Mapping[str, Part],
    names: Mapping[str, str],
    found: Mapping[str, int],
    whole: bool = False,
    agree: Callable[[set[str]], set[str]] = set,
) -> set[str]:
    """
    Names of the tensors that are no longer what their backbones provide.

    Args:
        model: a model of this package.
        parts: what this process holds of each tensor.
        names: theirs in the whole model; see `frozen_tensors`.
        found: the digests of these parts.
        whole: that `found` are those of the whole tensors.
        agree: told the names that a file shows to have changed in this process, gives those of all processes.
    """
    changed, cast = set(), {}
    for name, part in parts.items():
        known = model._provided.get(names[name])
        key = (part.tensor.dtype, known.shape if whole and known else part.tensor.shape)
        if known is None or known.digests.get(key, found[name]) != found[name]:
            changed.add(name)
        elif key not in known.digests:
            cast[name] = known, key
    other = agree(_differ_from_files(model, {name: parts[name] for name in cast}, names))
    for name, (known, key) in cast.items():
        if name not in other:
            known.digests[key] = found[name]
    return changed | (other & cast.keys())


def _differ_from_files(model: Any, parts: Mapping[str, Part], names: Mapping[str, str]) -> set[str]:
    """Names of the tensors that differ from what their backbones' files hold, or that have no such file now."""
    if not parts:
        return set()
    skeleton = model._skeleton(model.config)
    expected = [name for name in skeleton.state_dict() if not (model.config.tie_word_embeddings and name == HEAD)]
    differ = set(parts)
    for backbone, source in model.config.backbones.items():
        wanted = {name: names[name] for name in parts if part_of(names[name]) == backbone}
        if not wanted:
            continue
        try:
            checkpoint = Checkpoint(source, backbone, {"local_files_only": True})
            ours = [name for name in expected if part_of(name) == backbone]
            keys = match_names(backbone, ours, checkpoint, skeleton.lm_head_name, skeleton.decoder_name)
            for name, full in wanted.items():
                full = tied_to(model) if full == HEAD and full not in keys else full
                if full in model._own_tensors or (
                    full in keys and _is_cast(checkpoint.tensor(keys[full]), model._provided[full], parts[name])
                ):
                    differ.discard(name)
        except OSError as error:
            logger.warning(
                f"The {backbone} backbone {describe(source)} cannot be read, so the model's weights cannot be "
                f"compared with it; they are saved too ({error})."
            )
    return differ


def expected_shapes(model: Any, names: Collection[str]) -> dict[str, torch.Size]:
    """Shapes that the configuration says of tensors, by the names of the whole model; maybe of others too."""
    if all(part_of(name) is None for name in names):  # building the whole model takes longer than saving does
        with torch.device("meta"):
            tensors = new_projection(model.config)
    else:
        tensors = model._skeleton(model.config).state_dict()
    return {name: tensor.shape for name, tensor in tensors.items()}


def tied_to(model: Any) -> str:
    """Name of the embeddings in the whole model, which the LM head may share."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings) + ".weight"
    return whole_names(model, [name]).get(name, "")


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    local: torch.Tensor = getattr(tensor, "ds_tensor", tensor)
    return local.to_local() if hasattr(local, "to_local") else local


def _is_cast(stored: torch.Tensor, known: Provided, part: Part) -> bool:
    """Whether what a process holds of a tensor is that of a file, in the dtype that it has now."""
    first, tensor = part.first, part.tensor.detach()
    flat = tensor.ndim == 1 and stored.ndim != 1
    stored = (stored.flatten() if flat else stored)[first : first + len(tensor)] if tensor.ndim else stored
    tensor = tensor[: len(stored)] if flat else tensor  # behind the last value, ZeRO-3 fills the share up
    expected = stored.to(tensor.device).to(known.dtype).to(tensor.dtype)
    return expected.shape == tensor.shape and torch.equal(expected, tensor)


def _offloaded(module: nn.Module, names: Collection[str]) -> dict[str, torch.Tensor]:
    """Tensors that accelerate keeps elsewhere while they are not used, in memory or on a disk."""
    if not names:
        return {}
    found = {}
    for path, child in module.named_modules():
        hook = getattr(child, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (weights := getattr(one, "weights_map", None)) is not None:
                for name in (*child._parameters, *child._buffers):
                    full = f"{path}.{name}" if path else name
                    if full in names:
                        found[full] = weights[name]
    return found


__all__ = [
    "HEAD",
    "Part",
    "Provided",
    "changed_tensors",
    "compare",
    "expected_shapes",
    "frozen_tensors",
    "is_spread",
    "names_of_backbones",
    "remember_backbones",
    "tied_to",
    "whole_names",
]
