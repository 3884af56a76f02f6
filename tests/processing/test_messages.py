"""Messages: pictures in every form, histories of Gradio, `<image>` that somebody typed, and what is no chat."""

import base64
import copy
import io
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chats import assistant, image, marked_text, red, system, text, tokenized, user
from inner_templates import CHATML, template_tokenizer
from tiny_text import (
    IMAGE_ID,
    IMAGE_TOKENS,
    byte_tokenizer,
    dummy_prefix_tokenizer,
    make_processor,
    one_sentence,
    plain,
)
from transformers import image_utils


PICTURE = [IMAGE_ID] * IMAGE_TOKENS


# ---- pictures in messages ----------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The same red picture in every form in which it can stand in a message."""
    buffer = io.BytesIO()
    red().save(buffer, "PNG")
    content = buffer.getvalue()
    path = tmp_path / "red.png"
    path.write_bytes(content)
    for library in ("requests", "httpx"):
        if hasattr(image_utils, library):
            monkeypatch.setattr(
                getattr(image_utils, library),
                "get",
                lambda url, **_: {
                    "https://red.test/1": SimpleNamespace(content=content, raise_for_status=lambda: None)
                }[url],
            )
    encoded = base64.b64encode(content).decode()
    return {
        "path": str(path),
        "url": "https://red.test/1",
        "base64": encoded,
        "data": "data:image/png;base64," + encoded,
        "bytes": content,
    }


@pytest.mark.parametrize(
    "part",
    [
        lambda found: {"type": "image", "image": red()},
        lambda found: {"type": "image", "image": found["path"]},
        lambda found: {"type": "image", "image": found["url"]},
        lambda found: {"type": "image", "image": {"bytes": found["bytes"], "path": None}},
        lambda found: {"type": "image", "path": found["path"]},
        lambda found: {"type": "image", "url": found["url"]},
        lambda found: {"type": "image", "url": found["path"]},
        lambda found: {"type": "image", "base64": found["base64"]},
        lambda found: {"type": "image_url", "image_url": {"url": found["url"]}},
        lambda found: {"type": "image_url", "image_url": {"url": found["data"], "detail": "low"}},
        lambda found: {"type": "image_url", "image_url": found["url"]},
        lambda found: {"type": "image", "image": red(), "text": None, "url": None},
    ],
)
@pytest.mark.parametrize("template", ["vicuna_v0", "wrapped"])
def test_pictures_in_messages_come_in_every_form(sources, part, template):
    processor = make_processor(template_tokenizer(CHATML), chat_template=template)
    expected = processor.image_processor(red(), return_tensors="pt")["pixel_values"]
    result = tokenized(processor, [user(part(sources), "What?")], return_tensors="pt")
    assert torch.equal(result["pixel_values"], expected)
    assert (result["input_ids"] == IMAGE_ID).sum() == IMAGE_TOKENS


def gradio_file(path: str, **fields: Any) -> dict[str, Any]:
    """A file as Gradio 6 writes it."""
    own = {"url": None, "size": 90, "orig_name": "red.png", "mime_type": "image/png", "is_stream": False}
    return {"path": path, **own, "meta": {"_type": "gradio.FileData"}, **fields}


@dataclass
class ChatMessage:
    """As Gradio's."""

    content: Any
    role: str = "assistant"
    metadata: dict[str, Any] = field(default_factory=dict)
    options: list[dict[str, Any]] = field(default_factory=list)


