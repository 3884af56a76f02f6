"""Models and data of runs that are planned."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged import jpeg
from planned import CASES
from transformers import ResNetConfig

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from recipes_minigpt4.benchmark.models import SIZES, build_config, build_processor


@pytest.fixture(scope="session")
def long_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs whose captions are longer than any answer may be."""
    folder = tmp_path_factory.mktemp("long")
    pairs = [{"image": f"{number}.jpg", "caption": "a long picture of a square " * 40} for number in range(16)]
    for number, pair in enumerate(pairs):
        (folder / pair["image"]).write_bytes(jpeg(number))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Folder of a whole model of one of the benchmarks' sizes, with a Q-Former or without, or with a ResNet."""
    folders: dict[tuple[str, bool | str], str] = {}

    def save(size: str, qformer: bool | str) -> str:
        if (size, qformer) not in folders:
            config = build_config(SIZES[size])
            if qformer is not True:
                resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
                vision = resnet if qformer == "ResNet" else config.vision_config
                parts = {"vision_config": vision, "text_config": config.text_config}
                config = MiniGPT4Config(qformer_config=None, **parts)
            torch.manual_seed(0)
            folder = str(tmp_path_factory.mktemp(size))
            MiniGPT4ForConditionalGeneration(config).save_pretrained(folder)
            build_processor(config).save_pretrained(folder)
            folders[size, qformer] = folder
        return folders[size, qformer]

    return save


@pytest.fixture
def case(saved: Callable, long_pairs: Path, tmp_path: Path) -> Callable:
    """Arguments of a case of `CASES` and its stage."""

    def build(name: str, size: str, **more) -> tuple[int, list[str]]:
        stage, qformer, changes = CASES[name]
        fields = {
            "model_name_or_path": saved(size, qformer), "dataset_name": long_pairs, "output_dir": tmp_path / "run",
            "num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 4, "max_txt_len": 24,
            "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
            "warmup_steps": 1, **changes, **more,
        }  # fmt: skip
        if "cache_features" in fields:
            fields["cache_features"] = tmp_path / fields["cache_features"]
        return stage, [text for key, value in fields.items() for text in (f"--{key}", str(value))]

    return build
