"""
Whether frozen weights still are what their backbones provide.

Their content decides: a merged adapter, averaged weights and edits in place show neither in `requires_grad` nor in the
version counter of a tensor. A digest of every tensor is taken when the model is loaded and compared at every save,
which reads no file. Only for tensors that were cast since, and for large models on the CPU, the backbone's file is
read, once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from .backbones import Checkpoint, describe, match_names, part_of
from .digest_minigpt4 import digests
from .peft_minigpt4 import plain_names
from .quantization_minigpt4 import is_exact


logger = logging.get_logger(__name__)


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


class UnchangedMixin:
    """Finds the frozen tensors that are no longer their backbones'; mixed in before `BackbonesMixin`."""

    # What the classes that this is mixed into bring.
    config: Any
    base_model_prefix: str
    is_language_model_quantized: bool
    named_modules: Any
    state_dict: Any
    _own_tensors: frozenset[str]
    _new_projection: Any
    _skeleton: Any
    _keys_to_ignore_on_save: Any

    # What the backbones have provided, by the names of the whole model without an adapter.
    _provided: Mapping[str, Provided] = {}

    def _remember_backbones(self) -> None:
        """Note what has just been loaded of backbones."""
        tensors = self.state_dict(keep_vars=True)
        names = self._names_of_backbones(tensors)
        there = {name: _local(tensor) for name in names if not (tensor := tensors[name]).is_meta}
        on_cpu = sum(tensor.nbytes for tensor in there.values() if tensor.device.type == "cpu")
        read = {name for name, one in there.items() if one.device.type != "cpu" or on_cpu <= READ_AT_ONCE}
        found = digests({name: there[name] for name in read if self._is_comparable(name, there[name])})
        self._provided = {
            full: Provided(
                getattr(tensors[name], "ds_shape", tensors[name].shape),
                tensors[name].dtype,
                {(there[name].dtype, there[name].shape): found[name]} if name in found else {},
            )
            for name, full in names.items()
            if full not in self._own_tensors
        }

    def _names_of_backbones(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Names of tensors whose part has a backbone → their names in the whole model without an adapter."""
        return {name: full for name, full in self._whole_names(tensors) if part_of(full) in self.config.backbones}

    def _whole_names(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        prefix = "" if hasattr(self, self.base_model_prefix) else f"{self.base_model_prefix}."
        for name, inner in plain_names(self, tensors).items():  # type: ignore[arg-type]
            if inner is not None:
                yield name, prefix + inner

    def _is_comparable(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether a tensor is an ordinary one: of a quantized decoder, neither packed weights nor their scales."""
        if isinstance(tensor, nn.Parameter):
            return is_exact(tensor)
        return not (name.startswith(_DECODER) and self.is_language_model_quantized)

    def frozen_tensors(
        self, given: Mapping[str, torch.Tensor] | None = None, own: Mapping[str, torch.Tensor] | None = None
    ) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """
        The tensors that a checkpoint leaves out as long as they are what their backbones provide.

        Args:
            given: tensors that are to be saved in the place of the model's own.
            own: the model's own, if they are at hand.

        Returns:
            The tensors, and their names in the whole model without an adapter.
        """
        own = self.state_dict(keep_vars=True) if own is None else own
        tensors = {**own, **(given or {})}
        names = self._names_of_backbones(tensors)
        frozen = {}
        for name, full in names.items():
            trained = name in own and own[name].requires_grad
            exact = self._is_comparable(name, own.get(name, tensors[name]))
            if full not in self._own_tensors and not trained and exact:
                frozen[name] = tensors[name]
        frozen.update(_offloaded(self, {name for name, tensor in frozen.items() if tensor.is_meta}))  # type: ignore[arg-type]
        return frozen, names

    def changed_tensors(
        self, given: Mapping[str, torch.Tensor] | None = None, own: Mapping[str, torch.Tensor] | None = None
    ) -> set[str]:
        """
        Names of frozen tensors that are no longer what their backbones provide.

        Tensors that several processes share are passed over, unless they are `given` whole.

        Args:
            given, own: see `frozen_tensors`.
        """
        frozen, names = self.frozen_tensors(given, own)
        parts = {name: Part(tensor) for name, tensor in frozen.items() if not is_spread(tensor) and not tensor.is_meta}
        shapes: dict[str, torch.Size] | None = None
        changed = set()
        for name in list(parts):
            known = self._provided.get(names[name])
            if known is not None and parts[name].tensor.shape != known.shape:
                shapes = self._shapes(names.values()) if shapes is None else shapes
                if parts.pop(name).tensor.shape == shapes.get(names[name]):  # otherwise it is a part of a tensor
                    changed.add(name)
        found = digests({name: part.tensor for name, part in parts.items()})
        return changed | self.compare(parts, names, found)

    def compare(
        self,
        parts: Mapping[str, Part],
        names: Mapping[str, str],
        found: Mapping[str, int],
        whole: bool = False,
        agree: Callable[[set[str]], set[str]] = set,
    ) -> set[str]:
        """
        Names of the tensors that are no longer what their backbones provide.

        Args:
            parts: what this process holds of each tensor.
            names: theirs in the whole model; see `frozen_tensors`.
            found: the digests of these parts.
            whole: that `found` are those of the whole tensors.
            agree: told the names that a file shows to have changed in this process, gives those of all processes.
        """
        changed, cast = set(), {}
        for name, part in parts.items():
            known = self._provided.get(names[name])
            key = (part.tensor.dtype, known.shape if whole and known else part.tensor.shape)
            if known is None or known.digests.get(key, found[name]) != found[name]:
                changed.add(name)
            elif key not in known.digests:
                cast[name] = known, key
        other = agree(self._differ_from_files({name: parts[name] for name in cast}, names))
        for name, (known, key) in cast.items():
            if name not in other:
                known.digests[key] = found[name]
        return changed | (other & cast.keys())

    def _differ_from_files(self, parts: Mapping[str, Part], names: Mapping[str, str]) -> set[str]:
        """Names of the tensors that differ from what their backbones' files hold, or that have no such file now."""
        if not parts:
            return set()
        skeleton = self._skeleton(self.config)
        expected = [name for name in skeleton.state_dict() if not (self.config.tie_word_embeddings and name == _HEAD)]
        differ = set(parts)
        for backbone, source in self.config.backbones.items():
            wanted = {name: names[name] for name in parts if part_of(names[name]) == backbone}
            if not wanted:
                continue
            try:
                checkpoint = Checkpoint(source, backbone, {"local_files_only": True})
                ours = [name for name in expected if part_of(name) == backbone]
                keys = match_names(backbone, ours, checkpoint, skeleton.lm_head_name, skeleton.decoder_name)
                for name, full in wanted.items():
                    full = self._tied_to() if full == _HEAD and full not in keys else full
                    if full in self._own_tensors or (
                        full in keys and _is_cast(checkpoint.tensor(keys[full]), self._provided[full], parts[name])
                    ):
                        differ.discard(name)
            except OSError as error:
                logger.warning(
                    f"The {backbone} backbone {describe(source)} cannot be read, so the model's weights cannot be "
                    f"compared with it; they are saved too ({error})."
                )
        return differ

    def _choose_what_to_save(
        self, full: bool = False, changed: Collection[str] = (), own: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """
        Tell transformers which tensors to leave out of checkpoints: frozen ones that a backbone provides.

        The Trainer looks at the same list when it resumes, and does not warn about what is left out on purpose.

        Args:
            full: leave out nothing.
            changed: names of frozen tensors that no backbone provides any more.
            own: the model's tensors, if they are at hand.
        """
        tensors = {} if full else self.state_dict(keep_vars=True) if own is None else own
        self._keys_to_ignore_on_save = {
            name
            for name, full_name in self._names_of_backbones(tensors).items()
            if not (tensors[name].requires_grad or name in changed or full_name in self._own_tensors)
        }

    def tell_changed(self, changed: Collection[str], given: Mapping[str, torch.Tensor] | None = None) -> None:
        """Warn that a checkpoint holds more than the projection, and how much of what its backbones provide."""
        if not changed:
            return
        tensors = {**self.state_dict(keep_vars=True), **(given or {})}
        names = self._names_of_backbones(tensors)
        told, share = [], 0.0
        for part in self.config.backbones:
            ours = [name for name, full in names.items() if part_of(full) == part]
            written = [name for name in ours if name in changed]
            size, whole = (_megabytes(tensors[name] for name in some) for some in (written, ours))
            if written:
                told.append(f"{len(written)} tensors of the {part} backbone ({size:,.1f} of {whole:,.1f} MB)")
                share = max(share, size / whole)
        logger.warning(
            f"{' and '.join(told)} are no longer what is stored there, by a merged adapter, other training or an "
            "edit, and are saved beside the projection."
            + (" That is most of it: `full=True` saves a folder that needs no backbone." if share > 0.5 else "")
        )

    def _leave_out_tied(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Keep an LM head that is the embeddings out of checkpoints, where a copy of them stands for it.

        Raises:
            ValueError: if it is another matrix, though the configuration says that it is the embeddings.
        """
        if not self.config.tie_word_embeddings or _HEAD not in tensors:
            return
        embeddings = tensors.get(next((n for n, full in self._whole_names(tensors) if full == self._tied_to()), ""))
        if embeddings is None or is_spread(head := tensors[_HEAD]) or is_spread(embeddings) or head.is_meta:
            return
        same = head.data_ptr() == embeddings.data_ptr() or torch.equal(head.to(embeddings.device), embeddings)
        if not same:
            raise ValueError(
                f"{_HEAD} is no longer the embeddings' matrix, but the configuration says that it is, so it would be "
                "lost; set `model.config.tie_word_embeddings` and `model.config.text_config.tie_word_embeddings` to "
                "False to keep both."
            )
        self._keys_to_ignore_on_save.add(_HEAD)

    def _shapes(self, names: Collection[str]) -> dict[str, torch.Size]:
        """Shapes that the configuration says of tensors, by the names of the whole model; maybe of others too."""
        if all(part_of(name) is None for name in names):  # building the whole model takes longer than saving does
            with torch.device("meta"):
                tensors = self._new_projection(self.config)
        else:
            tensors = self._skeleton(self.config).state_dict()
        return {name: tensor.shape for name, tensor in tensors.items()}

    def _tied_to(self) -> str:
        """Name of the embeddings in the whole model, which the LM head may share."""
        embeddings = self.get_input_embeddings()  # type: ignore[attr-defined]
        name = next(name for name, module in self.named_modules() if module is embeddings)
        return next((full for _, full in self._whole_names({f"{name}.weight": embeddings.weight})), "")


_DECODER = ("model.language_model.", "language_model.", "lm_head.")
_HEAD = "lm_head.weight"


def _megabytes(tensors: Iterable[torch.Tensor]) -> float:
    return sum(prod(getattr(one, "ds_shape", one.shape)) * one.element_size() for one in tensors) / 1e6


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


__all__ = ["Part", "Provided", "UnchangedMixin", "is_spread"]
