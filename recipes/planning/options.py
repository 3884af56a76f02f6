"""What only a plan takes, and its help. Importing this file is cheap."""

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


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of the plan as its help shows it."""
    return options.build_parser(command, {"Plan": options.options_of(PlanArguments)})
