"""Heads of language models: which are one matrix, how their logits are adjusted, and which are refused."""

import re

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


def adjust_logits(logits: torch.Tensor, text_config: PretrainedConfig) -> torch.Tensor:
    """Scale and cap logits as the language model's own head does (Cohere, Granite, Falcon-H1, Gemma-2, …)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(text_config, name, None)) is not None:
            logits = logits * scale
    if (divisor := getattr(text_config, "logits_scaling", None)) is not None:
        logits = logits * divisor if text_config.model_type == "hyperclovax" else logits / divisor
    if (cap := getattr(text_config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


_KNOWN_HEAD_OPTIONS = {
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "final_logit_softcapping",
}


def check_head(causal_lm: PreTrainedModel) -> None:
    """
    Refuse a language model whose head is more than a matrix and the adjustments of `adjust_logits`.

    Raises:
        ValueError: naming what the head has beside that. Its logits would be silently different here.
    """
    name, text_config = type(causal_lm).__name__, causal_lm.config
    head = causal_lm.get_output_embeddings()
    children = {child for child, module in causal_lm.named_children() if any(True for _ in module.parameters())}
    extra = children - {decoder_name(causal_lm), head_name(causal_lm)}
    suspicious = re.compile(r"(?=.*(logit|lm_head))(?=.*(scal|cap|mult|norm))(?!.*(attn|attention|router))")
    options = {
        key
        for key, value in text_config.to_dict().items()
        if suspicious.match(key) and key not in _KNOWN_HEAD_OPTIONS and value not in (None, False, 0, 1)
    }
    if not isinstance(head, nn.Linear) or extra or options:
        reason = f"has {', '.join(sorted(extra | options))} beside it" if extra or options else "is no linear layer"
        raise ValueError(
            f"{name} cannot be the language model: its head {reason}, which would give other logits here than on its "
            "own; choose a decoder whose LM head is one matrix (Llama, Qwen, Mistral, Gemma, GPT-2, …)."
        )


def head_name(causal_lm: PreTrainedModel) -> str:
    """Name of the LM head inside a causal language model, such as `lm_head` or `embed_out`."""
    head = causal_lm.get_output_embeddings()
    return next((name for name, module in causal_lm.named_modules() if module is head and head is not None), "")


def decoder_name(causal_lm: PreTrainedModel) -> str:
    """Name of the decoder inside a causal language model; in 4.57, Gemma-3's prefix is not its name."""
    prefix = causal_lm.base_model_prefix
    if hasattr(causal_lm, prefix):
        return prefix
    return next((name for name, child in causal_lm.named_children() if isinstance(child, PreTrainedModel)), prefix)


__all__ = ["adjust_logits", "check_head", "decoder_name", "head_name"]
