"""What the two stages share: arguments, the original's learning-rate schedule, and a thin trainer on TRL's."""

import difflib
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer, TrlParser

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from modeling_minigpt4.peft_minigpt4 import ADAPTER_FOLDER, plain_names
from recipes_minigpt4 import TINY, RecipeError, one_line
from recipes_minigpt4.card import render_card
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.features import train_from_features
from recipes_minigpt4.watch import ImagesProgressCallback, PanelCallback


# ---- arguments ------------------------------------------------------------------------------------------------------


@dataclass
class ModelArguments:
    """Which parts the model is made of, and which of them train."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to go on from, a folder or a repository: stage 2 starts from what stage 1 saved. The "
            "parts below then only say where backbones have moved to."
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
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the frozen weights: float32, bfloat16 or float16. `auto` is that of mixed precision, "
            "which without a GPU is float32. The projection stays in float32."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of transformers: eager, sdpa, flash_attention_2, …"}
    )


@dataclass
class StageArguments(SFTConfig):
    """
    TRL's settings with the defaults of the original's stage 1, and the numbers of its learning-rate schedule.

    Mixed precision is bfloat16 on GPUs that know it, float16 (the original's) on others, and off without a GPU.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Highest learning rate, reached after warm-up."})
    min_learning_rate: float = field(default=8e-5, metadata={"help": "Where the cosine ends."})
    warmup_start_learning_rate: float = field(default=1e-6, metadata={"help": "Where the warm-up starts."})
    warmup_steps: int = field(default=5000, metadata={"help": "Steps of linear warm-up."})
    steps_per_epoch: int | None = field(
        default=None,
        metadata={
            "help": "Steps after which a warm-up that is not over starts again, as it does with every epoch of the "
            "original. Default: never."
        },
    )
    original_schedule: bool = field(
        default=True,
        metadata={"help": "Use the original's schedule. Otherwise lr_scheduler_type and what belongs to it."},
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay, on matrices only."})
    seed: int = field(default=42, metadata={"help": "Seed of the projection, the order of samples and the prompts."})
    max_length: int | None = field(
        default=None, metadata={"help": "Never cut a row: max_txt_len cuts answers, and images stay whole."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Rows are made from all columns."})
    cache_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the features of the frozen vision side, computed once per picture, to train "
            "from. Runs may share it, and all processes of a run have to. Default: none."
        },
    )
    cache_features_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the kept features: float32, bfloat16 or float16. Default: that of the frozen weights."
        },
    )
    report_to: str = field(default="none", metadata={"help": "Where to report: none, tensorboard, wandb, trackio, …"})
    panel_steps: int | None = field(
        default=None,
        metadata={
            "help": "Let the model describe a few fixed pictures after every so many steps, for panel.html of the "
            "output folder (it shows the pictures, and is pushed with the folder) and what report_to names. "
            "Default: never."
        },
    )
    panel_images: str | None = field(
        default=None, metadata={"help": "Folder of these pictures. Default: the first four of the training data."}
    )
    license: str = field(default="other", metadata={"help": "Licence of the trained weights, for the model card."})
    language: str = field(default="en", metadata={"help": "Language of the training text, for the model card."})

    def __post_init__(self) -> None:
        if self.bf16 is None and not self.fp16:  # type: ignore[has-type]
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = gpu and torch.cuda.is_bf16_supported()
            self.fp16 = gpu and not self.bf16
        if self.panel_steps is not None and self.panel_steps < 1:
            raise RecipeError(f"panel_steps is a number of steps from 1 on, not {self.panel_steps}.")
        if self.panel_images and self.panel_steps is None:
            raise RecipeError("panel_images needs panel_steps, the steps between two looks at the pictures.")
        super().__post_init__()


