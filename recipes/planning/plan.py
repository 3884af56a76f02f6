"""Compute what a training run needs before anything is loaded: parameters, memory per GPU, steps, time and data.

    minigpt4 plan --config stage1_vicuna_7b --num_processes 4 --hours 10
    minigpt4 plan --config stage2_vicuna_7b --accelerate_config fsdp2.yaml --per_device_train_batch_size 4

Takes the arguments of `minigpt4 stage1` and `stage2`. Of models and repositories only the configurations are read;
memory is that of a step with tensors that have no data (`memory.py`), every row as long as it can be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import nn
from transformers import Trainer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.feature_cache import STORED
from recipes_minigpt4.planning.data import RowLength, longest_row, measure_sources, plan_schedule
from recipes_minigpt4.planning.filling import plan_filling
from recipes_minigpt4.planning.memory import OPTIMIZER, Step, needs_values, trace_step
from recipes_minigpt4.planning.model import build_skeleton, check_quantization, list_parts, quantize_skeleton
from recipes_minigpt4.planning.options import PlanArguments
from recipes_minigpt4.planning.parallel import Parallelism, hold, memory_per_process, read_parallelism
from recipes_minigpt4.planning.report import Plan, format_plan
from recipes_minigpt4.stage2_finetune import Stage2Arguments
from recipes_minigpt4.training.argument_checks import check_warmup
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments, StageParser, find_config
from recipes_minigpt4.training.model import weights_dtype
from recipes_minigpt4.utils.command_line import one_spelling
from recipes_minigpt4.utils.errors import RecipeError, one_line


# Fields by which a configuration shows that it is for stage 2.
OF_STAGE_2 = ("model_name_or_path", "instruction_template")


def main(arguments: Sequence[str]) -> Plan:
    """
    Print a plan; a model that does not fit anywhere is a fact, no failure.

    Raises:
        RecipeError: for arguments that make no sense, and for what the stage itself would refuse.
    """
    plan = make_plan(arguments)
    print(format_plan(plan), flush=True)
    return plan


# ---- arguments ------------------------------------------------------------------------------------------------------


class _Planned:
    """
    Settings of a stage for a machine with GPUs, made on any: what this machine lacks is not asked for.

    Mixed precision is what the stage chooses on a GPU that knows bfloat16.
    """

    def __post_init__(self: Any) -> None:
        if self.deepspeed or self.fsdp:
            raise RecipeError(
                "A plan reads how work is shared from a file of accelerate's; give it with --accelerate_config, "
                "without --deepspeed and --fsdp."
            )
        wanted = {name: getattr(self, name) for name in ("bf16", "fp16", "tf32")}
        self.bf16, self.fp16, self.tf32 = False, False, None
        super().__post_init__()  # type: ignore[misc]
        if wanted["bf16"] is None:
            wanted["bf16"] = not (self.use_cpu or wanted["fp16"])
        for name, value in wanted.items():
            setattr(self, name, value)


@dataclass
class PlannedStage1(_Planned, StageArguments):
    """Settings of stage 1."""


@dataclass
class PlannedStage2(_Planned, Stage2Arguments):
    """Settings of stage 2."""


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, StageArguments, PlanArguments, int]:
    """Read the arguments of a stage and those of the plan; returns the number of the stage as well."""
    arguments = one_spelling(arguments)
    stage = tell_stage(arguments)
    kinds = (ModelArguments, DataArguments, PlannedStage1 if stage == 1 else PlannedStage2, PlanArguments)
    model, data, training, plan = StageParser("plan", kinds).parse(arguments)
    return model, data, training, plan, stage


def tell_stage(arguments: Sequence[str]) -> int:
    """The stage that arguments are for: what `--stage` says, or what is in them and their YAML file."""
    given = [part for text in arguments for part in (text.split("=", 1) if text.startswith("--") else [text])]
    if "--stage" in given:
        value = "".join(given[given.index("--stage") + 1 :][:1])
        if value not in ("1", "2"):
            raise RecipeError(f"--stage is {value or 'empty'}; there are 1 and 2.")
        return int(value)
    names = {text.removeprefix("--") for text in given if text.startswith("--")}
    if "--config" in given[:-1]:
        try:
            fields = yaml.safe_load(find_config(given[given.index("--config") + 1]).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"The configuration is not YAML: {one_line(error)}.") from error
        names |= set(fields) if isinstance(fields, dict) else set()
    return 2 if names & set(OF_STAGE_2) else 1


# ---- plan -----------------------------------------------------------------------------------------------------------


def make_plan(arguments: Sequence[str]) -> Plan:
    """Everything that `main` prints; see there."""
    model_args, data_args, training, plan_args, stage = parse(arguments)
    parallelism = read_parallelism(plan_args.accelerate_config, plan_args.num_processes)
    if parallelism.on_cpu and not training.use_cpu:
        return make_plan([*arguments, "--use_cpu", "true"])
    sources = measure_sources(data_args, stage)
    schedule = plan_schedule(training, sources, parallelism.processes)
    check_warmup(training, schedule.steps)

    quantization = getattr(model_args, "quantization", None)
    model = build_skeleton(model_args, training)
    check_quantization(quantization, model)
    parts = list_parts(model, quantization)
    row = longest_row(model_args, data_args, model.config, stage)
    notes = [row.assumption] if row.assumption else []
    precision = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    if parallelism.kind == "fsdp2" and precision is not None:
        _upcast(model)
    saved = _bytes_of_checkpoint(model)
    quantize_skeleton(model, quantization)
    holding = hold(model, parallelism, precision)
    step = plan_step(training, model_args, row, parallelism)
    if step.whole_rows:
        notes.append("a step of TRL's own, which scores every token; its metrics are not counted")
    trace = trace_step(model, step, _optimizer(training, model, notes))
    if trace.failure:
        notes.append(
            f"activations and logits are NOT counted, as the model cannot run without values ({trace.failure})"
        )
    memory = memory_per_process(holding, trace, parallelism, step.gpu)
    filling = None
    if training.cache_features:
        try:
            filling = plan_filling(build_skeleton(model_args, training), step, holding, parallelism, sources)
        except Exception as error:  # whatever operations of an encoder say that need values
            notes.append(f"filling the cache is NOT counted, as the encoder cannot run so ({one_line(error)})")
    return Plan(
        stage, step.gpu, precision, parallelism, parts, memory, (saved, trace.passes[OPTIMIZER]), row, training,
        schedule, sources, plan_args.hours, notes, filling,
    )  # fmt: skip


def plan_step(training: StageArguments, args: ModelArguments, row: RowLength, parallelism: Parallelism) -> Step:
    """The step that one process takes."""
    length, multiple = row.total, training.pad_to_multiple_of
    if multiple:
        length = -(-length // multiple) * multiple
    autocast = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    if parallelism.kind.startswith("zero"):
        autocast = None  # DeepSpeed computes in the dtype of the weights (accelerate, `native_amp`)
    checkpointing = dict(training.gradient_checkpointing_kwargs or {}) if training.gradient_checkpointing else None
    if parallelism.is_on("activation_checkpointing"):
        checkpointing = checkpointing or {}
    features = None
    if training.cache_features:
        name = training.cache_features_dtype or str(weights_dtype(args, training)).removeprefix("torch.")
        if name not in STORED:
            raise RecipeError(f"cache_features_dtype is {name!r}; use {', '.join(STORED)}.")
        features = STORED[name]
    return Step(
        rows=training.per_device_train_batch_size,
        length=length,
        answer=row.answer,
        accumulation=training.gradient_accumulation_steps,
        autocast=autocast,
        checkpointing=checkpointing,
        features=features,
        gpu=not training.use_cpu,
        whole_rows=training.loss_type != "nll" or bool(training.label_smoothing_factor),
    )


def _upcast(model: nn.Module) -> None:
    """What trains is float32 under FSDP2 and mixed precision (accelerate, `fsdp2_prepare_model`)."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _bytes_of_checkpoint(model: MiniGPT4ForConditionalGeneration) -> int:
    """Bytes of the weights that `save_pretrained` writes."""
    model._choose_what_to_save()
    tensors = {id(tensor): tensor for name, tensor in model.state_dict(keep_vars=True).items()
               if name not in model._keys_to_ignore_on_save}  # fmt: skip
    return sum(tensor.nbytes for tensor in tensors.values())


def _optimizer(
    training: StageArguments, model: MiniGPT4ForConditionalGeneration, notes: list[str]
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    """What makes the optimizer of the settings, or AdamW where that one needs values or a package."""

    def chosen(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
        return kind(parameters, **options)

    if reason := needs_values(chosen):
        notes.append(f"the state of AdamW, as that of {training.optim} is not known here ({reason[:80]})")
        return lambda parameters: torch.optim.AdamW(parameters, fused=True)
    return chosen
