"""What only a plan and an inspection take, and their help. Importing this file is cheap."""

import argparse
from dataclasses import dataclass, field

from recipes_minigpt4.training import options
from recipes_minigpt4.utils.ranges import check_ranges


@dataclass
class PlanArguments:
    """What only a plan takes."""

    stage: int | None = field(
        default=None,
        metadata={
            "help": "1 or 2. Default: 2 if model_name_or_path or instruction_template is there, otherwise 1.",
        },
    )
    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Configuration of `accelerate launch` for the run: DDP, FSDP2 or DeepSpeed."},
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "GPUs of all machines. Default: those of accelerate_config, or 1."}
    )
    hours: float | None = field(default=None, metadata={"help": "Hours that the run may take."})

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass
class InspectArguments:
    """What only an inspection takes."""

    stage: int | None = field(
        default=None,
        metadata={"help": "1 or 2. Default: 2 if model_name_or_path or instruction_template is there, otherwise 1."},
    )
    rows: int = field(default=10, metadata={"help": "Rows of every dataset that are shown."})
    output: str | None = field(default=None, metadata={"help": "HTML page with thumbnails to write. Default: none."})

    def __post_init__(self) -> None:
        check_ranges(self)


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of `minigpt4 plan` or `minigpt4 inspect` as its help shows it."""
    if command == "plan":
        return options.build_parser(command, {"Plan": options.options_of(PlanArguments)})
    return options.build_parser(command, {"Inspection": options.options_of(InspectArguments)}, ("Model", "Data"))
