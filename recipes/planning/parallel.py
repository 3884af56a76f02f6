"""How processes share work and weights, as accelerate's configuration files say, and what each of them holds."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from torch import nn

from recipes_minigpt4.planning.memory import ACTIVATIONS, BATCH, GRADIENTS, LOGITS, OPTIMIZER, VISION, Trace
from recipes_minigpt4.utils.errors import RecipeError, one_line


KNOWN = (
    "one process or several with their own copy (NO, MULTI_GPU, MULTI_CPU), FSDP of version 2, and DEEPSPEED (ZeRO)"
)
# Of ZeRO, where its configuration is silent (DeepSpeed 0.19.8, `runtime/zero/config.py`): numbers of parameters.
ZERO_DEFAULTS = {
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
# Assumed, not measured: driver and kernels of CUDA, workspaces of cuBLAS, blocks that torch's allocator cannot use.
CONTEXT_BYTES = 1_000_000_000
NCCL_BYTES = 500_000_000  # assumed as well: buffers of the channels between GPUs


@dataclass(frozen=True)
class Parallelism:
    """
    Who holds what.

    Args:
        kind: `"single"`, `"ddp"`, `"fsdp2"`, or `"zero0"` to `"zero3"`.
        processes: of all machines; each has a GPU unless the run is on CPUs.
        machines: how many.
        on_cpu: whether the file says so.
        settings: of FSDP in accelerate's names, or ZeRO's in DeepSpeed's.
    """

    kind: str = "single"
    processes: int = 1
    machines: int = 1
    on_cpu: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        names = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
        name = names.get(self.kind, f"DeepSpeed ZeRO-{self.kind[-1]}")
        several = f", {self.processes} processes" if self.kind != "single" else ""
        return name + several + (f" on {self.machines} machines" if self.machines > 1 else "")

    def is_on(self, name: str) -> bool:
        """Whether a setting is on; YAML and command lines write it in many ways."""
        return str(self.settings.get(name, "")).lower() in ("true", "1", "yes", "cpu", "nvme")


# ---- configuration --------------------------------------------------------------------------------------------------


def read_parallelism(path: str | None, num_processes: int | None) -> Parallelism:
    """
    What `accelerate launch --config_file PATH --num_processes N` starts.

    Raises:
        RecipeError: if the file is none of accelerate's, or for something that a plan does not know.
    """
    if path is None:
        processes = num_processes or 1
        return Parallelism("ddp" if processes > 1 else "single", processes)
    config = _read_config(path)
    processes = num_processes or config.num_processes
    if processes < 1:
        raise RecipeError(f"{path} does not say how many processes there are; add --num_processes.")
    given = {"processes": processes, "machines": config.num_machines, "on_cpu": bool(config.use_cpu)}
    kind = config.distributed_type
    if config.parallelism_config or kind not in _READERS:
        what = "a parallelism_config" if config.parallelism_config else f"the distributed_type {kind.value}"
        raise RecipeError(f"{path} has {what}, of which a plan knows nothing; it knows {KNOWN}.")
    name, settings = _READERS[kind](config, path)
    if name == "ddp" and processes == 1:
        name = "single"
    given["on_cpu"] = given["on_cpu"] or kind == DistributedType.MULTI_CPU
    return Parallelism(name, settings=settings, **given)


def _read_config(path: str) -> ClusterConfig:
    try:
        config = load_config_from_file(path)
    except FileNotFoundError as error:
        raise RecipeError(
            f"There is no file {path}; name one of accelerate's, or leave --accelerate_config out."
        ) from error
    except (yaml.YAMLError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, OSError) as error:
        raise RecipeError(
            f"{path} is not a configuration file of accelerate ({one_line(error)}); `accelerate config` writes one."
        ) from error
    except ValueError as error:  # an unknown key or type, such as TPU
        raise RecipeError(f"{path} cannot be used ({one_line(error)}); a plan knows {KNOWN}.") from error
    if not isinstance(config, ClusterConfig):
        raise RecipeError(f"{path} is for SageMaker, of which a plan knows nothing; it knows {KNOWN}.")
    return config


def _read_plain(config: ClusterConfig, path: str) -> tuple[str, dict[str, Any]]:
    return "ddp", {}


def _read_fsdp(config: ClusterConfig, path: str) -> tuple[str, dict[str, Any]]:
    settings = {name.removeprefix("fsdp_"): value for name, value in config.fsdp_config.items()}
    if str(settings.get("version", 1)) != "2":
        raise RecipeError(f"{path} asks for FSDP 1, which cannot mix frozen and trained weights; set fsdp_version: 2.")
    return "fsdp2", settings


def _read_deepspeed(config: ClusterConfig, path: str) -> tuple[str, dict[str, Any]]:
    settings: dict[str, Any] = dict(config.deepspeed_config)
    if file := settings.get("deepspeed_config_file"):
        try:
            zero = json.loads(Path(file).read_text(encoding="utf-8")).get("zero_optimization", {})
        except (OSError, ValueError, AttributeError) as error:
            raise RecipeError(f"{file}, which {path} names, cannot be read ({one_line(error)}).") from error
        devices = {
            f"{name}_device": (zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")
        }
        settings = {"zero_stage": zero.get("stage", 0), **devices, **zero}
    stage = str(settings.get("zero_stage", 2))  # as in accelerate's DeepSpeedPlugin
    if stage not in ("0", "1", "2", "3"):
        raise RecipeError(f"{path} has the zero_stage {stage}; there are 0 to 3.")
    return f"zero{stage}", settings


_READERS = {
    DistributedType.NO: _read_plain,
    DistributedType.MULTI_GPU: _read_plain,
    DistributedType.MULTI_CPU: _read_plain,
    DistributedType.FSDP: _read_fsdp,
    DistributedType.DEEPSPEED: _read_deepspeed,
}


# ---- memory ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """
    Bytes that a process holds of weights and what belongs to them, whatever the batch.

    Args:
        weights: of its own, buffers included.
        gathered: of others, at most, for the layers that are at work.
        gradients: of a byte of gradients, how much stays.
        state: of a byte of optimizer state, how much is on the device.
        buffers: that gradients are added up in, and master copies in float32.
    """

    weights: int
    gathered: int = 0
    gradients: float = 1.0
    state: float = 1.0
    buffers: int = 0


def hold(model: nn.Module, parallelism: Parallelism, param_dtype: torch.dtype | None) -> Holding:
    """
    What a process holds of a model.

    Args:
        model: on the meta device, quantized already.
        parallelism: how it is shared.
        param_dtype: what FSDP2 gathers weights in, or None for their own.
    """
    parameters = {id(parameter): parameter for parameter in model.parameters()}.values()
    whole = sum(parameter.nbytes for parameter in parameters)
    constant = sum(buffer.nbytes for buffer in model.buffers())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    share = 1 / parallelism.processes
    if parallelism.kind == "single":
        return Holding(whole + constant)
    if parallelism.kind in ("ddp", "zero0"):
        # DDP reduces gradients in buckets that hold all of them once more (torch, `gradient_as_bucket_view=False`).
        return Holding(whole + constant, buffers=gradients)
    if parallelism.kind == "fsdp2":
        offloaded = parallelism.is_on("offload_params")
        kept = 0 if offloaded else round(whole * share)
        state = 0.0 if offloaded else share
        return Holding(kept + constant, gathered_by_fsdp2(model, parallelism, param_dtype), state, state)
    return _hold_zero(model, parallelism, whole, constant, trained)


def gathered_by_fsdp2(model: nn.Module, parallelism: Parallelism, param_dtype: torch.dtype | None) -> int:
    """
    Bytes of whole weights at a time: the biggest layer with the buffer of its gathering, and what is not given back
    between forward and backward pass: the root's own weights and the head (accelerate, `fsdp2_prepare_model`).
    """
    settings = parallelism.settings
    classes = settings.get("transformer_layer_cls_to_wrap")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy=str(settings.get("auto_wrap_policy") or "NO_WRAP"),
        transformer_cls_names_to_wrap=classes.split(",") if isinstance(classes, str) else classes,
        min_num_params=int(settings.get("min_num_params") or 0),
        reshard_after_forward=str(settings.get("reshard_after_forward", True)).lower() in ("true", "1", "yes"),
    )
    try:
        plugin.set_auto_wrap_policy(model)
        wraps = fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False)
    except ValueError as error:
        raise RecipeError(
            f"FSDP cannot wrap this model ({one_line(error)}); name its layers in fsdp_transformer_layer_cls_to_wrap."
        ) from error
    taken: set[int] = set()

    def unit(module: nn.Module) -> int:
        found = {id(p): p for p in module.parameters()}
        size = sum(_gathered_bytes(p, param_dtype) for key, p in found.items() if key not in taken)
        taken.update(found)
        return size

    layers = [unit(module) for module in reversed(list(model.modules())[1:]) if wraps(module)]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    first = 0 if embeddings.weight is head.weight else unit(embeddings)
    last, root = unit(head), unit(model)
    if not plugin.reshard_after_forward:
        return root + first + last + sum(layers)
    # What is being gathered is there twice, as the buffer that it is copied out of goes last. The head stays whole
    # from its use to the backward pass; before its use there is the embedding.
    return root + max(2 * first, 2 * last, last + 2 * max(layers, default=0))


def _gathered_bytes(parameter: torch.Tensor, dtype: torch.dtype | None) -> int:
    as_it_is = dtype is None or not parameter.is_floating_point()
    return parameter.nbytes if as_it_is else parameter.numel() * dtype.itemsize  # type: ignore[union-attr]


def _hold_zero(
    model: Any, parallelism: Parallelism, whole: int, constant: int, trained: Sequence[torch.Tensor]
) -> Holding:
    """
    ZeRO (arXiv 1910.02054): stage 1 shares the optimizer's state, 2 gradients too, 3 weights too.

    Trained weights have a copy in float32, and so has their state. Gradients pass through a bucket that is made at its
    full size; with stage 3, up to `stage3_max_live_parameters` of whole weights are there, beside all small ones.
    """
    stage, share = int(parallelism.kind[-1]), 1 / parallelism.processes
    count, size = sum(p.numel() for p in trained), sum(p.nbytes for p in trained)
    width = model.config.text_config.hidden_size
    # What transformers writes in the place of "auto" (`integrations/deepspeed.py`).
    auto = {"reduce_bucket_size": width * width, "stage3_param_persistence_threshold": 10 * width}
    numbers = {}
    for name, default in {"reduce_bucket_size": count, **ZERO_DEFAULTS}.items():  # the first is the recipes' own
        value = parallelism.settings.get(name, default)
        numbers[name] = auto.get(name, default) if value == "auto" else int(float(value))
    overlap = str(parallelism.settings.get("overlap_comm")).lower() == "true"
    bucket = numbers["reduce_bucket_size"] * max((p.itemsize for p in trained), default=0)
    if stage <= 2:
        bucket *= 1 + overlap
    offloads_state = parallelism.is_on("offload_optimizer_device")
    # The state of float32 copies, whatever the dtype of the weights that the trace has seen.
    state = 0.0 if offloads_state else share * 4 * count / max(size, 1)
    masters = 0 if offloads_state else round(4 * count * share)
    gradients = share * 4 * count / max(size, 1) if stage >= 2 else 1.0
    if stage < 3:
        return Holding(whole + constant, 0, gradients, state, masters + bucket)
    small = [p for p in model.parameters() if p.numel() < numbers["stage3_param_persistence_threshold"]]
    live = _biggest(model.parameters(), numbers["stage3_max_live_parameters"])
    kept = 0 if parallelism.is_on("offload_param_device") else round(whole * share)
    gathered = min(whole, live + sum(p.nbytes for p in small))
    return Holding(kept + constant, gathered, gradients, state, masters + bucket)


def _biggest(parameters: Any, count: int) -> int:
    """Bytes of so many parameters, if they are those that take the most."""
    size = 0
    for parameter in sorted(parameters, key=lambda p: -p.itemsize):
        taken = min(count, parameter.numel())
        size, count = size + taken * parameter.itemsize, count - taken
    return size


def memory_per_process(
    holding: Holding, trace: Trace, parallelism: Parallelism, on_gpu: bool
) -> list[tuple[str, int, int]]:
    """
    Rows of name, bytes when most is taken at once, and the most that this part takes by itself.

    That moment is in the passes or in the optimizer, whichever needs more.
    """
    context = CONTEXT_BYTES + (NCCL_BYTES if parallelism.processes > 1 else 0) if on_gpu else 0

    def rows(moment: Counter[str]) -> list[tuple[str, int]]:
        found = [
            ("weights", holding.weights),
            ("weights of other GPUs, gathered", holding.gathered),
            ("gradients", round(moment[GRADIENTS] * holding.gradients)),
            ("optimizer", round(moment[OPTIMIZER] * holding.state)),
            ("buffers for gradients, master copies", holding.buffers),
            ("batch", moment[BATCH]),
            ("vision side", moment[VISION]),
            ("activations", moment[ACTIVATIONS]),
            ("logits", moment[LOGITS]),
            ("CUDA context and workspaces (assumed)", context),
        ]
        return [(name, size) for name, size in found]

    passes, update, most = (rows(moment) for moment in (trace.passes, trace.update, trace.most))
    peak = max(passes, update, key=lambda found: sum(size for _, size in found))
    return [(name, size, at_most) for (name, size), (_, at_most) in zip(peak, most, strict=True) if at_most]
