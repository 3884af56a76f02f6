"""What other people's harnesses get from us, without them: tasks, scenes, replies, and how these are read."""

import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.evaluation.harness import TASKS, main
from recipes_minigpt4.evaluation.harness import scenes as rows
from recipes_minigpt4.evaluation.harness.chats import chat_about, generation_options, losses, reply
from recipes_minigpt4.evaluation.harness.choices import (
    judge,
    pictures,
    question,
    read_choice,
    right_letter,
    with_picture,
)
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE, metrics
from recipes_minigpt4.tiny.demo import INSTRUCTION, MAX_NEW_TOKENS
from recipes_minigpt4.tiny.scenes import evaluation_scenes


FILES = [file for folder in TASKS.values() for file in sorted(folder.glob("*.yaml"))]
GREEDY = {"do_sample": False, "max_new_tokens": 40}


# ---- tasks ----------------------------------------------------------------------------------------------------------


class TaskLoader(yaml.SafeLoader):
    """Reads `!function MODULE.NAME` as both harnesses do."""


def function(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Callable:
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


TaskLoader.add_constructor("!function", function)


@pytest.mark.parametrize("harness", TASKS)
def test_the_command_prints_the_folder_of_tasks(harness: str, capsys: pytest.CaptureFixture) -> None:
    assert main([harness]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == TASKS[harness] and (folder / "minigpt4_scenes.yaml").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_task_is_named_as_its_file_and_finds_its_functions(file: Path) -> None:
    task = yaml.load(file.read_text(encoding="utf-8"), TaskLoader)
    if "include" in task:
        task = {**yaml.load((file.parent / task["include"]).read_text(encoding="utf-8"), TaskLoader), **task}
    assert task["task"] == file.stem and all(entry["aggregation"] for entry in task["metric_list"])
    if "scenes" in file.stem:
        options = task["generation_kwargs"]
        assert options.get("max_gen_toks", options.get("max_new_tokens")) == MAX_NEW_TOKENS
        assert task["doc_to_text"].removeprefix("<image>") == INSTRUCTION
        assert [entry["metric"] for entry in task["metric_list"]] == list(metrics.SCORES)
    if file.parent.name == "lm_eval_tasks":  # a server would read the placeholder as a word
        about = {"question": "What?", "choices": ["a", "b"]}
        text = task["doc_to_text"] if "scenes" in file.stem else task["doc_to_text"](about)
        assert text.count("<image>") == (0 if file.stem.endswith("_served") else 1)


# ---- scenes ---------------------------------------------------------------------------------------------------------


def test_scenes_are_the_demos_and_their_numbers_too(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["scenes", str(tmp_path / "new" / "scenes.parquet"), "--scenes", "6"]) == 0
    assert capsys.readouterr().out.endswith("scenes.parquet: 6 scenes\n")
    found = datasets.Dataset.from_parquet(str(tmp_path / "new" / "scenes.parquet"), cache_dir=str(tmp_path))
    expected = evaluation_scenes(6, held_out=2)
    assert [row["image"].tobytes() for row in found] == [image.tobytes() for image, _ in expected]
    scenes = [scene for _, scene in expected]
    assert [rows.read_scene(row["scene"]) for row in found] == scenes
    replies = [
        "A red circle in the centre.",
        "Nothing",
        "",
        "A blue heart in the top left. A blue heart.",
        "One.",
        "a",
    ]
    judged = [rows.judge(doc, [text]) for doc, text in zip(found, replies, strict=True)]
    scores = {name: getattr(rows, name)([one[name] for one in judged]) for name in metrics.SCORES}
    assert scores == metrics.score(replies, scenes)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["scenes", "{}/file/scenes.parquet"], "cannot be written"),
        (["scenes", "{}/s.parquet", "--scenes", "0"], "'0' is not a whole number from 1 on"),
        (["lm-evaluation"], "invalid choice"),
        ([], "required"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert main([text.format(tmp_path) for text in arguments]) == 2
    told = capsys.readouterr().err
    assert sentence in told and told.startswith("harness: ") and told.count("\n") == 1 and told.endswith(".\n")


def test_it_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["harness", "lm_eval"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("recipes_minigpt4.evaluation.harness", run_name="__main__")
    assert ended.value.code == 0 and capsys.readouterr().out.strip() == str(TASKS["lm_eval"])


# ---- multiple choice ------------------------------------------------------------------------------------------------

DOC = {"question": "What is on the plate?", "choices": ["dog", "hot dog", "cat", "A"], "correct_choice_idx": 1}


def test_the_question_has_its_choices_with_letters() -> None:
    assert question(DOC) == (
        "What is on the plate?\n(A) dog\n(B) hot dog\n(C) cat\n(D) A\nAnswer with the letter of the right choice."
    )
    assert with_picture(DOC) == "<image>" + question(DOC) and right_letter(DOC) == "B"


def test_a_picture_may_stand_there_as_a_path(tmp_path: Path) -> None:
    ((image, _),) = evaluation_scenes(1, 0)
    image.save(tmp_path / "0.png")
    for given in (image, str(tmp_path / "0.png")):
        assert [one.tobytes() for one in pictures({"image": given})] == [image.tobytes()]
    with pytest.raises(ValueError, match=r"No image could be read from .*1\.png"):
        pictures({"image": str(tmp_path / "1.png")})


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("B", 1), ("b.", 1), ("(B)", 1), (" B ", 1), ("B) hot dog", 1), ("B. It is long.", 1), ("(B), not a cat", 1),
        ("The answer is B.", 1), ("The answer is B because of the mustard.", 1), ("Answer: (C)", 2),
        ("I choose option C", 2), ("The answer is A.", 0),
        ("hot dog", 1), ("It is a Hot Dog.", 1), ("dog", 0), ("A dog is on the plate.", 0), ("The answer is a cat", 2),
        ("The answer is A cat.", 2),
        ("", None), ("I cannot tell.", None), ("cats", None), ("E", None), ("(B) or (C)", None),
        ("a dog and a cat", None), ("A dog beside a hot dog", None),
    ],
)  # fmt: skip
def test_a_choice_is_read_and_never_guessed(said: str, expected: int | None) -> None:
    choices = ["dog", "hot dog", "cat", "plate of rice"]
    assert read_choice(said, choices) == expected
    found = judge({"choices": choices, "correct_choice_idx": 1}, [said])
    assert found == {"acc": float(expected == 1), "unread": float(expected is None)}


def test_a_request_that_failed_is_no_wrong_answer() -> None:
    reply = "[LMMS_EVAL_REQUEST_FAILED after 5 retries] Error code: 404"
    for judged, doc in ((judge, {"choices": ["red"], "correct_choice_idx": 0}), (rows.judge, {"scene": "{}"})):
        with pytest.raises(RuntimeError, match="has failed, so there are no numbers"):
            judged(doc, [reply])


# ---- replies and likelihoods ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker() -> tuple[Any, Any]:
    """The frozen parts of the embedded world with a projection that has learned nothing, and their processor."""
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        vision=VISION_BACKBONE, qformer=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE
    ).eval()
    processor = MiniGPT4Processor.from_backbones(
        vision=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE, config=model.config
    )
    return model, processor


