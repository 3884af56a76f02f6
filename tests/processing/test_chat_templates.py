"""Chats: the original's own formats, and any language model's template taught about pictures and replies."""

import inspect
import re
from typing import Any

import pytest
import torch
from chats import assistant, image, marked_text, red, system, text, tokenized, user
from inner_templates import CHATML, MARKED, SHOUTING, THINKING, template_tokenizer
from tiny_text import (
    IMAGE_ID,
    IMAGE_TOKENS,
    byte_tokenizer,
    dummy_prefix_tokenizer,
    make_processor,
    one_sentence,
    plain,
)
from transformers import ProcessorMixin

from processing_minigpt4 import available_chat_templates, load_chat_template, wrap_chat_template


PICTURE = [IMAGE_ID] * IMAGE_TOKENS
SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
# ---- the original's formats --------------------------------------------------------------------------------------

ONE = [user(image(), "What is this?")]
TWO = [*ONE, assistant("A red cat."), user("Sure?")]

VICUNA = [
    (ONE, {"add_generation_prompt": True}, "###Human: <Img><image></Img> What is this?###Assistant: "),
    (ONE, {}, "###Human: <Img><image></Img> What is this?###"),
    (
        TWO,
        {"add_generation_prompt": True},
        "###Human: <Img><image></Img> What is this?###Assistant: A red cat.###Human: Sure?###Assistant: ",
    ),
    (TWO[:2], {}, "###Human: <Img><image></Img> What is this?###Assistant: A red cat.###"),
    (
        [*TWO[:1], assistant("A red")],
        {"continue_final_message": True},
        "###Human: <Img><image></Img> What is this?###Assistant: A red",
    ),
    ([user("Hello")], {"add_generation_prompt": True}, "###Human: Hello###Assistant: "),
    ([user("What is", image())], {}, "###Human: What is <Img><image></Img>###"),
    ([user(image(), image(), "Compare.")], {}, "###Human: <Img><image></Img> <Img><image></Img> Compare.###"),
    ([user(image(), "or", image(), "?")], {}, "###Human: <Img><image></Img> or <Img><image></Img> ?###"),
    (
        [user(image(), "What?"), assistant([text("A cat.")]), user(image(), "And this?")],
        {"add_generation_prompt": True},
        "###Human: <Img><image></Img> What?###Assistant: A cat.###Human: <Img><image></Img> And this?###Assistant: ",
    ),
]


@pytest.mark.parametrize(("chat", "options", "expected"), VICUNA)
def test_vicuna_v0_is_the_text_of_the_original(chat, options, expected):
    processor = make_processor()
    assert processor.apply_chat_template(chat, **options) == "<s>" + SYSTEM + expected
    as_parts = [system([text("Be brief.")]), *chat]
    for told in (as_parts, [system("Be brief."), *chat]):
        assert processor.apply_chat_template(told, **options) == "<s>Be brief." + expected
    assert processor.apply_chat_template([chat, chat], **options) == ["<s>" + SYSTEM + expected] * 2


@pytest.mark.parametrize(("chat", "options", "expected"), VICUNA)
def test_vicuna_v0_alignment_has_no_system_text_and_a_space_before_the_separator(chat, options, expected):
    rendered = make_processor(chat_template="vicuna_v0_alignment").apply_chat_template(chat, **options)
    # An instruction is everything from "Human: " to the next "###".
    assert rendered == "<s>" + re.sub(r"(?<=###)(Human: .*?)###", r"\1 ###", expected)


def test_vicuna_v0_alignment_is_the_instruction_template_of_stage_2():
    processor = make_processor(chat_template="vicuna_v0_alignment")
    chat = [user(image(), "Describe this image in detail.")]
    prompt = "<s>###Human: <Img><image></Img> Describe this image in detail. ###Assistant: "
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == prompt
    assert processor.apply_chat_template([*chat, assistant("A red cat.")]) == prompt + "A red cat.###"


