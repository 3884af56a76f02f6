"""The order in which a trainer draws rows, and what a step of rows of like length divides its loss by."""

import math
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes_minigpt4.data.collator import COUNTS
from recipes_minigpt4.data.grouping import EXPECTED, LENGTH, LikeLengthSampler
from recipes_minigpt4.utils.errors import RecipeError


NO_LENGTHS = (
    "--train_sampling_strategy is group_by_length, but the rows of this trainer tell no lengths; make them with "
    "stage1_rows or stage2_rows and `grouping=args.grouping`."
)


class SamplingMixin:
    """
    The orders of rows that `train_sampling_strategy` names, on all releases of transformers.

    Rows of like length are in batches whose answers are long or short together. Their losses are divided by the answer
    tokens that so many rows have on average (`grouping.py`), so that a token counts as much as in batches of any rows.
    """

    # What the Trainer brings.
    args: Any
    accelerator: Any
    train_dataset: Any

    def check_sampling(self) -> None:
        """Raise a `RecipeError` for rows that cannot be drawn in the order that is asked for."""
        strategy, rows = self.args.train_sampling_strategy, self.train_dataset
        if isinstance(rows, IterableDataset) and strategy == "sequential":
            raise RecipeError(
                "--train_sampling_strategy is 'sequential', but streams are shuffled in blocks; leave it out, and use "
                "--shuffle_buffer 0 to read them as they are."
            )
        if self.args.grouping is not None and isinstance(rows, Dataset) and LENGTH not in rows.column_names:
            raise RecipeError(NO_LENGTHS)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(rows, "__len__"):
            return None
        if self.args.grouping is not None:
            sampler = LikeLengthSampler(rows.with_format(None)[LENGTH][:], self.args.grouping)
            self._follow_epochs(sampler)
            return sampler
        return SequentialSampler(rows) if self.args.train_sampling_strategy == "sequential" else RandomSampler(rows)

    def _follow_epochs(self, sampler: LikeLengthSampler) -> None:
        self.pop_callback(SamplerEpochCallback)  # type: ignore[attr-defined]
        self.add_callback(SamplerEpochCallback(sampler))  # type: ignore[attr-defined]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """What the loss of a step, a sum over its answer tokens, is divided by."""
        items = super()._get_num_items_in_batch(batch_samples, device)  # type: ignore[misc]
        counts = [batch[COUNTS] for batch in batch_samples if COUNTS in batch]  # there are none in evaluation
        if self.args.grouping is None or items is None or not counts:
            return items
        expected = [one[EXPECTED] for one in counts]
        if None in expected:
            raise RecipeError(NO_LENGTHS)
        ours = torch.full((), sum(expected), dtype=torch.float32, device=device)
        if self.args.average_tokens_across_devices:
            ours = self.accelerator.reduce(ours) / self._copies()
        return ours

    def _copies(self) -> int:
        """How many processes have the same batch."""
        sizes = (getattr(self, f"get_{kind}_size", lambda: 1)() for kind in ("tp", "cp", "sp"))
        return math.prod(sizes)


class SamplerEpochCallback(TrainerCallback):
    """
    Tells a sampler which epoch begins, also when a run goes on in its middle.

    accelerate does so for its own samplers only, and from nought after some batches were skipped.
    """

    def __init__(self, sampler: LikeLengthSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.epoch = math.floor(round(state.epoch or 0, 6))
