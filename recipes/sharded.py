"""
Saving and resuming a model whose weights several processes share, by FSDP2 or DeepSpeed.

Only what a checkpoint of this model holds is gathered and written: the projection and whatever else trains, whole, once.
The frozen weights, gigabytes that the backbones provide, stay where they are.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors.torch import load_file
from torch import nn
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_minigpt4.peft_minigpt4 import ADAPTER_FOLDER, ADAPTER_WEIGHTS, PEFT_PREFIX
from recipes_minigpt4 import RecipeError


if TYPE_CHECKING:
    from recipes_minigpt4.trainer import MiniGPT4Trainer


def check_strategy(trainer: "MiniGPT4Trainer") -> None:
    """
    Keep FSDP2's sums as exact as those of DDP, and refuse what cannot be saved.

    Mixed precision of accelerate would add gradients up and return scores in half precision; the weights alone are to
    be (accelerate 1.15, `FullyShardedDataParallelPlugin.set_mixed_precision`).

    Raises:
        RecipeError: for the first FSDP.
    """
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


def gather(trainer: "MiniGPT4Trainer") -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint, whole and on the CPU, in the process that saves; nothing in the others.

    All processes have to call it, for each gives its part.
    """
    model, saves = trainer.model, trainer.args.should_save
    model._choose_what_to_save()
    tensors = {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in model._keys_to_ignore_on_save
    }
    with _zero3_gathered(list(tensors.values())):
        whole = {}
        for name, tensor in tensors.items():
            tensor = tensor.detach()
            if hasattr(tensor, "full_tensor"):  # one at a time, so that no process holds more than one
                tensor = tensor.to(trainer.args.device).full_tensor()
            if saves:
                whole[name] = tensor.to("cpu", copy=True)
    return whole


@contextmanager
def _zero3_gathered(tensors: list[torch.Tensor]) -> Iterator[None]:
    """ZeRO-3 leaves nothing of a parameter in its place; put them back for a while."""
    if not (partitioned := [tensor for tensor in tensors if hasattr(tensor, "ds_id")]):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=None):
        yield


def save_optimizer(trainer: "MiniGPT4Trainer", folder: str) -> None:
    """What transformers saves of an FSDP2 run beside the model, without the model: `gather` has written that."""
    plugin = trainer.accelerator.state.fsdp_plugin
    save_fsdp_optimizer(plugin, trainer.accelerator, trainer.optimizer, trainer.model, folder)
    if trainer.args.should_save:
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))


def load(model: nn.Module, folder: "str | os.PathLike[str]") -> None:
    """
    Give a model that FSDP2 has sharded the tensors of a checkpoint, each process its part.

    Raises:
        RecipeError: if anything that trains is not in the checkpoint.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    tensors = read_checkpoint(model, folder)
    trained = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}
    if missing := sorted(trained - tensors.keys()):
        raise RecipeError(
            f"The checkpoint {folder} lacks {missing[0]}, which trains; resume with what trained when it was saved."
        )
    set_model_state_dict(model, tensors, options=StateDictOptions(full_state_dict=True, strict=False))


def read_checkpoint(model: Any, folder: "str | os.PathLike[str]") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under the model's own names, those of an adapter of PEFT included."""
    tensors: dict[str, torch.Tensor] = load_file(Path(folder, SAFE_WEIGHTS_NAME))
    if not model.has_adapter:
        return tensors
    raise NotImplementedError(ADAPTER_FOLDER, ADAPTER_WEIGHTS, PEFT_PREFIX)