@pytest.mark.parametrize(
    ("chat", "options", "expected"),
    [
        (ONE, {"add_generation_prompt": True}, "<s>[INST] <Img><image></Img> What is this? [/INST] "),
        (
            TWO,
            {"add_generation_prompt": True},
            "<s>[INST] <Img><image></Img> What is this? [/INST] A red cat.<s>[INST] Sure? [/INST] ",
        ),
        (TWO[:2], {}, "<s>[INST] <Img><image></Img> What is this? [/INST] A red cat.</s>"),
        (
            [*ONE, assistant("A red")],
            {"continue_final_message": True},
            "<s>[INST] <Img><image></Img> What is this? [/INST] A red",
        ),
    ],
)
def test_llama2_is_the_text_of_the_original(chat, options, expected):
    processor = make_processor(chat_template="llama2")
    assert processor.apply_chat_template(chat, **options) == "<s>" + SYSTEM + expected
    assert processor.apply_chat_template([system("Be brief."), *chat], **options) == "<s>Be brief." + expected
    assert processor.apply_chat_template([system(""), *chat], **options) == expected


@pytest.mark.parametrize("name", ["vicuna_v0", "vicuna_v0_alignment", "llama2"])
@pytest.mark.parametrize("chat", [[user("a"), system("b")], [user("a"), {"role": "tool", "content": "b"}]])
def test_roles_that_have_no_place_are_told(name, chat):
    with pytest.raises(Exception, match=r"cannot place a message of role '(system|tool)'\.$"):
        make_processor(chat_template=name).apply_chat_template(chat)


@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, dummy_prefix_tokenizer])
def test_ids_are_those_of_the_originals_segments(make_tokenizer):
    """Text before the picture, text behind it, and each reply are tokenized apart, and BOS stands once in front."""
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer)
    chat = [user(image(red()), "What is this?"), assistant("a red cat")]
    before = plain(tokenizer, SYSTEM + "###Human: <Img>")
    behind = plain(tokenizer, "</Img> What is this?###Assistant: ")
    prompt = [tokenizer.bos_token_id, *before, *PICTURE, *behind]
    assert tokenized(processor, chat[:1], add_generation_prompt=True)["input_ids"] == [prompt]
    whole = tokenized(processor, chat, return_assistant_tokens_mask=True)
    reply = plain(tokenizer, "a red cat###")
    assert whole["input_ids"] == [prompt + reply]
    assert whole["assistant_masks"] == [[0] * len(prompt) + [1] * len(reply)]


def test_names_of_templates():
    assert available_chat_templates() == ["llama2", "vicuna_v0", "vicuna_v0_alignment", "wrapped"]
    assert make_processor(chat_template="llama2").chat_template == load_chat_template("llama2")
    processor = make_processor()
    chat = [user("Hello")]
    assert processor.apply_chat_template(chat, chat_template="llama2").endswith("[INST] Hello [/INST] ")
    processor.chat_template = "vicuna_v0_alignment"
    assert processor.apply_chat_template(chat) == "<s>###Human: Hello ###"


