"""The options of a stage that a run usually sets, in groups, and the help that shows them without TRL.

One table for each option's text and default: the settings of a stage take theirs from here, and `--help-all`, which
shows all that TRL and transformers have beside them, shows the same texts. Importing this file is cheap.
"""

import argparse
import re
from collections.abc import Collection, Mapping
from dataclasses import MISSING, field, fields
from textwrap import shorten
from types import MappingProxyType
from typing import Any, NamedTuple

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.training.model_arguments import ModelArguments
from recipes_minigpt4.utils.command_line import WIDTH, CommandParser, OneLineHelpFormatter


class Option(NamedTuple):
    """
    Args:
        default: what holds if the option is left out.
        help: what it does. The help of a stage shows the first sentence, and what follows "Default:".
    """

    default: Any
    help: str


GROUPED = "group_by_length"  # of `train_sampling_strategy`, whose values are those of transformers 5

# Name → option; the learning rates are those of stage 1 (released code, `LinearWarmupCosineLRScheduler`).
SCHEDULE = {
    "max_steps": Option(-1, "Steps of the run; -1 for as many as num_train_epochs takes."),
    "num_train_epochs": Option(3.0, "Passes over the data."),
    "per_device_train_batch_size": Option(8, "Rows of a batch, on each GPU."),
    "gradient_accumulation_steps": Option(1, "Batches of a step."),
    "learning_rate": Option(1e-4, "Highest learning rate, reached after warm-up."),
    "min_learning_rate": Option(8e-5, "Where the cosine ends."),
    "warmup_start_learning_rate": Option(1e-6, "Where the warm-up starts."),
    "warmup_steps": Option(5000, "Steps of linear warm-up."),
    "warmup_ratio": Option(
        0.0, "Share of the run that is warm-up, 0 to 1, in the place of warmup_steps. Default: none."
    ),
    "steps_per_epoch": Option(
        None,
        "Steps of an epoch, after which a warm-up that is not over starts again. As in the original. Default: never.",
    ),
    "original_schedule": Option(True, "Use the original's schedule; if false, lr_scheduler_type and its settings."),
    "weight_decay": Option(0.05, "Weight decay, on matrices only."),
    "seed": Option(42, "Seed of the projection, the order of samples and the prompts."),
    "train_sampling_strategy": Option(
        "random",
        "Order of rows: random, sequential or group_by_length. The last makes batches of rows of like length, which "
        "have few pads and take less time; each token counts as much as in any other order.",
    ),
    "bf16": Option(
        None, "Compute in bfloat16. Default: on GPUs that know it; others compute in float16, and CPUs in float32."
    ),
    "gradient_checkpointing": Option(True, "Recompute activations in the backward pass, to save memory."),
    "use_cpu": Option(False, "Train on the CPU, whatever else there is."),
    "dataloader_num_workers": Option(0, "Processes that read data; 0 reads in the process that trains."),
    "cache_features": Option(
        None,
        "Folder for the features of the frozen vision side. They are computed once per picture, and training reads "
        "them from there. Runs may share it; all processes of a run have to. Default: none.",
    ),
    "cache_features_dtype": Option(
        None,
        "Type of the stored features: float32, bfloat16 or float16. Default: that of the frozen weights.",
    ),
    "non_finite": Option(
        "stop",
        "What a loss that is not finite does: stop or skip. `stop` ends the run when the loss is logged; `skip` "
        "leaves its step out, and waits for the GPU in every step to notice it.",
    ),
}
WATCHING = {
    "logging_steps": Option(10, "Steps between two lines of the log."),
    "report_to": Option("none", "Where to report: none, tensorboard, wandb, trackio or another."),
    "panel_steps": Option(
        None,
        "Steps after which the model describes a few fixed pictures. Pictures and descriptions go to panel.html in "
        "the output folder, which is pushed with it, and to what report_to names. Default: never.",
    ),
    "panel_images": Option(None, "Folder of these pictures. Default: the first four of the training data."),
    "logging_nan_inf_filter": Option(
        False, "Hide losses that are not finite. To find them every step waits for the GPU."
    ),
}
EVALUATION = {
    "eval_strategy": Option("no", "When to evaluate: no, steps (and at the end) or epoch."),
    "eval_steps": Option(None, "Steps between two evaluations. Default: save_steps."),
    "eval_suites": Option(
        None, "Suites of `minigpt4 evaluate` on a few rows at every evaluation: failures, captions. They take time."
    ),
    "eval_suite_rows": Option(16, "How many of the held-out rows the suites ask about."),
    "eval_on_start": Option(False, "Evaluate before the first step as well."),
    "per_device_eval_batch_size": Option(8, "Rows of a batch of evaluation, on each GPU."),
    "load_best_model_at_end": Option(False, "Save the best checkpoint in the end rather than the last."),
    "metric_for_best_model": Option(
        None,
        "What the best checkpoint is best in: loss, mean_token_accuracy, or one of a suite, such as "
        "failures_detailed. Default: loss.",
    ),
}
CHECKPOINTS = {
    "output_dir": Option(None, "Folder that the run writes into."),
    "overwrite_output_dir": Option(False, "Overwrite the result of an earlier run in that folder."),
    "save_steps": Option(500, "Steps between two checkpoints."),
    "save_total_limit": Option(None, "How many checkpoints are kept, the newest ones. Default: all."),
    "resume_from_checkpoint": Option(
        None,
        "Checkpoint to go on from: auto, latest or a folder. `auto` takes the newest whole one, or starts afresh "
        "where there is none; `latest` insists on one. Default: none.",
    ),
}
PUBLISHING = {
    "push_to_hub": Option(False, "Publish on the Hub whenever a checkpoint is saved."),
    "hub_model_id": Option(None, "Repository of the Hub, as in you/your-adapter."),
    "hub_private_repo": Option(None, "Make that repository private. Default: as your organization has it."),
    "license": Option("other", "Licence of the trained weights, for the model card."),
    "language": Option("en", "Language of the training text, for the model card."),
}
GROUPS = {
    "Schedule": SCHEDULE,
    "Watching": {**WATCHING, **EVALUATION},
    "Checkpoints": CHECKPOINTS,
    "Publishing": PUBLISHING,
}
TITLES = ("Model", "Data", *GROUPS)
STAGE_OPTIONS = {name: option for group in GROUPS.values() for name, option in group.items()}
STAGE_2 = {"learning_rate": 3e-5, "min_learning_rate": 1e-5, "warmup_steps": 200}  # other defaults of stage 2
# Options that few runs set; `--help-all` has them.
RARE = (
    "cache_features_dtype",
    "logging_nan_inf_filter",
    "chat_template",
    "attn_implementation",
    "dataset_config",
    "projector_norm",
    "projector_init",
    "patch_merge_layout",
    "vision_feature_select_strategy",
    "vision_feature_layer",
    "dataset_revision",
    "steps_per_epoch",
    "hub_private_repo",
    "language",
    "eval_num_samples",
    "eval_image_column",
    "eval_text_column",
    "eval_image_folder",
    "eval_on_start",
    "eval_suite_rows",
    "per_device_eval_batch_size",
    "metric_for_best_model",
)

