"""The model of a plan: every parameter with its shape and dtype, and no data. Only configurations are read."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from modeling_minigpt4.backbones import part_of
from modeling_minigpt4.composition_minigpt4 import compose_config, find_parts
from modeling_minigpt4.peft_minigpt4 import ADAPTER_CONFIG, find_file, plain_names
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments
from recipes_minigpt4.training.model import NO_MODEL, add_adapter, backbone_sources, check_saved, weights_dtype
from recipes_minigpt4.training.quantization import quantization_config
from recipes_minigpt4.utils.errors import RecipeError, one_line


# ---- model ----------------------------------------------------------------------------------------------------------


def build_skeleton(args: ModelArguments, training: StageArguments) -> MiniGPT4ForConditionalGeneration:
    """
    What `load_model` loads, on the meta device: the same parameters, frozen or not, in the same dtypes.

    Raises:
        RecipeError: if a part is not named, cannot be found or does not fit.
    """
    parts = backbone_sources(args)
    adapter = None
    try:
        if args.model_name_or_path:
            config, adapter = _saved_config(args.model_name_or_path, parts, args.trust_remote_code)
            args.check_saved_fields(config)
        elif {"vision", "language_model"} <= parts.keys():
            trust = {"trust_remote_code": args.trust_remote_code}
            config = compose_config(
                parts["vision"], parts["language_model"], parts.get("qformer"), trust, **args.new_fields()
            )
        else:
            raise RecipeError(NO_MODEL)
        model = MiniGPT4ForConditionalGeneration._skeleton(config)
        if args.attn_implementation is not None:
            model.set_attn_implementation(_stand_in(args.attn_implementation))
        _cast(model, weights_dtype(args, training))
        model.freeze_backbones(train=args.train_parts)
        if adapter is not None:
            model.add_adapter(adapter)
        if args.peft_config:
            add_adapter(model, args)
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"{one_line(error)}.") from error
    return model


def _saved_config(path: str, moved: Mapping[str, str], trusted: bool) -> tuple[MiniGPT4Config, Any]:
    """Configuration of a checkpoint, and that of the adapter of PEFT it has, or None."""
    found, base = check_saved(path)
    config = MiniGPT4Config.from_pretrained(base)
    find_parts(config, {"name_or_path": base}, moved, trusted)
    subfolder = config.__dict__.pop("language_model_adapter", None)
    if found is None and subfolder is None:
        return config, None
    where, options = (base, {}) if found is None else found
    file = find_file(where, ADAPTER_CONFIG, options, subfolder if found is None else "")
    if file is None:
        raise RecipeError(f"{path} lacks the {ADAPTER_CONFIG} of its adapter; download or save the checkpoint again.")
    return config, PeftConfig.from_pretrained(os.path.dirname(file))


def _stand_in(attention: str) -> str:
    """An attention that keeps the same tensors and needs no package: flash attention has no other than torch's own."""
    return "sdpa" if attention.startswith(("flash_attention", "kernels-community/")) else attention


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """The dtype that `from_pretrained` gives to all but the projection."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and "language_projection." not in name:
            parameter.data = parameter.data.to(dtype)


# ---- parameters -----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """
    Parameters of one part in one state.

    Args:
        name: of the part.
        trains: whether they train.
        dtype: what they are stored in.
        count: how many they are.
        nbytes: what they take.
    """

    name: str
    trains: bool
    dtype: str
    count: int = 0
    nbytes: int = 0


def list_parts(model: MiniGPT4ForConditionalGeneration, quantization: str | None = None) -> list[Part]:
    """
    Parameters by part, in the order of the model; tied ones count once.

    Args:
        model: as `build_skeleton` makes it.
        quantization: what will be done to it.
    """
    parts: dict[tuple[str, bool, str], Part] = {}
    plain = plain_names(model, [name for name, _ in model.named_parameters()])
    quantized = {id(layer.weight): layer for layer in quantizable_layers(model, quantization)}
    for name, parameter in model.named_parameters():
        part = "adapter" if plain[name] is None else (part_of(name) or "projection")
        if name.startswith("lm_head."):
            part = "LM head"
        dtype, nbytes = str(parameter.dtype).removeprefix("torch."), parameter.nbytes
        if id(parameter) in quantized and quantization is not None:
            scheme = SCHEMES[quantization]
            dtype, nbytes = quantization, scheme.nbytes(parameter)
        key = (part.replace("_", " "), parameter.requires_grad, dtype)
        entry = parts.setdefault(key, Part(*key))
        entry.count += parameter.numel()
        entry.nbytes += nbytes
    return list(parts.values())


# ---- quantization ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """
    How a quantization stores the weights of a linear layer, and what a step through them needs.

    Args:
        bits: of a weight.
        group: weights that share a scale; None is a row of the matrix.
        scale: bytes of scale and zero point of a group.
        scale_group: groups whose scales share a scale of 4 bytes, if scales are quantized too.
        table: bytes of every layer beside.
        backward: `"input"` if the layer keeps its input, `"weight"` if it keeps its weights in 16 or 32 bits, or
            `"nothing"`. Weights come back from their codes in the backward pass otherwise.
        conv1d: whether the layers of GPT-2 are quantized as well.
    """

    bits: int
    group: int | None
    scale: int
    backward: str
    scale_group: int | None = None
    table: int = 0
    conv1d: bool = False

    def nbytes(self, weight: torch.Tensor) -> int:
        """
        Bytes of a matrix: `bits / 8` each, and `scale` for every `group` (rounded up).

        Per weight: bnb-int8 1 byte and 4 a row; bnb-nf4 1/2 + 1/64 + 4 / (64 · 256); torchao-int8 1 byte and 4 a row.
        """
        return sum(self.sizes(weight))

    def sizes(self, weight: torch.Tensor) -> tuple[int, int]:
        """Bytes of the codes, and of scales and tables."""
        count = weight.numel()
        codes = -(-count * self.bits // 8)
        groups = weight.shape[0] if self.group is None else -(-count // self.group)
        scales = groups * self.scale + self.table
        if self.scale_group is not None:
            scales += 4 * -(-groups // self.scale_group)
        return codes, scales


# Read in bitsandbytes 0.50.2 (`functional.py`, `autograd/_functions.py`) and torchao 0.18.0 (`quantize_/workflows`):
# nf4 in blocks of 64 with scales that are quantized again in blocks of 256, and torchao's defaults. bitsandbytes' int8
# keeps the input of every layer; autograd keeps what torchao's int8 has multiplied by.
SCHEMES = {
    "bnb-int8": Scheme(bits=8, group=None, scale=4, backward="input", conv1d=True),
    # Tables of float32: 16 values of a code, 256 of a quantized scale, and the mean of the scales.
    "bnb-nf4": Scheme(bits=4, group=64, scale=1, backward="nothing", scale_group=256, table=1092, conv1d=True),
    "torchao-int8": Scheme(bits=8, group=None, scale=4, backward="weight"),
}


def check_quantization(name: str | None, model: MiniGPT4ForConditionalGeneration) -> None:
    """Raise a `RecipeError` for a quantization that a run refuses, or one of a language model that trains itself."""
    if name is None:
        return
    if name not in SCHEMES:
        quantization_config(name, torch.float32)  # which says why
    if any(layer.weight.requires_grad for layer in quantizable_layers(model, name)):
        raise RecipeError("A quantized language model cannot train; leave out --quantization or its train_parts.")


def quantizable_layers(model: MiniGPT4ForConditionalGeneration, quantization: str | None) -> Iterator[Any]:
    """Linear layers of the decoder, without those of an adapter; head, embeddings and norms stay as they are."""
    scheme = SCHEMES.get(quantization or "")
    if scheme is None:
        return
    kinds = (nn.Linear, Conv1D) if scheme.conv1d else (nn.Linear,)
    decoder = model.get_decoder()
    layers = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, kinds)}
    plain = plain_names(decoder, layers)
    yield from (layer for name, layer in layers.items() if plain[name] is not None)


def quantize_skeleton(model: MiniGPT4ForConditionalGeneration, quantization: str | None) -> None:
    """Give the decoder's linear layers codes for weights, and a forward that keeps what that of their kind keeps."""
    for layer in list(quantizable_layers(model, quantization)):
        scheme = SCHEMES[quantization or ""]
        codes, scales = scheme.sizes(layer.weight)
        inputs, outputs = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
        layer.weight = nn.Parameter(torch.empty(codes, dtype=torch.int8, device="meta"), requires_grad=False)
        layer.register_buffer("scales", torch.empty(scales, dtype=torch.uint8, device="meta"))
        layer.forward = MethodType(_quantized_forward, layer)
        layer.shape, layer.scheme = (outputs, inputs), scheme


