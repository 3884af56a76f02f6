"""Tokenizers with every piece that can hold a part of the separator (`###`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_sentencepiece import DOORS, write_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


# Pieces with the character of the separator, as vocabularies have them; "_" stands for the space in front.
HASHES = ("#", "##", "###", "####", "_#", "_##", "_###", ".#", ".##", "done#", "word###", "##a", "#H", "###Human")
WORDS = ("a", "_b", "_cat", ".")
EXTRA = tuple(piece.replace("_", "▁") for piece in (*HASHES, *WORDS))


def sentencepiece_tokenizer(folder: Path) -> Any:
    return DOORS["auto"](write_folder(folder, extra=EXTRA))


def byte_level_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte-level pieces without merges; what is said is told in ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    extra = [piece.replace("▁", "Ġ") for piece in EXTRA]
    pieces = dict.fromkeys(["<unk>", "<s>", "</s>", *alphabet, *extra])
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


KINDS = {"sentencepiece": sentencepiece_tokenizer, "byte_level": byte_level_tokenizer}


def spell(tokenizer: Any, pieces: Sequence[str]) -> list[int]:
    """Ids of pieces as they stand in the vocabulary."""
    vocabulary = tokenizer.get_vocab()
    newline = "Ċ" if "Ċ" in vocabulary else "<0x0A>"
    space = "Ġ" if "Ġ" in vocabulary else "▁"
    names = [newline if piece == "\n" else piece.replace("_", space) for piece in pieces]
    return [vocabulary[name] for name in names]
