"""A chat, turn by turn: each reply is that of a fresh start, and nothing is computed that was computed before."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversation_case import (
    FORGETFUL,
    PIECES,
    TEMPLATES,
    WORDS,
    Chat,
    Heard,
    assert_same_text,
    counted,
    fresh,
    recorded,
    rendered,
    say,
    written,
)
from tiny_parts import LLAMA
from tiny_sentencepiece import DOORS, IS_TRANSFORMERS_4, write_folder
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, StoppingCriteria

from modeling_minigpt4 import Conversation, MiniGPT4Processor, Turn
from modeling_minigpt4.generation_minigpt4 import separator_pieces
from processing_minigpt4 import wrap_chat_template


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer.save_pretrained(folder / "bytes")
    byte_level = type(tokenizer).from_pretrained(folder / "bytes")  # processors teach theirs something
    return {"sentencepiece": DOORS["auto"](write_folder(folder, extra=PIECES)), "byte_level": byte_level}


@pytest.fixture(scope="module")
def make_chat(make_model: Callable, tokenizers: dict[str, Any], picture: Callable) -> Callable[..., Chat]:
    made: dict[Any, Chat] = {}

    def build(kind: str = "sentencepiece", template: str = "vicuna_v0", positions: int = 1024, **text: Any) -> Chat:
        key = (kind, template, positions, *text.items())
        if key not in made:
            fields = {"vocab_size": len(tokenizers[kind]), "max_position_embeddings": positions, **text}
            fields = {**LLAMA, **fields} if "model_type" in text else fields
            model = make_model(text=fields)
            chat = Chat(model, tokenizers[kind], template, picture)
            model.generation_config.update(eos_token_id=2, pad_token_id=0, max_new_tokens=WORDS, do_sample=False)
            if chat.ends_with_separator:
                pieces = separator_pieces(tokenizers[kind], "###")
                model.generation_config.update(separator="###", separator_pieces=pieces)
            made[key] = chat
        return made[key]

    return build


@pytest.fixture
def chat(make_chat: Callable) -> Chat:
    return make_chat()


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_a_second_turn_computes_what_is_new(kind: str, template: str, make_chat: Callable) -> None:
    chat = make_chat(kind, template)
    talk, red, first, second = chat.begin(), chat.picture("red"), Heard(), Heard()
    said = chat.spell("The cat") + chat.end()
    with counted(chat.model) as counts:
        assert say(talk, "What is this?", said, [red], streamer=first) == "The cat"
    assert (counts.pictures, counts.tokens) == (1, len(first.prompt) + len(said) - 1)
    assert first.prompt == written(chat, talk.messages[:1])

    with counted(chat.model) as counts:
        reply = talk.ask("What colour is it?", streamer=second)
    # LLaMA-2's template has no end of a reply between turns.
    kept = first.prompt + (said[:-1] if template == "llama2" else said)
    assert second.prompt[: len(kept)] == kept
    assert second.prompt[len(kept) :] == written(chat, talk.messages[:3])[len(kept) - len(second.prompt) :]
    assert_same_text(chat, second.prompt, rendered(chat, talk))
    new = len(second.prompt) - len(first.prompt) - (len(said) - 1)  # the last token was said, and not read
    assert (counts.pictures, counts.tokens) == (0, new + len(second.ids) - 1)
    assert fresh(chat, second.prompt, [red]) == second.ids
    assert reply == chat.processor.post_process_image_text_to_text([second.ids])[0]
    turns = [(turn.prompt_tokens, turn.computed_tokens, turn.new_tokens, turn.encoded_pictures) for turn in talk.turns]
    assert turns == [
        (len(first.prompt), len(first.prompt) + len(said) - 1, len(said), 1),
        (len(second.prompt), new + len(second.ids) - 1, len(second.ids), 0),
    ]
    assert all(isinstance(turn, Turn) and turn.seconds > 0 for turn in talk.turns)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[0]["content"][0]["image"] is red


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_replies_that_are_tokenized_anew_are_followed_by_those_of_a_fresh_start(
    kind: str, template: str, make_chat: Callable
) -> None:
    chat = make_chat(kind, template)
    talk, red = chat.begin(retokenize=True), chat.picture("red")
    for number, text in enumerate(("What?", "What colour is it?", "Why?")):
        with counted(chat.model) as counts, recorded(chat.model) as calls:
            talk.ask(text, [] if number else [red], num_beams=1 + number % 2)
        ((prompt, said),) = calls
        assert prompt == written(chat, talk.messages[:-1])
        assert fresh(chat, prompt, [red], num_beams=1 + number % 2) == said
        assert counts.pictures == (number == 0)
        assert counts.tokens == talk.turns[-1].computed_tokens
        assert number == 0 or counts.tokens < len(prompt) - len(written(chat, talk.messages[:1])) + 3 * WORDS


REPLIES = {
    "with_a_space": "The cat ###",
    "with_a_full_stop": "The cat.###",
    "cut_short": "The cat is",
    "cut_short_in_the_separator": "The cat##",
    "more_than_the_separator": "The cat####",
    "spaces_around": "  The cat  ",
    "lines": "The cat.\n\nThe dog.\n###",
    "nothing": "###",
    "spaces": "   ",
    "what_passes_for_a_picture": "a <image> of a cat###",
    "what_begins_a_picture": "a <imag of a cat###",
    "of_several_bytes": "The fü",
    "of_several_bytes_inside": "fü ü###",
    "bos": "The <s> cat###",
    "eos": "The cat</s>",
}


@pytest.mark.parametrize("text", [*REPLIES.values(), None], ids=[*REPLIES, "half_a_character"])
@pytest.mark.parametrize(("kind", "template"), [("sentencepiece", "vicuna_v0"), ("byte_level", "wrapped")])
def test_however_a_reply_is_spelt_the_model_sees_what_the_template_writes(
    kind: str, template: str, text: str | None, make_chat: Callable
) -> None:
    chat = make_chat(kind, template)
    talk, red, heard = chat.begin(), chat.picture("red"), Heard()
    said = chat.spell(text or "The caf")
    if text is None:
        vocabulary = chat.processor.tokenizer.get_vocab()
        half = vocabulary.get("<0xC3>", vocabulary.get("Ã"))
        said = [*said, half, *chat.spell(" cat is")]
    say(talk, "What is this?", said, [red])
    for question, images in (("What colour is it?", []), ("And this?", [chat.picture("blue")])):
        before, heard = len(talk.messages), Heard()
        with counted(chat.model) as counts:
            talk.ask(question, images, streamer=heard)
        assert_same_text(chat, heard.prompt, rendered(chat, talk))
        assert text is not None or half not in heard.prompt  # but what the replacement character is made of
        assert fresh(chat, heard.prompt, [red, *images]) == heard.ids
        assert counts.pictures == len(images) == talk.turns[-1].encoded_pictures
        assert (
            counts.tokens
            == talk.turns[-1].computed_tokens
            < len(heard.prompt) - len(written(chat, talk.messages[:1])) + 30
        )
        assert len(talk.messages) == before + 2


def test_what_a_template_leaves_out_of_earlier_replies_is_not_kept(make_chat: Callable) -> None:
    chat = make_chat("byte_level", "wrapped")
    processor = MiniGPT4Processor(
        image_processor=chat.processor.image_processor,
        tokenizer=chat.processor.tokenizer,
        image_token_id=chat.model.config.image_token_id,
        num_image_tokens=chat.model.config.num_image_tokens,
        chat_template=wrap_chat_template(chat.processor.tokenizer, FORGETFUL),
    )
    talk, red, heard = Conversation(chat.model, processor), chat.picture("red"), Heard()
    say(talk, "What is this?", [*chat.spell("It has ears.#so# The cat."), 2], [red])
    talk.ask("What colour is it?", streamer=heard)
    text = processor.apply_chat_template(talk.messages[:-1], add_generation_prompt=True)
    assert "ears" not in text
    assert_same_text(chat, heard.prompt, text)
    assert fresh(chat, heard.prompt, [red]) == heard.ids
    assert talk.turns[-1].computed_tokens < len(heard.prompt) / 1.3


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_of_later_turns(chat: Chat) -> None:
    talk, red, blue = chat.begin(), chat.picture("red"), chat.picture("blue")
    heard = Heard()
    for text, images, seen in (("What?", [], []), ("This?", [red], [red]), ("Both?", [blue, red], [red, blue, red])):
        heard = Heard()
        with counted(chat.model) as counts:
            talk.ask(text, images, streamer=heard)
        assert counts.pictures == talk.turns[-1].encoded_pictures == min(len(images), 1)  # red is known by then
        assert fresh(chat, heard.prompt, seen) == heard.ids
    assert talk.turns[-1].computed_tokens < len(heard.prompt) / 2


def test_another_picture_in_the_same_words_is_seen(chat: Chat) -> None:
    talk, heard = chat.begin(), [Heard(), Heard()]
    red, blue = chat.picture("red"), chat.picture("blue")
    for one, image in zip(heard, (red, blue), strict=True):
        talk.ask("What?", [image])
        talk.ask("What colour?", streamer=one)
        assert fresh(chat, one.prompt, [image]) == one.ids
        talk.undo(2)
    assert heard[0].ids != heard[1].ids


def test_pictures_come_in_many_forms_and_are_kept_as_pictures(chat: Chat, tmp_path: Path) -> None:
    chat.picture("red").save(tmp_path / "red.png")
    talk, named = chat.begin(), chat.begin()
    replies = talk.ask("What?", [chat.picture("red")]), named.ask("What?", str(tmp_path / "red.png"))
    assert replies[0] == replies[1]
    assert named.messages[0]["content"][0]["image"].size == chat.picture("red").size
    (tmp_path / "red.png").unlink()
    assert named.retry() == replies[1]


def test_a_typed_placeholder_is_text(chat: Chat) -> None:
    talk, red, heard = chat.begin(), chat.picture("red"), Heard()
    talk.ask("What is <image> here?", [red])
    talk.ask("And <image>?", streamer=heard)
    assert heard.prompt.count(chat.model.config.image_token_id) == chat.model.config.num_image_tokens
    assert fresh(chat, heard.prompt, [red]) == heard.ids


# ---- the way back ---------------------------------------------------------------------------------------------------


def test_undo_goes_back_to_any_turn(chat: Chat) -> None:
    talk, red, blue = chat.begin(system="Look."), chat.picture("red"), chat.picture("blue")
    questions = [("What?", [red]), ("What colour?", []), ("And this?", [blue]), ("Why?", [])]
    replies = [talk.ask(*question) for question in questions]
    said, turns = list(talk.messages), list(talk.turns)
    for count in (1, 2, 3, 4):
        talk.undo(count)
        assert talk.messages == said[: 1 + 2 * (4 - count)]
        assert talk.turns == turns[: 4 - count]
        with counted(chat.model) as counts:
            assert [talk.ask(*question) for question in questions[4 - count :]] == replies[4 - count :]
        assert counts.pictures == int(count > 2)  # one that another turn has come behind is seen anew
        assert counts.tokens < talk.turns[-1].prompt_tokens + 40
    with pytest.raises(ValueError, match=r"5 turns cannot be taken back, because there are 4\."):
        talk.undo(5)
    with pytest.raises(ValueError, match="0 turns cannot"):
        talk.undo(0)
    assert (len(talk.messages), len(talk.turns)) == (9, 4)


def test_retry_computes_the_reply_alone(chat: Chat) -> None:
    talk, red, heard, again = chat.begin(), chat.picture("red"), Heard(), Heard()
    with pytest.raises(ValueError, match="no question to ask once more"):
        talk.retry()
    talk.ask("What?", [red])
    talk.ask("What colour?", streamer=heard)
    torch.manual_seed(3)
    with counted(chat.model) as counts:
        talk.retry(do_sample=True, top_k=0, streamer=again)
    torch.manual_seed(3)
    assert fresh(chat, heard.prompt, [red], do_sample=True, top_k=0) == again.ids != heard.ids
    assert again.prompt == heard.prompt
    assert (counts.pictures, counts.tokens) == (0, len(again.ids))  # of the prompt its last token
    assert (len(talk.messages), len(talk.turns)) == (4, 2)
    reply = talk.retry()
    assert reply == chat.processor.post_process_image_text_to_text([heard.ids])[0]


def test_reset_begins_anew(chat: Chat) -> None:
    talk = chat.begin(system="Look closely.")
    first = talk.ask("What?", [chat.picture("red")])
    talk.ask("Why?")
    talk.reset()
    assert talk.turns == []
    assert talk.messages == [{"role": "system", "content": [{"type": "text", "text": "Look closely."}]}]
    assert talk.ask("What?", [chat.picture("red")]) == first
    assert "Look closely.###" in rendered(chat, talk)
    plain = chat.begin()
    plain.reset()
    assert plain.messages == []


def test_messages_that_somebody_changed_are_read_anew(chat: Chat) -> None:
    """So a chat that was saved can go on."""
    talk, red, heard = chat.begin(), chat.picture("red"), Heard()
    talk.ask("What?", [red])
    talk.messages[1]["content"][0]["text"] = "A dog"
    talk.ask("What colour?", streamer=heard)
    assert_same_text(chat, heard.prompt, rendered(chat, talk))
    assert fresh(chat, heard.prompt, [red]) == heard.ids
    loaded, other = chat.begin(), Heard()
    loaded.messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat"}]
    loaded.ask("Why?", streamer=other)
    assert "Human: What?###Assistant: A cat###Human: Why?" in rendered(chat, loaded)
    assert fresh(chat, other.prompt, []) == other.ids
    loaded.undo(2)
    assert loaded.messages == loaded.turns == []


# ---- what stops a reply ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 3])
def test_who_is_interrupted_has_said_nothing(stop: int, chat: Chat) -> None:
    talk, same = chat.begin(), chat.begin()
    for one in (talk, same):
        one.ask("What?", [chat.picture("red")])
    for call in (
        lambda heard: talk.ask("What colour is it?", [chat.picture("blue")], streamer=heard),
        lambda heard: talk.retry(streamer=heard),
    ):
        before = list(talk.messages), list(talk.turns)
        with pytest.raises(KeyboardInterrupt):
            call(Heard(stop))
        assert (talk.messages, talk.turns) == before
    assert talk.ask("Why?") == same.ask("Why?")
    assert talk.retry() == same.retry()


def test_a_step_that_breaks_off_between_two_layers_leaves_nothing(chat: Chat) -> None:
    talk, same, calls = chat.begin(), chat.begin(), []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    for one in (talk, same):
        one.ask("What?", [chat.picture("red")])
    hook = chat.model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.ask("What colour is it?")
    hook.remove()
    heard = [Heard(), Heard()]
    for one, into in zip((talk, same), heard, strict=True):
        one.ask("Why?", streamer=into)
    assert heard[0].ids == heard[1].ids == fresh(chat, heard[0].prompt, [chat.picture("red")])


class After(StoppingCriteria):
    """Stop behind so many tokens."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.count -= 1
        return torch.full((len(input_ids),), self.count <= 0, device=input_ids.device)


