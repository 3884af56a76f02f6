"""Batches for trainers: what is learned in them, and the placeholder where tokenizers and labels are asked for it."""

import copy
import json
import pickle
from typing import Any

import PIL.Image
import pytest
import torch
from tiny_text import IMAGE_ID, IMAGE_TOKENS, byte_tokenizer, dummy_prefix_tokenizer, make_processor, one_sentence
from transformers import TextStreamer

from processing_minigpt4 import MiniGPT4DataCollator


def red(number: int = 0) -> PIL.Image.Image:
    return PIL.Image.new("RGB", (9, 7), (200, number, 0))


@pytest.fixture(params=["byte", "dummy-prefix"])
def processor(request: pytest.FixtureRequest) -> Any:
    return make_processor(byte_tokenizer() if request.param == "byte" else dummy_prefix_tokenizer())


def chat(question: Any, *replies: str) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": question}]
    for reply in replies:
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": "And?"}]
    return messages[:-1] if replies else messages


def learned(processor: Any, labels: torch.Tensor) -> list[str]:
    return [processor.decode(row[row != -100]) for row in labels]


# ---- the collator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [
            {"messages": chat("What?", "a cat"), "images": [red()]},
            {"messages": chat("Hello", "red red"), "images": []},
        ],
        [{"messages": chat("What?", "a cat"), "image": red()}, {"messages": chat("Hello", "red red"), "image": None}],
        [
            {"messages": chat([{"type": "image"}, {"type": "text", "text": "What?"}], "a cat"), "images": [red()]},
            {"messages": chat("Hello", "red red"), "images": None},
        ],
        [{"text": "<image> What? a cat", "images": [red()]}, {"text": "Hello, red red"}],
        [{"text": "Hello, red red"}] * 2,
    ],
)
def test_all_text_is_learned_and_nothing_else(processor, rows):
    batch = MiniGPT4DataCollator(processor)(rows)
    ids, labels = batch["input_ids"], batch["labels"]
    text = batch["attention_mask"].bool() & (ids != IMAGE_ID)
    assert torch.equal(labels, ids.masked_fill(~text, -100))
    assert batch["attention_mask"][:, 0].all() and (ids[:, 0] == processor.tokenizer.bos_token_id).all()
    pictures = int((ids == IMAGE_ID).sum()) // IMAGE_TOKENS
    assert pictures == sum(bool(row.get("image") or row.get("images")) for row in rows)
    assert ("pixel_values" in batch) == bool(pictures) and len(batch.get("pixel_values", ())) == pictures


def test_chats_become_what_the_processor_makes_of_them(processor):
    parts = [{"type": "image", "image": red()}, {"type": "text", "text": "What?"}]
    expected = processor.apply_chat_template(
        chat(parts, "a cat"), tokenize=True, return_dict=True, return_tensors="pt"
    )
    batch = MiniGPT4DataCollator(processor)([{"messages": chat("What?", "a cat"), "images": [red()]}])
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], expected[name])


def test_replies_alone_are_learned(processor):
    rows = [
        {"messages": chat("What?", "a cat", "red"), "images": [red()]},
        {"messages": chat("Hello", "is"), "images": []},
    ]
    labels = MiniGPT4DataCollator(processor, assistant_only_loss=True)(rows)["labels"]
    assert [text.replace(" ", "") for text in learned(processor, labels)] == ["acat###red###", "is###"]


def test_rows_are_cut_behind_pictures_and_rounded_up(processor):
    rows = [{"messages": chat("What?", "a cat " * 20), "images": [red()]}]
    whole = MiniGPT4DataCollator(processor)(rows)["input_ids"]
    length = whole.shape[1] - 9
    cut = MiniGPT4DataCollator(processor, max_length=length)(rows)["input_ids"]
    assert torch.equal(cut, whole[:, :length])
    assert MiniGPT4DataCollator(processor, pad_to_multiple_of=32)(rows)["labels"].shape[1] % 32 == 0
    with pytest.raises(ValueError, match="would cut a picture"):
        MiniGPT4DataCollator(processor, max_length=5)(rows)


def test_rows_stay_as_they_are(processor):
    rows = [{"messages": chat([{"type": "image"}, {"type": "text", "text": "What?"}], "is"), "images": [red()]}]
    before = copy.deepcopy(rows)
    MiniGPT4DataCollator(processor)(rows)
    assert rows[0]["messages"] == before[0]["messages"]


@pytest.mark.parametrize(
    ("rows", "fields", "told"),
    [
        ([{"caption": "red"}], {}, "`messages` or `text`; one has caption"),
        ([{"text": "red"}], {"assistant_only_loss": True}, "whose replies are learned; one has text"),
        (
            [{"messages": chat([{"type": "image"}] * 2, "is"), "images": [red()]}],
            {},
            "2 places for pictures but 1 pictures",
        ),
        ([{"text": "<image> <image>", "images": [red()]}], {}, "2 <image> placeholders but 1 images"),
    ],
)
def test_rows_of_another_form_are_refused(processor, rows, fields, told):
    with pytest.raises(ValueError, match=told) as error:
        MiniGPT4DataCollator(processor, **fields)(rows)
    assert one_sentence(error.value)