@pytest.mark.parametrize("name", ["vicuna_v0", "llama2", "wrapped"])
def test_histories_of_gradio(sources, name):
    """Over the API, as `ChatInterface` keeps them, from the browser, and as its own classes."""
    processor = make_processor(template_tokenizer(CHATML), chat_template=name)
    file = gradio_file(sources["path"])
    said = {"type": "text", "text": "A cat."}
    extra = {"metadata": None, "options": None}
    thought = {"metadata": {"title": "Look", "status": "done"}, "options": [{"value": "yes"}]}
    forms = [
        [
            {"role": "user", "content": [{"path": sources["path"]}, "What?"], **extra},
            {"role": "assistant", "content": "A cat."},
        ],
        [
            {"role": "user", "content": [file, "What?"], **extra},
            {"role": "assistant", "content": ["A cat."], **thought},
        ],
        [
            {
                "role": "user",
                "content": [{"type": "file", "file": file, "alt_text": None}, {"type": "text", "text": "What?"}],
                **extra,
            },
            {"role": "assistant", "content": [said], **extra},
        ],
        [
            ChatMessage([SimpleNamespace(model_dump=lambda: file), "What?"], "user"),
            ChatMessage("A cat.", metadata={"title": "Look"}),
        ],
        [
            ChatMessage([{"type": "component", "component": "image", "value": file, "props": {}}, "What?"], "user"),
            ChatMessage("A cat."),
        ],
    ]
    question = user("Sure?")
    expected = tokenized(processor, [user(image(red()), "What?"), assistant("A cat."), question], return_tensors="pt")
    for history in forms:
        before = copy.deepcopy(history) if isinstance(history[0], dict) else None
        found = tokenized(processor, [*history, question], return_tensors="pt")
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
        assert before is None or history == before
    for alone in (file, {"type": "file", "file": file}, SimpleNamespace(model_dump=lambda: file)):
        found = tokenized(processor, [{"role": "user", "content": alone}], return_tensors="pt")
        assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_a_batch_of_chats_with_different_numbers_of_pictures():
    processor = make_processor()
    chats = [
        [user(image(red(1)), "a"), assistant("b"), user(image(red(2)), image(red(3)))],
        [user("no picture")],
        [user("c", image(red(4)))],
    ]
    result = tokenized(processor, chats, padding=True, return_tensors="pt", add_generation_prompt=True)
    expected = processor.image_processor([red(number) for number in (1, 2, 3, 4)], return_tensors="pt")
    assert torch.equal(result["pixel_values"], expected["pixel_values"])
    assert (result["input_ids"] == IMAGE_ID).sum(1).tolist() == [3 * IMAGE_TOKENS, 0, IMAGE_TOKENS]
    for chat, row, mask in zip(chats, result["input_ids"], result["attention_mask"], strict=True):
        alone = tokenized(processor, chat, add_generation_prompt=True)["input_ids"][0]
        assert row[mask.bool()].tolist() == alone


def test_pictures_can_be_passed_apart():
    processor = make_processor()
    chat = [user(image(), "a"), assistant("b"), user(image(), "c")]
    rendered = processor.apply_chat_template(chat)
    result = processor(text=rendered, images=[red(1), red(2)])
    inside = [user(image(red(1)), "a"), assistant("b"), user(image(red(2)), "c")]
    assert result["input_ids"][0].count(IMAGE_ID) == 2 * IMAGE_TOKENS
    assert len(tokenized(processor, inside)["pixel_values"]) == len(result["pixel_values"]) == 2


def test_a_place_without_a_picture_is_told_when_tokenizing():
    with pytest.raises(ValueError, match="1 <image> placeholders in all but there are 0 images"):
        tokenized(make_processor(), [user(image(), "a")])


def test_messages_of_the_caller_stay_as_they_are(family):
    _, _, processor, _, _ = family
    picture = red()
    chat = [user(image(picture), "A <image> typed", text("b")), assistant("c"), {**user("d"), "name": None}]
    before = copy.deepcopy([{**message} for message in chat])
    tokenized(processor, chat, return_assistant_tokens_mask=True)
    processor.apply_chat_template([*chat[:1], assistant("e")], continue_final_message=True)
    assert chat[0]["content"][0]["image"] is picture
    assert [message["role"] for message in chat] == [message["role"] for message in before]
    assert chat[0]["content"][1:] == before[0]["content"][1:] and chat[1:] == before[1:]


# ---- "<image>" that somebody typed -------------------------------------------------------------------------------


TYPED = "Is <image> a tag, <image><image>?"


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, dummy_prefix_tokenizer])
@pytest.mark.parametrize(
    ("name", "around"),
    [
        ("vicuna_v0", ("###Human: <Img>", "</Img> ", "###Assistant: ", "###")),
        ("vicuna_v0_alignment", ("###Human: <Img>", "</Img> ", " ###Assistant: ", "###")),
        ("llama2", ("<s>[INST] <Img>", "</Img> ", " [/INST] ", "</s>")),
    ],
)
def test_typed_placeholders_are_tokenized_as_text(make_tokenizer, name, around):
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer, chat_template=name)
    before, behind, between, end = around
    chat = [system("No <image>."), user(image(red()), TYPED), assistant("Yes: <image>")]
    result = tokenized(processor, chat, return_assistant_tokens_mask=True)
    expected = [tokenizer.bos_token_id, *plain(tokenizer, "No <image>." + before), *PICTURE]
    expected += plain(tokenizer, behind + TYPED + between)
    reply = plain(tokenizer, "Yes: <image>" + end)
    assert result["input_ids"] == [expected + reply]
    assert result["assistant_masks"] == [[0] * len(expected) + [1] * len(reply)]
    assert len(result["pixel_values"]) == 1


