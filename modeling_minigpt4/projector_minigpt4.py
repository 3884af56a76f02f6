"""The projection, the one part of MiniGPT-4 that trains: from vision features to tokens of the language model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .configuration_minigpt4 import MiniGPT4Config, vision_hidden_size


PREFIX = "model.language_projection."
SAMPLES = 4096  # random features, which tell mean and spread to about 1 %; and words that are held at a time


class Float32Linear(nn.Linear):
    """
    A linear layer whose weights stay in float32 whatever the rest of the model is cast to.

    The projection is the only thing that trains: AdamW steps of 1e-4 and less vanish in bfloat16.

    Args:
        normalize: whether each input vector is brought to mean 0 and variance 1 first. Weights of a LayerNorm would
            say nothing that this layer cannot say, so there are none.
    """

    def __init__(self, in_features: int, out_features: int, normalize: bool = False) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)
        self.normalize = normalize

    def _apply(self, fn: Any, recurse: bool = True) -> "Float32Linear":
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_dtype, recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        input = input.to(self.weight.dtype)
        if self.normalize:
            input = F.layer_norm(input, (self.in_features,))
        return F.linear(input, self.weight, self.bias)


def build_projection(config: MiniGPT4Config) -> nn.Module:
    """
    The trained part: one linear layer from vision features to the language model's width (paper, section 3.1).

    With `projector_num_layers` > 1 the further layers keep that width, with an activation in between (Table 5).
    """
    if config.qformer_config is not None:
        in_features = config.qformer_config.hidden_size
    else:
        width = config.vision_feature_size or vision_hidden_size(config.vision_config)
        in_features = width * config.patch_merge_size
    out_features = config.text_config.hidden_size
    layers: list[nn.Module] = [Float32Linear(in_features, out_features, config.projector_norm)]
    for _ in range(config.projector_num_layers - 1):
        layers += [ACT2FN[config.projector_hidden_act], Float32Linear(out_features, out_features)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def first_layer(projection: nn.Module) -> Any:
    """The linear layer that takes the vision features."""
    return projection[0] if isinstance(projection, nn.Sequential) else projection


def new_projection(config: MiniGPT4Config) -> dict[str, torch.Tensor]:
    """The tensors of an untrained projection, under their names in [`MiniGPT4ForConditionalGeneration`]."""
    tensors = build_projection(config).state_dict()
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


@torch.no_grad()
def start_at_words(
    tensors: dict[str, torch.Tensor], config: MiniGPT4Config, words: torch.Tensor, factor: float = 1.0
) -> None:
    """
    Scale and shift a new projection in place so that image tokens begin spread as words are.

    Of features of variance 1, every channel gets the mean and the standard deviation that it has over the vocabulary:
    an image token may then be any word, and none is out of the range that the language model reads.

    Args:
        tensors: of [`new_projection`]; only the last layer changes.
        config: of the model.
        words: the language model's input embeddings, of shape `(vocab_size, hidden_size)`.
        factor: what the language model multiplies them by when it looks them up.
    """
    projection = build_projection(config)
    projection.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
    tokens = projection(torch.randn(SAMPLES, first_layer(projection).in_features))
    mean = sum(part.double().sum(dim=0) for part in words.split(SAMPLES)) / len(words)
    variance = sum((part.double() - mean).square().sum(dim=0) for part in words.split(SAMPLES)) / (len(words) - 1)
    scale = variance.sqrt() * factor / tokens.std(dim=0)
    weight, bias = list(tensors.values())[-2:]
    weight.mul_(scale[:, None])
    bias.copy_((bias - tokens.mean(dim=0)) * scale + mean * factor)


__all__ = ["Float32Linear", "build_projection", "first_layer", "new_projection", "start_at_words"]
