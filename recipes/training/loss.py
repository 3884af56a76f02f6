"""The forward pass of a training step: answers are scored, and nothing else is computed that does not change them.

Pads behind an answer tell it nothing, nor does a row's last token, as long as the decoder's attention is causal.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def score_batch(model: nn.Module, batch: Mapping[str, Any], is_causal: bool) -> Any:
    """
    Score the answers of a batch.

    Args:
        model: a `MiniGPT4ForConditionalGeneration`, perhaps wrapped by a trainer.
        batch: what `StageCollator` makes; `label_positions` tells where answers are.
        is_causal: whether tokens see earlier ones only, see `is_causal_decoder`; otherwise pads and their mask stay.

    Returns:
        The model's output with `log_probs`, `entropy` and `is_top1`, each of shape (answer tokens,).
    """
    inputs = dict(batch)
    length, places = inputs["input_ids"].shape[1], inputs.pop("label_positions")
    answers, before = inputs.pop("labels").flatten().index_select(0, places), places - 1
    if is_causal:
        del inputs["attention_mask"]
        inputs["input_ids"] = inputs["input_ids"][:, :-1]
        before = without_last_column(before, length)
        inputs["image_positions"] = without_last_column(inputs["image_positions"], length)
    return model(**inputs, answers=answers, answer_positions=before, use_cache=False)


def without_last_column(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Places in flattened rows of `length` as places in the same rows without their last column."""
    return positions - positions // length


@torch.no_grad()
def is_causal_decoder(language_model: PreTrainedModel) -> bool:
    """
    Whether later tokens change nothing in what a decoder makes of earlier ones, so that pads behind an answer do not
    matter.

    It is tried out on four positions. Where that is not possible, as with weights that lie elsewhere, the answer is
    no.
    """
    embeddings = language_model.get_input_embeddings().weight
    try:
        generator = torch.Generator().manual_seed(0)
        one = torch.randn(1, 4, embeddings.shape[-1], generator=generator).to(embeddings.device, embeddings.dtype)
        other = torch.cat([one[:, :-1], -one[:, -1:]], dim=1)
        first, second = (
            language_model(inputs_embeds=rows, use_cache=False).last_hidden_state[:, :-1] for rows in (one, other)
        )
        return torch.allclose(first, second, rtol=1e-2, atol=1e-3)  # noqa: TID251 (wide enough for every dtype)
    except Exception:  # sharded, offloaded or on the meta device
        return False
