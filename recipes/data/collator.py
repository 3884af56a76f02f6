"""Batches of the two stages: what TRL's collator makes, and where in it pictures and answers are.

The collator runs in the workers of the data loader, on the CPU. What it finds out there – places of image tokens,
places of answers, numbers of samples and tokens – the training step would otherwise have to ask the GPU for, and wait.
"""

import copy
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from processing_minigpt4.conversations_minigpt4 import SEGMENT_MARK
from recipes_minigpt4.data.grouping import EXPECTED


COUNTS = "sample_counts"


class BytePictures:
    """
    Stands where a processor has its image processor, and leaves pictures as the bytes they are resized to.

    Batches are a quarter of the size then, on their way from the workers and to the GPU, where `to_pixels` turns them
    into the same floats. What is no picture of bytes, such as an array of floats, comes as floats.

    Args:
        image_processor: the processor's own.
    """

    def __init__(self, image_processor: Any) -> None:
        self.image_processor = image_processor

    def fetch_images(self, images: Any) -> Any:
        return self.image_processor.fetch_images(images)

    def __call__(self, images: Sequence[Any], **options: Any) -> Any:
        as_it_is = {"do_rescale": False, "do_normalize": False, "data_format": "channels_last"}
        plain = self.image_processor(images, **{**options, **as_it_is, "return_tensors": None})["pixel_values"]
        if any(pixels.dtype != np.uint8 for pixels in plain):
            return self.image_processor(images, **options)
        # Seen with channels first, as ever; moving them is left to the device.
        return {"pixel_values": torch.from_numpy(np.stack(plain)).permute(0, 3, 1, 2)}


def to_pixels(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """
    What the image processor would have made of pictures.

    Args:
        values: shape (pictures, 3, height, width), uint8.
        table: `image_processor.pixel_table()`, of shape (3, 256).
    """
    table = table.to(values.device)
    return torch.stack([table[channel][values[:, channel].int()] for channel in range(3)], dim=1)


class StageCollator(DataCollatorForVisionLanguageModeling):
    """
    TRL's collator, which leaves out rows that are `skipped` (`formatting.py`).

    A batch is TRL's, with

    - `image_positions` of shape (image tokens,), places of image tokens in the flattened `input_ids`;
    - `label_positions` of shape (answer tokens,), places of what carries loss in the flattened `labels`, unless a row
      ends in a picture;
    - `sample_counts`: samples `drawn` for the batch, records of those that are `skipped`, real `tokens`, `places` with
      those of pads, and answer tokens that are `expected` of so many rows, or None if rows are not grouped by length.

    A batch of which every row is skipped keeps one blank row without loss, so that all processes go on in step.
    """

    @classmethod
    def like(cls, collator: DataCollatorForVisionLanguageModeling) -> "StageCollator":
        """One with the settings of a collator of TRL's, whose pictures are bytes if they can be turned back."""
        settings = {field.name: getattr(collator, field.name) for field in fields(collator) if field.init}
        settings["processor"] = processor = copy.copy(collator.processor)
        if hasattr(processor.image_processor, "pixel_table"):
            processor.image_processor = BytePictures(processor.image_processor)
        return cls(**settings)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        skipped = [example["skipped"] for example in examples if example.get("skipped")]
        good = [example for example in examples if not example.get("skipped")]
        used = good or examples[:1]
        collate = self._collate_chats if any(example.get("learned") for example in used) else super().torch_call
        batch = dict(collate(used))
        is_image = batch["input_ids"] == self.processor.image_token_id
        labels = batch["labels"].masked_fill(is_image, -100)
        if not good:
            labels.fill_(-100)
        learned = labels != -100
        learned[:, 0] = False  # nothing comes before it
        counts = {
            "drawn": len(examples),
            "skipped": skipped,
            "tokens": int(batch["attention_mask"].sum()),
            "places": batch["input_ids"].numel(),
            "expected": sum(example[EXPECTED] for example in good) if all(EXPECTED in row for row in used) else None,
        }
        places = {"image_positions": is_image}
        if not is_image[:, -1].any():  # otherwise the last column cannot be left out, and TRL takes the step
            places["label_positions"] = learned
        places = {name: mask.flatten().nonzero().squeeze(-1) for name, mask in places.items()}
        return {**batch, "labels": labels, **places, COUNTS: counts}

    def _collate_chats(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch in which the stretches of a row are learned that its `learned` tells, or all of its completion."""
        batch = self.processor(
            images=[example["images"] for example in examples],
            text=[example["prompt"] + SEGMENT_MARK + example["completion"] for example in examples],
            padding=True,
            padding_side="right",
            truncation=self.max_length is not None,
            max_length=self.max_length,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_tensors=self.return_tensors,
        )
        starts = batch.pop("offset_mapping")[..., 0]  # of tokens, of shape (rows, longest row)
        is_learned = torch.zeros_like(starts, dtype=torch.bool)
        for row, example in enumerate(examples):
            offset = len(example["prompt"]) + len(SEGMENT_MARK)
            for begin, end in example.get("learned") or [(0, len(example["completion"]))]:
                is_learned[row] |= (starts[row] >= offset + begin) & (starts[row] < offset + end)
        batch["labels"] = batch["input_ids"].masked_fill(~is_learned | (batch["attention_mask"] == 0), -100)
        return dict(batch)