@pytest.mark.parametrize(
    "ask",
    [
        lambda: load_chat_template("vicuna"),
        lambda: make_processor(chat_template="vicuna"),
        lambda: make_processor().apply_chat_template([user("a")], chat_template="vicuna"),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(ask):
    with pytest.raises(ValueError, match=r"no chat template named 'vicuna'.*llama2, vicuna_v0") as caught:
        ask()
    assert one_sentence(caught.value)


def test_a_processor_without_template_says_so():
    with pytest.raises(ValueError, match="The processor has no chat template") as caught:
        make_processor(chat_template=None).apply_chat_template([user("a")])
    assert one_sentence(caught.value)
    with pytest.raises(ValueError, match="no chat template that could be wrapped") as caught:
        make_processor(chat_template="wrapped")
    assert one_sentence(caught.value)


# ---- any language model's template -------------------------------------------------------------------------------


PLAIN_CHATS = [
    [user("What is this?")],
    [user("What is this?"), assistant("A red cat.")],
    [user("One\n\ntwo "), assistant(" A red cat. "), user("  Sure? "), assistant("Yes.\n")],
    [user("same"), assistant("same"), user("same"), assistant("same")],
    [user("{{ jinja }} {% if %}"), assistant('"quotes" \\ and {# comments #}')],
    [user("hello"), assistant("")],
    [system("Be brief."), user("What?"), assistant("A cat."), user("Sure?")],
]


@pytest.mark.parametrize("chat", PLAIN_CHATS)
@pytest.mark.parametrize("prompt", [False, True])
def test_wrapped_renders_exactly_what_the_inner_template_does(family, chat, prompt):
    _, tokenizer, processor, _, has_system = family
    if chat[0]["role"] == "system" and not has_system:
        with pytest.raises(Exception, match="System role not supported"):
            processor.apply_chat_template(chat)
        return
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert processor.apply_chat_template(chat, add_generation_prompt=prompt) == expected
    in_parts = [{**message, "content": [text(message["content"])]} for message in chat]
    assert processor.apply_chat_template(in_parts, add_generation_prompt=prompt) == expected
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=True)["input_ids"]
    assert tokenized(processor, chat, add_generation_prompt=prompt)["input_ids"] == [ids]


def test_wrapped_puts_pictures_where_the_user_did(family):
    _, tokenizer, processor, _, _ = family
    for parts in (
        [image(), "What?"],
        ["What is ", image(), " here?"],
        ["What?", image()],
        [image(), image(), "Which?"],
        [image()],
    ):
        flat = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        expected = tokenizer.apply_chat_template([user(flat)], tokenize=False, add_generation_prompt=True)
        assert processor.apply_chat_template([user(*parts)], add_generation_prompt=True) == expected
        given = [image(red()) if part == image() else part for part in parts]
        result = tokenized(processor, [user(*given)], add_generation_prompt=True)
        assert result["input_ids"][0].count(IMAGE_ID) == IMAGE_TOKENS * flat.count("<image>")
        assert len(result["pixel_values"]) == flat.count("<image>")


def test_wrapped_continues_the_final_message(family):
    _, tokenizer, processor, _, _ = family
    chat = [user("What?"), assistant("A red")]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert expected.endswith("A red")
    assert processor.apply_chat_template(chat, continue_final_message=True) == expected


def test_bos_stands_once(family):
    name, tokenizer, processor, _, _ = family
    ids = tokenized(processor, [user(image(red()), "What?")])["input_ids"][0]
    if tokenizer.bos_token and name != "smol":
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_wrapping_twice_changes_nothing(family):
    _, tokenizer, processor, _, _ = family
    assert wrap_chat_template(tokenizer, processor.chat_template) == processor.chat_template
    assert wrap_chat_template(tokenizer) == processor.chat_template


def test_variables_and_tools_reach_the_inner_template():
    tokenizer = template_tokenizer(CHATML)
    processor = make_processor(tokenizer, chat_template="wrapped")
    tool = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
    call = {"type": "function", "function": {"name": "look", "arguments": {}}}
    chats = [
        ([user("What?")], {"thinking": False, "add_generation_prompt": True}, "<think></think>"),
        ([user("What?")], {"tools": [tool]}, "Tools: look"),
        ([user("a"), {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "b"}], {}, "Call look"),
        ([user("a"), {"role": "assistant", "content": None, "tool_calls": [call]}], {}, "Call look"),
    ]
    for chat, options, shown in chats:
        inner = [{key: value for key, value in message.items() if value is not None} for message in chat]
        expected = tokenizer.apply_chat_template(inner, tokenize=False, **options)
        assert shown in expected
        assert processor.apply_chat_template(chat, **options) == expected
        ids = tokenized(processor, chat, **options)["input_ids"]
        assert ids == [plain(tokenizer, expected)]


@pytest.mark.parametrize("ending", ["", "\n", "\n\n", "{{ '!' }}\n", " \n"])
def test_the_very_end_of_the_inner_template_is_rendered_as_it_is(ending):
    tokenizer = template_tokenizer("{% for m in messages %}{{ m.role + ':' + m.content }};{% endfor %}." + ending)
    chat = [user("a"), assistant("b")]
    expected = tokenizer.apply_chat_template(chat, tokenize=False)
    assert make_processor(tokenizer, chat_template="wrapped").apply_chat_template(chat) == expected


def test_a_message_that_only_calls_tools_has_no_content():
    inner = "{% for m in messages %}{{ m.content if m.content is defined else 'nothing' }};{% endfor %}"
    processor = make_processor(template_tokenizer(inner), chat_template="wrapped")
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}
    assert processor.apply_chat_template([user("a"), call, {**call, "content": ""}]) == "a;nothing;;"


