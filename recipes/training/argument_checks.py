"""Settings of transformers and TRL that cannot work here or would do nothing: refused before a model is loaded."""

import dataclasses
import difflib
import inspect
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch._inductor
from accelerate.data_loader import BatchSamplerShard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import SchedulerType, Trainer, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.utils import SAFE_WEIGHTS_NAME

from modeling_minigpt4 import MiniGPT4Config
from recipes_minigpt4.data import arguments as data_arguments
from recipes_minigpt4.training.options import GROUPED
from recipes_minigpt4.utils.errors import RecipeError, one_line


# Setting → why any value but its default, or those listed with it, is refused, and what to do.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "packing": ((), "TRL packs rows of text only; leave it out"),
    "eval_packing": ((False,), "TRL packs rows of text only; leave it out"),
    "padding_free": ((), "TRL leaves padding out of rows of text only; leave it out"),
    "pad_to_multiple_of": ((None,), "TRL does not pad rows with pictures to a multiple; leave it out"),
    "group_by_length": ((), "it has another name; use --train_sampling_strategy group_by_length"),  # of 4.57
    "train_sampling_strategy": (
        ("random", "sequential", GROUPED),
        "a stage knows random, sequential and group_by_length; use one of them",
    ),
    "length_column_name": ((), "lengths are counted in the text of rows; leave it out"),
    "use_liger_kernel": (
        (),
        "Liger has no kernels for MiniGPT-4, and a stage computes scores of answers only as it is; leave it out",
    ),
    "assistant_only_loss": ((), "only answers carry loss anyway; leave it out"),
    "remove_unused_columns": ((), "rows are made from all columns; leave it out"),
    "router_aux_loss_coef": ((0.0,), "the model has no mixture of experts that tells its routing; leave it out"),
    "model_init_kwargs": ((), "it has no effect here; use the settings of the model, such as --dtype"),
    "dataset_kwargs": ((), "it has no effect here; leave it out"),
    "dataset_text_field": ((), "it has no effect here; use --text_column"),
    "chat_template_path": ((), "the chat template is that of --chat_template; use that one"),
    "eos_token": ((), "it would come too late for the rows; use --end_sym for what ends an answer"),
    "lr_scheduler_type": ((), "it has no effect beside the original's schedule; add --original_schedule false"),
    "lr_scheduler_kwargs": ((), "it has no effect beside the original's schedule; add --original_schedule false"),
}
NO_END = "A stream of samples has no end; say how long to train with --max_steps."
WARMUP_RATIO = 0.1  # what is proposed where the warm-up is too long; the original's is a quarter and a fifth of a run
WITH_OTHER_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs")
# What looks at the data of evaluation, and what of it a best checkpoint can be best in.
EVALUATION = (
    "eval_strategy", "eval_on_start", "eval_suites", "load_best_model_at_end", "metric_for_best_model", "do_eval",
)  # fmt: skip
METRICS = ("loss", "mean_token_accuracy")
# What belongs to metrics made in Python, and to releases gone by.
WITHOUT_USE = ("eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object", "do_eval", "do_predict")
WITH_WORKERS = ("dataloader_persistent_workers", "dataloader_multiprocessing_context")
JSON_ONLY = ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
JSON_OR_FILE = ("accelerator_config", "fsdp_config", "deepspeed")


def is_offered(name: str) -> bool:
    """Whether help lists a setting; what is refused, or has no effect in a stage, it leaves out."""
    unused = name.startswith(("per_gpu_", "include_for_metrics", "batch_eval_metrics")) or name in WITHOUT_USE
    refused = name in REFUSED and name not in (*WITH_OTHER_SCHEDULE, "train_sampling_strategy")
    return not (unused or refused)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # enumerations hold their text


# ---- whatever the machine -------------------------------------------------------------------------------------------


