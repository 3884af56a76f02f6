"""Ways to load the frozen language model in 8 or 4 bits, by the names that `--quantization` knows."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig

from recipes_minigpt4.utils.errors import RecipeError


def _bnb_int8(dtype: torch.dtype) -> Any:
    """LLM.int8() (arXiv 2208.07339): rows and columns of 8 bits, outliers of the activations in 16."""
    return BitsAndBytesConfig(load_in_8bit=True)


def _bnb_nf4(dtype: torch.dtype) -> Any:
    """The 4-bit NormalFloat of QLoRA (arXiv 2305.14314), whose scales are quantized too."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _torchao_int8(dtype: torch.dtype) -> Any:
    """Weights of 8 bits with a scale per row, activations as they are."""
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4(dtype: torch.dtype) -> Any:
    """Told rather than tried: it needs packages and a GPU to fail at the first backward pass."""
    raise RecipeError(
        "Nothing trains through torchao-int4, because torchao's 4-bit kernels have no backward pass; use bnb-nf4 for "
        "4 bits, or torchao-int8."
    )


# Name → the package that it takes, and how its config is made for a dtype to compute in.
QUANTIZATIONS: dict[str, tuple[str, Callable[[torch.dtype], Any]]] = {
    "bnb-int8": ("bitsandbytes", _bnb_int8),
    "bnb-nf4": ("bitsandbytes", _bnb_nf4),
    "torchao-int8": ("torchao", _torchao_int8),
    "torchao-int4": ("torchao", _torchao_int4),
}


def quantization_config(name: str, dtype: torch.dtype) -> Any:
    """
    transformers' config of a quantization.

    Args:
        name: key of `QUANTIZATIONS`.
        dtype: type that the frozen weights are computed in.

    Raises:
        RecipeError: for an unknown name, one that nothing trains through, or a package that is not installed.
    """
    if name not in QUANTIZATIONS:
        names = ", ".join(known for known, (_, build) in QUANTIZATIONS.items() if build is not _torchao_int4)
        raise RecipeError(f"There is no quantization {name!r}; use {names}, or leave it out.")
    package, build = QUANTIZATIONS[name]
    if build is not _torchao_int4 and importlib.util.find_spec(package) is None:
        raise RecipeError(f"quantization {name} needs the package {package}; run `pip install {package}`.")
    return build(dtype)