# ---- which tokens are the assistant's ----------------------------------------------------------------------------

REPLIES = ["A red cat.", "Yes, it is.", "No"]


def long_chat(replies: list[str] = REPLIES) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] = []
    for number, reply in enumerate(replies):
        question = user("A red cat.", image(red(number)), "Yes, it is.") if number != 1 else user("No")
        chat += [question, assistant(reply)]
    return chat


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tensors", [None, "pt"])
def test_masks_mark_replies_and_the_end_of_their_turns(family, side, tensors):
    _, _, processor, end, _ = family
    chats = [long_chat(), [user("Hello"), assistant("Yes")], long_chat()[:4]]
    options = {"padding": True, "padding_side": side} if tensors else {}
    result = tokenized(processor, chats, return_assistant_tokens_mask=True, return_tensors=tensors, **options)
    expected = [[reply + end for reply in replies] for replies in (REPLIES, ["Yes"], REPLIES[:2])]
    if tensors:
        assert isinstance(result["assistant_masks"], torch.Tensor)
        assert result["assistant_masks"].shape == result["input_ids"].shape
        assert not (result["assistant_masks"].bool() & (result["input_ids"] == IMAGE_ID)).any()
    for row, mask, stretches in zip(result["input_ids"], result["assistant_masks"], expected, strict=True):
        found = marked_text(processor, row, mask)
        assert [stretch.strip() for stretch in found] == stretches
    assert "offset_mapping" not in result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("make_tokenizer", [byte_tokenizer, dummy_prefix_tokenizer])
@pytest.mark.parametrize(
    ("name", "ends"),
    [("vicuna_v0", ["###"] * 3), ("vicuna_v0_alignment", ["###"] * 3), ("llama2", ["", "", "</s>"])],
)
def test_masks_of_the_originals_formats(make_tokenizer, name, ends, side):
    processor = make_processor(make_tokenizer(), chat_template=name)
    chats = [long_chat(), [user("Hello"), assistant("Yes")]]
    result = tokenized(
        processor,
        chats,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        padding=True,
        padding_side=side,
    )
    expected = [[reply + end for reply, end in zip(REPLIES, ends, strict=True)], ["Yes" + ends[-1]]]
    for row, mask, stretches in zip(result["input_ids"], result["assistant_masks"], expected, strict=True):
        assert marked_text(processor, row.tolist(), mask.tolist()) == stretches


def test_masks_where_the_same_words_stand_everywhere(family):
    _, _, processor, end, _ = family
    chat = [user("same"), assistant("same"), user("same", image(red()), "same"), assistant("same")]
    result = tokenized(processor, chat, return_assistant_tokens_mask=True)
    found = marked_text(processor, result["input_ids"][0], result["assistant_masks"][0])
    assert [stretch.strip() for stretch in found] == ["same" + end] * 2


def test_masks_of_replies_with_spaces_around_them(family):
    _, _, processor, end, _ = family
    result = tokenized(processor, [user("a"), assistant(" A cat. ")], return_assistant_tokens_mask=True)
    (found,) = marked_text(processor, result["input_ids"][0], result["assistant_masks"][0])
    assert found.strip().replace(" " + end, end) == "A cat." + end