def check_texts(settings: Any) -> None:
    """
    Refuse text that is neither JSON nor, where one is allowed, a file, and ways to compile that torch does not have.

    For before transformers looks at the settings: it takes such text as it is, and tells the environment to compile.

    Raises:
        RecipeError: that names the setting and its value.
    """
    for name in (*JSON_ONLY, *JSON_OR_FILE):
        text = getattr(settings, name, None)
        if not isinstance(text, str) or (name in JSON_OR_FILE and Path(text).is_file()):
            continue
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if not isinstance(fields, dict):
            kinds = "a JSON object or a file that holds one" if name in JSON_OR_FILE else "a JSON object"
            raise RecipeError(f"--{name} is {text!r}; it has to be {kinds}.")
    modes = torch._inductor.list_mode_options()
    if settings.torch_compile_mode not in (None, *modes):
        raise RecipeError(f"--torch_compile_mode is {settings.torch_compile_mode!r}; torch has {', '.join(modes)}.")


def check_settings(settings: Any) -> None:
    """
    Refuse what could only crash later, or would have no effect without a word.

    Raises:
        RecipeError: that names the setting, its value, the reason and the remedy.
    """
    for field in dataclasses.fields(settings):
        harmless, reason = REFUSED.get(field.name, ((), ""))
        value, default = _plain(getattr(settings, field.name)), _plain(field.default)
        if field.name in WITH_OTHER_SCHEDULE and not settings.original_schedule:
            continue
        if reason and value != default and value not in harmless:
            raise RecipeError(f"--{field.name} is {value!r}, but {reason}.")
    for name in ("min_learning_rate", "warmup_start_learning_rate"):
        if settings.original_schedule and getattr(settings, name) > settings.learning_rate:
            raise RecipeError(
                f"--{name} is {getattr(settings, name):g}, above --learning_rate, {settings.learning_rate:g}, the "
                "highest of the schedule; lower it."
            )
    for name in WITH_WORKERS:
        if getattr(settings, name, None) and settings.dataloader_num_workers == 0:
            raise RecipeError(f"--{name} needs workers; give their number with --dataloader_num_workers.")
    if settings.max_length is not None and settings.truncation_mode != "keep_start":
        raise RecipeError("--truncation_mode keep_end would cut pictures; leave it out.")
    if getattr(settings.accelerator_config, "dispatch_batches", None):
        raise RecipeError(
            "--accelerator_config has dispatch_batches, but rows of different lengths with their pictures cannot be "
            "shared out from one process; leave it out."
        )
    for name in settings.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            close = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"the nearest is {close[0]}" if close else f"use one of {', '.join(INTEGRATION_TO_CALLBACK)}"
            raise RecipeError(f"--report_to is {name!r}, which transformers does not know; {hint}, or none.")
    if not settings.output_dir:
        raise RecipeError("--output_dir is empty; name the folder that the run writes into.")
    _try_checkpointing(settings)
    if not settings.original_schedule:
        _try_schedule(settings)


