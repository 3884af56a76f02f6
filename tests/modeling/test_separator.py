"""Replies end at `###` however a tokenizer spells it, and nowhere else; what is left is the reply alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from separator_pieces import EXTRA, KINDS, WORDS, byte_level_tokenizer, spell
from tiny_sentencepiece import DOORS, write_folder
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, pipeline

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor, ReplyStreamer
from modeling_minigpt4.generation_minigpt4 import SeparatorCriteria, separator_pieces


# What the model says, and the reply that is left; "a" stands in front of each.
STOPS: dict[str, tuple[list[str], str]] = {
    "one_token": (["###"], "a"),
    "with_a_space": (["_###"], "a"),
    "three_tokens": (["#", "#", "#"], "a"),
    "three_tokens_with_a_space": (["_#", "#", "#"], "a"),
    "two_and_one": (["##", "#"], "a"),
    "one_and_two": (["_#", "##"], "a"),
    "two_with_a_space_and_one": (["_##", "#"], "a"),
    "behind_a_full_stop": ([".##", "#"], "a."),
    "across_a_word": (["done#", "##"], "adone"),
    "into_the_next_word": (["##", "#H"], "a"),
    "with_the_next_word": (["###Human"], "a"),
    "behind_a_word": (["word###"], "aword"),
    "four": (["####"], "a"),
    "two_and_two": (["##", "##"], "a"),
    "after_single_ones": (["#", "_cat", "##", "_b", "_###"], "a# cat## b"),
}
NO_STOPS = {
    "one": ["#", "a"],
    "two": ["##", "a"],
    "two_with_a_space": ["_##", "_cat"],
    "parted_by_a_space": ["#", "_##", "a"],
    "parted_by_a_space_later": ["##", "_#", "a"],
    "parted_by_a_word": ["##", "a", "#"],
    "parted_by_a_line_break": ["##", "\n", "#"],
    "parted_twice": ["#", "_#", "_#", "a"],
}
BYTES = {
    "bytes": (["<0x23>", "<0x23>", "<0x23>"], "a"),
    "piece_and_byte": (["##", "<0x23>"], "a"),
    "byte_and_piece": (["_cat", "<0x23>", "##"], "a cat"),
}


class Script(LogitsProcessor):
    """Make the model say these ids, row by row, whatever it would."""

    def __init__(self, rows: list[list[int]], prompt_length: int) -> None:
        self.rows = torch.tensor(rows)
        self.start = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        wanted = self.rows[:, input_ids.shape[1] - self.start]
        return torch.full_like(scores, -torch.inf).scatter(1, wanted[:, None], 0.0)


@pytest.fixture(scope="module", params=KINDS)
def chatting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, backbones: Any) -> tuple:
    """A composed model and its processor, saved and loaded, around a tokenizer of each kind."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = KINDS[request.param](folder / "llama")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    parts = {"vision": backbones.vision, "language_model": str(folder / "llama")}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts)
    MiniGPT4Processor.from_backbones(**parts, config=model.config).save_pretrained(folder / "saved")
    model.save_pretrained(folder / "saved")
    saved = str(folder / "saved")
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(saved).eval()
    return request.param, model.eval(), loaded, MiniGPT4Processor.from_pretrained(saved)


