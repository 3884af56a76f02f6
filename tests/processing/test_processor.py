"""The processor: texts with `<image>` and pictures to model inputs, ids back to text, and its folder."""

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_text import (
    IMAGE_ID,
    IMAGE_TOKENS,
    byte_tokenizer,
    dummy_prefix_tokenizer,
    make_processor,
    one_sentence,
    plain,
)

from processing_minigpt4.conversations_minigpt4 import LENGTH_MARK


PICTURE = [IMAGE_ID] * IMAGE_TOKENS


def red(number: int = 0) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (9, 7), (200, number, 0))


@pytest.fixture(scope="module", params=["byte", "dummy-prefix"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_tokenizer() if request.param == "byte" else dummy_prefix_tokenizer()


@pytest.fixture
def processor(tokenizer: Any) -> Any:
    return make_processor(tokenizer)


# ---- ids ---------------------------------------------------------------------------------------------------------


def test_the_dummy_prefix_is_there_to_be_repeated():
    tokenizer = dummy_prefix_tokenizer()
    assert tokenizer.convert_ids_to_tokens(plain(tokenizer, "red cat")) == ["▁red", "▁cat"]
    assert plain(tokenizer, "red") + plain(tokenizer, "cat") != plain(tokenizer, "redcat")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("<image>", [PICTURE]),
        ("red<image>", ["red", PICTURE]),
        ("<image>red", [PICTURE, "red"]),
        ("a red<image>cat is", ["a red", PICTURE, "cat is"]),
        ("red <image> cat", ["red ", PICTURE, " cat"]),
        ("<image><image>", [PICTURE, PICTURE]),
        ("red<image><image>cat<image>a", ["red", PICTURE, PICTURE, "cat", PICTURE, "a"]),
        ("red\n<image>\ncat", ["red\n", PICTURE, "\ncat"]),
        ("no picture at all", ["no picture at all"]),
        ("", []),
    ],
)
@pytest.mark.parametrize("written", ["", "<s>"], ids=["bos-added", "bos-in-text"])
def test_text_around_pictures_is_tokenized_apart(processor, tokenizer, text, pieces, written):
    expected = [tokenizer.bos_token_id]
    for piece in pieces:
        expected += plain(tokenizer, piece) if isinstance(piece, str) else piece
    images = [red()] * text.count("<image>") or None
    for forms in ((written + text, images), ([written + text], images and [images])):
        result = processor(text=forms[0], images=forms[1])
        assert result["input_ids"] == [expected]
        assert result["attention_mask"] == [[1] * len(expected)]
        assert ("pixel_values" in result) == bool(images)
    without = processor(text=text, images=images, add_special_tokens=False)["input_ids"]
    assert without == [expected[1:]]
    brought = processor(text="<s>" + text, images=images, add_special_tokens=False)["input_ids"]
    assert brought == [expected]  # as of a chat template that writes it


def test_text_without_pictures_is_tokenized_as_the_tokenizer_does(processor, tokenizer):
    for text in ("What is this?", "a red\n\ncat ###", "ünïcode 猫"):
        assert processor(text=text)["input_ids"] == [tokenizer(text)["input_ids"]]


@pytest.mark.parametrize(
    ("front", "behind"), [((), ()), ((), ("</s>",)), (("<s>",), ("</s>",)), (("<s>", "<pad>"), ())]
)
@pytest.mark.parametrize("text", ["red<image>cat", "<image>", "cat"])
def test_what_the_tokenizer_adds_stands_once_around_all(front, behind, text):
    tokenizer = byte_tokenizer(front=front, behind=behind)
    ids = lambda tokens: tokenizer.convert_tokens_to_ids(list(tokens))  # noqa: E731
    images = [red()] if "<image>" in text else None
    before, there, after = text.partition("<image>")
    inner = plain(tokenizer, before) + PICTURE * bool(there) + plain(tokenizer, after)
    processor = make_processor(tokenizer)
    assert processor(text=text, images=images)["input_ids"] == [ids(front) + inner + ids(behind)]
    assert processor(text=text, images=images, add_special_tokens=False)["input_ids"] == [inner]


def test_a_tokenizer_without_bos(processor):
    tokenizer = byte_tokenizer(front=(), bos_token=None)
    result = make_processor(tokenizer)(text="red<image>cat", images=red())
    assert result["input_ids"] == [plain(tokenizer, "red") + PICTURE + plain(tokenizer, "cat")]


