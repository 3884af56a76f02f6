"""Checkpoints of a trainer: whole or not there, on all processes, and resumed exactly."""

import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import IterableDataset
from torch import nn
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from modeling_minigpt4.peft_minigpt4 import plain_names
from recipes_minigpt4.training import distributed
from recipes_minigpt4.training.checkpoints import (
    STATE,
    UNFINISHED,
    newest_checkpoint,
    rotate,
    together,
    write_whole,
    written_beside,
)
from recipes_minigpt4.utils.errors import RecipeError


class CheckpointingMixin:
    """
    Checkpoints of a Trainer, which are written beside their place and put there when they are whole.

    A resumed run gives the weights of one that never stopped. The place in a stream is found without reading what came
    before; random numbers, counts of samples and of tokens go on.
    """

    # What the Trainer brings.
    args: Any
    state: Any
    model: Any
    accelerator: Any
    train_dataset: Any
    finite_steps: Any
    process_state: Any
    is_fsdp_enabled: bool
    is_deepspeed_enabled: bool
    _total_train_tokens: int
    _write_card: Callable[..., None]
    find_best: Callable[[], None]
    push_to_hub: Callable[..., Any]

    _final_folder: Path | None = None  # of the checkpoint that is being written

    # ---- resuming -----------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        Train; see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest whole one of the output folder.

        Raises:
            RecipeError: if there is no such checkpoint, it does not fit this run, or a loss was not finite.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(newest_checkpoint(Path(self.args.output_dir)) or "") or True
        self.process_state.begin()
        if isinstance(resume_from_checkpoint, str):
            distributed.check_checkpoint(self, resume_from_checkpoint)
            self.process_state.load(resume_from_checkpoint)
            if (end := self._find_end(resume_from_checkpoint)) is not None:
                return end
        self._images, self._clock = 0, time.perf_counter()
        with distributed.trained_only(self):
            output = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        self.finite_steps.check(self)
        self.finite_steps.check_weights(self)
        return output

    def _find_end(self, checkpoint: str) -> TrainOutput | None:
        """Take up a checkpoint of the last step, behind which transformers would take one more."""
        if not Path(checkpoint, STATE).is_file():
            return None  # of which transformers says what is wrong
        state = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
        same_length = state.num_train_epochs == self.args.num_train_epochs
        last = self.args.max_steps if self.args.max_steps > 0 else state.max_steps if same_length else None
        if last is None or state.global_step < last:
            return None
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise RecipeError(
                f"The run is done: {checkpoint} is its end and holds the adapter; use that, or raise --max_steps."
            )
        self._load_from_checkpoint(checkpoint)
        self.state = state
        self.find_best()
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        return TrainOutput(state.global_step, losses[-1] if losses else float("nan"), {})

    def get_train_dataloader(self) -> Any:
        is_stream = isinstance(self.train_dataset, IterableDataset)
        self.accelerator.dataloader_config.use_stateful_dataloader = is_stream
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*set_vital", category=UserWarning)  # torchdata 0.11's own
            loader = super().get_train_dataloader()  # type: ignore[misc]
        if is_stream:
            self.process_state.find_place(loader)
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self.process_state.restore_rng()
        return batches

    @property
    def tokens_of_run(self) -> int:
        """Tokens of all processes so far, as of the last log."""
        return self._total_train_tokens

    @tokens_of_run.setter
    def tokens_of_run(self, count: int) -> None:
        self._total_train_tokens = count

    # An adapter of PEFT lies in a file of its own, of which transformers knows for models that PEFT has wrapped only.

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            distributed.load(self.model, resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.model.has_adapter:
            self.model.reload_adapter(resume_from_checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        plain, left_out = plain_names(self.model, load_result.missing_keys), self.model._keys_to_ignore_on_save
        missing = [name for name in load_result.missing_keys if plain[name] is not None]
        # A checkpoint may hold frozen tensors too, those that are no longer their backbones'.
        load_result.missing_keys[:] = left_out if set(missing) <= set(left_out) else missing
        super()._issue_warnings_after_load(load_result)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            distributed.load(self.model, self.state.best_model_checkpoint)
            return
        super()._load_best_model()  # type: ignore[misc]
        if self.model.has_adapter:
            self.model.reload_adapter(self.state.best_model_checkpoint)

    # ---- saving -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.finite_steps.check(self)
        self.finite_steps.check_weights(self)
        self.process_state.gather()
        run_dir = self._get_output_dir(trial=trial)
        final = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")

        def write() -> None:
            super(CheckpointingMixin, self)._save_checkpoint(model, trial)  # type: ignore[misc]
            # What is told of the best checkpoint is where it will be; 4.57 tells nothing if only the best is saved.
            if self.state.global_step and self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(final)
                if self.args.should_save:
                    self.state.save_to_json(str(final.parent / UNFINISHED / final.name / STATE))

        self._final_folder = final
        try:
            write_whole(self, final, write)
        finally:
            self._final_folder = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(self, run_dir)

    def _get_output_dir(self, trial: Any) -> str:
        if self._final_folder is not None:
            return str(self._final_folder.parent / UNFINISHED)
        return str(super()._get_output_dir(trial))  # type: ignore[misc]

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._final_folder is None:  # otherwise it is not whole yet
            super()._push_from_checkpoint(checkpoint_folder)  # type: ignore[misc]

    # transformers lets processes wait for each other between these three, so none may leave on its own.

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter; all processes have to call it, and one writes."""
        with together(self, self._final_folder):
            if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                super().save_model(output_dir, _internal_call)  # type: ignore[misc]
                return
            tensors = distributed.gather(self)
            if self.args.should_save:
                self._save(output_dir, state_dict=tensors)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with together(self, self._final_folder):
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                distributed.save_optimizer(self, output_dir)
            else:
                super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.process_state.write(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder, save = output_dir or self.args.output_dir, super()._save  # type: ignore[misc]
        if not self.args.should_save:
            save(folder, state_dict=state_dict)
        elif self._final_folder is not None:  # the whole checkpoint is put in its place later
            save(folder, state_dict=state_dict)
            self._write_card(folder)
        else:
            with written_beside(Path(folder)) as scratch:
                save(str(scratch), state_dict=state_dict)
                self._write_card(str(scratch))
