"""Models of every kind that `minigpt4 evaluate` asks: ours, LLaVA, BLIP-2; tiny, with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.evaluation.blip2 import tiny_blip2
from recipes_minigpt4.evaluation.questions import Picture, Question, Sampling
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE
from recipes_minigpt4.tiny.scenes import evaluation_scenes


LLAVA_CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}assistant:"
)


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the embedded world's parts, whose projection is new."""
    torch.manual_seed(0)
    parts = {"vision": str(VISION_BACKBONE), "qformer": str(VISION_BACKBONE), "language_model": str(LANGUAGE_BACKBONE)}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts)
    places = {"vision": parts["vision"], "language_model": parts["language_model"]}
    processor = MiniGPT4Processor.from_backbones(**places, config=model.config, chat_template="vicuna_v0_alignment")
    folder = str(tmp_path_factory.mktemp("ours"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
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
    folder = str(tmp_path_factory.mktemp("llava"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """BLIP-2 on the embedded world's parts."""
    model, processor = tiny_blip2()
    folder = str(tmp_path_factory.mktemp("blip2"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ask_about() -> Callable[..., list[Question]]:
    """`ask_about(prompts, **fields of Question)`: a question per prompt, each about another scene."""
    scenes = evaluation_scenes(6, 2)

    def build(*prompts: str, max_new_tokens: int = 8, temperature: float = 0.0, **fields: object) -> list[Question]:
        sampling = Sampling(max_new_tokens, temperature=temperature)
        return [
            Question(Picture(f"{place}.png", image), prompt, sampling, **fields)
            for place, (prompt, (image, _)) in enumerate(zip(prompts, scenes, strict=False))
        ]

    return build


@pytest.fixture
def pictures_folder(tmp_path: Path) -> Path:
    """Six scenes as PNG files in a folder of nothing else."""
    (folder := tmp_path / "pictures").mkdir()
    for place, (image, _) in enumerate(evaluation_scenes(6, 2)):
        image.save(folder / f"{place}.png")
    return folder
