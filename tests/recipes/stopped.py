"""Runs that end right after they have saved a checkpoint, to be resumed."""

import pytest

from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


def stop_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let every run stop with an error once the checkpoint of a step is written."""
    save = MiniGPT4Trainer._save_checkpoint

    def save_and_stop(trainer: MiniGPT4Trainer, *args: object) -> None:
        save(trainer, *args)
        if trainer.state.global_step == step:
            raise RecipeError("stopped")

    patch.setattr(MiniGPT4Trainer, "_save_checkpoint", save_and_stop)
