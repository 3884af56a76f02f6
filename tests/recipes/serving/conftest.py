"""Models that people talk to: ours, LLaVA, BLIP-2, InstructBLIP; tiny, with random weights, loaded once."""

import pytest
from chat_models import save_instructblip, save_llava, save_ours
from PIL import Image

from recipes_minigpt4.evaluation.blip2 import tiny_blip2
from recipes_minigpt4.serving.models import ModelOptions, Talker, open_talker
from recipes_minigpt4.tiny.scenes import evaluation_scenes


CPU = ModelOptions(device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an adapter on the embedded world's parts, whose projection is new."""
    return save_ours(tmp_path_factory.mktemp("serving") / "ours")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of transformers' LLaVA, which has a chat template."""
    return save_llava(tmp_path_factory.mktemp("serving") / "llava")


@pytest.fixture(scope="session")
def blip2(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of BLIP-2 on the embedded world's parts."""
    folder = str(tmp_path_factory.mktemp("serving") / "blip2")
    for part in tiny_blip2():
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instructblip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of transformers' InstructBLIP."""
    return save_instructblip(tmp_path_factory.mktemp("serving") / "instructblip")


@pytest.fixture(scope="session")
def talkers(ours: str, llava: str, blip2: str, instructblip: str) -> dict[str, Talker]:
    """All of them, loaded, by their kind."""
    folders = {"ours": ours, "llava": llava, "blip2": blip2, "instructblip": instructblip}
    return {kind: open_talker(folder, CPU) for kind, folder in folders.items()}


@pytest.fixture(scope="session")
def scenes() -> list[Image.Image]:
    """Four pictures of the embedded world."""
    return [image for image, _ in evaluation_scenes(4, 2)]
