"""The trainer of both stages: TRL's, with the original's optimizer and schedule, and steps that score answers only."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, ProgressCallback
from transformers.utils import logging
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipes_minigpt4.data.bad_samples import ENOUGH, SampleCounts
from recipes_minigpt4.data.collator import COUNTS, StageCollator, to_pixels
from recipes_minigpt4.hub.card import render_card
from recipes_minigpt4.training import distributed
from recipes_minigpt4.training.argument_checks import NO_END, long_warmup, steps_of_run
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.cached_features import train_from_features
from recipes_minigpt4.training.callbacks import ImagesProgressCallback, LinesCallback, PanelCallback, undisturbed
from recipes_minigpt4.training.checkpointing import CheckpointingMixin
from recipes_minigpt4.training.evaluating import EvaluationCallback, EvaluationMixin
from recipes_minigpt4.training.last_layer import LastLayer
from recipes_minigpt4.training.loss import is_causal_decoder, score_batch
from recipes_minigpt4.training.non_finite import STOP, FiniteSteps, FiniteStepsCallback
from recipes_minigpt4.training.push_to_hub import PublishingMixin
from recipes_minigpt4.training.resume import ProcessState, StreamEpochCallback
from recipes_minigpt4.training.sampling import SamplingMixin
from recipes_minigpt4.utils.errors import RecipeError, one_line


logger = logging.get_logger(__name__)


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


class MiniGPT4Trainer(CheckpointingMixin, EvaluationMixin, PublishingMixin, SamplingMixin, SFTTrainer):
    """
    TRL's trainer with the original's optimizer: decay on matrices only, and its schedule.

    A step scores answers only, in evaluation too (`EvaluationMixin`). It waits for the device once, where transformers
    looks for packed rows, and once more with `non_finite="skip"`. Samples that cannot be used are skipped, counted and
    reported at the end. Checkpoints are adapter-only, because `model.save_pretrained` is, with the processor beside
    it; they are whole or not there. A resumed run, also one on a stream, gives the weights of one that never stopped.
    Logs tell images per second, and the model card is this project's.

    Args:
        dataset_name: names of the training data, for the model card.
        stage: number of the stage, for the model card.
        max_bad_share: share of samples, 0 to 1, that may be skipped before the run stops.
        non_finite: `"stop"` the run at a loss that is not finite, or `"skip"` the step (`FiniteSteps`).
        Everything else as for `SFTTrainer`, with `StageArguments` as `args`.

    Raises:
        RecipeError: for other settings, or a stream without `max_steps`; while training, if more is skipped than
            `max_bad_share`, a loss is not finite, or a checkpoint cannot be written.
    """

    def __init__(
        self,
        *args: Any,
        dataset_name: str | Sequence[str] | None = None,
        stage: int | None = None,
        max_bad_share: float = 0.1,
        non_finite: str = STOP,
        **kwargs: Any,
    ) -> None:
        rows, settings = kwargs.get("train_dataset"), kwargs.get("args")
        if not isinstance(settings, StageArguments):
            raise RecipeError(
                "MiniGPT4Trainer takes `args=StageArguments(...)`, TRL's settings with those of the recipes; got "
                f"{type(settings).__name__}."
            )
        if isinstance(rows, IterableDataset) and settings is not None and settings.max_steps <= 0:
            raise RecipeError(NO_END)
        try:
            super().__init__(*args, **kwargs)
        except (ValueError, ImportError, NotImplementedError, OSError) as error:  # settings that do not go together
            raise RecipeError(f"{one_line(error)}.") from error
        self.dataset_name, self.stage = dataset_name, stage
        self._images, self._clock = 0, time.perf_counter()
        enough = ENOUGH if isinstance(self.train_dataset, IterableDataset) else min(ENOUGH, len(self.train_dataset))
        self.samples = SampleCounts(max_bad_share, enough)
        self.finite_steps = FiniteSteps(non_finite)
        distributed.check_strategy(self)
        self.check_sampling()
        self.evaluation_left_out = []
        self.add_callback(FiniteStepsCallback(self))
        self.add_callback(EvaluationCallback(self))
        self.process_state = ProcessState(self)
        self._tokens = 0  # since the last log, of this process
        self._answers: torch.Tensor | None = None  # correct ones, entropy, number and loss since the last log
        collator = self.data_collator  # type: ignore[has-type]
        if type(collator) is DataCollatorForVisionLanguageModeling:
            self.data_collator = StageCollator.like(collator)
        table = getattr(getattr(self.processing_class, "image_processor", None), "pixel_table", None)
        self._pixel_table = None if table is None else torch.from_numpy(table())
        with undisturbed(self.model):
            self._is_causal = is_causal_decoder(self.model.language_model)
        if isinstance(self.train_dataset, IterableDataset):
            self.add_callback(StreamEpochCallback)
        if self.pop_callback(ProgressCallback):
            self.add_callback(ImagesProgressCallback)
        if self.pop_callback(PrinterCallback):
            self.add_callback(LinesCallback)
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
                warmup = args.get_warmup_steps(num_training_steps)
                numbers = (args.min_learning_rate, args.warmup_start_learning_rate, warmup)
                return original_lr(step, num_training_steps, top, *numbers, args.steps_per_epoch) / top

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        counts = inputs.pop(COUNTS, None)
        if counts is not None and self.model.training:
            self.samples.add(counts["drawn"], counts["skipped"], counts["tokens"], counts["places"])
            self._tokens += counts["tokens"]
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        pixels = prepared.get("pixel_values")
        if pixels is not None and pixels.dtype == torch.uint8 and self._pixel_table is not None:
            self._pixel_table = self._pixel_table.to(pixels.device)
            prepared["pixel_values"] = to_pixels(pixels, self._pixel_table)
        return prepared

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss and metrics; a plain step scores answers only and keeps its metrics on the device until a log."""
        if return_outputs or not self._is_plain(inputs):
            inputs.pop("label_positions", None)
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        outputs = score_batch(model, inputs, self._is_causal)
        answers = outputs.log_probs
        count = torch.full((), len(answers), device=answers.device)
        loss = -answers.sum()
        metrics = torch.stack([outputs.is_top1.sum(), outputs.entropy.sum(), count, loss.detach().float()])
        self._answers = metrics if self._answers is None else self._answers + metrics
        if num_items_in_batch is None:
            return loss / max(len(answers), 1)
        # None at all if every sample of the batch was skipped. It counts the tokens of all processes, whose gradients
        # are averaged.
        loss = loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _is_plain(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a step is an ordinary one, for which TRL does nothing beside the loss of the answers."""
        other_loss = self.args.loss_type != "nll" or self.label_smoother or self.compute_loss_func
        return bool(
            self.model.training
            and {"label_positions", "attention_mask"} <= inputs.keys()
            and not (self.splits_sequences or other_loss or self.aux_loss_enabled)
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see [`CheckpointingMixin.train`]. What only training needs is on the model until it ends."""
        if problem := long_warmup(self.args, steps_of_run(self.args, self.train_dataset)):
            logger.warning(problem)  # the commands refuse it
        with LastLayer(self.model.language_model):
            return super().train(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        images = inputs.get("pixel_values", inputs.get("vision_features"))
        self._images += 0 if images is None else len(images)
        return self.finite_steps.watch(super().training_step(model, inputs, *args, **kwargs))

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was no training in images per second."""
        self._clock += seconds

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs["images_per_second"] = round(self._images * self.args.world_size / (now - self._clock), 2)
            self._images, self._clock = 0, now
            loss = self._log_answers()
            if self.args.grouping is not None and loss is not None:  # steps of short answers would pull it down
                logs["loss"] = loss
            self.samples.over_all_processes(self.accelerator).check()
        super().log(logs, start_time)
        if "loss" in logs:
            self.finite_steps.check(self)

    def _log_answers(self) -> float | None:
        """
        Hand over to TRL what it logs: entropy and accuracy of answers since the last log, and tokens of the run.

        Returns:
            The loss of a token since the last log, if it is known.
        """
        if self._answers is None:
            return None
        correct, entropy, count, loss = self.accelerator.reduce(self._answers).tolist()
        tokens = torch.tensor(self._tokens, device=self._answers.device)
        self._total_train_tokens += int(self.accelerator.reduce(tokens))
        self._answers, self._tokens = None, 0
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy / max(count, 1))
        metrics["mean_token_accuracy"].append(correct / max(count, 1))
        metrics["num_tokens"] = [self._total_train_tokens]
        return float(loss / max(count, 1))

    def create_model_card(self, *args: Any, results: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Write README.md into the output folder, from the template of cards; checkpoints have one as well."""
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
        """The last logged loss and token accuracy on the training data, and those of the evaluation."""
        last: dict[str, float] = next((entry for entry in reversed(self.state.log_history) if "loss" in entry), {})
        names = {
            "loss": "training loss",
            "mean_token_accuracy": "training token accuracy",
            "eval_loss": "evaluation loss",
            "eval_mean_token_accuracy": "evaluation token accuracy",
        }
        found = {**last, **self.evaluated()}
        return {text: found[name] for name, text in names.items() if name in found}
