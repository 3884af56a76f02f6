"""What both stages take: which model, and how it is trained; and the parser that reads YAML files and arguments."""

import argparse
import difflib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from trl import SFTConfig, TrlParser

from modeling_minigpt4.compat_minigpt4 import IS_TRANSFORMERS_4
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.grouping import Grouping
from recipes_minigpt4.training.argument_checks import (
    check_evaluation,
    check_settings,
    check_texts,
    check_warmup,
    is_offered,
)
from recipes_minigpt4.training.model_arguments import ModelArguments
from recipes_minigpt4.training.non_finite import SKIP, STOP
from recipes_minigpt4.training.options import GROUPED, STAGE_OPTIONS, option
from recipes_minigpt4.utils.command_line import DefaultsHelpFormatter, one_spelling
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.ranges import check_ranges


__all__ = ["ModelArguments", "StageArguments", "StageParser", "find_config"]


@dataclass
class StageArguments(SFTConfig):
    """
    TRL's settings with the defaults of the original's stage 1, and the numbers of its learning-rate schedule.

    Mixed precision is bfloat16 on GPUs that know it, float16 (the original's) on others, and off without a GPU.
    """

    # Schedule (released code, `LinearWarmupCosineLRScheduler`)
    learning_rate: float = option("learning_rate")
    min_learning_rate: float = option("min_learning_rate")
    warmup_start_learning_rate: float = option("warmup_start_learning_rate")
    warmup_steps: int = option("warmup_steps")
    warmup_ratio: float = option("warmup_ratio")
    steps_per_epoch: int | None = option("steps_per_epoch")
    original_schedule: bool = option("original_schedule")
    weight_decay: float = option("weight_decay")
    seed: int = option("seed")
    train_sampling_strategy: str = option("train_sampling_strategy")

    # Where results go
    overwrite_output_dir: bool = option("overwrite_output_dir")

    # Stored features of the vision side
    cache_features: str | None = option("cache_features")
    cache_features_dtype: str | None = option("cache_features_dtype")

    # What a run shows
    report_to: str = option("report_to")
    panel_steps: int | None = option("panel_steps")
    panel_images: str | None = option("panel_images")

    # What models say while they train
    eval_suites: list[str] | None = field(default=None, metadata={"help": STAGE_OPTIONS["eval_suites"].help})
    eval_suite_rows: int = option("eval_suite_rows")

    # Losses that are not finite
    non_finite: str = option("non_finite")
    logging_nan_inf_filter: bool = option("logging_nan_inf_filter")

    # Model card
    license: str = option("license")
    language: str = option("language")

    # Settings of TRL that pictures need
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of the longest row. Default: any, as max_txt_len cuts answers."}
    )
    trust_remote_code: bool = field(default=False, init=False)  # TRL's, of no use here: `ModelArguments` has it
    remove_unused_columns: bool = field(default=False, metadata={"help": "Stays false: rows are made of all columns."})

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, as in `training_args.bin`: everything but the token."""
        return {
            **self.__dict__,
            **{name: None for name in ("hub_token", "push_to_hub_token") if name in self.__dict__},
        }

    def __repr__(self) -> str:
        return str(self)  # of transformers, which hides tokens; a dataclass's own would show them

    def __post_init__(self) -> None:
        check_ranges(self)
        check_texts(self)
        if self.disable_tqdm is None:  # type: ignore[has-type]
            self.disable_tqdm = not sys.stderr.isatty()  # a bar would leave a line for every step in a file
        gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None and not self.fp16:  # type: ignore[has-type]
            self.bf16 = gpu and torch.cuda.is_bf16_supported()
            self.fp16 = gpu and not self.bf16
        if gpu and self.dataloader_pin_memory and self.accelerator_config is None:  # type: ignore[has-type]
            self.accelerator_config = {"non_blocking": True}  # the copy need not be waited for
        if self.non_finite not in (STOP, SKIP):
            raise RecipeError(f"non_finite is {self.non_finite!r}; it is stop or skip.")
        if self.save_on_each_node and not IS_TRANSFORMERS_4:
            raise RecipeError(
                "transformers 5 writes weights on the first machine only; let all machines share output_dir, and "
                "leave --save_on_each_node out."
            )
        if self.eval_steps is None:  # type: ignore[has-type]
            self.eval_steps = self.save_steps
        if self.panel_images and self.panel_steps is None:
            raise RecipeError("panel_images needs panel_steps, the steps between two looks at the pictures.")
        for end in ("", "_kwargs"):  # called activation_checkpointing since 5.24, and otherwise by TRL's defaults
            old, new = f"gradient_checkpointing{end}", f"activation_checkpointing{end}"
            if getattr(self, new, self) is None:
                setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        super().__post_init__()
        check_settings(self)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up in a run of so many: `warmup_ratio` of them, or else `warmup_steps`."""
        return math.ceil(num_training_steps * self.warmup_ratio) if self.warmup_ratio else int(self.warmup_steps)

    @property
    def grouping(self) -> Grouping | None:
        """How rows are put into batches of like length, or None if they are not."""
        if self.train_sampling_strategy != GROUPED:
            return None
        seed = self.seed if self.data_seed is None else self.data_seed
        return Grouping(self.train_batch_size, self.world_size, seed)

    @property
    def device(self) -> torch.device:
        """The device of this process; 4.57 could not resume on "cpu:0", as accelerate calls that of several ranks."""
        device: torch.device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