def test_masks_of_a_template_that_shortens_earlier_replies():
    processor = make_processor(template_tokenizer(THINKING), chat_template="wrapped")
    chat = [user("a"), assistant("<think>hm</think>\nA cat."), user("b"), assistant("<think>so</think>\nYes.")]
    expected = processor.tokenizer.apply_chat_template(chat, tokenize=False)
    assert processor.apply_chat_template(chat) == expected
    assert "hm" not in expected
    result = tokenized(processor, chat, return_assistant_tokens_mask=True)
    found = marked_text(processor, result["input_ids"][0], result["assistant_masks"][0])
    # Of the first reply one of its two marks is gone with the thoughts, so it is not trained; the last one is whole.
    assert found == ["<think>so</think>\nYes.<|im_end|>"]


def test_a_template_that_rewrites_replies_is_rendered_as_it_is():
    processor = make_processor(template_tokenizer(SHOUTING), chat_template="wrapped")
    chat = [user("a"), assistant("A cat.")]
    expected = "<|im_start|>user\nA<|im_end|>\n<|im_start|>assistant\nA CAT.<|im_end|>\n"
    assert processor.apply_chat_template(chat) == expected
    result = tokenized(processor, chat, return_assistant_tokens_mask=True)
    found = marked_text(processor, result["input_ids"][0], result["assistant_masks"][0])
    assert found == ["A CAT.<|im_end|>"]


def test_marks_of_the_inner_template_are_kept():
    processor = make_processor(template_tokenizer(MARKED), chat_template="wrapped")
    chat = [user("a ", image(red()), " b"), assistant("A cat."), user("c"), assistant("Yes.")]
    rendered = processor.apply_chat_template(chat)
    assert rendered.startswith("<|im_start|>user\na <image> b<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n")
    result = tokenized(processor, chat, return_assistant_tokens_mask=True)
    assert marked_text(processor, result["input_ids"][0], result["assistant_masks"][0]) == ["A cat.", "Yes."]


def test_masks_of_a_chat_without_replies(family):
    _, _, processor, _, _ = family
    result = tokenized(processor, [user(image(red()), "a")], return_assistant_tokens_mask=True)
    assert not any(result["assistant_masks"][0])


def test_masks_survive_truncation(family):
    _, _, processor, _, _ = family
    chat = [user(image(red()), "a"), assistant("A red cat on a white ground.")]
    whole = tokenized(processor, chat, return_assistant_tokens_mask=True)
    length = len(whole["input_ids"][0]) - 4
    cut = tokenized(processor, chat, return_assistant_tokens_mask=True, truncation=True, max_length=length)
    assert cut["assistant_masks"][0] == whole["assistant_masks"][0][:length]


# ---- templates of the user ---------------------------------------------------------------------------------------


def test_a_template_for_strings_is_wrapped_wherever_it_is_passed():
    tokenizer = template_tokenizer(None)
    chat = [user("a ", image(), " b"), assistant("c")]
    expected = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\na <image> b<|im_end|>\n"
    by_call = make_processor(tokenizer).apply_chat_template(chat, chat_template=CHATML)
    by_processor = make_processor(tokenizer, chat_template=CHATML).apply_chat_template(chat)
    assert by_call == by_processor == expected + "<|im_start|>assistant\nc<|im_end|>\n"


def test_a_template_that_knows_parts_is_used_as_it_is():
    template = (
        "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}"
        "{{ p['text'] }}{% endif %}|{% endfor %}{% endfor %}"
    )
    processor = make_processor(chat_template=template)
    assert processor.apply_chat_template([user("a", image(), "b")]) == "a|<image>|b|"


