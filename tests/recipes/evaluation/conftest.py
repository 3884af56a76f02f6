"""Models of every kind that `minigpt4 evaluate` asks: ours, LLaVA, BLIP-2, InstructBLIP; tiny, with random weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
from chat_models import save_instructblip, save_llava, save_ours

from recipes_minigpt4.evaluation.blip2 import tiny_blip2
from recipes_minigpt4.evaluation.questions import Picture, Question, Sampling
from recipes_minigpt4.tiny.scenes import evaluation_scenes


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the embedded world's parts, whose projection is new."""
    return save_ours(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """transformers' LLaVA with the embedded world's tokenizer, to which it has added its placeholder."""
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """BLIP-2 on the embedded world's parts."""
    model, processor = tiny_blip2()
    folder = str(tmp_path_factory.mktemp("blip2"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructblip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """transformers' InstructBLIP with the embedded world's tokenizer."""
    return save_instructblip(tmp_path_factory.mktemp("instructblip"))


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
