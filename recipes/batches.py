"""Batches of the two stages: what TRL's collator makes, and where in it pictures and answers are.

The collator runs in the workers of the data loader, on the CPU. What it finds out there – places of image tokens,
places of answers, numbers of samples and tokens – the training step would otherwise have to ask the GPU for, and wait.
"""

from dataclasses import fields
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling


COUNTS = "sample_counts"


class StageCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator, which leaves out rows that are `skipped` (`rows.py`).

    A batch is TRL's, with

    - `image_positions` of shape (image tokens,), places of image tokens in the flattened `input_ids`;
    - `label_positions` of shape (answer tokens,), places of what carries loss in the flattened `labels`;
    - `sample_counts`: samples `drawn` for the batch, records of those that are `skipped`, and real `tokens`.

    A batch of which every row is skipped keeps one blank row without loss, so that all processes go on in step.
    """

    @classmethod
    def like(cls, collator: DataCollatorForVisionLanguageModeling) -> "StageCollator":
        """One with the settings of a collator of TRL's."""
        return cls(**{field.name: getattr(collator, field.name) for field in fields(collator) if field.init})

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        skipped = [example["skipped"] for example in examples if example.get("skipped")]
        good = [example for example in examples if not example.get("skipped")]
        batch = dict(super().torch_call(good or examples[:1]))
        is_image = batch["input_ids"] == self.processor.image_token_id
        labels = batch["labels"].masked_fill(is_image, -100)
        if not good:
            labels.fill_(-100)
        learned = labels != -100
        learned[:, 0] = False  # nothing comes before it
        counts = {"drawn": len(examples), "skipped": skipped, "tokens": int(batch["attention_mask"].sum())}
        places = {"image_positions": is_image, "label_positions": learned}
        places = {name: mask.flatten().nonzero().squeeze(-1) for name, mask in places.items()}
        return {**batch, "labels": labels, **places, COUNTS: counts}
