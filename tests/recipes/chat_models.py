"""Models of several kinds on the embedded world's parts: ours, LLaVA, InstructBLIP; tiny, with random weights."""

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    BlipImageProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE


LLAVA_CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}assistant:"
)


def save_ours(folder: Path) -> str:
    """An adapter on the embedded world's parts, whose projection is new."""
    torch.manual_seed(0)
    parts = {"vision": str(VISION_BACKBONE), "qformer": str(VISION_BACKBONE), "language_model": str(LANGUAGE_BACKBONE)}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts)
    places = {"vision": parts["vision"], "language_model": parts["language_model"]}
    processor = MiniGPT4Processor.from_backbones(**places, config=model.config, chat_template="vicuna_v0_alignment")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_llava(folder: Path) -> str:
    """transformers' LLaVA with the embedded world's tokenizer, to which it has added its placeholder."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_BACKBONE)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, image_size=28, patch_size=14, **{**layers, "num_hidden_layers": 2}
        ),
        text_config=LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_key_value_heads=2, **layers),
        image_token_index=len(tokenizer) - 1,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    sizes = {"size": {"height": 28, "width": 28}, "crop_size": {"height": 28, "width": 28}}
    images = CLIPImageProcessor(**sizes)
    patches = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(images, tokenizer, chat_template=LLAVA_CHAT, **patches)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def save_instructblip(folder: Path) -> str:
    """transformers' InstructBLIP, whose Q-Former reads the question too, here with a large say in the answer."""
    torch.manual_seed(0)
    tokenizer, of_qformer = (AutoTokenizer.from_pretrained(LANGUAGE_BACKBONE, padding_side="left") for _ in range(2))
    processor = InstructBlipProcessor(
        BlipImageProcessor(size={"height": 28, "width": 28}), tokenizer, of_qformer, num_query_tokens=4
    )
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "hidden_size": 16}
    config = InstructBlipConfig(
        vision_config={**layers, "image_size": 28, "patch_size": 14},
        qformer_config={
            **layers, "vocab_size": len(of_qformer), "encoder_hidden_size": 16, "max_position_embeddings": 64,
            "initializer_range": 0.5,
        },
        text_config=LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **layers).to_dict(),
        num_query_tokens=4,
        image_token_index=len(tokenizer) - 1,
        initializer_range=0.5,
    )  # fmt: skip
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_()
    ends = model.language_model.generation_config
    ends.eos_token_id, ends.pad_token_id = 2, 0
    model.generation_config = ends
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