def say(model: Any, processor: Any, picture: Any, rows: list[list[int]], **options: Any) -> tuple[Any, Any]:
    """Whole ids, and those of the replies, of a batch of chats in which the model says what it is told."""
    width = max(map(len, rows))
    filler = spell(processor.tokenizer, ["_cat"])
    image = {"type": "image", "image": picture()}
    chats = [
        [{"role": "user", "content": [image, {"type": "text", "text": "What is # this?" * (row + 1)}]}]
        for row in range(len(rows))
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    length = inputs["input_ids"].shape[1]
    script = Script([row + filler * (width - len(row)) for row in rows], length)
    options = {"do_sample": False, **options}
    if "generation_config" not in options:
        options["max_new_tokens"] = width
    whole = model.generate(**inputs, logits_processor=[script], **options)
    return whole, whole[:, length:]


def cases(kind: str) -> dict[str, tuple[list[str], str]]:
    return {**STOPS, **(BYTES if kind == "sentencepiece" else {})}


def test_every_spelling_stops_its_row(chatting: tuple, picture: Any) -> None:
    """All in one batch, so rows stop at different steps; the hashes of the prompts stop nothing."""
    kind, model, loaded, processor = chatting
    tokenizer = processor.tokenizer
    said = [spell(tokenizer, ["a", *pieces]) for pieces, _ in cases(kind).values()]
    unstopped = [spell(tokenizer, ["a", *pieces, "_b"]) for pieces in NO_STOPS.values()]
    more = spell(tokenizer, ["#H", "_b", "_###", "."])
    rows = [*(row + more for row in said), *unstopped]
    width = max(map(len, rows))
    filler = spell(tokenizer, ["_cat"])
    for one in (model, loaded):
        whole, replies = say(one, processor, picture, rows)
        for reply, row in zip(replies.tolist(), said, strict=False):
            assert reply == row + [tokenizer.pad_token_id] * (width - len(row))
        for reply, row in zip(replies.tolist()[len(said) :], unstopped, strict=True):
            assert reply == row + filler * (width - len(row))
        texts = processor.post_process_image_text_to_text(replies)
        assert texts[: len(said)] == [reply for _, reply in cases(kind).values()]
        behind_prompts = processor.post_process_image_text_to_text(whole)
        for text, reply in zip(behind_prompts, texts, strict=True):
            assert text.rpartition("###Assistant:")[2].strip() == reply
        assert all("#" in text for text in texts[len(said) :])


def test_rows_stop_alone_as_in_a_batch(chatting: tuple, picture: Any) -> None:
    kind, _, loaded, processor = chatting
    for pieces, reply in cases(kind).values():
        row = spell(processor.tokenizer, ["a", *pieces])
        _, found = say(loaded, processor, picture, [row + spell(processor.tokenizer, ["_b", "_b"])])
        assert found.tolist() == [row]
        assert processor.post_process_image_text_to_text(found) == [reply]


def test_eos_stops_too_and_is_no_part_of_the_reply(chatting: tuple, picture: Any) -> None:
    _, _, loaded, processor = chatting
    eos = processor.tokenizer.eos_token_id
    rows = [[*spell(processor.tokenizer, ["a", "##"]), eos], spell(processor.tokenizer, ["a", "_cat", "_b", "###"])]
    _, replies = say(loaded, processor, picture, rows)
    assert replies.tolist() == [[*rows[0], processor.tokenizer.pad_token_id], rows[1]]
    assert processor.post_process_image_text_to_text(replies) == ["a##", "a cat b"]


def test_samples_stop_too(chatting: tuple, picture: Any) -> None:
    """As the original decodes: top_p 0.9 and a repetition penalty."""
    _, _, loaded, processor = chatting
    rows = [spell(processor.tokenizer, ["a", *pieces]) for pieces in (["##", "#H"], ["_cat", "_###"])]
    _, replies = say(
        loaded,
        processor,
        picture,
        [rows[0] + rows[1], rows[1] + rows[0]],
        do_sample=True,
        top_p=0.9,
        repetition_penalty=1.05,
    )
    assert replies.tolist() == rows


# ---- the rule itself ----------------------------------------------------------------------------------------------


def tokenizers_of(folder: Path) -> dict[str, Any]:
    found = {
        f"{name}-{legacy}": open_(write_folder(folder / f"{name}-{legacy}", legacy, EXTRA))
        for name, open_ in DOORS.items()
        for legacy in (True, False)
    }
    return {**found, "byte_level": byte_level_tokenizer(folder / "bytes")}


def test_random_replies_stop_where_their_text_has_the_separator(tmp_path: Path) -> None:
    """Ids one by one, and several a step as in assisted decoding, against the text of the whole reply."""
    draw = random.Random(0)
    for name, tokenizer in tokenizers_of(tmp_path).items():
        pieces = separator_pieces(tokenizer, "###")
        marks, words = list(pieces), spell(tokenizer, [*WORDS, "\n"])
        start = spell(tokenizer, ["a"])
        stopped = 0
        for _ in range(150):
            row = start + [draw.choice(marks if draw.random() < 0.5 else words) for _ in range(10)]
            expected = ["###" in tokenizer.decode(row[:length]) for length in range(1, len(row) + 1)]
            stop = expected.index(True) if True in expected else len(row)
            for step in (1, 2, 3):
                prompt = spell(tokenizer, ["###", "#"])
                criteria = SeparatorCriteria("###", pieces, prompt_length=len(prompt))
                ids = torch.tensor([prompt + row])
                ends = range(len(prompt) + step, ids.shape[1] + 1, step)
                found = [bool(criteria(ids[:, :end], None)) for end in ends]
                first = found.index(True) if True in found else len(found)
                assert first == min(stop // step, len(found)), (name, tokenizer.decode(row))
            stopped += stop < len(row)
        assert 30 < stopped < 150, name


def test_a_slow_tokenizer_spells_the_same(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, extra=EXTRA)
    fast, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder, use_fast=False)
    assert separator_pieces(fast, "###") == separator_pieces(other, "###")
    texts = separator_pieces(fast, "###")
    vocabulary = fast.get_vocab()
    assert texts[vocabulary["▁##"]] == " ##" and texts[vocabulary["<0x23>"]] == "#"
    assert all("#" in text for text in texts.values())


# ---- what a person sees -------------------------------------------------------------------------------------------


def question(picture: Any) -> list[dict[str, Any]]:
    image = {"type": "image", "image": picture()}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is ### this?"}]}]


SAID = {"one": ["###"], "three": ["_#", "#", "#"], "into_a_word": ["##", "#H"], "with_a_word": ["###Human"]}


@pytest.fixture(scope="module")
def pipes(chatting: tuple) -> Any:
    _, _, loaded, processor = chatting
    return pipeline("image-text-to-text", model=loaded, processor=processor, device="cpu")


@pytest.mark.parametrize("pieces", SAID.values(), ids=SAID)
def test_pipelines_show_the_reply_alone(chatting: tuple, pipes: Any, picture: Any, pieces: list[str]) -> None:
    """As a chat that goes on, as new text, and with the text of a prompt in front."""
    *_, processor = chatting
    row = spell(processor.tokenizer, ["a", "_cat", *pieces])
    chat = question(picture)
    length = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )["input_ids"].shape[1]
    script = Script([row], length)
    options = {"generate_kwargs": {"logits_processor": [script], "do_sample": False, "max_new_tokens": len(row)}}
    (whole,) = pipes(text=chat, **options)
    assert whole["generated_text"] == [*chat, {"role": "assistant", "content": "a cat"}]
    for kept in ({}, {"skip_special_tokens": False}):
        (new,) = pipes(text=chat, return_full_text=False, **options, **kept)
        assert new["generated_text"] == "a cat"
    prompt = "Human: <image> What?"
    script.start = processor(text=prompt, images=picture(), return_tensors="pt")["input_ids"].shape[1]
    (plain,) = pipes(images=picture(), text=prompt, **options)
    assert plain["generated_text"].startswith(prompt) and plain["generated_text"].rstrip().endswith("a cat")


