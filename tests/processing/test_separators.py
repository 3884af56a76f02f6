"""The separator that ends replies (`###`) reaches nobody: not in texts, not in streams, not twice in a history."""

import copy
import queue
import random
from typing import Any

import pytest
import torch
from chats import assistant, image, red, text, tokenized, user
from inner_templates import CHATML, template_tokenizer
from separator_pieces import KINDS, spell
from tiny_text import byte_tokenizer, dummy_prefix_tokenizer, make_processor, one_sentence, plain
from transformers import TextIteratorStreamer, TextStreamer

from processing_minigpt4 import MiniGPT4Processor, ReplyStreamer, load_chat_template


SYSTEM = "Give the following image: <Img>ImageContent</Img>."


@pytest.fixture(scope="module", params=["byte", "dummy-prefix"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return byte_tokenizer() if request.param == "byte" else dummy_prefix_tokenizer()


@pytest.fixture
def processor(tokenizer: Any) -> Any:
    return make_processor(tokenizer)


# ---- texts of ids -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "reply"),
    [
        ("a red cat###", "a red cat"),
        ("a red cat ### ", "a red cat"),
        ("a red cat.###Human: more", "a red cat."),
        ("a red cat.###Human: more###Assistant: no###", "a red cat."),
        ("a red cat", "a red cat"),
        ("a ## cat #", "a ## cat #"),
        ("###", ""),
        ("", ""),
    ],
)
def test_replies_come_without_separator_pads_and_eos(processor, tokenizer, written, reply):
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = plain(tokenizer, written)
    rows = [[*ids, eos, pad, pad], [pad, pad, *ids, eos], [*ids, pad, pad, pad]]
    for form in (rows, torch.tensor(rows)) if len({*map(len, rows)}) == 1 else (rows,):
        assert processor.post_process_image_text_to_text(form) == [reply] * 3
    assert processor.post_process_image_text_to_text(torch.tensor([*ids, eos])) == [reply]


def test_replies_behind_their_prompts(processor, tokenizer):
    chat = [
        {"role": "user", "content": [{"type": "image", "image": red()}, {"type": "text", "text": "What is this?"}]}
    ]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    for written in ("a red cat###", "a red cat", "a red cat###Human: more"):
        reply = torch.tensor([plain(tokenizer, written)])
        (text,) = processor.post_process_image_text_to_text(torch.cat([inputs["input_ids"], reply], dim=1))
        prompt, _, answer = text.rpartition("###Assistant:")
        assert prompt.endswith("###Human: <Img></Img> What is this?") and answer.strip() == "a red cat"
    # Pipelines look for the prompt's own text in front, which has to come out the same, its last space included.
    (alone,) = processor.post_process_image_text_to_text(inputs["input_ids"])
    assert text.startswith(alone) and alone.endswith("###Assistant: ")


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_of_text_alone_is_known_by_its_bos(processor, tokenizer, side):
    chat = [{"role": "user", "content": "Hello"}]
    ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    pads = [tokenizer.pad_token_id] * 2
    row = [*ids[0], *plain(tokenizer, "a red cat.###Human: more")]
    (text,) = processor.post_process_image_text_to_text([pads + row if side == "left" else row + pads])
    assert text.rpartition("###Assistant:")[2].strip() == "a red cat." and "###Human: Hello###" in text


def test_without_bos_a_prompt_is_known_by_the_words_of_the_template():
    tokenizer = byte_tokenizer(front=(), bos_token=None)
    processor = make_processor(tokenizer)
    chat = [{"role": "user", "content": "Hello"}]
    ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    (text,) = processor.post_process_image_text_to_text([[*ids[0], *plain(tokenizer, "a cat.###Human: more")]])
    assert text.endswith("###Human: Hello###Assistant: a cat.") and text.startswith("Give the following image")
    assert processor.post_process_image_text_to_text([plain(tokenizer, " a cat.###Human")]) == ["a cat."]


def test_special_tokens_can_be_kept_and_the_separator_goes_all_the_same(processor, tokenizer):
    """Pipelines of transformers 5 ask for them where the tokenizer tells how to parse a reply."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    prompt = tokenized(processor, [user(image(red()), "What?")], add_generation_prompt=True)["input_ids"][0]
    (alone,) = processor.post_process_image_text_to_text([prompt], skip_special_tokens=False)
    assert alone.startswith("<s>") and alone.count("<image>") == 1
    for written in ("cat###", "cat ###", "cat####", "cat"):
        for behind in ([eos], [], [eos, pad, pad]):
            ids = [*plain(tokenizer, written), *behind]
            kept = [[pad, *prompt, *ids], ids]
            whole, reply = processor.post_process_image_text_to_text(kept, skip_special_tokens=False)
            assert reply == "cat"
            assert alone.strip() in whole and whole.rpartition("###Assistant:")[2].strip() == "cat"


def test_a_template_for_strings_that_ends_replies_with_hashes():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '###' }}{% endfor %}"
    processor = make_processor(chat_template=template)
    assert processor.apply_chat_template([user(image(), "a")]) == "user: <image>a###"
    assert processor.separator == "###"
    assert processor.post_process_image_text_to_text([plain(processor.tokenizer, "a cat###")]) == ["a cat"]


@pytest.mark.parametrize("ending", ["###", "####", "###</s>", "###<pad>", " ###"])
def test_a_reply_is_decoded_without_the_separator_that_ended_it(ending):
    processor = make_processor(byte_tokenizer())
    tokenizer = processor.tokenizer
    ids = plain(tokenizer, "a red # cat" + ending)
    for decoder in (processor, tokenizer):  # harnesses and streamers ask the tokenizer
        assert decoder.decode(ids, skip_special_tokens=True).rstrip() == "a red # cat"
        assert [text.rstrip() for text in decoder.batch_decode([ids], skip_special_tokens=True)] == ["a red # cat"]
    assert processor.decode(ids) == tokenizer.decode(ids)
    assert "###" in tokenizer.decode(ids)
    plain_processor = make_processor(byte_tokenizer(), chat_template="llama2")
    assert "###" in plain_processor.decode(ids, skip_special_tokens=True)
    assert "###" in plain_processor.tokenizer.decode(ids, skip_special_tokens=True)


def test_a_separator_in_front_of_a_picture_stays():
    processor = make_processor(byte_tokenizer())
    ids = processor(text="Hello###<image> red", images=red())["input_ids"][0]
    for decoder in (processor, processor.tokenizer):
        assert decoder.decode(ids, skip_special_tokens=True) == "Hello### red"


def test_a_streamer_shows_no_separator(capsys):
    processor = make_processor(byte_tokenizer())
    streamer = TextStreamer(processor.tokenizer, skip_special_tokens=True)
    for token in plain(processor.tokenizer, "a red # cat.###"):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "a red # cat.\n"


# ---- streams ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers of both kinds, with all pieces that hold a part of the separator."""
    folder = tmp_path_factory.mktemp("kinds")
    made = {name: make(folder / name) for name, make in KINDS.items()}
    return {**made, "dummy_prefix": dummy_prefix_tokenizer()}


def random_replies(tokenizer: Any, number: int, seed: int = 0) -> list[list[int]]:
    """Ids of any text, with more hashes, spaces and single bytes than there mostly are; EOS may stand anywhere."""
    draw, vocabulary = random.Random(seed), tokenizer.get_vocab()
    hashes = sorted(token for piece, token in vocabulary.items() if "#" in piece)
    spaces = sorted(token for piece, token in vocabulary.items() if not piece.strip("▁ĠĊ \n") or piece == "<0x0A>")
    every = sorted(vocabulary.values())
    rows = [
        [draw.choice(draw.choice([every, every, hashes, spaces])) for _ in range(draw.randrange(12))]
        for _ in range(number)
    ]
    return [row for row in rows if row[:1] != [tokenizer.bos_token_id]]


def streamed(streamer: Any, ids: list[int], prompt: tuple[int, ...] = (1, 5), step: int = 1) -> list[str]:
    """The pieces that a streamer shows of a reply whose ids come `step` at a time, as in assisted decoding."""
    streamer.put(torch.tensor([prompt]))
    for start in range(0, len(ids), step):
        streamer.put(torch.tensor(ids[start : start + step]))
    streamer.end()
    return list(streamer)


@pytest.mark.parametrize("template", ["vicuna_v0", "llama2", "wrapped"])
@pytest.mark.parametrize("kind", [*KINDS, "dummy_prefix"])
def test_a_reply_in_pieces_is_the_reply(kinds, kind, template):
    tokenizer = copy.deepcopy(kinds[kind])
    tokenizer.chat_template = CHATML
    processor = make_processor(tokenizer, chat_template=template)
    streamer = ReplyStreamer(processor)
    several = 0
    for ids in random_replies(tokenizer, 150):
        pieces = streamed(streamer, ids)
        (reply,) = processor.post_process_image_text_to_text([ids])
        assert "".join(pieces) == "".join(streamed(streamer, ids, step=3)) == reply.strip()
        assert all(pieces[:-1])  # nothing is shown where nothing is to show
        if template == "vicuna_v0":
            assert "###" not in reply
        several += len(pieces) > 2
    assert several > 15


def test_what_may_begin_a_separator_is_held_back_until_it_is_clear(kinds):
    tokenizer = kinds["byte_level"]
    streamer = ReplyStreamer(make_processor(tokenizer))
    said = ["a", ".", "#", "a", "_##", "_cat", "\n", "_#", "##", "#H"]
    seen = []
    streamer.put(torch.tensor([[1]]))
    for token in spell(tokenizer, said):
        streamer.put(torch.tensor([token]))
        seen.append("".join(streamer.text_queue.queue))
    assert seen == ["a", "a.", "a.", "a.#a", "a.#a", "a.#a ## cat"] + ["a.#a ## cat"] * 4
    streamer.end()
    assert list(streamer)[-1] == ""
    # What stands at the end and is none is shown at the end.
    assert streamed(streamer, spell(tokenizer, ["a", "_##"])) == ["a", " ##"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shown_prompt_comes_first(kinds, kind):
    processor = make_processor(copy.deepcopy(kinds[kind]))
    (prompt,) = tokenized(processor, [user(image(red()), "What?")], add_generation_prompt=True)["input_ids"]
    for said in (["a", "_cat", "_###"], ["_###"], ["a", "_##"], []):
        reply = spell(processor.tokenizer, said)
        pieces = streamed(ReplyStreamer(processor, skip_prompt=False), reply, tuple(prompt))
        assert ["".join(pieces)] == processor.post_process_image_text_to_text([prompt + reply])


def test_one_reply_at_a_time():
    streamer = ReplyStreamer(make_processor())
    with pytest.raises(ValueError, match="shows one reply, and there are 2 rows") as caught:
        streamer.put(torch.zeros(2, 5, dtype=torch.long))
    assert one_sentence(caught.value)
    with pytest.raises(queue.Empty):
        next(ReplyStreamer(make_processor(), timeout=0.01))


def test_a_streamer_follows_the_chat_template():
    processor = make_processor(chat_template="llama2")
    streamer, ids = ReplyStreamer(processor), plain(processor.tokenizer, "a cat###")
    assert "".join(streamed(streamer, ids)) == "a cat###"
    processor.chat_template = load_chat_template("vicuna_v0")
    streamer.end()
    list(streamer)
    assert "".join(streamed(streamer, ids)) == "a cat"
    # Of another model, whose tokenizer knows no separator.
    assert "".join(streamed(ReplyStreamer(byte_tokenizer()), ids)) == "a cat###"


@pytest.mark.parametrize("of", ["processor", "tokenizer"])
@pytest.mark.parametrize("kind", KINDS)
def test_streamers_of_transformers_show_no_separator(kinds, kind, of):
    processor = make_processor(copy.deepcopy(kinds[kind]))
    decoder = processor if of == "processor" else processor.tokenizer
    for said in (["###"], ["_#", "##"], [".##", "#H"], ["###Human"], ["_##", "##a"], ["\n", "_###"], ["####"]):
        ids = [*spell(processor.tokenizer, ["a", "_cat", *said]), processor.tokenizer.eos_token_id]
        streamer = TextIteratorStreamer(decoder, skip_prompt=True, skip_special_tokens=True)
        reply = "a cat." if ".##" in said else "a cat"
        assert "".join(streamed(streamer, ids)).rstrip() == reply
        assert decoder.decode(ids, skip_special_tokens=True).rstrip() == reply
        assert decoder.batch_decode([ids], skip_special_tokens=True)[0].rstrip() == reply


# ---- what servers and pipelines of transformers 5 are told --------------------------------------------------------


def events_of(parser: Any, pieces: list[str]) -> list[str]:
    """What a server sends of these pieces."""
    events = [*parser.initial_events, *(event for piece in pieces for event in parser.feed(piece))]
    events += parser.finalize()[1]
    return [event["text"] for event in events if event["type"] == "region_chunk"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_reads_the_response_template_sends_the_reply_alone(kinds, kind):
    tokenizer = make_processor(copy.deepcopy(kinds[kind])).tokenizer
    if not hasattr(tokenizer, "get_response_parser"):
        pytest.skip("response templates came after transformers 4.57")
    prompt = "<s>" + SYSTEM + "###Human: What is ### this?###Assistant: "
    cases = {
        ("A", " cat", ".", "##", "#"): "A cat.",
        (" \n", "A #1", " ##", " title", " ", "###", "Human", ": "): "A #1 ## title",
        ("A cat", " ###Human"): "A cat",
        ("A cat", "</s>", "</s>"): "A cat",
        ("A cat", " ##"): "A cat ##",
        ("###",): "",
        (): "",
    }
    for pieces, reply in cases.items():
        assert tokenizer.parse_response("".join(pieces), prefix=prompt) == {"role": "assistant", "content": reply}
        sent = events_of(tokenizer.get_response_parser(prefix=prompt), list(pieces))
        assert "".join(sent) == reply
        assert pieces[:1] != ("A",) or len(sent) == 3


def test_the_response_template_goes_with_the_chat_template(tmp_path):
    processor = make_processor()
    assert processor.tokenizer.response_template["defaults"]["role"] == "assistant"
    processor.chat_template = load_chat_template("llama2")
    assert processor.tokenizer.response_template is None
    processor.chat_template = load_chat_template("vicuna_v0")
    processor.save_pretrained(tmp_path)
    for options in ({}, {"chat_template": "vicuna_v0_alignment"}):
        loaded = MiniGPT4Processor.from_pretrained(tmp_path, **options)
        assert loaded.tokenizer.response_template == processor.tokenizer.response_template
    other = MiniGPT4Processor.from_pretrained(tmp_path, chat_template="llama2")
    assert other.tokenizer.response_template is None
    # What the language model brings of its own stays where its own chat template does.
    own = template_tokenizer(CHATML)
    own.response_template = {"start_anchor": "assistant\n", "fields": {"content": {"close": "<|im_end|>"}}}
    assert make_processor(own, chat_template="wrapped").tokenizer.response_template["start_anchor"] == "assistant\n"


# ---- histories ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["###", " ###", "###\n", "\n### \n", "####", "######", "### ###"])
@pytest.mark.parametrize("template", ["vicuna_v0", "vicuna_v0_alignment"])
def test_a_separator_in_a_history_is_written_once(template, ending):
    processor = make_processor(chat_template=template)
    question = user(image(), "What is ###?###")
    for content in ("A cat" + ending, [text("A cat" + ending)]):
        told = [question, assistant(content), user("Sure? ###")]
        expected = processor.apply_chat_template([question, assistant("A cat"), user("Sure? ###")])
        assert processor.apply_chat_template(told) == expected
        assert processor.apply_chat_template([told, told]) == [expected] * 2
        assert told[1]["content"] == content
    assert expected.count("What is ###?###") == 1 and "Sure? ###" in expected
    assert processor.apply_chat_template([user("a"), assistant(ending)]).endswith("###Assistant: ###")
    # What is trained is one separator, too.
    rows = [[user("a"), assistant(said)] for said in ("A cat" + ending, "A cat")]
    given, alone = (tokenized(processor, row, return_assistant_tokens_mask=True) for row in rows)
    assert given["input_ids"] == alone["input_ids"] and given["assistant_masks"] == alone["assistant_masks"]


@pytest.mark.parametrize("said", ["A cat ##", "### Title\nA cat", "A ### cat", " A cat ", "#", "C# "])
def test_other_hashes_of_a_history_are_text(said):
    processor = make_processor()
    assert f"###Assistant: {said}###Human" in processor.apply_chat_template([user("a"), assistant(said), user("b")])


@pytest.mark.parametrize("template", ["llama2", "wrapped"])
def test_where_there_is_no_separator_a_history_stays_as_it_is(template):
    processor = make_processor(template_tokenizer(CHATML), chat_template=template)
    assert "A cat ###" in processor.apply_chat_template([user("a"), assistant("A cat ###"), user("b")])
    by_call = make_processor().apply_chat_template([user("a"), assistant("A ###"), user("b")], chat_template="llama2")
    assert "A ###" in by_call
