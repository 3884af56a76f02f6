"""Prompts and training rows have the original's ids, with every tokenizer made of LLaMA's SentencePiece file."""

import random
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest
from tiny_sentencepiece import DOORS, LINES, original_ids, sentence_pieces, write_folder
from tiny_text import IMAGE_ID, IMAGE_TOKENS, byte_tokenizer, make_processor
from tokenizers import Regex, pre_tokenizers
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import INSTRUCTIONS, clean_caption, stage1_rows, stage2_rows, truncate


PICTURE = [IMAGE_ID] * IMAGE_TOKENS
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
PIECES = sentence_pieces()
LEGACY = {"legacy": True, "not_legacy": False, "unsaid": None}


@pytest.fixture(scope="module", params=DOORS)
def door(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=LEGACY)
def tokenizer(request: pytest.FixtureRequest, door: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return DOORS[door](write_folder(tmp_path_factory.mktemp("llama"), LEGACY[request.param]))


def red() -> PIL.Image.Image:
    return PIL.Image.new("RGB", (9, 7), "red")


# ---- the original's procedure, straight on the SentencePiece model ------------------------------------------------


def original_prompt(prompt: str) -> list[int]:
    """Ids of a prompt: BOS once, and the text between pictures tokenized piece by piece."""
    ids = [PIECES.bos_id()]
    for number, text in enumerate(prompt.split("<ImageHere>")):
        ids += PICTURE * (number > 0) + original_ids(PIECES, text)
    return ids


def original_chat(system: str, roles: tuple[str, str], separator: str, turns: list[str]) -> str:
    """Text of a chat whose turns take turns; earlier replies are part of it, and the assistant is to speak next."""
    text = system + separator
    for number, turn in enumerate(turns):
        text += roles[number % 2] + turn + separator
    return text + roles[1]


def test_the_tiny_model_is_cut_as_llama_s() -> None:
    assert [PIECES.unk_id(), PIECES.bos_id(), PIECES.eos_id()] == [0, 1, 2]
    assert PIECES.encode("a 12", out_type=str) == ["▁a", "▁", "1", "2"]
    assert PIECES.encode("a\n🐎 ", out_type=str)[:3] == ["▁a", "<0x0A>", "<0xF0>"]
    assert PIECES.encode("a ", out_type=str) == ["▁a", "▁"] != PIECES.encode("a", out_type=str)
    assert PIECES.encode("</Img>") != PIECES.encode(" </Img>")  # the dummy prefix comes in front of a space too


# ---- chats --------------------------------------------------------------------------------------------------------

FORMATS = {
    "vicuna_v0": (("Human: ", "Assistant: "), "###"),
    "llama2": (("<s>[INST] ", " [/INST] "), ""),
}
IMG = "<Img><ImageHere></Img>"
CHATS = {
    "one_picture": [f"{IMG} What is this?"],
    "two_pictures": [f"{IMG} {IMG} Compare the two."],
    "picture_between_words": [f"What is {IMG} this?"],
    "picture_last": [f"What is this? {IMG}"],
    "second_turn": [f"{IMG} What is this?", "A red cat.", "Are you sure?"],
    "third_turn": [f"{IMG} What?", "A cat.", "Sure?", "Yes, a cat: 12 of them.", "Where?"],
    "later_picture": [f"{IMG} What is this?", "A café\nwith 305 boats 🐎.", f"{IMG} And this?"],
    "spaces": [f"{IMG}  What  is this? ", " A cat. ", "  Sure?  "],
    "hashes": [f"{IMG} # What ## is this?", "# A title", "#"],
    "text_alone": ["Hello"],
}


def as_messages(turns: list[str]) -> list[dict[str, Any]]:
    """The same turns as messages with parts; a space beside a picture is what joins the parts."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        parts: list[dict[str, Any]] = []
        for place, text in enumerate(turn.split(IMG)):
            parts += [{"type": "image", "image": red()}] * (place > 0)
            text = text[1:] if place > 0 else text
            text = text[:-1] if place < turn.count(IMG) else text
            parts += [{"type": "text", "text": text}] * bool(text)
        messages.append({"role": ("user", "assistant")[number % 2], "content": parts})
    return messages


def chat_ids(processor: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    options = {"add_generation_prompt": True, **options}
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"][0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chat", CHATS)
def test_prompts_of_chats(tokenizer: Any, name: str, chat: str) -> None:
    processor, turns = make_processor(tokenizer, chat_template=name), CHATS[chat]
    assert chat_ids(processor, as_messages(turns)) == original_prompt(original_chat(SYSTEM, *FORMATS[name], turns))
    told = [{"role": "system", "content": "Be brief: you see <Img>ImageContent</Img>."}, *as_messages(turns)]
    expected = original_chat("Be brief: you see <Img>ImageContent</Img>.", *FORMATS[name], turns)
    assert chat_ids(processor, told) == original_prompt(expected)


def test_pictures_in_messages_of_their_own(tokenizer: Any) -> None:
    """As the original's demo does when two pictures are uploaded before a question."""
    processor = make_processor(tokenizer)
    messages = as_messages([IMG]) + as_messages([f"{IMG} Compare."])
    expected = f"{SYSTEM}###Human: {IMG}###Human: {IMG} Compare.###Assistant: "
    assert chat_ids(processor, messages) == original_prompt(expected)


def test_raw_prompts(tokenizer: Any) -> None:
    """As of the original's evaluation; spaces at the ends of a segment get a dummy prefix like everything else."""
    processor = make_processor(tokenizer)
    for prompt in ("###Human: <ImageHere> What? ###Assistant: ", "<ImageHere>", " <ImageHere> a", "a  <ImageHere> "):
        ids = processor(text=prompt.replace("<ImageHere>", "<image>"), images=red())["input_ids"]
        assert ids == [original_prompt(prompt)]


def test_special_tokens_that_somebody_typed_are_the_tokenizer_s_affair(tokenizer: Any) -> None:
    text = "a cat<s>and</s>a dog"
    ids = make_processor(tokenizer)(text=text, add_special_tokens=False)["input_ids"][0]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (ids == original_ids(PIECES, text)) is bool(tokenizer.legacy)  # `legacy` is just about this


def test_a_reply_that_is_trained_is_a_segment_of_its_own(tokenizer: Any) -> None:
    processor = make_processor(tokenizer)
    ids = chat_ids(processor, as_messages(CHATS["second_turn"][:2]), add_generation_prompt=False)
    prompt = original_prompt(original_chat(SYSTEM, *FORMATS["vicuna_v0"], CHATS["second_turn"][:1]))
    assert ids == prompt + original_ids(PIECES, "A red cat.###")
    processor = make_processor(tokenizer, chat_template="llama2")
    ids = chat_ids(processor, as_messages(CHATS["second_turn"][:2]), add_generation_prompt=False)
    prompt = original_prompt(original_chat(SYSTEM, *FORMATS["llama2"], CHATS["second_turn"][:1]))
    assert ids == prompt + original_ids(PIECES, "A red cat.</s>")


def test_masks_of_replies_hold_beside_the_marks(tokenizer: Any) -> None:
    if not tokenizer.is_fast:
        pytest.skip("a slow tokenizer knows no offsets, which masks are made of")
    for name, end in (("vicuna_v0", "###"), ("llama2", "</s>")):
        processor = make_processor(tokenizer, chat_template=name)
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        found = processor.apply_chat_template(as_messages(CHATS["second_turn"][:2]), **options)
        ids, mask = found["input_ids"][0], found["assistant_masks"][0]
        reply = original_ids(PIECES, f"A red cat.{end}")
        assert [token for token, used in zip(ids, mask, strict=True) if used] == reply
        assert mask[-len(reply) :] == [1] * len(reply)


# ---- training rows ------------------------------------------------------------------------------------------------

ANSWERS = [
    "A red cat.",
    "The picture shows (12) boats,  and 305 houses!",
    "a café 🐎 " * 40,
    " spaces around ",
    "# title\n\nbody",
    "",
    "an <image> that somebody typed, and a word\ufdd43 with marks",
]


def trained(make: Any, processor: Any, answers: list[str], **fields: Any) -> list[tuple[str, list[int], list[int]]]:
    """Prompt text, ids and labels of each row, as TRL's collator makes them, without pads."""
    pairs = datasets.Dataset.from_dict({"image": [red()] * len(answers), "text": answers})
    rows = make(pairs.cast_column("image", datasets.Image()), processor, DataArguments(**fields))
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    result = []
    for row in rows:
        batch = collate([dict(row)])
        assert bool(batch["attention_mask"].all())
        result.append((row["prompt"], batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
    return result


def check(row: tuple[str, list[int], list[int]], prompt: list[int], answer: list[int]) -> None:
    _, ids, labels = row
    assert ids == prompt + answer
    assert labels == [-100] * len(prompt) + answer


def clean(text: str) -> str:
    """Without the code points that no text has."""
    return text.replace("\ufdd4", "")


def test_rows_of_stage_1(tokenizer: Any) -> None:
    processor = make_processor(tokenizer)
    for limit in (None, 5):
        rows = trained(stage1_rows, processor, ANSWERS, max_txt_len=limit)
        for row, text in zip(rows, ANSWERS, strict=True):
            answer = original_ids(PIECES, clean_caption(clean(text)) + "\n")[: limit or 32]
            check(row, original_prompt("<ImageHere>"), answer)


@pytest.mark.parametrize(
    ("name", "template", "end"),
    [
        ("vicuna_v0", "###Human: {} ###Assistant: ", "###"),
        ("vicuna_v0_alignment", "###Human: {} ###Assistant: ", "###"),
        ("llama2", "[INST] {} [/INST] ", "</s>"),
    ],
)
@pytest.mark.parametrize("limit", [None, 7])
def test_rows_of_stage_2(tokenizer: Any, name: str, template: str, end: str, limit: int | None) -> None:
    processor = make_processor(tokenizer, chat_template=name)
    rows = trained(stage2_rows, processor, ANSWERS, max_txt_len=limit)
    for row, text in zip(rows, ANSWERS, strict=True):
        (instruction,) = [words for words in INSTRUCTIONS if words in row[0]]
        prompt = original_prompt(template.format(f"<Img><ImageHere></Img> {instruction}"))
        check(row, prompt, original_ids(PIECES, clean(text) + end)[: limit or 160])


# ---- cutting to max_txt_len ---------------------------------------------------------------------------------------

WORDS = [
    "a", "the", "red", "cat", "picture", "shows", "it's", "don't", "12", "305", "2024", "(with)", "...", "café",
    "e\u0301", "Привет", "日本", "猫", "🐎", "👩\u200d👧", "🇩🇪", "—", "“quoted”", "\u200b", "#", "##", "###",
    "<s>", "</s>",
]  # fmt: skip
GAPS = [" "] * 12 + ["  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\u00a0", "", " \n "]


def random_texts(count: int) -> list[tuple[str, float]]:
    """Texts as nobody writes them, and where to cut each, as a fraction of its tokens."""
    draw = random.Random(0)

    def text() -> str:
        pairs = [(draw.choice(WORDS), draw.choice(GAPS)) for _ in range(draw.randrange(3, 25))]
        return "".join(word + gap for word, gap in pairs) + draw.choice(("###", "\n", "</s>"))

    return [(text(), draw.random()) for _ in range(count)]


def test_cut_answers_are_the_first_ids_of_the_whole(tokenizer: Any) -> None:
    processor = make_processor(tokenizer)
    # A non-legacy tokenizer joins what follows `</s>` to it, which no answer of the original has.
    texts = [(text, place) for text, place in random_texts(300) if "<s>" not in text and "</s>" not in text[:-4]]
    assert len(texts) > 100
    marked = 0
    for text, place in texts:
        whole = original_ids(PIECES, text)
        limit = max(int(place * len(whole)), 1)
        cut = truncate(text, tokenizer, limit)
        assert processor(text=cut, add_special_tokens=False)["input_ids"] == [whole[:limit]]
        marked += "\ufdd4" in cut
    assert 0 < marked < len(texts) / 2  # most answers are cut as text, which any trainer can read


def llama3_tokenizer() -> Any:
    """Byte-level BPE that looks ahead over line breaks and spaces, as GPT-4's and Llama 3's do."""
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer.train_new_from_iterator([*LINES, "a\n\n\nb   c \n d 1234"], 420, show_progress=False)


@pytest.mark.parametrize("make", [byte_tokenizer, llama3_tokenizer])
def test_cut_answers_of_byte_level_tokenizers(make: Any) -> None:
    tokenizer = make()
    processor = make_processor(tokenizer)
    for text, place in random_texts(300):
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        limit = max(int(place * len(whole)), 1)
        cut = truncate(text, tokenizer, limit)
        assert processor(text=cut, add_special_tokens=False)["input_ids"] == [whole[:limit]]


def test_a_length_that_somebody_typed_is_no_length(tokenizer: Any) -> None:
    processor = make_processor(tokenizer)
    typed = chat_ids(processor, as_messages([f"{IMG} What is this\ufdd41?"]))
    assert typed == chat_ids(processor, as_messages([f"{IMG} What is this1?"]))


def test_offsets_of_a_cut_answer(tmp_path: Path) -> None:
    tokenizer = DOORS["auto"](write_folder(tmp_path))
    found = make_processor(tokenizer)(text="A cat 🐎\ufdd45", return_offsets_mapping=True)
    assert len(found["input_ids"][0]) == len(found["offset_mapping"][0]) == 1 + 5
