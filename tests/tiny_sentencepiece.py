"""A SentencePiece model with LLaMA's settings, and the tokenizers that people make of one."""

import json
import re
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import sentencepiece
import transformers
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from transformers import AutoTokenizer, LlamaTokenizerFast


IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

# What LLaMA's own `tokenizer.model` was trained with, as far as it changes how text is cut.
LLAMA = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "add_dummy_prefix": True,
    "remove_extra_whitespaces": False,
    "normalization_rule_name": "identity",
    "allow_whitespace_only_pieces": True,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
}

LINES = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you.",
    "Please answer my questions.###Human: <Img></Img> What is this?###Assistant: A red square on a white ground.###",
    "###Human: <Img></Img> Describe this image in detail. ###Assistant: The picture shows a cat and a dog.###",
    "[INST] <Img></Img> Please provide a detailed description of the picture. [/INST] Two cats, one of them black.",
    "Could you describe the contents of this image for me? Take a look and describe what you notice.",
    "there are 12 boats  and 305 houses beside the   water, isn't it: a café (with a menu) / a well-known place",
)


@lru_cache(maxsize=4)
def train(extra: tuple[str, ...] = ()) -> bytes:
    """A `tokenizer.model`, the same in every run; `extra` are rare pieces that it has beside those it learns."""
    written = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 3),
        model_writer=written,
        vocab_size=460,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **LLAMA,
    )
    model = ModelProto.FromString(written.getvalue())
    lowest = min(piece.score for piece in model.pieces)
    for number, text in enumerate(text for text in extra if text not in {piece.piece for piece in model.pieces}):
        model.pieces.add(piece=text, score=lowest - 1 - number)
    return model.SerializeToString()


def sentence_pieces() -> sentencepiece.SentencePieceProcessor:
    """The model itself, which knows nothing of transformers."""
    return sentencepiece.SentencePieceProcessor(model_proto=train())


def original_ids(pieces: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """
    Ids of one text without special tokens around it, as the original's tokenizer gives them.

    That is the slow tokenizer of transformers 4.30: it cuts a text at `<s>` and `</s>`, and SentencePiece puts its
    dummy prefix on each part.
    """
    ids: list[int] = []
    for part in re.split("(<s>|</s>)", text):
        if part in ("<s>", "</s>"):
            ids.append(pieces.piece_to_id(part))
        elif part:
            ids += pieces.encode(part)
    return ids


def write_folder(folder: Path, legacy: bool | None = True, extra: tuple[str, ...] = ()) -> Path:
    """The tokenizer files of a repository such as Vicuna's: `tokenizer.model` and a configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train(extra))
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>", "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    config |= {} if legacy is None else {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _with_json(folder: Path, keep_model: bool) -> Any:
    """What loads from the folder that `save_pretrained` writes, with the SentencePiece file beside it or without."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
    (folder / "saved" / "tokenizer.model").unlink(missing_ok=True)
    if keep_model:
        (folder / "saved" / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    return AutoTokenizer.from_pretrained(folder / "saved")


# How a tokenizer comes to a user; transformers 5 has no slow one.
DOORS: dict[str, Callable[[Path], Any]] = {
    "auto": AutoTokenizer.from_pretrained,
    "fast": LlamaTokenizerFast.from_pretrained,
    "json_and_model": lambda folder: _with_json(folder, keep_model=True),
    "json": lambda folder: _with_json(folder, keep_model=False),
}
if IS_TRANSFORMERS_4:
    DOORS["slow"] = lambda folder: AutoTokenizer.from_pretrained(folder, use_fast=False)
