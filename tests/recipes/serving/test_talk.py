"""One person's chat with one model: pieces, draws, stops, errors, several at once, and models of other kinds."""

import importlib.util
import json
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image

from recipes_minigpt4.evaluation.questions import Picture, Question, Sampling
from recipes_minigpt4.serving import talk as talk_module
from recipes_minigpt4.serving.models import ModelOptions, Talker, check_labels, open_talker, split_label
from recipes_minigpt4.serving.settings import Draws, ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE
from recipes_minigpt4.utils.errors import RecipeError


GREEDY = ReplySettings(temperature=0, repetition_penalty=1.0, max_new_tokens=8)
DRAWN = ReplySettings(max_new_tokens=8, seed=3)
BEAMS = ReplySettings(temperature=0, num_beams=3, repetition_penalty=1.0, max_new_tokens=8)
KINDS = ("ours", "llava", "blip2", "instructblip")
ASKED = "Describe the image in detail."


def said(talk: Talk) -> list[str]:
    """The texts of a chat."""
    return [part["text"] for message in talk.conversation.messages for part in message["content"] if "text" in part]


def reply(talk: Talk, settings: ReplySettings, picture: Image.Image, text: str = ASKED) -> str:
    return "".join(talk.ask(text, [picture], settings))


# ---- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, BEAMS], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_comes_in_pieces_and_is_what_the_model_says(kind, settings, talkers, scenes) -> None:
    talk = Talk(talkers[kind])
    pieces = list(talk.ask(ASKED, scenes[:1], settings))
    speaker, question = talkers[kind].speaker, Question(Picture("", scenes[0]), ASKED)
    sampling = Sampling(8, settings.num_beams)
    ((expected, _),) = speaker.complete([speaker.written(question)], scenes[:1], sampling)
    assert "".join(pieces) == expected == said(talk)[-1]
    assert len(pieces) == 1 if settings.num_beams > 1 else len(pieces) > 3
    (turn,) = talk.conversation.turns
    assert 1 <= turn.new_tokens <= 8 and turn.encoded_pictures == 1 and turn.seconds > 0
    assert turn.prompt_tokens < turn.computed_tokens


# ---- draws ----------------------------------------------------------------------------------------------------------


def test_draws_follow_temperature_and_share() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -6.0]).log_softmax(-1)
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.8)):
        draws = Draws(ReplySettings(temperature=temperature, top_p=top_p, seed=0))
        drawn = draws(None, logits.repeat(20_000, 1)).argmax(-1)
        found = torch.bincount(drawn, minlength=5) / 20_000
        expected = (logits / temperature).softmax(-1)
        if top_p < 1:  # the two likeliest are 0.66 and 0.24
            expected = torch.where(expected > 0.2, expected, 0.0)
            expected, never = expected / expected.sum(), expected == 0
            assert not found[never].any()
        assert (found - expected).abs().max() < 0.015


@pytest.mark.parametrize("kind, num_beams", [("ours", 1), ("ours", 2), ("blip2", 1)])
def test_a_seed_gives_the_same_reply_while_others_draw(kind, num_beams, talkers, scenes) -> None:
    def draw(seed: int | None) -> str:
        settings = ReplySettings(temperature=3.0, top_p=1.0, num_beams=num_beams, max_new_tokens=6, seed=seed)
        return reply(Talk(talkers[kind]), settings, scenes[0])

    alone = [draw(seed) for seed in (1, 2)]
    assert alone[0] != alone[1] and alone == [draw(seed) for seed in (1, 2)]
    with ThreadPoolExecutor(4) as people:
        assert list(people.map(draw, (1, 2, None, 1)))[:2] == alone
    assert draw(None) != draw(None)


# ---- stops ----------------------------------------------------------------------------------------------------------


def stop_by_event(talk: Talk, picture: Image.Image) -> str:
    stop, shown = threading.Event(), ""
    for number, piece in enumerate(talk.ask(ASKED, [picture], LONG, stop)):
        shown += piece
        if number == 2:
            stop.set()
    return shown


def stop_by_closing(talk: Talk, picture: Image.Image) -> str:
    pieces = talk.ask(ASKED, [picture], LONG)
    shown = "".join(next(pieces) for _ in range(3))
    pieces.close()
    return shown


def stop_by_ctrl_c(talk: Talk, picture: Image.Image) -> str:
    shown = ""
    with pytest.raises(KeyboardInterrupt):
        for number, piece in enumerate(talk.ask(ASKED, [picture], LONG)):
            shown += piece
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
    return shown