class StageParser(TrlParser):
    """`TrlParser` that finds shipped YAML files by name and tells mistakes in one sentence."""

    def __init__(self, command: str, dataclass_types: Sequence[type]) -> None:
        usage = f"minigpt4 {command} [--config YAML] [--FIELD VALUE ...]"
        super().__init__(dataclass_types=dataclass_types, usage=usage, allow_abbrev=False)

    def error(self, message: str) -> Any:
        raise RecipeError(f"{message}.")

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
        except (yaml.YAMLError, ValueError) as error:  # also what the settings of transformers and TRL refuse
            kind = "The configuration is no YAML: " if isinstance(error, yaml.YAMLError) else ""
            raise RecipeError(f"{kind}{one_line(error)}.") from error
        for unknown in (text for text in (*in_file, *in_command) if text.startswith("-")):
            name = unknown.lstrip("-").split("=")[0]
            close = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
            hint = f"the nearest is {close[0]}." if close else "--help lists those there are."
            raise RecipeError(f"There is no argument {name!r}; {hint}")
        if in_command:
            raise RecipeError(f"Nothing takes the value {in_command[0]!r}; write --FIELD VALUE.")
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


# ---- model ----------------------------------------------------------------------------------------------------------


def load_model(args: ModelArguments, training: StageArguments) -> tuple[MiniGPT4ForConditionalGeneration, Any]:
    """
    Compose or load the model, freeze what does not train, and make its processor.

    Raises:
        RecipeError: if a part is not named, cannot be found or does not fit.
    """
    set_seed(training.seed)  # a new projection is drawn from it
    options: dict[str, Any] = {"dtype": _dtype(args, training)}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    parts = {"vision": args.vision, "qformer": args.qformer, "language_model": args.language_model}
    parts = {part: _resolve(part, source) for part, source in parts.items() if source}
    template = {} if args.chat_template is None else {"chat_template": args.chat_template}
    try:
        if args.model_name_or_path:
            model = MiniGPT4ForConditionalGeneration.from_pretrained(
                args.model_name_or_path, backbones=parts, **options
            )
            processor = MiniGPT4Processor.from_pretrained(args.model_name_or_path, **template)
            if args.projector_num_layers not in (None, model.config.projector_num_layers):
                raise RecipeError(
                    f"projector_num_layers is {args.projector_num_layers}, but the projection of "
                    f"{args.model_name_or_path} has {model.config.projector_num_layers}; leave it out."
                )
        elif {"vision", "language_model"} <= parts.keys():
            if args.projector_num_layers is not None:
                options["projector_num_layers"] = args.projector_num_layers
            if args.chat_template and "{" not in args.chat_template:  # not what the language model's own chats end in
                options["separator"] = "###" if args.chat_template.startswith("vicuna_v0") else None
            model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, **options)
            processor = MiniGPT4Processor.from_backbones(
                language_model=parts["language_model"], vision=parts["vision"], config=model.config, **template
            )
        else:
            raise RecipeError(
                "No model: name --vision, --language_model and perhaps --qformer, or an adapter with "
                "--model_name_or_path."
            )
        model.freeze_backbones(train=args.train_parts)
        if args.peft_config:
            add_adapter(model, args)
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{one_line(error)}.") from error
    return model, processor


def add_adapter(model: MiniGPT4ForConditionalGeneration, args: ModelArguments) -> None:
    """
    Put the adapter of `peft_config` on the language model.

    Raises:
        RecipeError: if there is one already, the language model trains itself, or PEFT knows no such configuration.
    """
    if model.has_adapter:
        raise RecipeError(f"{args.model_name_or_path} has an adapter, which goes on training; leave peft_config out.")
    if "language_model" in args.train_parts:
        raise RecipeError("An adapter needs a frozen language model; leave out peft_config or its train_parts.")
    try:
        model.add_adapter(read_peft_config(args.peft_config))
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"peft_config does not fit the language model: {one_line(error)}.") from error


def read_peft_config(value: Any) -> Any:
    """PEFT's own configuration from its fields, a mapping or JSON."""
    try:
        fields = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RecipeError(
            f'peft_config is no JSON ({one_line(error)}); write it as in {{"peft_type": "LORA", "r": 8}}.'
        ) from error
    kind = str(fields.get("peft_type")).upper() if isinstance(fields, Mapping) else None
    if kind not in PeftType.__members__:
        raise RecipeError(
            "peft_config is a mapping with a peft_type that PEFT knows, as in "
            f'{{"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}}; got {fields!r}.'
        )
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](**{**fields, "peft_type": kind})
    except TypeError as error:
        raise RecipeError(f"peft_config has a field that PEFT does not know: {one_line(error)}.") from error


