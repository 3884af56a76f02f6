"""Rows, and models that match sentences with pictures: tiny, made in code, with random weights."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4 import cli
from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE
from recipes_minigpt4.tiny.scenes import evaluation_scenes


SIDE = 28
LAYERS = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEN = {**LAYERS, "image_size": SIDE, "patch_size": 14, "initializer_range": 0.5}
MATCHERS = ("clip", "siglip", "itm")


@pytest.fixture(scope="session")
def matcher_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`matcher_folder(kind)`: a saved CLIP, SigLIP or BLIP-2 with matching head. CLIP sees 16 tokens of a text."""
    made: dict[str, Path] = {}

    def build(kind: str) -> Path:
        if kind in made:
            return made[kind]
        tokenizer = AutoTokenizer.from_pretrained(LANGUAGE_BACKBONE)
        sizes = {"height": SIDE, "width": SIDE}
        said = {**LAYERS, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "bos_token_id": 1,
                "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
        torch.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(text_config=said, vision_config=SEEN, projection_dim=8))
            images = CLIPImageProcessor(size=sizes, crop_size=sizes)
        elif kind == "siglip":
            model = SiglipModel(SiglipConfig(text_config={**said, "projection_size": 16}, vision_config=SEEN))
            images = SiglipImageProcessor(size=sizes)
        else:
            words = {**said, "max_position_embeddings": 64, "encoder_hidden_size": 16, "use_qformer_text_input": True}
            config = Blip2Config(
                vision_config=SEEN, qformer_config=words, num_query_tokens=2, image_text_hidden_size=8
            )
            model, images = Blip2ForImageTextRetrieval(config), BlipImageProcessor(size=sizes)
        for parameter in model.parameters():  # some begin so small that all texts would fit alike
            torch.nn.init.normal_(parameter, std=0.3)
        folder = tmp_path_factory.mktemp(kind)
        model.eval().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        images.save_pretrained(folder)
        made[kind] = folder
        return folder

    return build


@pytest.fixture(scope="session")
def describing(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the embedded world's parts, whose projection is new: it says something about any picture."""
    torch.manual_seed(0)
    places = {"vision": str(VISION_BACKBONE), "language_model": str(LANGUAGE_BACKBONE)}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**places, qformer=places["vision"])
    processor = MiniGPT4Processor.from_backbones(**places, config=model.config, chat_template="vicuna_v0_alignment")
    folder = str(tmp_path_factory.mktemp("describing"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


GOOD = "In the picture there is a large {} shape on a plain background, and nothing else can be seen in it."


@pytest.fixture
def curate_tiny(describing: str, tmp_path: Path) -> Callable[..., Path]:
    """`curate_tiny(*options)`: a folder of `minigpt4 curate` about scenes, whose mender says the same of all."""

    def run(*more: str) -> Path:
        line = {"answer": GOOD.format("red")}
        (tmp_path / "mender.jsonl").write_text(json.dumps(line) + "\n")
        folder = tmp_path / "curated-tiny"
        options = {"--model": describing, "--dataset_name": "tiny", "--mender": f"stub:{tmp_path / 'mender.jsonl'}",
                   "--output_dir": str(folder), "--max_new_tokens": "4", "--device": "cpu"}  # fmt: skip
        assert cli.main(["curate", *(text for pair in options.items() for text in pair), *more]) == 0
        return folder

    return run


@pytest.fixture
def curated(tmp_path: Path) -> Callable[..., tuple[Path, list[CuratedRow]]]:
    """`curated(texts)`: a folder with a picture per text, as `minigpt4 curate` leaves them, and its rows."""

    def build(*texts: str | None, **fields: object) -> tuple[Path, list[CuratedRow]]:
        folder = tmp_path / "curated"
        (folder / "picture").mkdir(parents=True, exist_ok=True)
        rows = []
        for (image, _), (place, text) in zip(evaluation_scenes(len(texts), 1), enumerate(texts), strict=True):
            picture = Picture(f"{place}.png", image)
            file = f"picture/{picture.digest}.png"
            image.save(folder / file)
            rows.append(CuratedRow(picture.digest, picture.name, file, f"Draft {place}.", False, text, text, **fields))
        return folder, rows

    return build
