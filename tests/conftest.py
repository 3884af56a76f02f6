"""What all tests share: tiny models, a tokenizer, backbone folders and pictures, made in code and offline."""

import atexit
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Before transformers and huggingface_hub are imported: no network, and no file of an earlier run or of the user.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import deprecations  # before our packages are imported
import numpy as np
import pytest
import torch
from hub_server import TOKEN, HubServer
from PIL import Image, ImageDraw
from tiny_parts import LLAMA, NUM_QUERIES, QFORMER, VISION, VOCAB_SIZE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration


atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

TRAINING_TEXT = [
    "Human: Describe this image in detail. Assistant: The picture shows a red square on a white ground.",
    "Human: What colour is the square? Assistant: The square is blue, and the circle beside it is green.",
]


@dataclass(frozen=True)
class Backbones:
    """Folders of frozen parts: `vision` is laid out as BLIP-2 is, and holds the Q-Former too."""

    vision: str
    language_model: str

    @property
    def qformer(self) -> str:
        return self.vision

    def parts(self, qformer: bool = True) -> dict[str, str]:
        """Arguments of `from_backbones`."""
        parts = {"vision": self.vision, "language_model": self.language_model}
        return {**parts, "qformer": self.qformer} if qformer else parts


def pytest_configure(config: pytest.Config) -> None:
    for line in deprecations.filters() if deprecations.WANTED else ():
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """One thread: tiny models gain nothing from more. `tests/kernels.py` asks for others."""
    torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every test, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., MiniGPT4Config]:
    """`tiny_config(qformer=True, text={...}, vision={...}, **fields)`: a small one; dicts change its parts."""

    def build(qformer: bool = True, text: Any = None, vision: Any = None, **fields: Any) -> MiniGPT4Config:
        # A dict with a model type, or a configuration, replaces a part; another dict changes some of its fields.
        def part(default: dict[str, Any], change: Any) -> Any:
            complete = change is not None and (not isinstance(change, dict) or "model_type" in change)
            return change if complete else {**default, **(change or {})}

        fields.setdefault("qformer_config", dict(QFORMER) if qformer else None)
        return MiniGPT4Config(
            vision_config=part(VISION, vision),
            text_config=part(LLAMA, text),
            **{"num_query_tokens": NUM_QUERIES, **fields},
        )

    return build


@pytest.fixture(scope="session")
def make_model(tiny_config: Callable[..., MiniGPT4Config]) -> Callable[..., MiniGPT4ForConditionalGeneration]:
    """`make_model(config=None, seed=0, **fields of tiny_config)`: a random model in eval mode, no reply separator."""

    def build(config: MiniGPT4Config | None = None, seed: int = 0, **fields: Any) -> MiniGPT4ForConditionalGeneration:
        torch.manual_seed(seed)
        model = MiniGPT4ForConditionalGeneration(config or tiny_config(**fields)).eval()
        for parameter in model.model.language_projection.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return model

    return build


@pytest.fixture(scope="session")
def make_inputs() -> Callable[..., dict[str, torch.Tensor]]:
    """
    `make_inputs(model, rows, padding_side="left")`: ids, mask and random pixels for rows such as `[1, "image", 7]`.

    The n-th picture of a batch always has the same pixels; `first_image` tells the number of the first one.
    """

    def build(
        model: MiniGPT4ForConditionalGeneration,
        rows: Sequence[Sequence[Any]],
        padding_side: str = "left",
        first_image: int = 0,
    ) -> dict[str, torch.Tensor]:
        config = model.config
        count = config.num_image_tokens
        spelt = [
            [token for entry in row for token in ([config.image_token_id] * count if entry == "image" else [entry])]
            for row in rows
        ]
        length = max(map(len, spelt))
        gaps = [length - len(row) for row in spelt]
        left = padding_side == "left"
        ids = [[0] * gap + row if left else row + [0] * gap for row, gap in zip(spelt, gaps, strict=True)]
        mask = [
            [0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap
            for row, gap in zip(spelt, gaps, strict=True)
        ]
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        if images := sum(entry == "image" for row in rows for entry in row):
            inputs["pixel_values"] = torch.stack([pixels(config, first_image + i) for i in range(images)])
        return inputs

    def pixels(config: MiniGPT4Config, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(3, *config.image_size, generator=generator)

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: `<unk>` 0 (also pad), `<s>` 1 in front, `</s>` 2; `###` is three tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def write_backbones(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Backbones]:
    """
    `write_backbones(folder, seed=0, text={...}, **saving options)`: write both backbone folders below `folder`.

    The vision folder is a whole BLIP-2, with a language model that nobody needs here.
    """

    def write(folder: Path, seed: int = 0, text: dict[str, Any] | None = None, **saving: Any) -> Backbones:
        torch.manual_seed(seed)
        unused = {
            "model_type": "opt", "vocab_size": 40, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 16,
        }  # fmt: skip
        blip2 = Blip2Config(
            vision_config=VISION, qformer_config=QFORMER, text_config=unused, num_query_tokens=NUM_QUERIES
        )
        vision = Blip2ForConditionalGeneration(blip2)
        torch.nn.init.normal_(vision.query_tokens)
        vision.save_pretrained(folder / "blip2", **saving)
        options = {name: value for name, value in LLAMA.items() if name != "model_type"}
        language_model = LlamaForCausalLM(LlamaConfig(**{**options, **(text or {})}))
        language_model.save_pretrained(folder / "llama", **saving)
        tokenizer.save_pretrained(folder / "llama")
        return Backbones(vision=str(folder / "blip2"), language_model=str(folder / "llama"))

    return write


@pytest.fixture(scope="session")
def backbones(tmp_path_factory: pytest.TempPathFactory, write_backbones: Callable[..., Backbones]) -> Backbones:
    """Backbone folders for reading only: `.vision`, `.qformer`, `.language_model`; `.parts()` for `from_backbones`."""
    return write_backbones(tmp_path_factory.mktemp("backbones"))


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    """`picture("red", size=(40, 30))`: a coloured square on white, as an RGB image."""

    def draw(colour: str = "red", size: tuple[int, int] = (40, 30)) -> Image.Image:
        image = Image.new("RGB", size, "white")
        width, height = size
        ImageDraw.Draw(image).rectangle((width // 4, height // 4, width * 3 // 4, height * 3 // 4), fill=colour)
        return image

    return draw


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, where `you` are logged in; `hub.pauses` are the seconds that were waited, in no time."""
    with HubServer() as server:
        server.add_user("you", TOKEN)
        server.connect(monkeypatch, TOKEN)
        server.pauses = []
        monkeypatch.setattr(time, "sleep", server.pauses.append)
        yield server
        server.forget_connections()
