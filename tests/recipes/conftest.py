"""Backbones, a tokenizer and pairs for the tests of the recipes: tiny, made in code, the same in every run."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import transformers
from accelerate.state import AcceleratorState
from browser import Browser, find_browser
from damaged import sample, write_tar
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Blip2Config,
    Blip2QFormerModel,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


COLOURS = ("red", "green", "blue", "black", "white", "yellow", "purple", "grey")
SIZE = 28  # pixels of a picture's side
QUERIES = 3  # image tokens per picture
HIDDEN = 24  # width of the language model
QFORMER_HIDDEN = 16


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a few merges; Llama's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [f"a {colour} square on a white ground. The picture shows a {colour} square." for colour in COLOURS]
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def save_language_model(folder: Path, chat_template: str | None = None) -> str:
    """A Llama of one layer with its tokenizer."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=512, initializer_range=0.1,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_vision_side(folder: Path) -> str:
    """A vision encoder, Q-Former and queries under the names that BLIP-2 gives them."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIZE, "patch_size": 14, "initializer_range": 0.2,
    }  # fmt: skip
    qformer = {
        "vocab_size": 8, "hidden_size": QFORMER_HIDDEN, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "encoder_hidden_size": 16, "cross_attention_frequency": 2, "initializer_range": 0.2,
    }  # fmt: skip
    config = Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=QUERIES)
    torch.manual_seed(1)
    tensors = {"query_tokens": torch.randn(1, QUERIES, QFORMER_HIDDEN)}
    for name, model in (
        ("vision_model", Blip2VisionModel(config.vision_config)),
        ("qformer", Blip2QFormerModel(config.qformer_config)),
    ):
        tensors |= {f"{name}.{key}": value.clone() for key, value in model.state_dict().items()}
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def save_clip(folder: Path) -> str:
    """CLIP's vision tower, of two layers; a picture is 4 × 4 patches and a CLS token."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=7
    )
    torch.manual_seed(2)
    CLIPVisionModel(config).save_pretrained(folder)
    return str(folder)


def draw(colour: str) -> Image.Image:
    picture = Image.new("RGB", (SIZE + 4, SIZE), "white")
    ImageDraw.Draw(picture).rectangle((6, 6, 20, 20), fill=colour)
    return picture


@pytest.fixture(autouse=True)
def mixed_precision_of_one_run_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what a run tells all later ones of the process, in the environment and in accelerate's shared state."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT interrupt, as it does a command; workers of pytest-xdist ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The folders of a vision side and of a language model, under the names of `from_backbones`."""
    root = tmp_path_factory.mktemp("parts")
    blip2 = save_vision_side(root / "blip2")
    return {"vision": blip2, "qformer": blip2, "language_model": save_language_model(root / "llama")}


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of an encoder that is not BLIP-2's."""
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    return [draw(colour) for colour in COLOURS]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> Path:
    """Eight pairs as a .jsonl file whose pictures lie beside it."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = []
    for colour, picture in zip(COLOURS, pictures, strict=True):
        picture.save(folder / f"{colour}.png")
        lines.append(json.dumps({"image": f"{colour}.png", "caption": f"A {colour} square!"}))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def uneven_pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs whose answers have from one word to sixteen, each another."""
    folder = tmp_path_factory.mktemp("uneven_pairs")
    lines = []
    for number in range(16):
        draw(COLOURS[number % 8]).rotate(90 * (number // 8)).save(folder / f"{number}.png")
        caption = " ".join(COLOURS[(number + word) % 8] for word in range(number + 1))
        lines.append(json.dumps({"image": f"{number}.png", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "pairs.jsonl"


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """A folder of six tar files with seven samples each."""
    for tar in range(6):
        write_tar(tmp_path / "tars" / f"{tar}.tar", [sample(7 * tar + number) for number in range(7)])
    return tmp_path / "tars"


@pytest.fixture
def compose(parts: dict[str, str]) -> Callable:
    """Make model and processor from `parts`, as a user does; keyword arguments go to the model."""
    from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor

    def build(chat_template: str | None = None, seed: int = 0, **changes):
        torch.manual_seed(seed)
        sources = {**parts, **changes}
        model = MiniGPT4ForConditionalGeneration.from_backbones(**sources)
        template = {} if chat_template is None else {"chat_template": chat_template}
        processor = MiniGPT4Processor.from_backbones(
            language_model=sources["language_model"], vision=sources["vision"], config=model.config, **template
        )
        return model, processor

    return build


@pytest.fixture
def stage(parts: dict[str, str], pairs_file: Path, tmp_path: Path) -> Callable:
    """Arguments of a stage on the tiny parts; keywords are fields, and `None` leaves one out."""

    def build(output: str = "run", **fields) -> list[str]:
        defaults = {
            **({} if "model_name_or_path" in fields else parts),
            "dataset_name": pairs_file, "output_dir": tmp_path / output, "max_steps": 2, "warmup_steps": 1,
            "learning_rate": 0.01, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True, "overwrite_output_dir": True,
        }  # fmt: skip
        chosen = {name: value for name, value in {**defaults, **fields}.items() if value is not None}
        return [text for name, value in chosen.items() for text in (f"--{name}", str(value))]

    return build


# transformers' and TRL's notices about what is not installed say nothing about what is tested here.
transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what `datasets` prepares for one test out of the next."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


@pytest.fixture
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium without a window, for tests that are marked `browser`."""
    if (path := find_browser()) is None:
        pytest.skip("there is no Chromium")
    opened = Browser(path, tmp_path_factory.mktemp("profile"), tmp_path_factory.mktemp("downloads"))
    yield opened
    opened.close()
