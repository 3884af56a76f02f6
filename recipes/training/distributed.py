"""
Saving and resuming a model whose weights several processes share, by FSDP2 or DeepSpeed.

Only what a checkpoint of this model holds is gathered and written, whole and once: the projection and whatever else
trains. The frozen weights, gigabytes that the backbones provide, stay where they are.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate.utils import gather_object, save_fsdp_optimizer
from accelerate.utils.deepspeed import DeepSpeedSchedulerWrapper
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_minigpt4 import unchanged_minigpt4 as unchanged
from modeling_minigpt4.digest_minigpt4 import digests
from modeling_minigpt4.peft_minigpt4 import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from recipes_minigpt4.training.non_finite import SKIP
from recipes_minigpt4.utils.errors import RecipeError


def check_strategy(trainer: Any) -> None:
    """
    Keep FSDP2's sums as exact as those of DDP and DeepSpeed's memory to what trains, and refuse what does not work.

    Mixed precision of accelerate would add gradients up and return scores in half precision; the weights alone are to
    be (accelerate 1.15, `FullyShardedDataParallelPlugin.set_mixed_precision`).

    Raises:
        RecipeError: for the first FSDP, for features that no process has the weights to compute, and for steps that
            DeepSpeed cannot leave out.
    """
    if trainer.args.cache_features and is_deepspeed_zero3_enabled():
        raise RecipeError(
            "Under ZeRO-3 no process has the whole vision side to compute features with; leave --cache_features out, "
            "or share the weights by FSDP2."
        )
    if trainer.is_deepspeed_enabled:
        # DeepSpeed makes its bucket for gradients at full size, which by default is 2 GB for a projection of 13 MB.
        trained = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters() if p.requires_grad)
        zero = trainer.accelerator.state.deepspeed_plugin.deepspeed_config.get("zero_optimization", {})
        zero.setdefault("reduce_bucket_size", trained)
        if trainer.finite_steps.policy == SKIP:
            raise RecipeError("DeepSpeed takes its steps by itself; leave --non_finite skip out.")
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise RecipeError(
            "FSDP 1 joins frozen weights and trained ones into one tensor; set fsdp_version: 2, as in the "
            "recipes' accelerate/fsdp2.yaml."
        )
    if plugin.mixed_precision_policy is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        weights = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=weights, reduce_dtype=torch.float32)


def check_checkpoint(trainer: Any, folder: "str | os.PathLike[str]") -> None:
    """
    Refuse to resume a run in another way than it was saved, since optimizer state cannot be carried over.

    Raises:
        RecipeError: saying how the checkpoint was saved.
    """
    written = {"DeepSpeed": "global_step*", "FSDP": "optimizer[._][0b]*", "DDP or one process": "optimizer.pt"}
    saved = [name for name, pattern in written.items() if any(Path(folder).glob(pattern))]
    now = "DeepSpeed" if trainer.is_deepspeed_enabled else "FSDP" if trainer.is_fsdp_enabled else "DDP or one process"
    if saved and now not in saved:
        raise RecipeError(
            f"The checkpoint {folder} was saved under {saved[0]}, and its optimizer state cannot be used under {now}; "
            f"resume as it was saved, or begin anew from its adapter with --model_name_or_path {folder}."
        )


def gather(trainer: Any) -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint, whole and on the CPU, in the process that saves; nothing in the others.

    All processes have to call it, for each gives its part.
    """
    model, saves = trainer.model, trainer.args.should_save
    model._choose_what_to_save(changed=changed_on_any_rank(trainer))
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in model._keys_to_ignore_on_save
    }
    whole: dict[int, torch.Tensor] = {}  # one for all names of a tied one
    for tensor in {id(tensor): tensor for tensor in tensors.values()}.values():  # no process holds more than one
        gathered = _gather_deepspeed(tensor) if trainer.is_deepspeed_enabled else _gather_fsdp(tensor, trainer)
        if saves:
            whole[id(tensor)] = gathered.to("cpu", copy=True)
    return {name: whole[id(tensor)] for name, tensor in tensors.items()} if saves else {}