def test_a_reply_that_a_criterion_cuts_short_stays(chat: Chat) -> None:
    talk, red, heard = chat.begin(), chat.picture("red"), Heard()
    said = chat.spell("The cat is red.")
    assert say(talk, "What?", said, [red], stopping_criteria=[After(3)], max_new_tokens=9) == "The cat is"
    talk.ask("And?", streamer=heard)
    assert "Assistant: The cat is###Human: And?###" in rendered(chat, talk)
    assert_same_text(chat, heard.prompt, rendered(chat, talk))
    assert fresh(chat, heard.prompt, [red]) == heard.ids


# ---- options of generate --------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 4},
    "drawn_beams": {"num_beams": 3, "do_sample": True},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "stop_strings": {"stop_strings": ["a", "e"]},
    "own_config": {"generation_config": {"num_beams": 2, "max_new_tokens": 5}},
    "without_cache": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "static_beams": {"cache_implementation": "static", "num_beams": 2},
    "looked_up": {"prompt_lookup_num_tokens": 2},
}
COMPUTED_ANEW = ("without_cache", "static", "static_beams", "looked_up")


@pytest.mark.parametrize("name", WAYS)
def test_every_way_to_generate(name: str, make_chat: Callable) -> None:
    """Turns of each kind, with a new picture and without, and one of the plain kind behind them."""
    chat = make_chat("byte_level", "vicuna_v0")
    talk, red, blue = chat.begin(), chat.picture("red"), chat.picture("blue")
    seen: list[Any] = []
    for number, (text, images) in enumerate([("What?", [red]), ("Why?", []), ("This?", [blue]), ("So?", [])]):
        given = dict(WAYS[name]) if number < 3 else {}
        if "generation_config" in given:
            fields = {"eos_token_id": 2, "pad_token_id": 0, **given["generation_config"]}
            given["generation_config"] = GenerationConfig(**fields)
        seen += images
        torch.manual_seed(number)
        with recorded(chat.model) as calls, counted(chat.model) as counts:
            reply = talk.ask(text, images, **given)
        ((prompt, said),) = calls
        assert_same_text(chat, prompt, rendered(chat, talk))
        torch.manual_seed(number)
        more = {"tokenizer": chat.processor.tokenizer} if "stop_strings" in given else {}
        assert fresh(chat, prompt, seen, **given, **more) == said
        assert reply == chat.processor.post_process_image_text_to_text([said])[0]
        assert counts.pictures == len(images) == talk.turns[-1].encoded_pictures
        if name != "looked_up":
            assert counts.tokens == talk.turns[-1].computed_tokens
        if number and name not in COMPUTED_ANEW:
            beams = 4 if "beams" in name or name == "own_config" else 1
            assert counts.tokens < len(prompt) - 60 + beams * WORDS


