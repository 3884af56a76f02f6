"""Two models of one shape and with one set of weights: MiniGPT-4, and transformers' BLIP-2 with a Llama."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, Image, Value
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    LlamaConfig,
)

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from processing_minigpt4 import MiniGPT4ImageProcessor, MiniGPT4Processor
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE
from recipes_minigpt4.tiny.scenes import stage2_examples


@dataclass(frozen=True)
class Size:
    """
    Shape of both models.

    Args:
        vision: fields of `Blip2VisionConfig`.
        qformer: fields of `Blip2QFormerConfig`.
        text: fields of `LlamaConfig`.
        num_query_tokens: image tokens per picture.
        matmul: side of the square matrices whose product gives the machine's rate.
    """

    vision: Mapping[str, Any]
    qformer: Mapping[str, Any]
    text: Mapping[str, Any]
    num_query_tokens: int
    matmul: int


SIZES = {
    "mid": Size(
        vision={
            "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
            "image_size": 224, "patch_size": 14,
        },
        qformer={
            "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6,
            "cross_attention_frequency": 2,
        },
        text={
            "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
            "vocab_size": 32_000,
        },
        num_query_tokens=32,
        matmul=2048,
    ),
    # For trying the benchmark itself: seconds, and no numbers worth telling.
    "tiny": Size(
        vision={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 56, "patch_size": 14,
        },
        qformer={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "cross_attention_frequency": 2,
        },
        text={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
            "vocab_size": 1000,
        },
        num_query_tokens=4,
        matmul=512,
    ),
}  # fmt: skip
# Released models, which the commands for a CPU do not offer.
FULL_SIZES = {
    "vicuna-7b": Size(
        vision={
            "hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
            "image_size": 224, "patch_size": 14,
        },
        qformer={
            "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "cross_attention_frequency": 2,
        },
        text={
            "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "vocab_size": 32_001,
        },
        num_query_tokens=32,
        matmul=8192,
    ),
}  # fmt: skip


def size_of(name: str) -> Size:
    """The size of a name."""
    return {**SIZES, **FULL_SIZES}[name]


# ---- models ---------------------------------------------------------------------------------------------------------


def build_parts(size: Size) -> tuple[Blip2VisionConfig, Blip2QFormerConfig, LlamaConfig]:
    """
    Configurations of the three backbones.

    BLIP-2 draws the weights of its ViT from N(0, 1e-20), which a processor multiplies slower than other numbers; here
    it is the usual 0.02.
    """
    vision = Blip2VisionConfig(**size.vision, initializer_range=0.02)
    qformer = Blip2QFormerConfig(**size.qformer, encoder_hidden_size=vision.hidden_size)
    return vision, qformer, LlamaConfig(**size.text, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def build_config(size: Size) -> MiniGPT4Config:
    """Our configuration, with the epsilon that BLIP-2 has behind its ViT."""
    vision, qformer, text = build_parts(size)
    return MiniGPT4Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text,
        num_query_tokens=size.num_query_tokens,
        vision_post_layernorm_eps=vision.layer_norm_eps,
    )


@contextmanager
def made_as(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Let models be made on a device and in a dtype from the start, so that their weights are nowhere else."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def build_ours(size: Size, seed: int) -> MiniGPT4ForConditionalGeneration:
    """Our model with random weights, backbones frozen; the same for every call with a seed."""
    torch.manual_seed(seed)
    model = MiniGPT4ForConditionalGeneration(build_config(size))
    model.model.language_projection.float()  # whatever the dtype of the rest, as it is loaded
    model.freeze_backbones()
    return model


def build_peer(
    size: Size, seed: int, ours: MiniGPT4ForConditionalGeneration | None = None, share: bool = False
) -> Blip2ForConditionalGeneration:
    """
    BLIP-2 of the same shape, of which only `language_projection` trains.

    Args:
        size: shape of the parts.
        seed: of the random weights.
        ours: model whose weights are copied; None leaves the random ones.
        share: let both models hold the same frozen tensors instead of copies.
    """
    vision, qformer, text = build_parts(size)
    torch.manual_seed(seed)
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=size.num_query_tokens,
        image_token_index=peer_image_token(text.vocab_size),
    )
    model = Blip2ForConditionalGeneration(config)
    if ours is not None:
        state = {peer_name(name): tensor for name, tensor in ours.state_dict().items()}
        own = {name: tensor.clone() for name, tensor in state.items() if "language_projection" in name}
        model.load_state_dict({**state, **own}, assign=share)
    model.requires_grad_(False)
    model.language_projection.requires_grad_(True)
    return model


def peer_name(name: str) -> str:
    """BLIP-2's name for one of our tensors."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


def peer_image_token(vocab_size: int) -> int:
    """The placeholder of BLIP-2, which looks its embedding up: the last token, which no text of ours has."""
    return vocab_size - 1


def peer_inputs(batch: Mapping[str, Any], config: MiniGPT4Config) -> dict[str, torch.Tensor]:
    """The same tensors for BLIP-2: its placeholder instead of ours, and nothing that it does not know."""
    known = ("input_ids", "attention_mask", "pixel_values", "labels")
    inputs = {name: batch[name] for name in known if name in batch}
    ids = inputs["input_ids"]
    token = peer_image_token(config.text_config.vocab_size)
    return {**inputs, "input_ids": ids.masked_fill(ids == config.image_token_id, token)}


# ---- data -----------------------------------------------------------------------------------------------------------


def build_processor(config: MiniGPT4Config) -> MiniGPT4Processor:
    """The processor of our model, with the tokenizer of the embedded world, whose ids any vocabulary here has."""
    height, width = config.image_size
    return MiniGPT4Processor(
        image_processor=MiniGPT4ImageProcessor(size={"height": height, "width": width}),
        tokenizer=AutoTokenizer.from_pretrained(LANGUAGE_BACKBONE, padding_side="left"),
        image_token_id=config.image_token_id,
        num_image_tokens=config.num_image_tokens,
        chat_template="vicuna_v0",
    )


def build_pairs(count: int) -> Dataset:
    """Scenes of the embedded world, columns `image` and `text`, with descriptions of 50 words and more."""
    scenes = stage2_examples(count)
    columns = {"image": [scene["image"] for scene in scenes], "text": [f"{scene['caption']} " * 2 for scene in scenes]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))
