"""What happens to long runs: a scheduler takes the machine away, a loss is not finite, another process is gone."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_minigpt4.checkpoints import how_to_go_on
from recipes_minigpt4.utils.errors import RecipeError, one_line


# ---- pre-emption ----------------------------------------------------------------------------------------------------


class PreemptionCallback(TrainerCallback):
    """
    Ends training after the step in which SIGTERM arrives at any process, with a checkpoint. Use it in a `with`.

    Processes hear the signal at different times, and have to save after the same step. So with every step they tell
    each other, without waiting for the answer before the step after; the GPU is not asked anything. Workers of data
    loaders, to which schedulers send the signal too, go on until their process ends them.

    Transformers has a callback of that purpose (`enable_jit_checkpoint`, 5.x), which lets every process decide alone.
    """

    in_use = False  # whether processes that are forked now are workers of such a run

    def __init__(self) -> None:
        self.asked = False  # whether this process has got the signal
        self.preempted = False  # whether training has ended because of it
        self._former: Any = None
        self._group: Any = None
        self._answer: tuple[Any, torch.Tensor] | None = None

    def __enter__(self) -> "PreemptionCallback":
        if threading.current_thread() is threading.main_thread():  # others may not
            self._former = signal.signal(signal.SIGTERM, self._hear)
            PreemptionCallback.in_use = True
        return self

    def __exit__(self, *_: object) -> None:
        PreemptionCallback.in_use = False
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
            self._former = None

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.world_size > 1 and distributed.is_initialized():
            try:
                self._group = distributed.new_group(backend="gloo")
            except RuntimeError as error:
                raise RecipeError(
                    f"The processes cannot tell each other of SIGTERM ({one_line(error)[:200]}); name the network "
                    "between the machines with the variable GLOO_SOCKET_IFNAME."
                ) from error

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._someone_was_asked() and state.global_step < state.max_steps:
            self.preempted = control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there is no time for it
            # At its end transformers deletes all but the best.
            args.save_total_limit, args.load_best_model_at_end = None, False

    def _someone_was_asked(self) -> bool:
        if self._group is None:
            return self.asked
        was_asked = self._former_answer()
        if not was_asked:
            flag = torch.tensor(int(self.asked))
            work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._answer = (work, flag)
        return was_asked

    def _former_answer(self) -> bool:
        if self._answer is None:
            return False
        (work, flag), self._answer = self._answer, None
        work.wait()
        return bool(flag)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._former_answer()


def _obey_parent_only() -> None:
    """In a forked process of a run: end at a SIGTERM of the process it belongs to, and at no other."""
    if PreemptionCallback.in_use and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in all threads that are started from here on
        threading.Thread(target=_wait_for_end, args=(os.getppid(),), daemon=True).start()


def _wait_for_end(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_obey_parent_only)


# ---- losses that are not finite -------------------------------------------------------------------------------------

STOP, SKIP = "stop", "skip"
MOST_IN_A_ROW = 20  # skipped steps after which there is nothing left to hope for
NAMED = 10  # steps that a report names


class FiniteSteps:
    """
    Watches losses, and gradients where steps are skipped, without asking the GPU in ordinary steps.

    Args:
        policy: `"stop"` looks at the losses when they are logged and before a checkpoint is written. `"skip"` looks
            before every update, which waits for the GPU, and leaves out those that are not finite on any process.
    """

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.skipped: list[int] = []
        self._bad: torch.Tensor | None = None  # number of bad losses since somebody looked

    def watch(self, loss: torch.Tensor) -> torch.Tensor:
        """Look at the loss of a batch; returns what the log may add up."""
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad.float() if self._bad is None else self._bad + bad
        return loss.masked_fill(bad, 0) if self.policy == SKIP else loss

    def check(self, trainer: Any) -> None:
        """
        Look at what came since the last look, on all processes at once.

        Raises:
            RecipeError: if a loss was not finite and steps are not skipped.
        """
        if self.policy == SKIP or self._bad is None:
            return
        count, self._bad = int(trainer.accelerator.reduce(self._bad)), None
        if count:
            raise RecipeError(self._reason(trainer, f"The loss was not finite in {count} batch(es)"))

    def check_weights(self, trainer: Any) -> None:
        """
        Keep weights that are not finite from being saved.

        Raises:
            RecipeError: on all processes, if there are any.
        """
        finite = [_is_finite(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad]
        bad = torch.stack(finite).logical_not().sum().float() if finite else torch.zeros(())
        if int(trainer.accelerator.reduce(bad.to(trainer.args.device))):
            raise RecipeError(self._reason(trainer, "Trained weights are not finite any more"))

    def _reason(self, trainer: Any, what: str) -> str:
        return (
            f"{what} at or before step {trainer.state.global_step}; lower --learning_rate or leave such steps out "
            f"with --non_finite skip, then {how_to_go_on(Path(trainer.args.output_dir))}."
        )

    def before_update(self, trainer: Any) -> None:
        """
        Leave the update out if a loss or a gradient is not finite on any process, where steps are skipped.

        Raises:
            RecipeError: if this happens too often in a row.
        """
        if self.policy != SKIP or self._bad is None:
            return
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        # Under float16 gradients overflow while the scaler looks for its scale, and it leaves these steps out itself.
        has_scaler = trainer.accelerator.scaler is not None
        bad, self._bad = self._bad, None
        if gradients and not has_scaler:
            bad = bad + torch.stack([_is_finite(gradient) for gradient in gradients]).logical_not().sum()
        if not int(trainer.accelerator.reduce(bad)):
            return
        if not has_scaler:
            trainer.model.zero_grad(set_to_none=True)  # optimizers pass over parameters without a gradient
        step = trainer.state.global_step + 1
        self.skipped.append(step)
        if self.skipped[-MOST_IN_A_ROW:] == list(range(step - MOST_IN_A_ROW + 1, step + 1)):
            raise RecipeError(self._reason(trainer, f"{MOST_IN_A_ROW} steps in a row were not finite"))

    def report(self, steps: int) -> str | None:
        """A line for the end of a run; None if nothing was skipped."""
        if not self.skipped:
            return None
        named = ", ".join(map(str, self.skipped[:NAMED])) + (", …" if len(self.skipped) > NAMED else "")
        return f"steps: {len(self.skipped):,} of {steps:,} skipped, as loss or gradient was not finite: {named}"


class FiniteStepsCallback(TrainerCallback):
    """Has `FiniteSteps` look before every update."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finite_steps.before_update(self.trainer)


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """Whether all numbers of a tensor, or of this process's share in it, are finite."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return torch.isfinite(local.detach()).all()


# ---- other processes ------------------------------------------------------------------------------------------------

# What gloo and NCCL say in the processes that are left.
LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out waiting",
    "socket timeout",
    "nccl communicator",
    "remote process exited",
    "collective operation timeout",
)


def is_lost_process(error: BaseException) -> bool:
    """Whether an error means that another process of the run is gone."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return world > 1 and isinstance(error, RuntimeError) and any(word in str(error).lower() for word in LOST)