def test_a_turn_that_is_computed_anew_lets_the_earlier_ones_be(chat: Chat) -> None:
    talk, red, heard = chat.begin(), chat.picture("red"), Heard()
    talk.ask("What?", [red])
    talk.ask("What colour is it?", cache_implementation="static")
    talk.ask("Why?", streamer=heard)
    assert fresh(chat, heard.prompt, [red]) == heard.ids
    assert talk.turns[2].computed_tokens < talk.turns[2].prompt_tokens - talk.turns[0].prompt_tokens + 2 * WORDS


@pytest.mark.parametrize("seeing", [False, True])
def test_an_assistant_may_have_eyes_of_its_own(seeing: bool, chat: Chat, make_model: Callable) -> None:
    config = chat.model.config.text_config
    text = {"vocab_size": config.vocab_size, "max_position_embeddings": 1024}
    blind = LlamaForCausalLM(LlamaConfig(**{**LLAMA, **text})).eval()
    assistant = make_model(text=text, seed=1) if seeing else blind
    talk, same = chat.begin(), chat.begin()
    for question in (("What?", [chat.picture("red")]), ("Why?", [])):
        with counted(chat.model) as counts:
            reply = talk.ask(*question, assistant_model=assistant)
        assert reply == same.ask(*question)
        assert counts.pictures == talk.turns[-1].encoded_pictures == 1
    heard = Heard()
    talk.ask("And?", streamer=heard)
    assert fresh(chat, heard.prompt, [chat.picture("red")]) == heard.ids


