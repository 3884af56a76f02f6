"""Long runs on machines that go: a scheduler takes one away (SIGTERM), or another process of the run is gone."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_minigpt4.utils.errors import RecipeError, one_line


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
        self._settings: dict[str, Any] = {}  # of the trainer, which are changed while it ends
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
            self._settings = {name: getattr(args, name) for name in ("save_total_limit", "load_best_model_at_end")}
            args.load_best_model_at_end = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.preempted:  # older checkpoints are deleted by now; at its end transformers deletes all but the best
            args.save_total_limit = None

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
        for name, value in self._settings.items():
            setattr(args, name, value)
        self._settings = {}


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
