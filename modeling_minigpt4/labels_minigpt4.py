"""The image placeholder, which is no word of the language model, where labels and ids are looked up."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .compat_minigpt4 import let_servers_find
from .configuration_minigpt4 import MiniGPT4Config


def register_name(model_class: Any) -> None:
    """
    Enter a class in the tables of names by which transformers tells what a model does.

    Trainer shifts labels before it smooths them for classes in the first, and `transformers serve` tells by the others
    which class to load, and that it sees.
    """
    model_type, class_name = model_class.config_class.model_type, model_class.__name__
    for names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        names[model_type] = class_name
    let_servers_find(model_type, class_name, model_class)


def mask_image_labels(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """
    Set the labels of image placeholders to -100, before any forward, also one that a trainer has put in its place.

    TRL labels every token of `messages` data and indexes the vocabulary with the labels, where a placeholder has no
    row. A hook on the module runs whatever `forward` has become.
    """
    for key in ("labels", "shift_labels"):
        labels = kwargs.get(key)
        if labels is not None:
            kwargs = {**kwargs, key: labels.masked_fill(labels == module.config.image_token_id, -100)}
    return args, kwargs


def _without_placeholders(config: MiniGPT4Config, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].masked_fill(args[0] == config.image_token_id, 0), *args[1:]) if args else args


def mask_look_ups(embeddings: nn.Module, config: MiniGPT4Config) -> None:
    """
    Let whoever looks ids up in the embeddings find some word in the place of each placeholder, instead of crashing.

    It is a place holder: image tokens have to be put there, as the model's own forward does.
    """
    hooks = embeddings._forward_pre_hooks.values()
    if not any(isinstance(hook, partial) and hook.func is _without_placeholders for hook in hooks):
        embeddings.register_forward_pre_hook(partial(_without_placeholders, config))


class ScoredElsewhere(torch.Tensor):
    """
    Logits of a step whose loss somebody else computes (a trainer with label smoothing or a loss of its own).

    Where their labels still hold image placeholders, cross-entropy leaves these out, as it does -100; a plain look-up
    of scores cannot, and says what to do. Everything that is computed from them, but for other scores of the same
    vocabulary, is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            source = args[0] if args and isinstance(args[0], cls) else kwargs.get("input")
            known = source.__dict__ if isinstance(source, cls) else {}
            if known and func in _LOOK_UPS:
                args, kwargs = _LOOK_UPS[func](known["image_token_id"], list(args), kwargs)
        result = super().__torch_function__(func, types, args, kwargs)
        if not isinstance(result, cls):
            return result
        with torch._C.DisableTorchFunctionSubclass():
            if known.get("vocab_size") not in result.shape:
                return result.as_subclass(torch.Tensor)
            result.__dict__.update(known)
        return result


def _leave_out(image_token_id: int, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments of a cross-entropy whose targets ignore placeholders."""
    ignored = args[4] if len(args) > 4 else kwargs.get("ignore_index", -100)
    where: Any = args if len(args) > 1 else kwargs
    key: Any = 1 if len(args) > 1 else "target"
    if not where[key].is_floating_point():
        where[key] = where[key].masked_fill(where[key] == image_token_id, ignored)
    return args, kwargs


def _refuse(image_token_id: int, args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Raise a `ValueError` if scores of placeholders are looked up."""
    for index in (*args[1:], *kwargs.values()):
        if isinstance(index, torch.Tensor) and bool((index == image_token_id).any()):
            raise ValueError(
                f"The labels hold the image placeholder {image_token_id}, which is no word of the language model and "
                "has no score; set those labels to -100, as in `labels[labels == processor.image_token_id] = -100`, "
                "or let `MiniGPT4DataCollator(processor)` make the batches."
            )
    return args, kwargs


_LOOK_UPS: dict[Any, Any] = {
    F.cross_entropy: _leave_out,
    F.nll_loss: _leave_out,
    torch.gather: _refuse,
    torch.Tensor.gather: _refuse,
    torch.take_along_dim: _refuse,
    torch.Tensor.take_along_dim: _refuse,
}


def scored_elsewhere(logits: torch.Tensor, image_token_id: int) -> torch.Tensor:
    """Logits as [`ScoredElsewhere`], except for a compiler, which has no use for it."""
    if torch.compiler.is_compiling():
        return logits
    guarded = logits.as_subclass(ScoredElsewhere)
    guarded.__dict__.update(image_token_id=image_token_id, vocab_size=logits.shape[-1])
    return guarded


__all__ = ["mask_image_labels", "mask_look_ups", "register_name", "scored_elsewhere"]