@pytest.mark.parametrize("window", [7, 165, 1000])
@pytest.mark.parametrize("model_type", ["mistral", "gemma2"])
def test_a_language_model_that_forgets(model_type: str, window: int, make_chat: Callable) -> None:
    """Layers that see a window only have let go of what a next turn would need, once their window is full."""
    fields = {"model_type": model_type, "sliding_window": window, "head_dim": 8}
    chat = make_chat("byte_level", "vicuna_v0", **fields)
    talk, red, seen, cheap = chat.begin(), chat.picture("red"), [], []
    for number in range(4):
        given = {"num_beams": 2} if number == 2 else {}
        with counted(chat.model) as counts, recorded(chat.model) as calls:
            talk.ask("Why?", [red] if number in (0, 2) else [], **given)
        seen += [red] if number in (0, 2) else []
        ((prompt, said),) = calls
        assert fresh(chat, prompt, seen, **given) == said
        assert counts.pictures == (number == 0)
        assert counts.tokens == talk.turns[-1].computed_tokens
        cheap.append(counts.tokens < len(prompt))
    assert cheap == [False, window > 7, window > 165, window > 165], [turn.prompt_tokens for turn in talk.turns]
    with pytest.raises(KeyboardInterrupt):
        talk.ask("Why is it so?", streamer=Heard(2))
    talk.ask("Why?", streamer=(heard := Heard()))
    assert fresh(chat, heard.prompt, seen) == heard.ids