def _dtype(args: ModelArguments, training: StageArguments) -> torch.dtype:
    if args.dtype == "auto":
        return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    dtype = getattr(torch, args.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise RecipeError(f"There is no dtype {args.dtype!r}; use float32, bfloat16, float16 or auto.")
    return dtype


def _resolve(part: str, source: str) -> str:
    """The folder of a shipped backbone for `tiny`; everything else as it is."""
    if source != TINY:
        return source
    from recipes_minigpt4 import tiny

    return str(tiny.LANGUAGE_BACKBONE if part == "language_model" else tiny.VISION_BACKBONE)


def describe_parameters(model: MiniGPT4ForConditionalGeneration) -> str:
    """What trains and what is frozen: a line per part with its number of parameters, and the names that train."""
    counts: dict[tuple[bool, str], int] = {}
    for name, parameter in model.named_parameters():
        part = name.removeprefix("model.").split(".")[0]
        key = (parameter.requires_grad, part)
        counts[key] = counts.get(key, 0) + parameter.numel()
    lines = [
        f"{'trains' if trains else 'frozen'}  {part:<20} {count:>14,} parameters"
        for (trains, part), count in sorted(counts.items(), reverse=True)
    ]
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return "\n".join([*lines, f"names that train: {shown}"])


# ---- schedule -------------------------------------------------------------------------------------------------------


def original_lr(
    step: int,
    total_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    warmup_start_learning_rate: float,
    warmup_steps: int,
    steps_per_epoch: int | None = None,
) -> float:
    """
    Learning rate of the original at a step (released code, `minigpt4/common/optims.py`).

    Linear warm-up, then a cosine that counts from the first step, not from the end of the warm-up: the rate drops a
    little where the two meet. The warm-up counts within an epoch and starts anew with each, if it is longer.

    Args:
        step: optimizer step, from 0.
        total_steps: all steps of the run.
        learning_rate: end of the warm-up and top of the cosine.
        min_learning_rate: end of the cosine.
        warmup_start_learning_rate: start of the warm-up.
        warmup_steps: length of the warm-up in steps.
        steps_per_epoch: length of an epoch in steps; None makes the run one epoch.
    """
    if step < warmup_steps:
        progress = step % (steps_per_epoch or total_steps) / max(warmup_steps, 1)
        rise = (learning_rate - warmup_start_learning_rate) * progress
        return min(learning_rate, warmup_start_learning_rate + rise)
    fall = 0.5 * (1 + math.cos(math.pi * step / total_steps))
    return min_learning_rate + (learning_rate - min_learning_rate) * fall


# ---- trainer --------------------------------------------------------------------------------------------------------


class MiniGPT4Trainer(SFTTrainer):
    """
    TRL's trainer with the original's optimizer: decay on matrices only, and its schedule.

    Checkpoints are adapter-only, because `model.save_pretrained` is; the processor lies beside them. Logs tell images
    per second, and the model card is this project's.

    Args:
        dataset_name: what the model card calls the training data.
        stage: number of the stage, for the model card.
        Everything else as for `SFTTrainer`.
    """

    def __init__(self, *args: Any, dataset_name: str | None = None, stage: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dataset_name, self.stage = dataset_name, stage
        self._images, self._clock = 0, time.perf_counter()
        if self.pop_callback(ProgressCallback):
            self.add_callback(ImagesProgressCallback)
        if self.args.panel_steps:  # before numbers of features take the place of pictures
            self.add_callback(PanelCallback(self, self.args.panel_steps, self.args.panel_images))
        if self.args.cache_features:
            train_from_features(self)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Under ZeRO-3 a parameter's own shape is empty and `ds_shape` tells the real one.
        shapes = {
            name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in model.named_parameters()
        }
        # IA3 stores its vectors, which start from one and not from nought, as matrices of one column.
        return [name for name, shape in shapes.items() if len(shape) >= 2 and ".ia3_l." not in name]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None and self.args.original_schedule:  # type: ignore[has-type]
            args, top = self.args, self.args.learning_rate

            def factor(step: int) -> float:
                numbers = (args.min_learning_rate, args.warmup_start_learning_rate, int(args.warmup_steps))
                return original_lr(step, num_training_steps, top, *numbers, args.steps_per_epoch) / top

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._images, self._clock = 0, time.perf_counter()
        return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        images = inputs.get("pixel_values", inputs.get("vision_features"))
        self._images += 0 if images is None else len(images)
        return super().training_step(model, inputs, *args, **kwargs)

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was no training in images per second."""
        self._clock += seconds

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["images_per_second"] = round(self._images * self.args.world_size / (now - self._clock), 2)
            self._images, self._clock = 0, now
        super().log(logs, start_time)

    # An adapter of PEFT lies in a file of its own, of which transformers knows for models that PEFT has wrapped only.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.model.has_adapter:
            self.model.reload_adapter(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        plain = plain_names(self.model, load_result.missing_keys)
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if plain[name] is not None]
        super()._issue_warnings_after_load(load_result)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.model.has_adapter:
            self.model.reload_adapter(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.model.has_adapter and self.is_world_process_zero():
            folder = os.path.join(checkpoint_folder, ADAPTER_FOLDER)
            shutil.copytree(folder, os.path.join(self.args.output_dir, ADAPTER_FOLDER), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=state_dict)
        self._write_card(output_dir or self.args.output_dir)

    def create_model_card(self, *args: Any, results: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write README.md into the output folder, from the template MODEL_CARD.md; checkpoints have one as well."""
        if self.is_world_process_zero():
            self._write_card(self.args.output_dir, results)

    def _write_card(self, folder: str, results: Mapping[str, Any] | None = None) -> None:
        card = render_card(
            self.model,
            self.args,
            steps=self.state.global_step,
            stage=self.stage,
            dataset_name=self.dataset_name,
            repo_id=getattr(self, "hub_model_id", None),  # set when the repository is made, at the first push
            results=results or self.results(),
        )
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    def results(self) -> dict[str, float]:
        """The last logged loss and token accuracy on the training data."""
        last: dict[str, float] = next((entry for entry in reversed(self.state.log_history) if "loss" in entry), {})
        names = {"loss": "training loss", "mean_token_accuracy": "training token accuracy"}
        return {text: last[name] for name, text in names.items() if name in last}


def train_and_save(trainer: MiniGPT4Trainer) -> None:
    """
    Train, or go on from a checkpoint, then save the adapter with its processor and card, and push them if asked to.

    Raises:
        RecipeError: if there is no checkpoint to resume from, or no room for the pictures.
    """
    args = trainer.args
    check_max_length(trainer)
    if trainer.is_world_process_zero():
        print(describe_parameters(trainer.model))
    trainer.train(resume_from_checkpoint=find_checkpoint(args))
    trainer.save_model()  # which pushes too, if asked to
    trainer.save_state()


def check_max_length(trainer: MiniGPT4Trainer) -> None:
    """Refuse a `max_length` that would cut pictures, before the first step rather than in it."""
    if (limit := trainer.args.max_length) is None:
        return
    row = next(iter(trainer.train_dataset))
    prompt = trainer.data_collator.processor(images=row["images"], text=row["prompt"], add_special_tokens=False)
    if (needed := len(prompt["input_ids"][0])) >= limit:
        raise RecipeError(
            f"max_length is {limit}, but picture and prompt alone take {needed} tokens; leave it out, for "
            "--max_txt_len cuts long answers and never a picture."
        )


def find_checkpoint(args: StageArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` means: a folder, or the latest of the output folder."""
    wanted = str(args.resume_from_checkpoint or "").strip()
    if wanted.lower() in ("", "false", "none"):
        return None
    latest = wanted.lower() in ("true", "latest")
    if latest:
        wanted = (os.path.isdir(args.output_dir) and get_last_checkpoint(args.output_dir)) or ""
    if not os.path.isfile(os.path.join(wanted, "trainer_state.json")):
        where = f"in {args.output_dir}" if latest else f"at {wanted}"
        raise RecipeError(f"There is no checkpoint to resume from {where}; leave --resume_from_checkpoint out.")
    return wanted
