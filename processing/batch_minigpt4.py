"""What the processor returns: a batch whose labels never hold image placeholders."""

from typing import Any

import torch
from transformers.feature_extraction_utils import BatchFeature


class MiniGPT4Batch(BatchFeature):
    """
    Inputs of the model, to which a collator adds labels: `batch["labels"] = batch["input_ids"].clone()`.

    Image placeholders among them become -100, in place: they are no words of the language model, so that nothing can
    be learned about them, and a loss outside the model's `forward` would look them up in vain.

    Args:
        image_token_id: the placeholder.
        Everything else as for `BatchFeature`.
    """

    _image_token_id: int | None = None

    def __init__(self, *args: Any, image_token_id: int | None = None, **kwargs: Any) -> None:
        self._image_token_id = image_token_id
        super().__init__(*args, **kwargs)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in ("labels", "shift_labels") and isinstance(value, torch.Tensor) and self._image_token_id is not None:
            places = value == self._image_token_id
            ids = self.data.get("input_ids")
            if isinstance(ids, torch.Tensor) and ids.data_ptr() == value.data_ptr():
                value = value.masked_fill(places, -100)  # the ids themselves, or a view of them
            else:
                value[places] = -100
        super().__setitem__(key, value)


__all__ = ["MiniGPT4Batch"]