def test_the_window_of_the_language_model(make_chat: Callable) -> None:
    chat = make_chat("sentencepiece", "vicuna_v0", positions=110)
    talk, red = chat.begin(), chat.picture("red")
    talk.ask("What?", [red])
    said, turns = list(talk.messages), list(talk.turns)
    for question in ("What is it like? " * 9, "word " * 500):
        with counted(chat.model) as counts, pytest.raises(ValueError, match=r"The chat has .* 110 positions") as error:
            talk.ask(question, [chat.picture("blue")])
        assert "`undo`" in str(error.value)
        assert (counts.pictures, counts.tokens) == (0, 0)
        assert (talk.messages, talk.turns) == (said, turns)
    config = GenerationConfig(max_new_tokens=500, eos_token_id=999, pad_token_id=0, separator="")
    for options in ({"generation_config": config}, {"max_new_tokens": 500, "eos_token_id": 999, "pad_token_id": 0}):
        talk.ask("Why?", **options)
        assert talk.turns[-1].prompt_tokens + talk.turns[-1].new_tokens == 110
        talk.undo()
    assert config.max_new_tokens == 500
    talk.ask("Why?")
    length = talk.turns[-1].prompt_tokens + 3
    talk.retry(max_length=length, eos_token_id=999)
    assert talk.turns[-1].prompt_tokens + talk.turns[-1].new_tokens == length