NOTHING: Mapping[str, Mapping[str, "Option"]] = MappingProxyType({})
TEXTS = {
    "stage1": "Teach the projection what pictures hold, from many image–caption pairs.",
    "stage2": "Teach the model to answer well, from few curated descriptions.",
    "plan": "Print parameters, memory per GPU, steps and data of a run before it starts.",
    "inspect": "Show what becomes of data: rows, tokens, what carries loss, what is skipped.",
}
EXAMPLES = {
    "stage1": "minigpt4 stage1 --config tiny_stage1 --max_steps 20 --output_dir runs/first",
    "stage2": "minigpt4 stage2 --config tiny_stage2 --model_name_or_path runs/first --output_dir runs/second",
    "plan": "minigpt4 plan --config tiny_stage1",
    "inspect": "minigpt4 inspect tiny --stage 2 --output inspect.html",
}


def option(name: str, stage: int = 1) -> Any:
    """The field of a dataclass for an option of the table: its default and its text."""
    known = STAGE_OPTIONS[name]
    default = STAGE_2.get(name, known.default) if stage == 2 else known.default
    return field(default=default, metadata={"help": known.help})


def options_of(dataclass_type: Any) -> dict[str, Option]:
    """Name → option of settings whose fields tell their own help."""
    found = {}
    for one in fields(dataclass_type):
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        found[one.name] = Option(default, one.metadata["help"])
    return found


def stage_options(command: str) -> dict[str, dict[str, Option]]:
    """Group → name → option, as the help of a stage shows them."""
    groups = {"Model": options_of(ModelArguments), "Data": options_of(DataArguments), **GROUPS}
    changed = STAGE_2 if command == "stage2" else {}
    return {
        title: {
            name: known._replace(default=changed.get(name, known.default))
            for name, known in group.items()
            if name not in RARE
        }
        for title, group in groups.items()
    }


def build_parser(
    command: str, more: Mapping[str, Mapping[str, Option]] = NOTHING, titles: Collection[str] = TITLES
) -> argparse.ArgumentParser:
    """
    The parser of a stage as its help shows it, one line per option; a run is read by `StageParser`, which knows all.

    Args:
        command: stage1, stage2, plan or inspect.
        more: groups of options that only this command has.
        titles: of the groups of a stage that it has too.
    """
    parser = CommandParser(
        prog=f"minigpt4 {command}",
        usage=f"minigpt4 {command} [--config YAML] [--FIELD VALUE ...]",
        description=f"{TEXTS[command]}\n\n    {EXAMPLES[command]}",
        epilog="Every option is also a field of the YAML file, and the command line wins.",
        formatter_class=OneLineHelpFormatter,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this.")
    parser.add_argument("--help_all", action="store_true", help="Show every option, those of TRL included.")
    parser.add_argument("--config", help="YAML file with fields, or the name of a shipped one, such as tiny_stage1.")
    shared = {title: group for title, group in stage_options(command).items() if title in titles}
    for title, group in {**more, **shared}.items():
        shown = parser.add_argument_group(title)
        for name, known in group.items():
            shown.add_argument(f"--{name}", help=_line(known), default=argparse.SUPPRESS)
    return parser


def _line(known: Option) -> str:
    """The first sentence of a text, and the default."""
    text, _, default = known.help.partition(" Default: ")
    if not default and known.default is not None:
        default = str(known.default).lower() if isinstance(known.default, bool) else f"{known.default}"
    sentence = re.split(r"(?<=\.)\s", text, maxsplit=1)[0].rstrip(".")
    default = re.split(r";|\.(?!\d)", default, maxsplit=1)[0]
    told = f" ({default})" if default else ""
    return (shorten(sentence, WIDTH - len(told), placeholder=" …") + told).replace("%", "%%")