@pytest.mark.parametrize("pieces", SAID.values(), ids=SAID)
def test_a_stream_of_generate_is_the_reply(chatting: tuple, picture: Any, pieces: list[str]) -> None:
    _, _, loaded, processor = chatting
    row = spell(processor.tokenizer, ["a", "_##", "_cat", *pieces])
    for reply in (row, row[:3], row[:2], [*row[:2], processor.tokenizer.eos_token_id]):
        streamer = ReplyStreamer(processor)
        _, ids = say(loaded, processor, picture, [reply], streamer=streamer)
        assert ["".join(streamer)] == processor.post_process_image_text_to_text(ids)


def test_rewards_of_trl_read_the_reply_and_see_where_it_ends(chatting: tuple, picture: Any) -> None:
    """As GRPO and RLOO generate and decode: with a config of their own that suppresses the placeholder."""
    _, _, loaded, processor = chatting
    tokenizer = processor.tokenizer
    rows = [spell(tokenizer, ["a", *pieces]) for pieces in SAID.values()]
    own = GenerationConfig(
        max_new_tokens=max(map(len, rows)), do_sample=False, pad_token_id=0, eos_token_id=2,
        suppress_tokens=[loaded.config.image_token_id],
    )  # fmt: skip
    _, ids = say(loaded, processor, picture, rows, generation_config=own)
    for row, reply in zip(rows, ids.tolist(), strict=True):
        assert reply[: len(row) + 1] == [*row, tokenizer.eos_token_id]
    for decoder in (processor, tokenizer):
        assert [text.strip() for text in decoder.batch_decode(ids, skip_special_tokens=True)] == ["a"] * len(rows)
