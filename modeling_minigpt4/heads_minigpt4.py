"""Heads of language models: which are one matrix, how their logits are adjusted, and how answers are scored."""

import re
from typing import Any

import torch
import torch.nn.functional as F
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


# Logits that are there at once, and those of them that are worked on at once, which stay in a processor's cache.
_AT_ONCE = 1 << 26
_IN_CACHE = 1 << 19


def score_answers(
    hidden_states: torch.Tensor, answers: torch.Tensor, head: nn.Module, text_config: PretrainedConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Score tokens, each by the hidden state before it.

    Args:
        hidden_states: shape (tokens, channels).
        answers: ids of the tokens, of shape (tokens,).
        head: the LM head.
        text_config: says how logits are adjusted.

    Returns:
        Log-probabilities of the tokens, and without gradient the entropy of what was predicted, both in nats, and
        whether a token is the most likely one; all of shape (tokens,), float32.
    """
    # A compiler fuses the lines below by itself, and cannot look into gradients that are computed inside.
    if not (torch.compiler.is_compiling() or any(parameter.requires_grad for parameter in head.parameters())):
        return FrozenHeadScores.apply(hidden_states, answers, head, text_config)
    log_probs = adjust_logits(head(hidden_states), text_config).float().log_softmax(-1)
    answers = answers.to(log_probs.device)
    chosen = -F.nll_loss(log_probs, answers, reduction="none")
    with torch.no_grad():
        return chosen, -(log_probs.exp() * log_probs).sum(-1), (log_probs.argmax(-1) == answers).float()


class FrozenHeadScores(torch.autograd.Function):
    """
    `score_answers` for a head that does not train: the gradient is computed together with the scores, in the place of
    the logits, so that these are there once, up to `_AT_ONCE` of them, and do not wait for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_states: torch.Tensor, answers: torch.Tensor, head: nn.Module, text_config: PretrainedConfig
    ) -> tuple[torch.Tensor, ...]:
        rows = max(1, _AT_ONCE // text_config.vocab_size)
        ctx.scale = 1.0
        scores, gradients = [], []
        for states, ids in zip(hidden_states.detach().split(rows), answers.split(rows), strict=True):
            with torch.enable_grad():
                states.requires_grad_()
                logits = head(states.view_as(states))  # what counts operations takes no leaf of an inner graph
            if logits.dtype == torch.float16:  # which would lose the gradients of tokens that are almost certain
                ctx.scale = 1024.0  # a power of two costs no digit
            gradient = logits.detach()  # shares its memory
            scores.append(score_in_place(gradient, ids.to(gradient.device), text_config, ctx.scale))
            if ctx.needs_input_grad[0]:
                gradients += torch.autograd.grad(logits, states, gradient)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        log_probs, entropy, is_top1 = (row.clone() for row in torch.cat(scores, dim=1))  # no views, for FSDP's hooks
        ctx.mark_non_differentiable(entropy, is_top1)
        return log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        upstream = upstream.to(gradient.device)[:, None] / ctx.scale
        return (upstream * gradient).to(gradient.dtype), None, None, None


def score_in_place(
    logits: torch.Tensor, answers: torch.Tensor, text_config: PretrainedConfig, scale: float
) -> torch.Tensor:
    """Scores of shape (3, tokens); `logits` become the gradient of the log-probabilities, times `scale`."""
    rows, scores = max(1, _IN_CACHE // logits.shape[-1]), []
    for part, ids in zip(logits.split(rows), answers.split(rows), strict=True):
        with torch.enable_grad():
            given = part.detach().requires_grad_()
            log_probs = adjust_logits(given, text_config).float().log_softmax(-1)
            chosen = -F.nll_loss(log_probs, ids, reduction="none")
            (gradient,) = torch.autograd.grad(chosen.sum() * scale, given)
        log_probs = log_probs.detach()
        entropy = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        scores.append(torch.stack([chosen.detach(), entropy, (log_probs.argmax(-1) == ids).float()]))
        part.copy_(gradient)
    return torch.cat(scores, dim=1)


__all__ = ["adjust_logits", "check_head", "decoder_name", "head_name", "score_answers"]