def test_the_default_image_token_id_is_no_token_of_the_tokenizer():
    tokenizer = byte_tokenizer()
    processor = make_processor(tokenizer, image_token_id=None)
    assert processor.image_token_id == len(tokenizer)
    assert processor.image_token_id not in tokenizer.get_vocab().values()


def test_other_placeholders_can_be_chosen():
    tokenizer = byte_tokenizer()
    processor = make_processor(tokenizer, image_token="<|pic|>")
    ids = processor(text="<image><|pic|>", images=red())["input_ids"][0]
    assert ids == [tokenizer.bos_token_id, *plain(tokenizer, "<image>"), *PICTURE]


# ---- padding and truncation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"padding": True}, None),
        ({"padding": "longest"}, None),
        ({"padding": "max_length", "max_length": 40}, 40),
        ({"padding": "max_length", "max_length": 2}, None),
        ({"padding": True, "pad_to_multiple_of": 16}, 16),
        ({"padding": "max_length", "max_length": 33, "pad_to_multiple_of": 8}, 40),
    ],
)
def test_padding(processor, tokenizer, side, options, length):
    texts, images = ["cat", "<image>red<image>"], [[], [red(), red(1)]]
    alone = [processor(text=text, images=own or None)["input_ids"][0] for text, own in zip(texts, images, strict=True)]
    length = length or len(alone[1])
    result = processor(text=texts, images=images, padding_side=side, return_tensors="pt", **options)
    assert result["input_ids"].shape == result["attention_mask"].shape == (2, length)
    for ids, mask, row in zip(result["input_ids"].tolist(), result["attention_mask"].tolist(), alone, strict=True):
        pads, zeros, ones = [tokenizer.pad_token_id] * (length - len(row)), [0] * (length - len(row)), [1] * len(row)
        assert (ids, mask) == ((pads + row, zeros + ones) if side == "left" else (row + pads, ones + zeros))


def test_the_padding_side_of_the_tokenizer_is_the_default():
    for side in ("left", "right"):
        processor = make_processor(byte_tokenizer(padding_side=side))
        masks = processor(text=["cat", "cat and red"], padding=True)["attention_mask"]
        assert masks[0][0 if side == "left" else -1] == 0


