"""What differs between releases of transformers; no other file of this folder asks for a version."""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations import peft as peft_integration
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils.deprecation import deprecate_kwarg


# It can go when 4.57 is no longer supported.
IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

# What `from_pretrained` takes if it is told no dtype.
DEFAULT_DTYPE = "float32" if IS_TRANSFORMERS_4 else "auto"

# What the cache of keys and values is called in outputs and in `generate`: `cache` since 5.24.
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")

# How the devices of tensor parallelism put their shares of the logits together.
GATHER_LOGITS = "colwise_rep" if IS_TRANSFORMERS_4 else "colwise_gather_output"


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """
    Let a forward that has an argument `cache` take it as `past_key_values` too, as it was called before 5.24.

    There, the old name is deprecated by transformers' own decorator. On older releases, whose `generate` looks for it
    in the signature, it is the one that is shown.
    """
    if CACHE == "cache":
        found: Callable[..., Any] = deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")(forward)
        return found

    @functools.wraps(forward)
    def named(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            if kwargs.get("cache") is not None:
                raise ValueError("Give the cache once: `cache` and `past_key_values` are two names of one argument.")
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(*args, **kwargs)

    signature = inspect.signature(forward)
    shown = [each.replace(name=CACHE) if name == "cache" else each for name, each in signature.parameters.items()]
    named.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return named


def argument_names(forward: Callable[..., Any]) -> tuple[frozenset[str], str]:
    """The arguments that a decoder's forward names, and what it calls the cache; code of others may be older."""
    names = frozenset(inspect.signature(forward).parameters)
    return names, next((name for name in (CACHE, *CACHE_NAMES) if name in names), CACHE)


def accepted(options: dict[str, Any], arguments: frozenset[str]) -> dict[str, Any]:
    """Those options that a forward takes, which names these arguments."""
    return options if "kwargs" in arguments else {name: options[name] for name in options if name in arguments}


def checkpoint_with_gradients_only(layer_class: type[GradientCheckpointingLayer]) -> None:
    """
    Let layers checkpoint where there are gradients only, as since 5.24.

    Before, they also leave the cache out where there is nothing to checkpoint, so that replies which another thread
    writes while a model trains would be about their last token alone.
    """
    name = "gradient_checkpointing"
    if CACHE == "cache" or isinstance(getattr(layer_class, name), property):
        return

    def checkpoints(layer: GradientCheckpointingLayer) -> bool:
        return torch.is_grad_enabled() and bool(layer.__dict__.get(name, False))

    def switch(layer: GradientCheckpointingLayer, value: bool) -> None:
        layer.__dict__[name] = value

    setattr(layer_class, name, property(checkpoints, switch))


_AUTOCAST_LOCK = threading.RLock()


@contextmanager
def autocast_on_meta() -> Iterator[None]:
    """
    Let encoders with rotary positions of 4.57 switch autocast off on the meta device, of which torch knows none.

    On every other device it is torch's own meanwhile, for other threads too.
    """
    if not IS_TRANSFORMERS_4:
        yield
        return
    with _AUTOCAST_LOCK:
        autocast: Any = torch.autocast

        def unless_meta(device_type: str, *args: Any, **kwargs: Any) -> Any:
            return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

        with mock.patch.object(torch, "autocast", unless_meta):
            yield


_PEFT_LOCK = threading.RLock()


@contextmanager
def installed_peft() -> Iterator[None]:
    """
    Let transformers put adapters into a model with the PEFT that is installed.

    5.24 asks for PEFT 0.22 there, which came later, for the sake of prompts that are learned as a cache.
    """
    with _PEFT_LOCK, mock.patch.object(peft_integration, "MIN_PEFT_VERSION", "0.21.0"):
        yield


def let_servers_find(model_type: str, class_name: str, model_class: Any = None) -> None:
    """
    Enter a model where `transformers serve` looks which class to load.

    The configuration does so before any code of the model has run. 4.57 takes the class from transformers itself;
    until there is one, it gets the Auto class, which loads it.

    Args:
        model_type: of the configuration.
        class_name: of the model.
        model_class: the model's class, once there is one.
    """
    if (names := getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)) is not None:
        names.setdefault(model_type, class_name)
        return
    # 4.57 makes a second module `transformers` when processors are imported; its server may have the first.
    server = sys.modules.get("transformers.commands.serving")
    for module in (transformers, getattr(server, "transformers", transformers)):
        if model_class is not None or not hasattr(module, class_name):
            setattr(module, class_name, model_class or transformers.AutoModelForImageTextToText)


def no_split_modules(model: PreTrainedModel) -> list[str]:
    """
    Classes of the layers that this very model is made of, which `device_map` and FSDP handle as one.

    4.57 leaves out those of the parts; 5.x also names layers that a part might have, over which FSDP stumbles.
    """
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return sorted(_outermost(model, {name for one in parts for name in one._no_split_modules or ()}))


def _outermost(module: nn.Module, names: set[str]) -> set[str]:
    """Those classes among `names` that modules below this one have, unless they are inside another of them only."""
    found: set[str] = set()
    for child in module.children():
        name = type(child).__name__
        found |= {name} if name in names else _outermost(child, names)
    return found


def attention_of_parts(config: PretrainedConfig, attn_implementation: "str | dict[str, str]") -> Any:
    """The argument of `set_attn_implementation`; the Q-Former of 4.57, which knows eager attention only, keeps it."""
    if not IS_TRANSFORMERS_4 or config.qformer_config is None:
        return attn_implementation
    if isinstance(attn_implementation, str):
        attn_implementation = dict.fromkeys(("", *config.sub_configs), attn_implementation)
    return {**attn_implementation, "qformer_config": "eager"}


def keep_qformer_eager(config: PretrainedConfig) -> None:
    """Give the Q-Former of 4.57 the one attention that it knows; that of 5.x goes through the interface."""
    if IS_TRANSFORMERS_4:
        config.qformer_config._attn_implementation = "eager"


def tied_weights_keys(source: str) -> Any:
    """`_tied_weights_keys` of a model whose LM head is `source`, if its configuration ties them."""
    return ["lm_head.weight"] if IS_TRANSFORMERS_4 else {"lm_head.weight": source}


__all__ = [
    "CACHE",
    "CACHE_NAMES",
    "DEFAULT_DTYPE",
    "GATHER_LOGITS",
    "IS_TRANSFORMERS_4",
    "accepted",
    "argument_names",
    "attention_of_parts",
    "autocast_on_meta",
    "checkpoint_with_gradients_only",
    "installed_peft",
    "keep_qformer_eager",
    "let_servers_find",
    "no_split_modules",
    "takes_cache",
    "tied_weights_keys",
]