@pytest.mark.skipif(not IS_TRANSFORMERS_4, reason="transformers 5 has no slow tokenizers of SentencePiece")
def test_a_tokenizer_that_cannot_tell_characters(make_model: Callable, picture: Callable, tmp_path: Path) -> None:
    tokenizer = DOORS["slow"](write_folder(tmp_path)) if IS_TRANSFORMERS_4 else None
    chat = Chat(make_model(text={"vocab_size": len(tokenizer)}), tokenizer, "vicuna_v0", picture)
    talk, red, blue = chat.begin(), chat.picture("red"), chat.picture("blue")
    for text, images, seen in (("What?", [red], [red]), ("Why?", [], [red]), ("This?", [blue], [red, blue])):
        heard = Heard()
        with counted(chat.model) as counts:
            talk.ask(text, images, streamer=heard, max_new_tokens=4, do_sample=False)
        assert heard.prompt == written(chat, talk.messages[:-1])
        assert fresh(chat, heard.prompt, seen, max_new_tokens=4) == heard.ids
        assert counts.pictures == len(images)
    assert counts.tokens < len(heard.prompt) / 2
    talk.undo(3)
    talk.ask("What?", [blue], streamer=(other := Heard()), max_new_tokens=4, do_sample=False)
    assert fresh(chat, other.prompt, [blue], max_new_tokens=4) == other.ids