def test_padding_needs_a_pad_token():
    processor = make_processor(byte_tokenizer(pad_token=None))
    assert len(processor(text=["cat", "cat"], padding=True)["input_ids"]) == 2  # nothing to pad
    with pytest.raises(ValueError, match="no pad token") as caught:
        processor(text=["cat", "cat and red"], padding=True)
    assert one_sentence(caught.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_cuts_text_and_keeps_what_stands_around(side):
    tokenizer = byte_tokenizer(behind=("</s>",), truncation_side=side)
    processor = make_processor(tokenizer)
    text = "red and blue<image>red and blue"
    words = plain(tokenizer, "red and blue")
    gone = len(words) - 1
    whole = processor(text=text, images=red())["input_ids"][0]
    result = processor(text=text, images=red(), truncation=True, max_length=len(whole) - gone, return_tensors="np")
    kept = (words[gone:] + PICTURE + words) if side == "left" else (words + PICTURE + words[: len(words) - gone])
    expected = [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id]
    assert result["input_ids"].tolist() == [expected] and result["attention_mask"].all()
    assert processor(text=text, images=red(), truncation=True, max_length=len(whole))["input_ids"] == [whole]


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_a_picture(side):
    tokenizer = byte_tokenizer(truncation_side=side)
    processor = make_processor(tokenizer)
    text = "<image>red cat" if side == "left" else "red cat<image>"
    whole = len(processor(text=text, images=red())["input_ids"][0])
    for max_length in range(whole):
        with pytest.raises(ValueError, match=f"would cut a picture; set `max_length` to {whole} or more") as caught:
            processor(text=["cat", text], images=[red()], truncation=True, max_length=max_length)
        assert "row 1" in str(caught.value) and one_sentence(caught.value)


def test_the_length_that_a_truncation_error_asks_for_is_enough():
    processor = make_processor()
    text = "red<image>and<image>a very long end of this text"
    with pytest.raises(ValueError, match=r"max_length` to (\d+)") as caught:
        processor(text=text, images=[red(), red()], truncation=True, max_length=5)
    needed = int(str(caught.value).split("`max_length` to ")[1].split()[0])
    ids = processor(text=text, images=[red(), red()], truncation=True, max_length=needed)["input_ids"][0]
    assert len(ids) == needed and ids[-IMAGE_TOKENS:] == PICTURE


def test_without_truncation_max_length_cuts_nothing():
    processor = make_processor()
    ids = processor(text="<image>a long text", images=red(), max_length=2)["input_ids"][0]
    assert ids == processor(text="<image>a long text", images=red())["input_ids"][0]


def test_truncation_falls_back_on_the_length_of_the_model():
    processor = make_processor(byte_tokenizer(model_max_length=6))
    assert len(processor(text="a very long text " * 9, truncation=True)["input_ids"][0]) == 6


# ---- offsets and types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_offsets_point_into_the_text_as_it_was_passed(processor, tokenizer, side):
    texts = ["<s>red cat<image>What is", "a<image><image> this and that, and what else there is?"]
    result = processor(text=texts, images=[red()] * 3, return_offsets_mapping=True, padding=True, padding_side=side)
    for text, ids, mask, spans in zip(
        texts, result["input_ids"], result["attention_mask"], result["offset_mapping"], strict=True
    ):
        assert len(ids) == len(spans)
        real = [(token, *span) for token, span, used in zip(ids, spans, mask, strict=True) if used]
        places = [text[start:end] for token, start, end in real if token == IMAGE_ID]
        assert places == ["<image>"] * IMAGE_TOKENS * text.count("<image>")
        starts = [start for _, start, _ in real]
        assert starts == sorted(starts)
        covered = {place for _, start, end in real for place in range(start, end)}
        assert covered == set(range(len(text)))
        for token, start, end in real:
            if token not in (IMAGE_ID, tokenizer.bos_token_id):
                assert tokenizer.decode([token]).strip() == text[start:end].strip()


def test_token_types_tell_pictures_from_text(processor):
    result = processor(
        text=["cat<image>", "red"], images=[red()], return_mm_token_type_ids=True, padding=True, return_tensors="pt"
    )
    assert torch.equal(result["mm_token_type_ids"], (result["input_ids"] == IMAGE_ID).long())
    assert "mm_token_type_ids" not in processor(text="cat")


@pytest.mark.parametrize(("tensors", "kind"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_tensors_of_the_kind_asked_for(processor, tensors, kind):
    result = processor(text=["<image>a", "a<image>"], images=[red(), red()], padding=True, return_tensors=tensors)
    assert set(result) == {"input_ids", "attention_mask", "pixel_values"} == set(processor.model_input_names)
    assert all(isinstance(value, kind) for value in result.values())
    if tensors == "pt":
        assert result["pixel_values"].shape == (2, 3, 4, 6) and result["pixel_values"].dtype == torch.float32
        assert result["input_ids"].dtype == torch.int64
        assert result.to("cpu", torch.bfloat16)["pixel_values"].dtype == torch.bfloat16


# ---- which picture belongs where ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images",
    [
        lambda a, b, c: [a, b, c],
        lambda a, b, c: (a, b, c),
        lambda a, b, c: [[a, b], [], [c]],
        lambda a, b, c: [[a, b], None, c],
        lambda a, b, c: [[a, b, c]],
        lambda a, b, c: np.stack([np.asarray(image) for image in (a, b, c)]),
    ],
    ids=["flat", "tuple", "nested", "none-and-bare", "one-list", "array"],
)
def test_pictures_keep_their_order(processor, images):
    a, b, c = red(0), red(100), red(200)
    texts = ["<image>and<image>", "none", "one <image>"]
    result = processor(text=texts, images=images(a, b, c), padding=True, return_tensors="pt")
    expected = processor.image_processor([a, b, c], return_tensors="pt")["pixel_values"]
    assert torch.equal(result["pixel_values"], expected)
    counts = (result["input_ids"] == IMAGE_ID).sum(1)
    assert counts.tolist() == [2 * IMAGE_TOKENS, 0, IMAGE_TOKENS]


def test_the_attention_mask_can_be_left_out(processor):
    assert set(processor(text=["a", "b"], return_attention_mask=False)) == {"input_ids"}


def test_images_alone(processor):
    result = processor(images=[red(), red(1)], return_tensors="pt")
    assert set(result) == {"pixel_values"} and result["pixel_values"].shape == (2, 3, 4, 6)


def test_options_of_the_image_processor_are_handed_on(processor):
    result = processor(text="<image>", images=red(), size={"height": 2, "width": 3}, return_tensors="pt")
    assert result["pixel_values"].shape == (1, 3, 2, 3)
    grouped = processor(
        text="<image>",
        images=red(),
        images_kwargs={"do_normalize": False},
        text_kwargs={"padding": "max_length", "max_length": 30},
        common_kwargs={"return_tensors": "pt"},
    )
    assert grouped["input_ids"].shape == (1, 30) and grouped["pixel_values"].min() >= 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "no place", "images": [red()]}, "have 0 <image> placeholders in all but there are 1 images"),
        ({"text": "<image><image>", "images": [red()]}, "have 2 <image> placeholders in all but there are 1 images"),
        ({"text": "<image>"}, "have 1 <image> placeholders in all but there are 0 images"),
        ({"text": ["<image>", "a"], "images": []}, "have 1 <image> placeholders in all but there are 0 images"),
        (
            {"text": ["<image>", "<image>"], "images": [[red(), red()], []]},
            "Text 0 has 1 <image> placeholders but 2 images",
        ),
        (
            {"text": ["<image>", "<image><image>"], "images": [[red()], [red()]]},
            "Text 1 has 2 <image> placeholders but 1 images",
        ),
        ({"text": []}, "The batch is empty"),
        ({"text": [], "images": []}, "The batch is empty"),
        ({}, "nothing to process"),
        ({"images": []}, "no image to process"),
        ({"text": 3}, "`text` must be a string or a list of strings"),
        ({"text": ["a", None]}, "`text` must be a string or a list of strings"),
        ({"text": [["a", "b"]]}, "`text` must be a string or a list of strings"),
        ({"text": [{"role": "user", "content": "a"}]}, "chats go to `apply_chat_template`"),
        ({"text": "<image>", "images": "no-such-file.png"}, "No image could be read from 'no-such-file.png'"),
        ({"text": "a", "videos": ["film.mp4"]}, "text and images only"),
        ({"text": "a", "audio": ["song.wav"]}, "text and images only"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(processor, arguments, message):
    with pytest.raises(ValueError) as caught:
        processor(**arguments)
    assert message in str(caught.value) and one_sentence(caught.value)


# ---- text from ids -----------------------------------------------------------------------------------------------


def test_decode_gives_the_text_back(processor, tokenizer):
    text = "What is<image>red cat<image><image> a"
    ids = processor(text=text, images=[red()] * 3, return_tensors="pt")["input_ids"]
    assert processor.decode(ids[0].tolist(), skip_special_tokens=True) == text.replace("<image>", "")
    written = tokenizer.decode(tokenizer("")["input_ids"] + plain(tokenizer, "What is")) + text.removeprefix("What is")
    assert processor.decode(ids[0]) == written
    for rows in (ids, ids.tolist(), ids.numpy(), list(ids)):
        assert processor.batch_decode(rows) == [written]
        assert processor.decode(rows) == [written]


def test_decode_of_little(processor, tokenizer):
    cat = plain(tokenizer, "cat")
    assert processor.decode([]) == ""
    assert processor.batch_decode([]) == []
    assert processor.batch_decode([[], cat]) == ["", "cat"]
    assert processor.decode(IMAGE_ID) == processor.decode([IMAGE_ID]) == "<image>"
    assert processor.decode(torch.tensor(cat)) == "cat"


def test_a_limit_counts_the_tokens_of_its_own_piece(processor, tokenizer):
    """A row of training text whose answer is to be cut behind 3 tokens, with BOS and picture in front or without."""
    answer = "red cat is this"
    expected = plain(tokenizer, answer)[:3]
    for front in ("", "<s><image>", "<image>"):
        ids = processor(text=f"{front}{answer}{LENGTH_MARK}3", images=red() if "<image>" in front else None)
        assert ids["input_ids"][0][-3:] == expected
        assert len(ids["input_ids"][0]) == 1 + IMAGE_TOKENS * bool(front) + 3


# ---- what inference servers ask ----------------------------------------------------------------------------------


def test_number_of_tokens_of_pictures(processor):
    counted = processor._get_num_multimodal_tokens(image_sizes=[(10, 20), (1, 1), (3000, 20)])
    assert counted["num_image_tokens"] == [IMAGE_TOKENS] * 3 and counted["num_image_patches"] == [1] * 3
    assert "num_image_tokens" not in processor._get_num_multimodal_tokens()


def test_what_one_placeholder_stands_for(processor):
    assert processor.replace_image_token({"pixel_values": None}, image_idx=0) == "<image>" * IMAGE_TOKENS