class StageParser(TrlParser):
    """`TrlParser` that finds shipped YAML files by name and tells mistakes in one sentence."""

    def __init__(self, command: str, dataclass_types: Sequence[type]) -> None:
        usage = f"minigpt4 {command} [--config YAML] [--FIELD VALUE ...]"
        super().__init__(
            dataclass_types=dataclass_types, usage=usage, allow_abbrev=False, formatter_class=DefaultsHelpFormatter
        )
        for action in self._actions:
            if action.dest in STAGE_OPTIONS:
                action.help = STAGE_OPTIONS[action.dest].help
            elif not is_offered(action.dest):
                action.help = argparse.SUPPRESS

    def error(self, message: str) -> Any:
        raise RecipeError(f"{message.rstrip('.')}.")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        Read the YAML file and the arguments, of which the latter win.

        Raises:
            RecipeError: for a file that is not there or no YAML, and for fields that do not exist.
        """
        arguments = [part for text in one_spelling(arguments) for part in _split_config(text)]
        if "--help_all" in arguments:
            self.print_help()
            raise SystemExit(0)
        if "--config" in arguments:
            place = arguments.index("--config") + 1
            if place == len(arguments):
                self.error("--config needs a YAML file or the name of a shipped one")
            arguments[place] = str(find_config(arguments[place]))
        try:
            *parsed, in_file, in_command = self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except RecipeError:
            raise
        except (yaml.YAMLError, ValueError, TypeError, OSError, ImportError) as error:
            # Also what the settings of transformers and TRL refuse, each in its way.
            kind = "The configuration is not YAML: " if isinstance(error, yaml.YAMLError) else ""
            raise RecipeError(f"{kind}{one_line(error)}.") from error
        for unknown in (text for text in (*in_file, *in_command) if text.startswith("-")):
            name = unknown.lstrip("-").split("=")[0]
            close = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
            hint = f"the nearest is {close[0]}." if close else "--help lists those there are."
            raise RecipeError(f"There is no argument {name!r}; {hint}")
        if in_command:
            raise RecipeError(f"Nothing takes the value {in_command[0]!r}; write --FIELD VALUE.")
        data = next((settings for settings in parsed if isinstance(settings, DataArguments)), None)
        for settings in parsed:
            if isinstance(settings, StageArguments):
                check_evaluation(settings, data)
                _choose_warmup(settings, arguments)
                if settings.max_steps > 0:  # otherwise the trainer knows, by its data
                    check_warmup(settings, settings.max_steps)
        return tuple(parsed)


def _choose_warmup(settings: StageArguments, arguments: Sequence[str]) -> None:
    """Let the command line's `--warmup_steps` win over a file's `warmup_ratio`, and refuse both in one place."""
    names = ("--warmup_steps", "--warmup_ratio")
    by_steps, by_ratio = (any(text.split("=")[0] == name for text in arguments) for name in names)
    own = type(settings).warmup_steps  # the stage's default
    in_file = not (by_steps or by_ratio) and settings.warmup_ratio and settings.warmup_steps != own
    if in_file or (by_steps and by_ratio):
        raise RecipeError("Both warmup_steps and warmup_ratio are given; leave one of them out.")
    if by_steps:
        settings.warmup_ratio = 0.0


def _split_config(text: str) -> list[str]:
    return text.split("=", 1) if text.startswith("--config=") else [text]


def find_config(name: str) -> Path:
    """The YAML file at a path, or the shipped one of that name (`tiny_stage1`)."""
    shipped = shipped_configs()
    if Path(name).is_file():
        return Path(name)
    if name.removesuffix(".yaml") in shipped:
        return shipped[name.removesuffix(".yaml")]
    raise RecipeError(
        f"There is no configuration {name!r}: give the path of a YAML file or one of {', '.join(shipped)}."
    )