@pytest.mark.parametrize(
    "template",
    [
        # Texts in both forms, and no place for a picture.
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ p.text }}{% endfor %}{% endif %}|{% endfor %}",
        # A placeholder of another model.
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "{{ '<picture>' if p['type'] == 'image' else p.text }}{% endfor %}{% endif %}|{% endfor %}",
        # Types of something else than parts.
        "{% for t in tools or [] %}{{ t.type }}{{ t.text }}{% endfor %}"
        "{% for m in messages %}{{ m['content'] + '|' }}{% endfor %}",
        "{% for m in messages %}{{ m['content'] }}|{% endfor %}",
    ],
    ids=["texts", "other-model", "tools", "printed"],
)
def test_a_template_without_a_place_for_pictures_is_wrapped(template):
    processor = make_processor(chat_template=template)
    assert processor.apply_chat_template([user("a ", image(), " b"), assistant("c")]) == "a <image> b|c|"
    result = tokenized(processor, [user("a ", image(red()), " b"), assistant("c")], return_assistant_tokens_mask=True)
    assert result["input_ids"][0].count(IMAGE_ID) == IMAGE_TOKENS
    assert marked_text(processor, result["input_ids"][0], result["assistant_masks"][0]) == ["c"]


def test_a_template_for_texts_in_parts_is_used_as_it_is():
    template = "{% for m in messages %}{{ m['content'][0]['text'] }}|{% endfor %}"
    assert make_processor(chat_template=template).apply_chat_template([user("a"), assistant("b")]) == "a|b|"


@pytest.mark.parametrize("name", ["vicuna_v0", "llama2", "wrapped"])
def test_chats_use_the_placeholder_of_the_processor(name):
    processor = make_processor(template_tokenizer(CHATML), chat_template=name, image_token="<|pic|>")
    chat = [user(image(red()), "a <image> and a <|pic|>")]
    rendered = processor.apply_chat_template(chat)
    assert rendered.count("<|pic|>") == 1 and "a <image> and a" in rendered
    result = tokenized(processor, chat)
    assert result["input_ids"][0].count(IMAGE_ID) == IMAGE_TOKENS
    assert "a <image> and a <|pic|>" in processor.decode(result["input_ids"][0])


def test_several_named_templates():
    tokenizer = template_tokenizer(None)
    processor = make_processor(tokenizer, chat_template={"default": CHATML, "old": load_chat_template("llama2")})
    assert processor.apply_chat_template([user("a")]).endswith("user\na<|im_end|>\n")
    assert processor.apply_chat_template([user("a")], chat_template="old").endswith("[INST] a [/INST] ")
    assert processor.separator is None
    assert make_processor(chat_template={"default": "vicuna_v0", "old": "llama2"}).separator == "###"
    nameless = make_processor(tokenizer, chat_template={"new": CHATML, "old": "llama2"})
    assert nameless.separator is None
    with pytest.raises(ValueError, match=r"none of them is called 'default'.*names: new, old") as caught:
        nameless.apply_chat_template([user("a")])
    assert one_sentence(caught.value)


def test_a_template_that_refuses_most_chats_is_used_all_the_same():
    picky = "{% if messages[0].role != 'system' %}{{ raise_exception('System first!') }}{% endif %}###" + CHATML
    processor = make_processor(template_tokenizer(picky), chat_template="wrapped")
    rendered = processor.apply_chat_template([system("s"), user(image(), "a")])
    assert rendered == "###<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n<image>a<|im_end|>\n"
    assert processor.separator is None
    with pytest.raises(Exception, match="System first!"):
        processor.apply_chat_template([user("a")])


def test_control_tokens_that_somebody_typed_can_be_made_text():
    processor = make_processor(template_tokenizer(CHATML), chat_template="wrapped")
    if "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters:
        pytest.skip("sanitize_control_tokens came after transformers 4.57")
    chat = [user(image(red()), "a <|im_end|> <image>")]
    ids = [tokenized(processor, chat, sanitize_control_tokens=clean)["input_ids"][0] for clean in (False, True)]
    assert [row.count(processor.tokenizer.eos_token_id) for row in ids] == [3, 2]
    assert [row.count(IMAGE_ID) for row in ids] == [IMAGE_TOKENS] * 2
    assert processor.decode(ids[0]) == processor.decode(ids[1])
