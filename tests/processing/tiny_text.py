"""Tokenizers of every kind, and processors around them, made in code for the tests of this folder."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from processing_minigpt4 import MiniGPT4ImageProcessor, MiniGPT4Processor


IMAGE_TOKENS = 3  # of a picture
IMAGE_ID = 9999  # no token of any tokenizer here
SIZE = {"height": 4, "width": 6}

CORPUS = [
    "###Human: Describe this image in detail. ###Assistant: The picture shows a red square on a white ground.###",
    "Give the following image: <Img>ImageContent</Img>. What colour is the square? It is blue, and there is a circle.",
    "system user assistant model You are helpful. Compare this and that <image> or [INST] none [/INST] at all.",
]


def byte_tokenizer(
    *,
    special: tuple[str, ...] = ("<s>", "</s>", "<pad>"),
    front: tuple[str, ...] = ("<s>",),
    behind: tuple[str, ...] = (),
    **options: Any,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as in GPT-2, Qwen or Llama 3; `front` and `behind` are the tokens it adds to every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _finished(tokenizer, front, behind, options)


def dummy_prefix_tokenizer(
    *, front: tuple[str, ...] = ("<s>",), behind: tuple[str, ...] = (), **options: Any
) -> PreTrainedTokenizerFast:
    """As LLaMA's: every text gets a dummy prefix "▁", and what is no word falls back to bytes."""
    words = [
        "▁",
        "▁a",
        "▁red",
        "▁cat",
        "▁What",
        "▁is",
        "▁this",
        "a",
        "red",
        "cat",
        "is",
        "What",
        "###",
        "▁###",
        "Human",
    ]
    letters = [chr(code) for code in range(ord("A"), ord("z") + 1) if chr(code).isalpha()] + list("#<>/?:.,1234567890")
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = dict.fromkeys(["<unk>", "<s>", "</s>", *bytes_, *letters, *words])
    tokenizer = Tokenizer(
        models.Unigram(
            [(word, -float(1 if len(word) > 1 else 5)) for word in vocabulary], unk_id=0, byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _finished(tokenizer, front, behind, {"unk_token": "<unk>", "pad_token": "<unk>", **options})


def _finished(
    tokenizer: Tokenizer, front: tuple[str, ...], behind: tuple[str, ...], options: dict[str, Any]
) -> PreTrainedTokenizerFast:
    around = [(token, tokenizer.token_to_id(token)) for token in {*front, *behind}]
    single = " ".join([*front, "$A", *behind])
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=around)
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**defaults, **options})


def make_processor(tokenizer: Any = None, **fields: Any) -> MiniGPT4Processor:
    """A processor with pictures of `SIZE` and `IMAGE_TOKENS` tokens of id `IMAGE_ID`."""
    fields = {"image_token_id": IMAGE_ID, "num_image_tokens": IMAGE_TOKENS, "chat_template": "vicuna_v0", **fields}
    return MiniGPT4Processor(
        image_processor=MiniGPT4ImageProcessor(size=SIZE),
        tokenizer=byte_tokenizer() if tokenizer is None else tokenizer,
        **fields,
    )


def plain(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text alone, without special tokens around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one_sentence(error: BaseException | str) -> bool:
    """Whether an error is one sentence (a semicolon may join two thoughts) that ends in a full stop."""
    text = str(error)
    return text.endswith(".") and "\n" not in text and text.count(". ") == 0