def _try_schedule(settings: Any) -> None:
    """Make the schedule for an optimizer of one number, because only itself knows what it takes."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.learning_rate)
    steps = {"num_warmup_steps": int(settings.warmup_steps), "num_training_steps": int(settings.warmup_steps) + 10}
    try:
        get_scheduler(
            settings.lr_scheduler_type, optimizer, **steps, scheduler_specific_kwargs=settings.lr_scheduler_kwargs
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RecipeError(
            f"--lr_scheduler_type {_plain(settings.lr_scheduler_type)} does not go with --lr_scheduler_kwargs "
            f"{settings.lr_scheduler_kwargs or '{}'}: {one_line(error)}."
        ) from error


def _try_checkpointing(settings: Any) -> None:
    """Checkpoint one number, for the same reason."""
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        options = dict(getattr(settings, name, None) or {})
        options.pop("every_n_layers", None)  # of transformers; the rest is torch's
        try:
            checkpoint(torch.clone, torch.zeros(1, requires_grad=True), **{"use_reentrant": False, **options})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"--{name} {options} is not what torch takes: {one_line(error)}.") from error


def check_length(settings: Any, pairs: Any) -> None:
    """
    Refuse a run without an end, or one that is shorter than its warm-up, once its data are known.

    Raises:
        RecipeError: that names what to set.
    """
    if settings.max_steps <= 0 and not hasattr(pairs, "__len__"):
        raise RecipeError(NO_END)
    check_warmup(settings, steps_of_run(settings, pairs))


def check_warmup(settings: Any, steps: int) -> None:
    """Refuse a warm-up that is longer than the run, with a `RecipeError`; see `long_warmup`."""
    if problem := long_warmup(settings, steps):
        raise RecipeError(problem)


def long_warmup(settings: Any, steps: int) -> str | None:
    """
    What to set where the warm-up is longer than the run, which would train at a small part of its rate.

    Args:
        settings: of the stage.
        steps: of the run.
    """
    warmup = settings.get_warmup_steps(steps)
    if warmup <= steps or not _has_warmup(settings):
        return None
    reached = min(steps, (settings.original_schedule and settings.steps_per_epoch) or steps) / warmup
    start = settings.warmup_start_learning_rate / settings.learning_rate if settings.original_schedule else 0
    top = max(1, round(100 * (start + (1 - start) * reached)))
    return (
        f"The warm-up takes {warmup:,} steps and the run only {steps:,}, so that it would train at up to {top} % of "
        f"--learning_rate; set --warmup_steps {max(1, round(steps * WARMUP_RATIO))} (or --warmup_ratio "
        f"{WARMUP_RATIO:g}), or more --max_steps."
    )


def _has_warmup(settings: Any) -> bool:
    """Whether the schedule of a run begins with a warm-up, as the original's and most of transformers' do."""
    if settings.original_schedule:
        return True
    schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(settings.lr_scheduler_type)]
    return "num_warmup_steps" in inspect.signature(schedule).parameters


def steps_of_run(settings: Any, rows: Any) -> int:
    """Steps that the Trainer will count; `rows` without a length need `max_steps`."""
    if settings.max_steps > 0:
        return int(settings.max_steps)
    return math.ceil(settings.num_train_epochs * steps_per_epoch(settings, len(rows), settings.world_size))


def steps_per_epoch(settings: Any, samples: int, processes: int) -> int:
    """Steps of a pass over the data, as accelerate shares batches out (transformers, both releases)."""
    batches = BatchSampler(
        SequentialSampler(range(samples)), settings.per_device_train_batch_size, settings.dataloader_drop_last
    )
    own = len(BatchSamplerShard(batches, processes, 0)) if processes > 1 else len(batches)
    return max(-(-own // settings.gradient_accumulation_steps), 1)


def check_evaluation(settings: Any, data: Any) -> None:
    """
    Refuse evaluation without data, or data that nothing evaluates on.

    Args:
        settings: of the stage.
        data: the arguments that tell of data, or None.

    Raises:
        RecipeError: that names what is missing.
    """
    asked = [name for name in EVALUATION if _plain(getattr(settings, name)) not in (False, None, "no")]
    if _plain(settings.save_strategy) == "best":
        asked.append("save_strategy")
    if settings.do_predict:
        raise RecipeError("--do_predict has no effect in a stage; leave it out.")
    given = [] if data is None else [name for name in data_arguments.EVALUATION if getattr(data, name)]
    has_data = data is not None and data.is_evaluated
    if asked and not has_data:
        raise RecipeError(
            f"--{asked[0]} is {_plain(getattr(settings, asked[0]))!r}, but there are no data to evaluate on; name a "
            "dataset with --eval_dataset_name or a split with --eval_split."
        )
    if given and not has_data:
        raise RecipeError(
            f"--{given[0]} is given without data to evaluate on; name a dataset with --eval_dataset_name or a split "
            "with --eval_split."
        )
    if not has_data:
        return
    if not {"eval_strategy", "eval_on_start"} & set(asked):
        raise RecipeError(
            f"--{given[0]} names data to evaluate on, but not when; add --eval_strategy steps with --eval_steps N, or "
            "--eval_strategy epoch."
        )
    metric = (settings.metric_for_best_model or METRICS[0]).removeprefix("eval_")
    if metric not in METRICS and not settings.eval_suites:  # whose measures the trainer knows
        raise RecipeError(
            f"--metric_for_best_model is {settings.metric_for_best_model!r}; an evaluation tells {', '.join(METRICS)}."
        )


# ---- this machine ---------------------------------------------------------------------------------------------------


def check_start(model_args: Any, data_args: Any, settings: Any) -> None:
    """
    Make sure that a run can start here and write its results, and overwrites nothing that it reads.

    Raises:
        RecipeError: naming what is missing or in the way, and what to do.
    """
    for name in settings.report_to or ():
        if name not in (*get_available_reporting_integrations(), "flyte"):  # which transformers does not look for
            raise RecipeError(f"--report_to {name} needs its package; run `pip install {name}`, or use none.")
    _check_optimizer(settings)
    if settings.device.type == "cpu":
        if settings.activation_offloading:
            raise RecipeError("--activation_offloading moves activations off a GPU, and there is none; leave it out.")
        if (model_args.attn_implementation or "").startswith("flex_attention"):
            raise RecipeError("--attn_implementation flex_attention cannot train on a CPU; use sdpa.")
    if not settings.should_save:
        return
    folder = Path(settings.output_dir)
    sources = {
        **{name: getattr(model_args, name) for name in ("model_name_or_path", "vision", "qformer", "language_model")},
        **{name: getattr(data_args, name) for name in ("image_folder", "eval_dataset_name", "eval_image_folder")},
    }
    read = [*sources.items(), *(("dataset_name", name) for name in data_args.dataset_name or ())]
    for name, source in read:
        if source and Path(source).is_dir() and Path(source).resolve() == folder.resolve():
            raise RecipeError(
                f"--output_dir {folder} is the folder that --{name} reads from, whose files would be overwritten; "
                "name another folder."
            )
    if (kind := _kind_of_model(folder)) not in (None, MiniGPT4Config.model_type):
        raise RecipeError(
            f"--output_dir {folder} holds a {kind!r} model, whose files would be overwritten; name another folder."
        )
    goes_on = str(settings.resume_from_checkpoint or "").lower() not in ("", "false", "none")
    if (folder / SAFE_WEIGHTS_NAME).is_file() and not (goes_on or settings.overwrite_output_dir):
        raise RecipeError(
            f"--output_dir {folder} holds the result of an earlier run; name another folder, or overwrite it with "
            "--overwrite_output_dir true."
        )
    check_writable(folder, "--output_dir")
    if settings.cache_features and not {"vision", "qformer"} & set(model_args.train_parts):  # refused by and by
        check_writable(Path(settings.cache_features), "--cache_features")


def _check_optimizer(settings: Any) -> None:
    """Ask transformers for the optimizer, which tells of packages that are missing; some look at the model as well."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(settings, torch.nn.Module())
    except (ImportError, ValueError, RuntimeError) as error:
        if isinstance(error, ImportError) or not settings.optim_target_modules:
            with_args = f" with --optim_args {settings.optim_args}" if settings.optim_args else ""
            raise RecipeError(
                f"--optim {_plain(settings.optim)}{with_args} cannot be used: {one_line(error)}."
            ) from error


def _kind_of_model(folder: Path) -> str | None:
    """The model type of the configuration in a folder, if it has one."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return None if kind is None else str(kind)


def check_writable(folder: Path, argument: str) -> None:
    """
    Make a folder and write into it, so that a run does not find out at its end that it cannot.

    Raises:
        RecipeError: naming the argument, the folder and the reason.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is a file" if folder.is_file() else (error.strerror or str(error)).lower()
        raise RecipeError(f"{argument} {folder} cannot be written into ({reason}); name a folder that can.") from error
