"""What both stages take: which model, and how it is trained; and the parser that reads YAML files and arguments."""

import difflib
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
from recipes_minigpt4.training.argument_checks import check_evaluation, check_settings, check_texts
from recipes_minigpt4.training.non_finite import SKIP, STOP
from recipes_minigpt4.utils.command_line import DefaultsHelpFormatter
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.ranges import check_ranges


@dataclass
class ModelArguments:
    """Which parts the model is made of, and which of them train."""

    # The parts
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to continue from, a folder or a repository: stage 2 starts from what stage 1 saved. With "
            "it, vision, qformer and language_model only say where backbones have moved to."
        },
    )
    vision: str | None = field(
        default=None, metadata={"help": "Vision encoder: repository, repository@revision, folder or `tiny`."}
    )
    qformer: str | None = field(
        default=None, metadata={"help": "BLIP-2 repository with a Q-Former, folder or `tiny`. Default: none."}
    )
    language_model: str | None = field(
        default=None, metadata={"help": "Language model: repository, repository@revision, folder or `tiny`."}
    )
    projector_num_layers: int | None = field(
        default=None,
        metadata={"help": "Linear layers of a new projection; the ablation of the paper has 3. Default: 1."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of the published processor: vicuna_v0, llama2, wrapped (the language model's own) "
            "or Jinja. Default: the language model's own if it has one, otherwise vicuna_v0."
        },
    )

    # What trains beside the projection
    train_parts: list[str] = field(
        default_factory=list,
        metadata={"help": "Parts that train beside the projection: vision, qformer, language_model. Default: none."},
    )
    peft_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Adapter of PEFT on the language model, trained beside the projection: the fields of its "
            'configuration, as in {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]}. JSON on the '
            "command line. Default: none."
        },
    )

    # How the frozen weights are kept and computed
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the frozen weights: float32, bfloat16 or float16. `auto` takes the type of mixed "
            "precision, or float32 without a GPU. The projection stays in float32."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the frozen language model, and nothing else, in fewer bits: bnb-int8, bnb-nf4 or "
            "torchao-int8. Checkpoints are the same with and without it. Default: none."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: eager, sdpa, flash_attention_2, …"}
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for name in ("model_name_or_path", "vision", "qformer", "language_model"):
            if not isinstance(getattr(self, name), (str, type(None))):
                raise RecipeError(f"--{name} is {getattr(self, name)!r}; it has to be a repository or a folder.")


@dataclass
class StageArguments(SFTConfig):
    """
    TRL's settings with the defaults of the original's stage 1, and the numbers of its learning-rate schedule.

    Mixed precision is bfloat16 on GPUs that know it, float16 (the original's) on others, and off without a GPU.
    """

    # Schedule (released code, `LinearWarmupCosineLRScheduler`)
    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate, reached after warm-up."})
    min_learning_rate: float = field(default=8e-5, metadata={"help": "Where the cosine ends."})
    warmup_start_learning_rate: float = field(default=1e-6, metadata={"help": "Where the warm-up starts."})
    warmup_steps: int = field(default=5000, metadata={"help": "Steps of linear warm-up."})
    steps_per_epoch: int | None = field(
        default=None,
        metadata={
            "help": "Steps of an epoch, after which a warm-up that is not over starts again, as in the original. "
            "Default: never."
        },
    )
    original_schedule: bool = field(
        default=True,
        metadata={"help": "Use the original's schedule; if false, lr_scheduler_type and its settings."},
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay, on matrices only."})
    seed: int = field(default=42, metadata={"help": "Seed of the projection, the order of samples and the prompts."})

    # Where results go
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Overwrite the result of an earlier run in output_dir."}
    )

    # Stored features of the vision side
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the features of the frozen vision side. They are computed once per picture, and "
            "training reads them from there. Runs may share it; all processes of a run have to. Default: none."
        },
    )
    cache_features_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the stored features: float32, bfloat16 or float16. Default: that of the frozen weights."
        },
    )

    # What a run shows
    report_to: str = field(default="none", metadata={"help": "Where to report: none, tensorboard, wandb, trackio, …"})
    panel_steps: int | None = field(
        default=None,
        metadata={
            "help": "Let the model describe a few fixed pictures every so many steps. Pictures and descriptions go to "
            "panel.html in the output folder, which is pushed with it, and to what report_to names. Default: never."
        },
    )
    panel_images: str | None = field(
        default=None, metadata={"help": "Folder of these pictures. Default: the first four of the training data."}
    )

    # Losses that are not finite
    non_finite: str = field(
        default=STOP,
        metadata={
            "help": "What to do about a loss that is not finite: stop ends the run when the loss is logged; skip "
            "leaves its step out, and waits for the GPU in every step to notice it."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite; to find them every step waits for the GPU."}
    )

    # Model card
    license: str = field(default="other", metadata={"help": "Licence of the trained weights, for the model card."})
    language: str = field(default="en", metadata={"help": "Language of the training text, for the model card."})

    # Settings of TRL that pictures need
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of the longest row. Default: any, as max_txt_len cuts answers."}
    )
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
        if self.panel_images and self.panel_steps is None:
            raise RecipeError("panel_images needs panel_steps, the steps between two looks at the pictures.")
        for end in ("", "_kwargs"):  # called activation_checkpointing since 5.24, and otherwise by TRL's defaults
            old, new = f"gradient_checkpointing{end}", f"activation_checkpointing{end}"
            if getattr(self, new, self) is None:
                setattr(self, new, getattr(self, old))
                setattr(self, old, None)
        super().__post_init__()
        check_settings(self)

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

    def error(self, message: str) -> Any:
        raise RecipeError(f"{message.rstrip('.')}.")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """
        Read the YAML file and the arguments, of which the latter win.

        Raises:
            RecipeError: for a file that is not there or no YAML, and for fields that do not exist.
        """
        arguments = [part for text in arguments for part in _split_config(text)]
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
        for settings in parsed:
            if isinstance(settings, StageArguments):
                check_evaluation(settings)
        return tuple(parsed)


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
