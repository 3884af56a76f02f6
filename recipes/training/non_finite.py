"""Losses, gradients and weights that are not finite: a run stops, or leaves such steps out."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_minigpt4.training.checkpoints import how_to_go_on
from recipes_minigpt4.utils.errors import RecipeError


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
