"""The sides of the training benchmark: BLIP-2 in transformers' Trainer, and our model in the recipes' trainer."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Blip2ForConditionalGeneration, Trainer, TrainingArguments, set_seed

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.benchmark.models import (
    Size,
    build_config,
    build_ours,
    build_pairs,
    build_peer,
    build_processor,
    peer_inputs,
    size_of,
)
from recipes_minigpt4.benchmark.options import ANSWER_TOKENS, BATCH_SIZE
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.last_layer import LastLayer
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


Batch = dict[str, Any]

STEPS_OF_SCHEDULE = 100_000  # of which the benchmark sees the beginning


@dataclass(frozen=True)
class Workload:
    """
    What is trained.

    Args:
        size_name: key of `SIZES`.
        batch_size: rows per step.
        answer_tokens: tokens of every row that carry loss.
        seed: of weights and the order of rows.
        num_batches: different batches, used in turn.
    """

    size_name: str
    batch_size: int = BATCH_SIZE
    answer_tokens: int = ANSWER_TOKENS
    seed: int = 0
    num_batches: int = 2

    @property
    def size(self) -> Size:
        return size_of(self.size_name)


@dataclass
class Data:
    """
    What is there before a model is built.

    Args:
        processor: our processor.
        rows: rows of stage 1.
        peer_batches: the batches that our collator makes of them, as BLIP-2 takes them.
    """

    processor: MiniGPT4Processor
    rows: Dataset
    peer_batches: list[Batch] = field(default_factory=list)


# ---- sides ----------------------------------------------------------------------------------------------------------


class TrainingSide:
    """
    Takes steps as the Trainer's own loop does, with batches that are prepared.

    Args:
        trainer: holds the model.
        batches: what its collator made, on the device.
    """

    def __init__(self, trainer: Trainer, batches: Sequence[Batch]) -> None:
        self.trainer, self.batches, self.steps = trainer, batches, 0
        trainer.create_optimizer_and_scheduler(num_training_steps=STEPS_OF_SCHEDULE)
        trainer.current_gradient_accumulation_steps = 1  # the loop tells it to every step
        # As in the `train` of the recipes' trainer.
        ours = isinstance(trainer, MiniGPT4Trainer)
        self.while_training: Any = LastLayer(trainer.model.language_model) if ours else nullcontext()
        if trainer.accelerator.native_amp and "_original_forward" not in vars(trainer.model):
            trainer.accelerator.prepare_model(trainer.model)  # which lets it compute in half precision

    def step(self) -> tuple[float, float]:
        """Take a step; returns loss and norm of the gradient before clipping."""
        loss, norm = self.advance()
        return float(loss), float(norm)

    def advance(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, backward, clipping, optimizer, schedule; the numbers of `step`, which stay on the device."""
        trainer, model = self.trainer, self.trainer.model
        batch = dict(self.batches[self.steps % len(self.batches)])  # trainers take things out of it
        self.steps += 1
        samples, items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        with self.while_training:
            loss = trainer.training_step(model, samples[0], items)
        norm = trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        model.zero_grad()
        return loss, norm


def settings(workload: Workload, folder: Path) -> dict[str, Any]:
    """What the trainers of all sides are told; a recipe's defaults for the optimizer, and float32 on any device."""
    recipe = StageArguments(output_dir=str(folder), use_cpu=True)
    same = ("optim", "learning_rate", "weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")
    return {
        "output_dir": str(folder), "per_device_train_batch_size": workload.batch_size, "seed": workload.seed,
        "use_cpu": not torch.cuda.is_available(), "bf16": False, "fp16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False,
        **{name: getattr(recipe, name) for name in same},
    }  # fmt: skip


def on_one_device(args: TrainingArguments) -> TrainingArguments:
    """The same settings for the first device alone; of several, a Trainer would give each so many rows."""
    args._n_gpu = min(args.n_gpu, 1)
    return args


def build_data(workload: Workload) -> Data:
    """Rows of stage 1 for all batches, and their processor."""
    processor = build_processor(build_config(workload.size))
    pairs = build_pairs(workload.batch_size * workload.num_batches)
    rows = stage1_rows(pairs, processor, DataArguments(max_txt_len=workload.answer_tokens))
    return Data(processor, rows)


def build_our_side(
    workload: Workload,
    folder: Path,
    data: Data,
    model: MiniGPT4ForConditionalGeneration | None = None,
    **options: Any,
) -> TrainingSide:
    """
    Our model, a new one unless it is given, in the trainer of the recipes; options are fields of `StageArguments`.

    Raises:
        RecipeError: if captions have fewer tokens than the workload asks for.
    """
    args = StageArguments(**{**settings(workload, folder), "gradient_checkpointing": False, **options})
    trainer = MiniGPT4Trainer(
        model=build_ours(workload.size, workload.seed) if model is None else model,
        args=on_one_device(args),
        train_dataset=data.rows,
        processing_class=data.processor,
    )
    set_seed(workload.seed)  # the order of rows is drawn from it
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    shortest = min(int((batch["labels"] != -100).sum(-1).min()) for batch in batches)
    if shortest < workload.answer_tokens:
        raise RecipeError(
            f"--answer_tokens is {workload.answer_tokens}, but there are captions of {shortest} tokens; ask for no "
            "more than these."
        )
    return TrainingSide(trainer, batches)


def build_cached_side(workload: Workload, folder: Path, data: Data) -> TrainingSide:
    """The same, from features of the frozen vision side, which are computed now."""
    return build_our_side(workload, folder, data, cache_features=str(folder / "features"))


def build_peer_side(
    workload: Workload,
    folder: Path,
    data: Data,
    weights_of: MiniGPT4ForConditionalGeneration | None = None,
    model: Blip2ForConditionalGeneration | None = None,
    **options: Any,
) -> TrainingSide:
    """
    BLIP-2, a new one unless it is given, in transformers' Trainer; options are fields of `TrainingArguments`.

    Args:
        workload: what to train.
        folder: for what a Trainer writes.
        data: holds the peer's batches.
        weights_of: our model, to have the same weights; None draws others, where only the shape matters.
        model: what is trained.
    """
    model = build_peer(workload.size, workload.seed, ours=weights_of) if model is None else model
    args = TrainingArguments(**{**settings(workload, folder), **options})
    return TrainingSide(Trainer(model=model, args=on_one_device(args)), data.peer_batches)


# Each side can be built without the others, if the peer's batches are there.
BUILDERS: dict[str, Callable[[Workload, Path, Data], TrainingSide]] = {
    "peer": build_peer_side,
    "ours": build_our_side,
    "cached": build_cached_side,
}


def build_sides(workload: Workload, folder: Path) -> dict[str, TrainingSide]:
    """
    All sides, with the same weights and rows.

    Raises:
        RecipeError: if the rows are not the same.
    """
    data = build_data(workload)
    ours, cached = build_our_side(workload, folder, data), build_cached_side(workload, folder, data)
    for batch, other in zip(ours.batches, cached.batches, strict=True):
        if not torch.equal(batch["input_ids"], other["input_ids"]):
            raise RecipeError("With cached features the rows come in another order, so nothing can be compared.")
    # Our trainer makes floats of pictures in the step; the peer gets these floats.
    prepared = [ours.trainer._prepare_inputs(dict(batch)) for batch in ours.batches]
    data.peer_batches = [peer_inputs(batch, ours.trainer.model.config) for batch in prepared]
    return {"peer": build_peer_side(workload, folder, data, ours.trainer.model), "ours": ours, "cached": cached}
