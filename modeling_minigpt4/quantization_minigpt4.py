"""
Quantization of the frozen language model, and of nothing else.

transformers' quantizers (bitsandbytes, torchao, …) do the work, and by themselves would do it to every linear layer of
the model. This module tells them what to leave alone, checks that they did, and keeps quantization, which is a matter
of whoever loads a model, out of checkpoints that hold no language model.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import logging

from .compat_minigpt4 import IS_TRANSFORMERS_4


logger = logging.get_logger(__name__)

# Fields in which quantization configs name what stays as it is: bitsandbytes', torchao's and most others', HQQ's.
SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")

# All but the decoder, by the names in the model with a head and in the one without.
EXACT = (
    "lm_head",
    *(f"{prefix}{part}" for part in ("vision_model", "qformer", "language_projection") for prefix in ("model.", "")),
)

# What transformers writes on the model that it quantizes, for trainers and PEFT to read.
MARKS = ("is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")

# And what it leaves in the model and its configurations, the last of which in 4.57.
TRACES = ("hf_quantizer", "quantization_config", "_pre_quantization_dtype")

# On some processors, bitsandbytes packs 4-bit weights at the first forward pass without gradients, such as a reply in
# the middle of training, for a kernel without a backward pass. There is no way back without loss, so it is not done.
PACKING = "support_avx512bf16_for_cpu"


def stored_quantization(config: PretrainedConfig) -> str | None:
    """Name of the method that the weights of a repository are stored in, or None if they are ordinary ones."""
    for part in (config, config.get_text_config()):
        if stored := getattr(part, "quantization_config", None):
            fields: Mapping[str, Any] = stored if isinstance(stored, Mapping) else stored.to_dict()
            method = fields.get("quant_method") or "bitsandbytes"  # which left its name out at first
            return str(getattr(method, "value", method))
    return None


def keep_to_decoder(quantization_config: Any) -> Any:
    """
    A copy of a quantization config that leaves all but the decoder's linear layers alone, and what it did already.

    Args:
        quantization_config: any of transformers', or its fields.

    Raises:
        ValueError: if its method has no list of what to leave alone.
    """
    if isinstance(quantization_config, Mapping):
        quantization_config = AutoQuantizationConfig.from_dict(dict(quantization_config))
    config = copy.deepcopy(quantization_config)
    name = next((name for name in SKIP_LISTS if hasattr(config, name)), None)
    if name is None:
        raise ValueError(
            f"{type(config).__name__} cannot be kept to the language model, as it has no list of modules to leave "
            "alone; use BitsAndBytesConfig or TorchAoConfig."
        )
    setattr(config, name, [*EXACT, *(given for given in getattr(config, name) or () if given not in EXACT)])
    if getattr(config, "include_input_output_embeddings", False):
        logger.warning_once("Embeddings and head stay exact; `include_input_output_embeddings` is left out.")
        config.include_input_output_embeddings = config.untie_embedding_weights = False
    return config


def is_exact(tensor: torch.Tensor) -> bool:
    """Whether a parameter is an ordinary one, whole or sharded, rather than one of a quantizer's own kind."""
    return type(tensor).__name__ in ("Parameter", "DTensor") and tensor.is_floating_point() and tensor.itemsize > 1


def quantized_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers whose weights are quantized, by name."""
    for name, layer in module.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and hasattr(layer, "in_features") and not is_exact(weight):
            yield name, layer


def number_of_values(parameter: torch.Tensor) -> int:
    """Values that a parameter stands for; bitsandbytes packs two of 4 bits into one byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape
    return torch.Size(shape).numel()


