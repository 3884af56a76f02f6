"""Evaluation while a run trains: loss and accuracy of all answer tokens of a split, by the same fast step.

minigpt4 stage1 --config tiny_stage1 --eval_dataset_name tiny --eval_strategy steps --eval_steps 50
"""

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import logging

from recipes_minigpt4.data.bad_samples import SampleCounts
from recipes_minigpt4.data.collator import COUNTS
from recipes_minigpt4.data.evaluation_split import FILLER, FilledUp
from recipes_minigpt4.training.callbacks import undisturbed
from recipes_minigpt4.training.loss import score_batch
from recipes_minigpt4.utils.errors import RecipeError


logger = logging.get_logger(__name__)
SUITES = "recipes_minigpt4.evaluation.while_training"  # by name: a room above this one, imported when it is asked for
SCORED = {"image_positions", "labels", "attention_mask"}  # what the fast step needs of a batch


class Scores:
    """Sums over the answers of a split, of this process."""

    def __init__(self) -> None:
        self.samples = SampleCounts(limit=1.0)
        self.sums: torch.Tensor | None = None  # correct answers, entropy, negative log-likelihood, number of answers

    def count(self, counts: Mapping[str, Any]) -> None:
        """Take the samples of a batch, without those that only fill it up."""
        skipped = [record for record in counts["skipped"] if record["cause"] != FILLER]
        self.samples.add(counts["drawn"] - len(counts["skipped"]) + len(skipped), skipped)

    def add(self, outputs: Any) -> None:
        """Take what `score_batch` gave for a batch; nothing is asked of the device."""
        answers = outputs.log_probs
        exact = torch.float32 if answers.device.type == "mps" else torch.float64
        count = torch.full((), len(answers), dtype=exact, device=answers.device)
        sums = [part.sum(dtype=exact) for part in (outputs.is_top1, outputs.entropy, -answers)]
        found = torch.stack([*sums, count])
        self.sums = found if self.sums is None else self.sums + found


def nothing_to_evaluate(samples: SampleCounts) -> str:
    """What to say of a split without an answer to score."""
    return (
        f"None of the {samples.drawn + samples.ahead:,} samples to evaluate on can be used: "
        f"{samples.by_cause() or 'their answers are cut off'}; fix them, or evaluate on others."
    )