def test_typed_placeholders_are_text_beside_pictures(family):
    _, tokenizer, processor, _, has_system = family
    chat = [user("<image> ", image(red()), " <image>"), assistant("<image>"), user(TYPED)]
    flat = [user("<image> \0 <image>"), assistant("<image>"), user(TYPED)]
    if has_system:
        chat, flat = [system("No <image>."), *chat], [system("No <image>."), *flat]
    result = tokenized(processor, chat)
    before, behind = tokenizer.apply_chat_template(flat, tokenize=False).split("\0")
    assert result["input_ids"] == [plain(tokenizer, before) + PICTURE + plain(tokenizer, behind)]
    assert len(result["pixel_values"]) == 1


def test_typed_placeholders_without_any_picture(family):
    _, tokenizer, processor, end, _ = family
    chat = [user("What does <image> mean?"), assistant("<image> is a tag.")]
    expected = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    result = tokenized(processor, chat, return_assistant_tokens_mask=True)
    assert "pixel_values" not in result and result["input_ids"] == [expected]
    (found,) = marked_text(processor, result["input_ids"][0], result["assistant_masks"][0])
    assert found.strip() == "<image> is a tag." + end


def test_typed_placeholders_stay_text_when_text_is_rendered_first():
    processor = make_processor()
    chat = [user(image(), "Is <image> a tag?")]
    result = processor(text=processor.apply_chat_template(chat), images=[red()])
    assert result["input_ids"] == tokenized(processor, [user(image(red()), "Is <image> a tag?")])["input_ids"]


# ---- what is no chat ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], "no conversation to render"),
        ("Hello", "no conversation to render"),
        (None, "no conversation to render"),
        ({"role": "user", "content": "a"}, "no conversation to render"),
        ([[]], "has no messages"),
        ([[user("a")], []], "has no messages"),
        ([user("a"), "b"], "must be a dict with `role` and `content`, but one is 'b'"),
        ([{"content": "a"}], "must be a dict with `role` and `content`"),
        ([{"role": 3, "content": "a"}], "must be a dict with `role` and `content`"),
        ([{"role": "user", "content": 3}], "must be a string or a list of parts, but one is 3"),
        ([{"role": "user", "content": red()}], "a picture goes into a part"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "must be a string or a list of parts"),
        ([{"role": "user", "content": [red()]}], "A part of a message is <PIL.Image"),
        ([{"role": "user", "content": [{"type": "video", "path": "a"}]}], "has the type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has the type 'text' and the keys ['type']"),
        ([{"role": "user", "content": [{"type": "text", "text": 3}]}], "has the type 'text'"),
        ([{"role": "user", "content": [{"image": red()}]}], "has the type None and the keys ['image']"),
        (
            [user(gradio_file("/tmp/a/clip.mp4", orig_name="clip.mp4", mime_type="video/mp4"))],
            "The file 'clip.mp4' of a message is of the type video/mp4 and no picture",
        ),
        (
            [user({"type": "file", "file": gradio_file("/tmp/a/x.pdf", orig_name=None, mime_type="application/pdf")})],
            "The file 'x.pdf' of a message is of the type application/pdf",
        ),
        ([user({"path": __file__})], "No image could be read from"),
        ([user({"type": "file", "file": {"file_id": "f-1"}})], "is {'file_id': 'f-1'}, which names no picture"),
        ([user({"type": "file"})], "which names no picture; pass its `path`"),
        ([user({"type": "component", "component": "plot", "value": {}})], "the Gradio component 'plot'"),
        ([user({"type": "image", "path": "no-such.png"})], "No image could be read from 'no-such.png'"),
    ],
)
def test_what_is_no_chat_is_told_in_one_sentence(chat, message):
    with pytest.raises(ValueError) as caught:
        make_processor().apply_chat_template(chat, tokenize=True)
    assert message in str(caught.value) and one_sentence(caught.value)
    assert len(str(caught.value)) < 400