# ---- labels of other collators --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["labels", "shift_labels"])
def test_labels_put_into_a_batch_lose_placeholders(processor, key):
    def fresh() -> Any:
        return processor(
            text=["<image> a", "<image> red cat"], images=[red(), red()], padding=True, return_tensors="pt"
        )

    batch = fresh()
    expected = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, -100)
    batch[key] = batch["input_ids"].clone()
    assert torch.equal(batch[key], expected)
    batch = fresh()
    labels = batch["input_ids"].clone()
    batch[key] = labels
    labels[batch["attention_mask"] == 0] = -7  # a collator that goes on with what it has put there
    assert torch.equal(batch[key] == -7, batch["attention_mask"] == 0)
    for same in (lambda ids: ids, lambda ids: ids[:]):  # not cloned at all
        batch = fresh()
        batch[key] = same(batch["input_ids"])
        assert torch.equal(batch[key], expected)
        assert torch.equal(batch["input_ids"], fresh()["input_ids"])


def test_batches_are_copied_moved_and_pickled(processor):
    batch = processor(text="<image> a", images=red(), return_tensors="pt")
    batch["labels"] = batch["input_ids"].clone()
    for again in (copy.copy(batch), copy.deepcopy(batch), pickle.loads(pickle.dumps(batch)), batch.to("cpu"),
                  type(batch)(dict(batch))):  # fmt: skip
        assert again.keys() == batch.keys() and all(torch.equal(again[name], batch[name]) for name in batch)


# ---- the placeholder at the tokenizer -------------------------------------------------------------------------------


def test_the_tokenizer_knows_the_placeholder(processor):
    tokenizer, word = processor.tokenizer, processor.tokenizer.convert_ids_to_tokens(7)
    assert tokenizer.image_token_id == processor.image_token_id == IMAGE_ID and tokenizer.image_token == "<image>"
    assert tokenizer.convert_tokens_to_ids(processor.image_token) == IMAGE_ID
    assert tokenizer.convert_tokens_to_ids([word, "<image>"]) == [7, IMAGE_ID]
    assert tokenizer.convert_ids_to_tokens(IMAGE_ID) == "<image>"
    assert tokenizer.convert_ids_to_tokens([7, IMAGE_ID]) == [word, "<image>"]
    ids = processor(text="<image> red", images=red(), return_tensors="pt")["input_ids"]
    assert tokenizer.decode([IMAGE_ID], skip_special_tokens=False) == tokenizer.decode(IMAGE_ID) == "<image>"
    for form in (ids[0], ids[0].tolist(), ids[0].numpy()):
        assert tokenizer.decode(form) == processor.decode(form)
    assert tokenizer.batch_decode(ids) == processor.batch_decode(ids)
    assert "<image>" not in tokenizer.decode(ids[0], skip_special_tokens=True)


def test_its_vocabulary_and_its_texts_stay_what_they_are(tmp_path):
    fresh, tokenizer = byte_tokenizer(), byte_tokenizer()
    make_processor(tokenizer).tokenizer.save_pretrained(tmp_path / "taught")
    fresh.save_pretrained(tmp_path / "fresh")
    assert len(tokenizer) == len(fresh) and tokenizer.get_vocab() == fresh.get_vocab()
    assert tokenizer("<image> red", add_special_tokens=False) == fresh("<image> red", add_special_tokens=False)
    assert tokenizer.unk_token_id == fresh.unk_token_id
    for name in ("tokenizer.json", "tokenizer_config.json"):
        taught, own = (json.loads((tmp_path / folder / name).read_text()) for folder in ("taught", "fresh"))
        taught.pop("response_template", None)  # which tells transformers 5 where replies end
        assert taught == own
    ids = fresh("a red cat")["input_ids"]
    assert tokenizer.decode(ids) == fresh.decode(ids)


def test_it_follows_the_processor_and_travels_with_it(processor):
    processor.image_token_id = 999
    for again in (processor, copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert again.tokenizer.convert_tokens_to_ids("<image>") == 999
        assert again.tokenizer.decode([999]) == "<image>"
    assert pickle.loads(pickle.dumps(processor.tokenizer)).convert_tokens_to_ids("<image>") == 999


def test_a_streamer_shows_the_prompt(processor, capsys):
    ids = processor(text="<image> red", images=red(), return_tensors="pt")["input_ids"]
    streamer = TextStreamer(processor.tokenizer)
    streamer.put(ids)
    streamer.end()
    assert "<image>" in capsys.readouterr().out


# ---- empty lists of what there is not -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["videos", "video", "audio", "audios"])
def test_nothing_of_another_kind_counts_as_absent(processor, name):
    expected = processor(text="<image> red", images=red())
    for nothing in (None, [], (), [[]]):
        assert processor(text="<image> red", images=red(), **{name: nothing})["input_ids"] == expected["input_ids"]
    with pytest.raises(ValueError, match=f"text and images only; leave `{name}` out"):
        processor(text="<image> red", images=red(), **{name: [red()]})