def _quantized_forward(layer: Any, inputs: torch.Tensor) -> torch.Tensor:
    if layer.scheme.backward == "weight":
        result = F.linear(inputs, torch.empty(layer.shape, dtype=inputs.dtype, device=inputs.device))
        result = result * torch.empty(layer.shape[:1], dtype=inputs.dtype, device=inputs.device)
    else:
        result = _Quantized.apply(inputs, layer.shape, layer.scheme.backward == "input")
    return result if layer.bias is None else result + layer.bias


class _Quantized(torch.autograd.Function):
    """A product with quantized weights that makes and keeps the tensors that bitsandbytes makes and keeps."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, shape: Sequence[int], keeps_input: bool) -> torch.Tensor:
        ctx.shape = shape
        if not keeps_input:
            return F.linear(inputs, inputs.new_empty(shape))  # weights from their codes, for this product only
        ctx.inputs = inputs  # as bitsandbytes does; what is not saved by autograd is out of reach of checkpointing
        half = inputs.to(torch.float16)
        codes = half.to(torch.int8)
        sums = codes.new_empty((*inputs.shape[:-1], shape[0]), dtype=torch.int32)
        return sums.to(torch.float16).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None, None]:
        (gradient,) = gradients
        return gradient @ gradient.new_empty(ctx.shape), None, None