class QuantizationMixin(PreTrainedModel):
    """Quantizes the language model alone while it is loaded, lets the rest train, and saves nothing of it."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """
        transformers' own, with `quantization_config` kept to the linear layers of the decoder.

        Raises:
            ValueError: for a config that cannot be kept to them, or that leaves none.
        """
        load = super().from_pretrained
        if kwargs.get("load_in_8bit") or kwargs.get("load_in_4bit"):
            raise ValueError(
                "`load_in_8bit` and `load_in_4bit` are fields of BitsAndBytesConfig, which is given as "
                "`quantization_config`."
            )
        if (quantization_config := kwargs.get("quantization_config")) is None:
            loaded = load(pretrained_model_name_or_path, *model_args, **kwargs)
        else:
            kwargs["quantization_config"] = keep_to_decoder(quantization_config)
            if IS_TRANSFORMERS_4 and kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
                kwargs["dtype"] = torch.get_default_dtype()  # bitsandbytes' is float16, for the vision side too
            with _without_files(pretrained_model_name_or_path):
                loaded = load(pretrained_model_name_or_path, *model_args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._after_quantization()
        return loaded

    def _after_quantization(self) -> None:
        """
        Check that only the decoder is quantized, and let the marks that tell of it be the decoder's.

        Trainers read them on the whole model: transformers' refuses to train one that is quantized, and TRL's casts
        all that trains in it to bfloat16, which is meant for adapters. Here the projection trains, in float32.

        Raises:
            ValueError: if anything else is quantized, or nothing at all.
        """
        if getattr(self, "hf_quantizer", None) is None:
            return
        decoder = self.get_decoder()
        allowed = {id(tensor) for tensor in decoder.parameters()}
        allowed -= {id(tensor) for tensor in self.get_input_embeddings().parameters()}
        found = [(name, tensor) for name, tensor in self.named_parameters() if not is_exact(tensor)]
        if wrong := [name for name, tensor in found if id(tensor) not in allowed]:
            raise ValueError(
                f"{wrong[0]} would be quantized, which is no layer of the language model's decoder; use a "
                "`quantization_config` that leaves it out."
            )
        if not found:
            raise ValueError(
                "No layer of the language model was quantized: it has none of the kind or the sizes that this "
                "`quantization_config` is for, or all are left out; use another one, or none."
            )
        for mark in MARKS:
            if self.__dict__.pop(mark, False):
                setattr(decoder, mark, True)
        for _, layer in quantized_layers(decoder):
            if hasattr(layer, PACKING):
                setattr(layer, PACKING, False)
        self._keep_from_ddp()

    @property
    def is_language_model_quantized(self) -> bool:
        """Whether layers of the language model are quantized, by `quantization_config` or in a full checkpoint."""
        return bool(getattr(self.get_decoder(), "is_quantized", False))

    @contextmanager
    def _marked(self) -> Iterator[None]:
        """Let the whole model have the decoder's marks, where PEFT looks for them."""
        marks = [mark for mark in MARKS if getattr(self.get_decoder(), mark, False)]
        self.__dict__.update(dict.fromkeys(marks, True))
        try:
            yield
        finally:
            for mark in marks:
                self.__dict__.pop(mark, None)

    def _keep_from_ddp(self) -> None:
        """Let DistributedDataParallel leave quantized weights alone: they are frozen, and torchao's cannot be sent."""
        self._ddp_params_and_buffers_to_ignore = [
            name for name, tensor in self.named_parameters() if not is_exact(tensor)
        ]

    def prepare_quantized_training(self) -> None:
        """
        Get ready to train through quantized layers, and refuse to where they let no gradient pass.

        Some kernels of torchao are for inference only. Gradients would go around their layers, on the residual path,
        and be wrong without a word.

        Raises:
            ValueError: naming the first such layer.
        """
        if not self.is_language_model_quantized:
            return
        self._keep_from_ddp()  # under the names of today: an adapter changes them
        if getattr(self, "_gradients_pass", False):
            return
        decoder = self.get_decoder()
        for name, layer in quantized_layers(decoder):
            if not _lets_gradients_pass(layer, decoder.dtype):
                raise ValueError(
                    f"Nothing trains through this quantization: {name} of the language model "
                    f"({type(layer._parameters['weight']).__name__}) lets no gradient pass to the projection; use "
                    "bitsandbytes, or torchao's Int8WeightOnlyConfig."
                )
        self._gradients_pass = True

    @contextmanager
    def _unquantized(self) -> Iterator[None]:
        """
        Take every word of quantization away while a checkpoint is saved: it is for whoever loads that to decide.

        Raises:
            ValueError: if the quantized language model would be part of the checkpoint.
        """
        self.check_language_model_is_elsewhere()
        with _without(TRACES, self, self.config, *map(self.config.__dict__.get, self.config.sub_configs)):
            yield

    def check_language_model_is_elsewhere(self) -> None:
        """
        Refuse a quantized language model that no backbone provides, or that was trained: it would have to be saved.

        Raises:
            ValueError: saying so.
        """
        own = any("language_model." in name for name in self._own_tensors)
        if self.is_language_model_quantized and (own or "language_model" not in self.config.backbones):
            raise ValueError(
                "A checkpoint cannot hold a quantized language model; load this one without quantization to save or "
                "train what has the language model in it, and quantize that when it is loaded."
            )


def _lets_gradients_pass(layer: nn.Module, dtype: torch.dtype) -> bool:
    weight: torch.Tensor = layer._parameters["weight"]  # type: ignore[assignment]
    with torch.enable_grad():
        inputs = torch.ones(1, layer.in_features, dtype=dtype, device=weight.device, requires_grad=True)  # type: ignore[call-overload]
        try:
            torch.autograd.grad(layer(inputs).sum(), inputs)
        except RuntimeError:  # the output has no graph, or the kernel no derivative
            return False
    return True


def _without_files(path: Any) -> AbstractContextManager[Any]:
    """4.57 lets torchao read metadata of files even where weights come as a state dict, and there are none."""
    if not IS_TRANSFORMERS_4 or path is not None:
        return nullcontext()
    from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

    return mock.patch.object(TorchAoHfQuantizer, "set_metadata", lambda quantizer, files: None)


@contextmanager
def _without(names: Sequence[str], *owners: Any) -> Iterator[None]:
    """Take attributes away for a while."""
    taken = [
        (owner.__dict__, name, owner.__dict__.pop(name))
        for owner in owners
        for name in names
        if owner is not None and name in owner.__dict__
    ]
    try:
        yield
    finally:
        for attributes, name, value in taken:
            attributes[name] = value