@pytest.fixture(scope="module")
def chats() -> list:
    """Of different lengths: a picture, two pictures, and text alone."""
    images = [image for image, _ in evaluation_scenes(3, 1)]
    return [
        chat_about(images[:1], "Describe this image in detail."),
        chat_about(images[1:], "What do these have in common?"),
        chat_about([], "What is a square?"),
    ]


def by_hand(speaker: tuple, chat: list, answer: str) -> tuple[float, bool]:
    """Mean loss of an answer token by token, in a forward pass of its own for each."""
    model, processor = speaker
    inputs = processor.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    lost, greedy = [], True
    for token in processor.tokenizer(answer, add_special_tokens=False)["input_ids"]:
        with torch.inference_mode():
            scores = model(**inputs).logits[0, -1].log_softmax(-1)
        lost.append(-float(scores[token]))
        greedy = greedy and int(scores.argmax()) == token
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return sum(lost) / len(lost), greedy


def test_replies_of_a_batch_are_those_of_single_chats(speaker: tuple, chats: list) -> None:
    together = reply(*speaker, chats, GREEDY)
    assert together == [reply(*speaker, [chat], GREEDY)[0] for chat in chats]
    assert all(together) and len(set(together)) == 3 and not any("###" in text for text in together)


def test_a_reply_ends_before_the_texts_that_a_task_names(speaker: tuple, chats: list) -> None:
    (whole,) = reply(*speaker, chats[2:], GREEDY)
    word = whole.split()[2]
    assert reply(*speaker, chats[2:], {**GREEDY, "until": ["\n\n", word, ""]}) == [whole.split(word)[0]]
    assert reply(*speaker, chats[2:], {**GREEDY, "until": word}) == [whole.split(word)[0]]


def test_a_video_is_refused_in_a_sentence(speaker: tuple) -> None:
    content = [{"type": "video", "video": "film.mp4"}, {"type": "text", "text": "What happens?"}]
    with pytest.raises(ValueError, match="video") as error:
        reply(*speaker, [[{"role": "user", "content": content}]], GREEDY)
    assert "\n" not in str(error.value)


def test_likelihoods_are_those_of_the_tokens_one_by_one(speaker: tuple, chats: list) -> None:
    (greedy,) = reply(*speaker, chats[2:], {"do_sample": False, "max_new_tokens": 5})
    pairs = [(chats[0], "a red circle"), (chats[1], "shapes"), (chats[2], greedy), (chats[2], "A circle is round.")]
    found = losses(*speaker, [chat for chat, _ in pairs], [f" {answer}\n" for _, answer in pairs])
    expected = [by_hand(speaker, list(chat), answer) for chat, answer in pairs]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    assert [best for _, best in found] == [best for _, best in expected] == [False, False, True, False]
    with pytest.raises(ValueError, match="is empty; take the choice out"):
        losses(*speaker, chats[:1], [" "])


@pytest.mark.parametrize(
    ("asked", "taken"),
    [
        ({}, {"do_sample": False}),
        ({"temperature": 0, "top_p": None, "num_beams": 1, "image_aspect_ratio": "original"},
         {"do_sample": False, "num_beams": 1}),
        ({"do_sample": True, "temperature": 0}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"do_sample": False}),
        ({"temperature": 0.7, "top_p": 0.9}, {"do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True, "max_new_tokens": 8}, {"do_sample": True, "max_new_tokens": 8}),
        ({"top_p": 0.9, "until": ["\n"]}, {"do_sample": False, "until": ["\n"]}),
    ],
)  # fmt: skip
def test_what_a_task_asks_of_generate(asked: dict, taken: dict) -> None:
    assert generation_options(asked) == taken
