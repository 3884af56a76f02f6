"""Going on from a checkpoint: which one is meant, and what each process remembers beside what transformers does.

That is its place in a stream, and its counts of samples and tokens.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_minigpt4.data.streaming import loader_state
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.checkpoints import FILES, STATE, newest_checkpoint, what_is_missing
from recipes_minigpt4.utils.errors import RecipeError


def find_checkpoint(args: StageArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means.

    A folder, or of the output folder the newest that is whole: `latest` has to find one, and `auto` starts from the
    beginning where there is none, so that a scheduler can run the same command again and again.

    Raises:
        RecipeError: if there is none, or the folder is no whole one.
    """
    wanted = str(args.resume_from_checkpoint or "").strip()
    if wanted.lower() in ("", "false", "none"):
        return None
    if wanted.lower() in ("true", "latest", "auto"):
        latest = newest_checkpoint(Path(args.output_dir))
        if latest is None and wanted.lower() != "auto":
            raise RecipeError(
                f"There is no checkpoint to resume from in {args.output_dir}; leave --resume_from_checkpoint out."
            )
        return None if latest is None else str(latest)
    folder = Path(wanted)
    if not (folder / STATE).is_file():
        raise RecipeError(f"There is no checkpoint to resume from at {wanted}; leave --resume_from_checkpoint out.")
    if (folder / FILES).is_file() and (reason := what_is_missing(folder)) is not None:
        raise RecipeError(f"{wanted} is not a whole checkpoint, for {reason}; name another, or `latest`.")
    return wanted


def check_same(checkpoint: str | None) -> None:
    """Refuse to resume where the processes see different checkpoints, as on machines without a shared disk."""
    found = dict.fromkeys(gather_object([checkpoint]))
    if len(found) > 1:
        seen = " and ".join(str(each or "none") for each in found)
        raise RecipeError(
            f"The processes of this run see different newest checkpoints, {seen}; let all machines share "
            "output_dir, or copy the newest to each."
        )


class StreamEpochCallback(TrainerCallback):
    """Tells how much of a run is done as its epoch, also after a stream went on in its middle."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        state.epoch = state.global_step / state.max_steps


class ProcessState:
    """
    The parts of a checkpoint that belong to one process each, the files `process_N.pt`.

    Args:
        trainer: the trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.loader: Any = None  # that of a stream
        self._checkpoint: str | None = None
        self._place: dict[str, Any] | None = None  # in the stream, until a loader is there
        self._start: dict[str, Any] | None = None  # place at which the loader was started
        self._wants_rng = False
        self._ignore_data_skip = trainer.args.ignore_data_skip  # the user's wish
        self._states: list[dict[str, Any]] = []  # of all processes, for the checkpoint that is being written

    def _shape(self) -> dict[str, int]:
        """What has to stay for a stream to be found again: it tells which process and worker reads what."""
        args = self.trainer.args
        return {
            "processes": args.world_size,
            "workers": args.dataloader_num_workers,
            "batch size": args.per_device_train_batch_size,
        }

    def _check_order(self, checkpoint: str, state: dict[str, Any]) -> None:
        """Refuse to go on in an epoch or a stream in another order, for samples would come twice."""
        before = state.get("train_sampling_strategy", "random")
        if before != self.trainer.args.train_sampling_strategy and not self.trainer.args.ignore_data_skip:
            raise RecipeError(
                f"{checkpoint} was saved with --train_sampling_strategy {before}, and cannot go on with "
                f"{self.trainer.args.train_sampling_strategy}; resume as it was started, or begin the data again with "
                "--ignore_data_skip true."
            )

    def begin(self) -> None:
        """Forget what an earlier run of the trainer has set."""
        self.trainer.args.ignore_data_skip = self._ignore_data_skip
        self._checkpoint = self._place = self._start = None
        self._wants_rng = False

    def gather(self) -> None:
        """Bring the states of all processes together, which all have to call, before one writes them."""
        trainer = self.trainer
        state = {
            "samples": trainer.samples.state(),
            "skipped_steps": trainer.finite_steps.skipped,
            "tokens": trainer.tokens_of_run,
            "stream": None if self.loader is None else loader_state(self.loader, self._start),
            "train_sampling_strategy": str(trainer.args.train_sampling_strategy),
            **self._shape(),
        }
        self._states = gather_object([state])

    def write(self, checkpoint: str) -> None:
        """Write the files of all processes, which need not share a disk."""
        if self.trainer.args.should_save:
            for index, state in enumerate(self._states):
                torch.save(state, Path(checkpoint) / f"process_{index}.pt")

    def load(self, checkpoint: str) -> None:
        """
        Take up what this process knew at a checkpoint.

        Raises:
            RecipeError: if the stream cannot be found again with as many processes and workers as there are now.
        """
        trainer = self.trainer
        own, first = (Path(checkpoint) / f"process_{index}.pt" for index in (trainer.args.process_index, 0))
        if not first.is_file():
            return  # saved by another trainer
        state = torch.load(own if own.is_file() else first, weights_only=True)
        self._check_order(checkpoint, state)
        if own.is_file():  # otherwise there were fewer processes, of which the first stands for all
            trainer.samples.take_up(state["samples"])
        trainer.finite_steps.skipped = state["skipped_steps"]
        trainer.tokens_of_run = state["tokens"]
        if state["stream"] is None or trainer.args.ignore_data_skip:
            return
        for name, now in self._shape().items():
            if state[name] != now:
                raise RecipeError(
                    f"{checkpoint} was saved with {name} {state[name]} and cannot go on in its stream with {now}; "
                    "resume as it was started, or begin the stream again with --ignore_data_skip true."
                )
        self._checkpoint, self._place = checkpoint, state["stream"]

    def find_place(self, loader: Any) -> None:
        """Set the data loader of a stream to where the checkpoint was, which spares reading all that came before."""
        self.loader, self._start = loader, self._place
        if self._place is not None:
            loader.load_state_dict(self._place)
            self.trainer.args.ignore_data_skip = True  # nothing is left to skip
            self._place, self._wants_rng = None, True

    def restore_rng(self) -> None:
        """Set random numbers to those of the checkpoint after the first batch, as starting a loader draws some."""
        if self._wants_rng:
            self.trainer._load_rng_state(self._checkpoint)
            self._wants_rng = False
