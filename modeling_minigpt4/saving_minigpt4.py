"""
What `save_pretrained` writes: all that no backbone provides, as whole tensors, or nothing.

What several processes share (FSDP, ZeRO-3) has to be gathered first. Frozen tensors that are no longer those of their
backbones are written too (`unchanged_minigpt4`).
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import entry_points
from math import prod
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .backbones import HERE, is_local, part_of
from .unchanged_minigpt4 import (
    HEAD,
    changed_tensors,
    expected_shapes,
    is_spread,
    names_of_backbones,
    tied_to,
    whole_names,
)


logger = logging.get_logger(__name__)

REMEDY = (
    "nothing was written. Save with `trainer.save_model()` in all processes, or gather tensors in all of them with "
    "`accelerator.get_state_dict(model)` and hand them over as `state_dict`."
)

# Names under which a saved folder is found with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_minigpt4.MiniGPT4Config",
    "AutoModel": "modeling_minigpt4.MiniGPT4Model",
    "AutoModelForImageTextToText": "modeling_minigpt4.MiniGPT4ForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_minigpt4.MiniGPT4ForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_minigpt4.MiniGPT4ForConditionalGeneration",
}

# What the card says that transformers makes where a repository has none.
GENERAL_CARD = "This model card has been automatically generated"

# Entry points of whoever writes a better one: functions of a model and `repo_id=`, which return the text of the card.
CARDS = "modeling_minigpt4.model_card"


class SavingMixin(PreTrainedModel):
    """Saves what no backbone provides (a few MB instead of 30 GB), and pushes it with a card of its own."""

    def save_pretrained(
        self,
        save_directory: "str | os.PathLike[str]",
        *args: Any,
        full: bool = False,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        r"""
        Save configuration, generation config, code, and the tensors that no backbone provides.

        Those are the projection, whatever else was trained, and frozen tensors that are no longer their backbones' (a
        merged adapter, averaged weights, an edit in place, a resized vocabulary), of which a warning tells how much it
        is; an adapter of PEFT lies in the folder `peft` beside them, in PEFT's own format. Takes every option of
        [`~transformers.PreTrainedModel.save_pretrained`].

        Args:
            save_directory: folder to write.
            full: write every tensor, so that the folder needs no backbone (for vLLM and the like). An adapter stays
                beside them and is not merged.
            push_to_hub: upload the folder too.

        Raises:
            ValueError: before anything is written, if a tensor is missing or not whole, as in one process of several
                that share the weights (FSDP, ZeRO-3); hand over gathered ones as `state_dict`. Also for an adapter
                that is merged but still there, and for a head that is tied no longer.
            ValueError: if a quantized language model would have to be written.
        """
        self.check_adapter_is_apart()
        options = {**dict(zip(("is_main_process", "state_dict"), args, strict=False)), **kwargs}
        given, own = options.get("state_dict"), self.state_dict(keep_vars=True)
        changed = set() if full else changed_tensors(self, given, own)
        self._tell_changed(changed, given)
        backbones = self.config.backbones
        try:
            self._choose_what_to_save(full, changed, own)
            if options.get("is_main_process", True):
                self._check_whole(given, own, changed)
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), **AUTO_MAP}
            relative = _relative(backbones, save_directory)
            if not full:
                _warn_about_local(relative)
            self.config.backbones = {} if full else relative
            with (
                unsharded_class(self),
                self._adapter_aside(save_directory, args, kwargs) as (args, kwargs),
                self._unquantized(),
            ):
                super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)
            _remove_older(save_directory, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
        finally:
            self.config.backbones = backbones
            if full or changed:
                self._choose_what_to_save()

    def _tell_changed(self, changed: Collection[str], given: Mapping[str, torch.Tensor] | None = None) -> None:
        """Warn that a checkpoint holds more than the projection, and how much of what its backbones provide."""
        if not changed:
            return
        tensors = {**self.state_dict(keep_vars=True), **(given or {})}
        names = names_of_backbones(self, tensors)
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
            for name, full_name in names_of_backbones(self, tensors).items()
            if not (tensors[name].requires_grad or name in changed or full_name in self._own_tensors)
        }

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
        names = whole_names(self, given)
        shapes = expected_shapes(self, names.values())
        check_whole(given, needed, {name: shapes.get(full) for name, full in names.items()})

    def _leave_out_tied(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """
        Keep an LM head that is the embeddings out of checkpoints, where a copy of them stands for it.

        Raises:
            ValueError: if it is another matrix, though the configuration says that it is the embeddings.
        """
        if not self.config.tie_word_embeddings or HEAD not in tensors:
            return
        source = tied_to(self)
        names = whole_names(self, tensors)
        embeddings = next((tensors[name] for name, full in names.items() if full == source), None)
        if embeddings is None or is_spread(head := tensors[HEAD]) or is_spread(embeddings) or head.is_meta:
            return
        same = head.data_ptr() == embeddings.data_ptr() or torch.equal(head.to(embeddings.device), embeddings)
        if not same:
            raise ValueError(
                f"{HEAD} is no longer the embeddings' matrix, but the configuration says that it is, so it would be "
                "lost; set `model.config.tie_word_embeddings` and `model.config.text_config.tie_word_embeddings` to "
                "False to keep both."
            )
        self._keys_to_ignore_on_save.add(HEAD)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Upload what `push_to_hub` has saved, with a card of `CARDS` in the place of transformers' general one."""
        card = Path(working_dir, "README.md")
        cards = list(entry_points(group=CARDS))
        if cards and card.is_file() and GENERAL_CARD in card.read_text(encoding="utf-8"):
            card.write_text(cards[0].load()(self, repo_id=repo_id), encoding="utf-8")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


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


def _relative(backbones: Mapping[str, Any], folder: "str | os.PathLike[str]") -> dict[str, Any]:
    """The same sources, with those that lie in the folder itself named so that both can be moved."""
    here = str(Path(folder).resolve())
    return {
        part: {**source, "name_or_path": HERE} if source["name_or_path"] == here else source
        for part, source in backbones.items()
    }


def _warn_about_local(backbones: Mapping[str, Any]) -> None:
    """Tell which backbones are folders of this machine, if there are any."""
    if where := ", ".join(f"{part} {one['name_or_path']}" for part, one in backbones.items() if is_local(one)):
        logger.warning_once(
            f"This checkpoint holds no backbone weights and refers to folders of this machine ({where}), so "
            "nobody else can load it. Before publishing, push these backbones and name them by repository, or "
            "save with `full=True`."
        )


def _remove_older(folder: "str | os.PathLike[str]", *names: str) -> None:
    """Keep the newest of files that stand for the same thing, e.g. shards where one file was before."""
    paths = sorted(
        (path for name in names if (path := Path(folder, name)).is_file()), key=lambda path: path.stat().st_mtime_ns
    )
    for path in paths[:-1]:
        path.unlink(missing_ok=True)  # another process may have been faster


def _megabytes(tensors: Iterable[torch.Tensor]) -> float:
    return sum(prod(whole_shape(one)) * one.element_size() for one in tensors) / 1e6


__all__ = ["AUTO_MAP", "CARDS", "SavingMixin", "check_whole", "unsharded_class", "whole_shape"]
