"""Which values the numbers of the commands may have, in one table, and one sentence for those that are none."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from recipes_minigpt4.utils.errors import RecipeError


class Range(NamedTuple):
    """
    Args:
        text: what a value has to be, as it stands behind "it has to be".
        holds: whether a finite number is one.
    """

    text: str
    holds: Callable[[float], bool]


def _whole(value: float) -> bool:
    return value == int(value)


MAX_SEED = 2**32 - 1  # NumPy's
COUNT = Range("a whole number from 1 on", lambda value: value >= 1 and _whole(value))
NATURAL = Range("a whole number from 0 on", lambda value: value >= 0 and _whole(value))
INTEGER = Range("a whole number", _whole)
NUMBER = Range("a number", lambda value: True)
POSITIVE = Range("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Range("a number from 0 on", lambda value: value >= 0)
SHARE = Range("a number from 0 to 1", lambda value: 0 <= value <= 1)
DECAY = Range("a number from 0 to below 1", lambda value: 0 <= value < 1)
SEED = Range(f"a whole number from 0 to {MAX_SEED}", lambda value: 0 <= value <= MAX_SEED and _whole(value))
PORT = Range("a whole number from 0 to 65535", lambda value: 0 <= value <= 65535 and _whole(value))
STEPS = Range(
    "a whole number from 1 on, or -1 for as many as --num_train_epochs takes",
    lambda value: value == -1 or COUNT.holds(value),
)
INTERVAL = Range(
    "a whole number of steps from 1 on, or a share of the run between 0 and 1",
    lambda value: 0 < value < 1 or COUNT.holds(value),
)
STAGE = Range("1 or 2", lambda value: value in (1, 2))

# Field of the stages or of the plan → its range. None is fine where it is the default.
RANGES = {
    # the data
    "num_samples": COUNT,
    "eval_num_samples": COUNT,
    "max_txt_len": COUNT,
    "shuffle_buffer": NATURAL,
    "max_bad_share": SHARE,
    # the model
    "projector_num_layers": COUNT,
    "patch_merge_size": COUNT,
    "vision_feature_layer": INTEGER,
    "image_size": COUNT,
    # how long, and with how much at a time
    "max_steps": STEPS,
    "num_train_epochs": POSITIVE,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "max_length": COUNT,
    # optimizer and schedule
    "learning_rate": POSITIVE,
    "min_learning_rate": NOT_NEGATIVE,
    "warmup_start_learning_rate": NOT_NEGATIVE,
    "warmup_steps": NATURAL,
    "warmup_ratio": SHARE,
    "steps_per_epoch": COUNT,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": DECAY,
    "adam_beta2": DECAY,
    "adam_epsilon": NOT_NEGATIVE,
    "max_grad_norm": Range("a number from 0 on, where 0 clips nothing", NOT_NEGATIVE.holds),
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    # seeds
    "seed": SEED,
    "data_seed": SEED,
    # how often
    "logging_steps": INTERVAL,
    "save_steps": INTERVAL,
    "eval_steps": INTERVAL,
    "eval_delay": NOT_NEGATIVE,
    "eval_suite_rows": COUNT,
    "panel_steps": COUNT,
    "torch_empty_cache_steps": COUNT,
    "save_total_limit": COUNT,
    # processes
    "dataloader_num_workers": NATURAL,
    "dataloader_prefetch_factor": COUNT,
    "dataset_num_proc": COUNT,
    "ddp_bucket_cap_mb": COUNT,
    "ddp_timeout": COUNT,
    # the plan
    "stage": STAGE,
    "num_processes": COUNT,
    "hours": POSITIVE,
    # what is inspected
    "rows": COUNT,
}


def check_ranges(settings: Any) -> None:
    """
    Look at every number of a dataclass of settings.

    Raises:
        RecipeError: that names the first field out of its range, its value, and the range.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if (allowed := RANGES.get(field.name)) is None or (value is None and field.default is None):
            continue
        if not is_in(allowed, value):
            finite = "finite, and " if isinstance(value, float) and not math.isfinite(value) else ""
            raise RecipeError(f"--{field.name} is {value!r}; it has to be {finite}{allowed.text}.")


def is_in(allowed: Range, value: Any) -> bool:
    """Whether a value is a finite number in a range; a truth value is none."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and allowed.holds(value)


def in_range(allowed: Range, kind: type = int) -> Callable[[str], Any]:
    """A number in a range, as `argparse` reads it: the `type` of an argument."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if not is_in(allowed, value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {allowed.text}")
        return value

    return read