LONG = ReplySettings(temperature=0, max_new_tokens=200, repetition_penalty=1.5)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("stop", [stop_by_event, stop_by_closing, stop_by_ctrl_c])
@pytest.mark.parametrize("kind", ["ours", "llava"])
def test_a_stopped_reply_stays_as_far_as_it_came(kind, stop, talkers, scenes, monkeypatch) -> None:
    slowed = talk_module.Stopped.__call__

    def slowly(criterion, *args, **kwargs):
        criterion.event.wait(0.05)
        return slowed(criterion, *args, **kwargs)

    monkeypatch.setattr(talk_module.Stopped, "__call__", slowly)
    talk = Talk(talkers[kind])
    shown = stop(talk, scenes[0])
    assert said(talk)[-1].startswith(shown) and 0 < len(shown) <= len(said(talk)[-1])
    assert talk.conversation.turns[0].new_tokens < 30
    if stop is stop_by_event:
        assert said(talk)[-1] == shown
    monkeypatch.undo()
    again = "".join(talk.ask("What else?", [], GREEDY))
    assert [message["role"] for message in talk.conversation.messages] == ["user", "assistant"] * 2
    assert said(talk)[-1] == again


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("kind", ["ours", "llava", "blip2"])
def test_an_error_is_raised_where_it_is_asked_and_changes_nothing(
    kind, num_beams, talkers, scenes, monkeypatch
) -> None:
    talk = Talk(talkers[kind])
    reply(talk, GREEDY, scenes[0])
    before, calls = said(talk), []

    def fail(criterion, input_ids, scores, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return torch.zeros(len(input_ids), dtype=torch.bool)

    monkeypatch.setattr(talk_module.Stopped, "__call__", fail)
    settings = ReplySettings(temperature=0, max_new_tokens=8, num_beams=num_beams)
    for asking in (lambda: talk.ask("And now?", [], settings), lambda: talk.retry(settings)):
        calls.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            list(asking())
        assert said(talk) == before and len(talk.conversation.turns) == 1
    monkeypatch.undo()
    assert "".join(talk.retry(GREEDY)) == before[-1]


def test_a_chat_that_does_not_fit_is_told(talkers, scenes) -> None:
    talk = Talk(talkers["ours"])
    with pytest.raises(ValueError, match="512"):
        reply(talk, GREEDY, scenes[0], "shape " * 600)
    assert talk.conversation.messages == []
    with pytest.raises(ValueError, match="no question"):
        list(talk.retry(GREEDY))


# ---- several at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ours", "llava"])
def test_talks_in_threads_give_what_they_give_alone(kind, talkers, scenes) -> None:
    def chat(number: int) -> list[str]:
        talk = Talk(talkers[kind])
        reply(talk, DRAWN if number % 2 else GREEDY, scenes[number])
        "".join(talk.ask("Where is it?", [], GREEDY))
        return said(talk)

    alone = [chat(number) for number in range(4)]
    with ThreadPoolExecutor(4) as people:
        assert list(people.map(chat, range(4))) == alone
    assert len({text[1] for text in alone}) > 1


# ---- models of other kinds ------------------------------------------------------------------------------------------


def test_another_chat_model_sees_the_whole_chat_and_all_pictures(talkers, scenes) -> None:
    talk = Talk(talkers["llava"])
    first = reply(talk, GREEDY, scenes[0])
    second = reply(talk, GREEDY, scenes[1], "And this?")
    speaker = talkers["llava"].speaker
    text = f"user: <image>{ASKED} assistant: {first} user: <image>And this? assistant:"
    inputs = speaker.on_device(speaker.processor(text=[text], images=[scenes[:2]], return_tensors="pt"))
    ids = speaker.model.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert second == speaker.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert talk.conversation.turns[1].encoded_pictures == 2
    assert talk.conversation.turns[1].prompt_tokens == inputs["input_ids"].shape[1]
    talk.conversation.undo()
    assert said(talk) == [ASKED, first]
    with pytest.raises(ValueError, match="2 turns"):
        talk.conversation.undo(2)
    talk.conversation.reset()
    assert talk.conversation.messages == [] and talk.conversation.turns == []


@pytest.mark.parametrize("kind", ["blip2", "instructblip"])
def test_blip2_answers_each_question_alone_about_the_newest_picture(kind, talkers, scenes) -> None:
    def alone(picture: Image.Image, text: str) -> str:
        return reply(Talk(talkers[kind]), GREEDY, picture, text)

    talk = Talk(talkers[kind])
    with pytest.raises(ValueError, match="pictures only"):
        list(talk.ask("What is it?", [], GREEDY))
    reply(talk, GREEDY, scenes[0])
    assert reply(talk, GREEDY, scenes[1], "Which shape?") == alone(scenes[1], "Which shape?")
    assert "".join(talk.ask("Where?", [], GREEDY)) == alone(scenes[1], "Where?")
    assert len(talk.conversation.turns) == 3
    with pytest.raises(RecipeError, match="each question alone"):
        Talk(talkers[kind], system="Be brief.")


@pytest.mark.parametrize("kind", ["llava", "blip2", "instructblip"])
def test_a_mark_of_a_picture_that_somebody_types_is_refused(kind, talkers, scenes) -> None:
    talk = Talk(talkers[kind])
    with pytest.raises(ValueError, match="This model takes <image> for the place of a picture; ask without it"):
        reply(talk, GREEDY, scenes[0], "What is <image> here?")
    assert talk.conversation.messages == []


def test_words_in_front_of_a_chat_reach_the_model(talkers, scenes) -> None:
    plain, told = Talk(talkers["llava"]), Talk(talkers["llava"], system="Give one word.")
    for talk in (plain, told):
        reply(talk, GREEDY, scenes[0])
    difference = told.conversation.turns[0].prompt_tokens - plain.conversation.turns[0].prompt_tokens
    assert difference > 3
    told.conversation.reset()
    assert said(told) == ["Give one word."]


# ---- loading --------------------------------------------------------------------------------------------------------


def test_a_model_has_a_label_and_says_what_it_is(talkers: dict[str, Talker], ours: str) -> None:
    assert talkers["ours"].label == "ours" and split_label(f"mine={ours}") == ("mine", ours)
    assert split_label("you/it@main") == ("it@main", "you/it@main")
    about = talkers["ours"].about
    parts = "vision encoder blip2, Q-Former blip2, language model llama"
    assert about.startswith(f"ours: {ours} on {parts}; float32 on cpu, loaded in ")
    assert "a blip-2;" in talkers["blip2"].about
    with pytest.raises(RecipeError, match="Two models are called ours; write LABEL="):
        check_labels([ours, "runs/ours"])


def test_what_cannot_be_loaded_is_told(ours: str, blip2: str, tmp_path: Path) -> None:
    for name, options, told in (
        (str(tmp_path / "no"), ModelOptions(device="cpu"), r"\(there is no such folder\); name a folder or a repo"),
        ("openai:http://127.0.0.1:1/v1#x", ModelOptions(), "is a server"),
        (ours, ModelOptions(device="nowhere"), "--device nowhere is not there"),
        (ours, ModelOptions(device="cpu", quantization="int3"), "no quantization 'int3'"),
        (blip2, ModelOptions(device="cpu", quantization="torchao-int8"), "is a blip-2; leave it out"),
    ):
        with pytest.raises(RecipeError, match=told) as caught:
            open_talker(name, options)
        assert "\n" not in str(caught.value)


def test_parts_that_have_moved_are_named(ours: str, talkers, scenes, tmp_path: Path) -> None:
    folder = shutil.copytree(ours, tmp_path / "moved")
    config = json.loads((folder / "config.json").read_text())
    config["backbones"]["language_model"]["name_or_path"] = "/gone/llama"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match=r"/gone/llama cannot be opened.* or with --language_model"):
        open_talker(str(folder), ModelOptions(device="cpu", dtype="float32"))
    moved = ModelOptions("cpu", "float32", backbones={"language_model": str(LANGUAGE_BACKBONE)})
    assert reply(Talk(open_talker(str(folder), moved)), GREEDY, scenes[0]) == reply(
        Talk(talkers["ours"]), GREEDY, scenes[0]
    )


@pytest.mark.parametrize(
    "name, package", [("torchao-int8", "torchao"), ("bnb-int8", "bitsandbytes"), ("bnb-nf4", "bitsandbytes")]
)
def test_a_quantized_model_talks(name: str, package: str, ours: str, scenes) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    talker = open_talker(ours, ModelOptions(device="cpu", dtype="float32", quantization=name))
    assert talker.speaker.model.is_language_model_quantized
    assert reply(Talk(talker), GREEDY, scenes[0])