def changed_on_any_rank(trainer: Any) -> set[str]:
    """
    Names of frozen tensors that are no longer their backbones', whichever process holds what has changed.

    Digests of shards are added up; what a file has to tell, each process compares with its own share of the file. All
    processes have to call it.
    """
    model = trainer.model
    frozen, names = unchanged.frozen_tensors(model)
    parts, sums = {}, dict[str, int]()
    for name, tensor in frozen.items():
        if isinstance(tensor, DTensor):
            shape, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            local: Any = tensor.detach()
            parts[name] = unchanged.Part(local.to_local().view(shape), start[0] if start else 0)
        elif hasattr(tensor, "ds_shape"):  # a share of all values, in their order
            share: torch.Tensor = tensor.ds_tensor.detach()  # type: ignore[attr-defined]
            parts[name] = unchanged.Part(share, share.numel() * trainer.accelerator.process_index)
    found = digests({name: part.tensor for name, part in parts.items()}, {name: p.first for name, p in parts.items()})
    for mesh, placements in {(t.device_mesh, t.placements) for t in frozen.values() if isinstance(t, DTensor)}:
        these = [name for name in parts if getattr(frozen[name], "placements", None) == placements]
        summed = [Partial() if placement.is_shard() else placement for placement in placements]
        here = torch.tensor([found[name] for name in these], device=trainer.args.device)
        whole: Any = DTensor.from_local(here, mesh, summed, run_check=False).full_tensor()
        sums.update(zip(these, whole.tolist(), strict=True))

    def agree(told: set[str]) -> set[str]:
        return {name for each in gather_object([told]) for name in each}

    changed = unchanged.compare(model, parts, names, {**found, **sums}, whole=bool(sums), agree=agree)
    return agree(changed | unchanged.changed_tensors(model))


def _gather_fsdp(tensor: torch.Tensor, trainer: Any) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    part: Any = tensor.detach().to(trainer.args.device)  # for the CPU may have no collectives
    return part.full_tensor()


def _gather_deepspeed(tensor: torch.Tensor) -> torch.Tensor:
    """What is optimized, in float32, rather than the copy in half precision that the model computes with."""
    import deepspeed

    if tensor.requires_grad and (exact := deepspeed.utils.safe_get_full_fp32_param(tensor)) is not None:
        return exact.detach()
    with deepspeed.zero.GatheredParameters([tensor], modifier_rank=None, enabled=hasattr(tensor, "ds_id")):
        return tensor.detach().clone()


def save_optimizer(trainer: Any, folder: str) -> None:
    """What transformers saves of such a run beside the adapter, but without all weights of the model."""
    if trainer.is_deepspeed_enabled:
        trainer.model_wrapped.save_checkpoint(folder, exclude_frozen_parameters=True)
    else:
        plugin = trainer.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save and not isinstance(trainer.lr_scheduler, DeepSpeedSchedulerWrapper):
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))


@contextmanager
def trained_only(trainer: Any) -> Iterator[None]:
    """
    Let DeepSpeed's own checkpoints be resumed without frozen weights, which `save_optimizer` keeps out of them.

    transformers asks for all weights, unless PEFT has wrapped the model (4.57 to 5.23, `deepspeed_load_checkpoint`).
    """
    if not trainer.is_deepspeed_enabled:
        yield
        return
    restore = transformers.trainer.deepspeed_load_checkpoint

    def restore_trained(engine: Any, folder: str, **_: Any) -> None:
        check_complete(trainer.model, read_checkpoint(trainer.model, folder), folder)
        restore(engine, folder, load_module_strict=False)

    transformers.trainer.deepspeed_load_checkpoint = restore_trained
    try:
        yield
    finally:
        transformers.trainer.deepspeed_load_checkpoint = restore


def load(model: nn.Module, folder: "str | os.PathLike[str]") -> None:
    """
    Give a model that FSDP2 has sharded the tensors of a checkpoint, each process its part.

    Raises:
        RecipeError: if anything that trains is not in the checkpoint.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    tensors = read_checkpoint(model, folder)
    check_complete(model, tensors, folder)
    set_model_state_dict(model, dict(tensors), options=StateDictOptions(full_state_dict=True, strict=False))


def check_complete(model: nn.Module, tensors: Mapping[str, Any], folder: "str | os.PathLike[str]") -> None:
    """Raise a `RecipeError` if anything that trains is not among the tensors of a checkpoint."""
    trained = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}
    if missing := sorted(trained - tensors.keys()):
        raise RecipeError(
            f"The checkpoint {folder} lacks {missing[0]}, which trains; resume with what trained when it was saved."
        )


def read_checkpoint(model: Any, folder: "str | os.PathLike[str]") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under the model's own names, those of an adapter of PEFT included."""
    tensors: dict[str, torch.Tensor] = load_file(Path(folder, SAFE_WEIGHTS_NAME))
    adapter = Path(folder, ADAPTER_FOLDER, ADAPTER_WEIGHTS)
    if model.has_adapter and adapter.is_file():
        names, stored = model.stored_names(), load_file(adapter)
        tensors |= {names[key]: tensor for key, tensor in stored.items() if key in names}
    return tensors