# ---- who asks, and what is refused ----------------------------------------------------------------------------------


def test_many_conversations_on_one_model(chat: Chat) -> None:
    colours = ("red", "blue", "green", "yellow")

    def speak(colour: str) -> list[str]:
        talk = chat.begin()
        replies = [talk.ask(f"What is {colour}?", [chat.picture(colour)]), talk.ask("Why?"), talk.retry(num_beams=2)]
        talk.undo()
        return [*replies, talk.ask("And this?", [chat.picture("black")])]

    found: dict[str, Any] = {}
    threads = [threading.Thread(target=lambda one=one: found.update({one: speak(one)})) for one in colours]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {colour: speak(colour) for colour in colours}
    assert len(set(map(tuple, found.values()))) == 4


def test_what_is_refused_changes_nothing(chat: Chat, tmp_path: Path) -> None:
    talk = chat.begin()
    talk.ask("What?", [chat.picture("red")])
    said, turns = list(talk.messages), list(talk.turns)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"text": ""}, "There is no question"),
        ({"text": "a", "num_return_sequences": 2}, "goes on from one reply, so `num_return_sequences` cannot be 2"),
        ({"text": "a", "generation_config": GenerationConfig(num_beams=2, num_return_sequences=2)}, "cannot be 2"),
        ({"text": "a", "input_ids": torch.tensor([[1]])}, "gives `input_ids` to the model itself"),
        ({"text": "a", "past_key_values": None}, "gives `past_key_values` to the model itself"),
        ({"text": "a", "images": [str(tmp_path / "none.png")]}, "none.png"),
        ({"text": "a", "streamer": Heard(), "num_beams": 2}, "`streamer` hears one reply, and not 2 beams"),
    ]
    with counted(chat.model) as counts:
        for given, sentence in cases:
            with pytest.raises(ValueError, match=sentence):
                talk.ask(**given)
            assert (talk.messages, talk.turns) == (said, turns)
    assert counts.tokens == 0
    talk.ask("Why?")


def test_models_and_processors_that_do_not_fit(chat: Chat, tokenizers: dict[str, Any]) -> None:
    class Plain:
        image_token_id, num_image_tokens, chat_template = chat.processor.image_token_id, 4, None

    with pytest.raises(ValueError, match=r"no chat template; .*vicuna_v0"):
        Conversation(chat.model, Plain())
    for name, value in (("image_token_id", 5000), ("num_image_tokens", 9)):
        processor = MiniGPT4Processor(chat.processor.image_processor, tokenizers["byte_level"], **{
            "image_token_id": chat.model.config.image_token_id, "num_image_tokens": 4, name: value,
        }, chat_template="vicuna_v0")  # fmt: skip
        with pytest.raises(ValueError, match=rf"`{name}` is {value}, but the model's is"):
            Conversation(chat.model, processor)
    with pytest.raises(ValueError, match="the model is a LlamaModel"):
        Conversation(chat.model.model.language_model, chat.processor)


def test_conversations_do_not_travel_with_a_checkpoint(chat: Chat, tmp_path: Path) -> None:
    chat.model.save_pretrained(tmp_path, full=True)
    files = {path.name for path in tmp_path.glob("*.py")}
    assert "modeling_minigpt4.py" in files
    assert not files & {"conversation_minigpt4.py", "memory_minigpt4.py", "transcript_minigpt4.py"}