class EvaluationMixin:
    """
    Evaluation of a Trainer, by the step that trains: only answers are scored, and their logits are not kept.

    Loss, accuracy and entropy are those of all answer tokens of the split together, on all processes. Samples that
    cannot be used are left out and told once. Training goes on as if nothing had been: random numbers are as before,
    and images per second do not count the time. With `compute_metrics`, for `predict`, and for rows of unknown length
    it is transformers' own evaluation, with the logits of all tokens where they are asked for.
    """

    # What the Trainer brings.
    args: Any
    state: Any
    control: Any
    model: Any
    accelerator: Any
    eval_dataset: Any
    _is_causal: bool
    leave_out: Callable[[float], None]
    is_world_process_zero: Callable[[], bool]

    suites: Any = None  # what asks the model at every evaluation
    evaluation_left_out: list[Mapping[str, str]]  # records of samples that are left out ahead
    _scores: Scores | None = None  # while it evaluates
    _told = False  # whether what is left out has been told

    # ---- the split ----------------------------------------------------------------------------------------------

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """See [`~transformers.Trainer.get_eval_dataloader`]; rows of known length are filled up to whole batches."""
        if isinstance(eval_dataset, str):
            self.eval_dataset = {**self.eval_dataset, eval_dataset: self._filled_up(self.eval_dataset[eval_dataset])}
        else:
            eval_dataset = self._filled_up(self.eval_dataset if eval_dataset is None else eval_dataset)
        self.accelerator.dataloader_config.use_stateful_dataloader = False  # which streams to train on ask for
        loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)  # type: ignore[misc]
        return loader

    def _filled_up(self, rows: Any) -> Any:
        if not isinstance(rows, Dataset) or self.compute_metrics is not None:  # type: ignore[attr-defined]
            return rows
        return FilledUp(rows, self.args.eval_batch_size * self.args.world_size)

    def _get_eval_sampler(self, eval_dataset: Any) -> SequentialSampler | None:
        """In their order, also where training has rows of like length together."""
        return SequentialSampler(eval_dataset) if hasattr(eval_dataset, "__len__") else None

    # ---- suites -------------------------------------------------------------------------------------------------

    def watch_suites(self, pairs: Dataset) -> None:
        """
        Let the suites that are named ask the model at every evaluation; see `evaluation/while_training.py`.

        Args:
            pairs: held-out pairs, as `load_evaluation_pairs` gives them.

        Raises:
            RecipeError: for suites and measures that there are not, and where no process holds the whole model.
        """
        if self.is_fsdp_enabled or is_deepspeed_zero3_enabled():  # type: ignore[attr-defined]
            raise RecipeError(
                "Suites need a whole model in one process; with FSDP or ZeRO-3, leave --eval_suites out."
            )
        self.suites = import_module(SUITES).SuitesOnRows(self.args.eval_suites, pairs, self.args.eval_suite_rows)
        if metric := self.args.metric_for_best_model:
            better = self.suites.is_better_higher(metric)
            self.args.greater_is_better = self.args.greater_is_better if better is None else better

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """See [`~transformers.Trainer.evaluate`]; with the measures of the suites that are watched."""
        metrics: dict[str, float] = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # type: ignore[misc]
        if self.suites is None or eval_dataset is not None:
            return metrics
        started, found = time.perf_counter(), [None]
        if self.is_world_process_zero():
            with undisturbed(self.model), torch.no_grad(), self.accelerator.autocast():
                found = [self.suites.measure(self.model, self.processing_class)]  # type: ignore[attr-defined]
        told: Any = broadcast_object_list(found)[0]
        measures = {f"{metric_key_prefix}_{name}": value for name, value in told.items()}
        self.log(measures)  # type: ignore[attr-defined]
        self.leave_out(time.perf_counter() - started)
        return {**metrics, **measures}

    # ---- the numbers --------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """
        Go through a split; see [`~transformers.Trainer.evaluation_loop`].

        Raises:
            RecipeError: if none of its samples can be used.
        """
        rows = getattr(dataloader, "dataset", None)
        started, devices = time.perf_counter(), [self.args.device] if self.args.device.type == "cuda" else []
        self._scores = scores = Scores() if isinstance(rows, FilledUp) else None
        try:
            with torch.random.fork_rng(devices=devices):
                output: EvalLoopOutput = super().evaluation_loop(  # type: ignore[misc]
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self._scores = None
        if scores is not None and isinstance(rows, FilledUp):
            output = output._replace(num_samples=len(rows.rows))
            if scores.sums is not None:
                output.metrics.update(self._measures(scores, metric_key_prefix))
        self.leave_out(time.perf_counter() - started)
        return output

    def _measures(self, scores: Scores, prefix: str) -> dict[str, float]:
        """Measures of a split, of all processes together; they have to ask at the same time."""
        samples = scores.samples.over_all_processes(self.accelerator)
        samples.leave_out(self.evaluation_left_out)
        correct, entropy, loss, count = self.accelerator.reduce(scores.sums).tolist()
        if not count:
            raise RecipeError(nothing_to_evaluate(samples))
        if samples.skipped and not self._told and self.is_world_process_zero():
            print(f"evaluation {samples.report()}")
        self._told = True
        measures = {"loss": loss, "mean_token_accuracy": correct, "entropy": entropy}
        return {f"{prefix}_{name}": value / count for name, value in measures.items()}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """See [`~transformers.Trainer.prediction_step`]; answers are added up instead, where nothing else is asked."""
        scores = self._scores
        if scores is not None and (counts := inputs.get(COUNTS)) is not None:
            scores.count(counts)
        if not inputs.keys() >= SCORED or self.splits_sequences:
            found: Any = super().prediction_step(  # type: ignore[misc]
                model, inputs, prediction_loss_only, ignore_keys
            )
            return found  # type: ignore[no-any-return]
        inputs = self._prepare_inputs(inputs)  # type: ignore[attr-defined]
        with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
            if scores is not None and prediction_loss_only:
                scores.add(self._score(model, inputs))
                return None, None, None
            loss: torch.Tensor = self.compute_loss(model, dict(inputs))  # type: ignore[attr-defined]
            if prediction_loss_only:
                return loss, None, None
            plain = {name: value for name, value in inputs.items() if name not in ("labels", "label_positions")}
            return loss, model(**plain, use_cache=False).logits, inputs["labels"]

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        if "label_positions" in inputs:
            return score_batch(model, inputs, self._is_causal)
        learned = inputs["labels"] != -100  # of a row that ends in a picture, so that the last column has to stay
        learned[:, 0] = False
        return score_batch(model, {**inputs, "label_positions": learned.flatten().nonzero().squeeze(-1)}, False)

    @property
    def splits_sequences(self) -> bool:
        """Whether several processes share the tokens of a row."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        return parallelism is not None and bool(parallelism.cp_enabled or parallelism.sp_enabled)

    # ---- the best checkpoint ------------------------------------------------------------------------------------

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether the step is the best so far; one that leaves no checkpoint is not compared."""
        best_only = getattr(self.args.save_strategy, "value", self.args.save_strategy) == "best"
        if not (best_only or self.control.should_save):
            return False
        is_best = bool(super()._determine_best_metric(metrics=metrics, trial=trial))  # type: ignore[misc]
        if is_best:
            self.state.best_global_step = self.state.global_step  # 4.57 leaves it out where only the best is saved
        return is_best

    def find_best(self) -> None:
        """Find the best checkpoint of a resumed run, which may have moved with the output folder."""
        step, told = self.state.best_global_step, self.state.best_model_checkpoint
        if not step or (told is not None and Path(told).is_dir()):
            return
        here = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        self.state.best_model_checkpoint = str(here) if here.is_dir() else None
        if self.state.best_model_checkpoint is None:
            self.state.best_metric = self.state.best_global_step = None
            if self.args.load_best_model_at_end:
                logger.warning(f"The best checkpoint, {here}, is gone; the best of those to come is saved.")

    def evaluated(self) -> dict[str, float]:
        """The last evaluation of the model as it is: of the best checkpoint, where that is loaded in the end."""
        entries = [entry for entry in self.state.log_history if "eval_loss" in entry]
        if self.args.load_best_model_at_end and self.state.best_global_step:
            entries = [entry for entry in entries if entry["step"] == self.state.best_global_step] or entries
        return entries[-1] if entries else {}


class EvaluationCallback(TrainerCallback):
    """
    Evaluates the last step of a run as well, whatever `eval_steps` are, for it is what is saved in the end.

    Args:
        trainer: the trainer, whose best checkpoint is looked for when a run goes on.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.find_best()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        strategy = getattr(args.eval_strategy, "value", args.eval_strategy)
        if strategy == "steps" and self.trainer.eval_dataset is not None and state.global_step >= state.max_steps:
            control.should_evaluate = True
