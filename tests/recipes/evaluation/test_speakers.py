"""Models that `minigpt4 evaluate` asks: of any kind, in batches that change nothing, choices by their likelihood."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes_minigpt4.evaluation.speakers import SpeakerOptions, open_speaker
from recipes_minigpt4.utils.errors import RecipeError


PROMPTS = ("Describe the image in detail.", "What is this?", "Which colour has the star in the middle of it all?")
WRITTEN = {
    "ours": "###Human: <Img><image></Img> What is this? ###Assistant: ",
    "llava": "user: <image>What is this? assistant:",
    "blip2": "Question: What is this? Answer:",
    "instructblip": "What is this?",
}
CPU = SpeakerOptions("cpu", "float32")


@pytest.fixture(params=WRITTEN)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(kind)


def told(speaker, questions: list) -> list:
    return speaker.answer(questions, [question.picture.open() for question in questions])


def test_each_kind_is_asked_in_its_own_words(kind: str, folder: str, ask_about: Callable) -> None:
    speaker = open_speaker(folder, CPU)
    (question,) = ask_about("What is this?")
    assert speaker.written(question).removeprefix("<s>").strip() == WRITTEN[kind].strip()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_reply_does_not_depend_on_the_batch(folder: str, ask_about: Callable, temperature: float) -> None:
    speaker = open_speaker(folder, CPU)
    questions = ask_about(*PROMPTS, temperature=temperature)
    together = told(speaker, questions)
    assert together == [told(speaker, [question])[0] for question in questions]
    assert len({said.text for said in together}) > 1 or not temperature


def test_a_reply_is_what_generate_gives(ours: str, ask_about: Callable) -> None:
    (question,) = ask_about("What is this?", max_new_tokens=12)
    model, processor = AutoModelForImageTextToText.from_pretrained(ours), AutoProcessor.from_pretrained(ours)
    content = [{"type": "image", "image": question.picture.open()}, {"type": "text", "text": question.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    (said,) = told(open_speaker(ours, CPU), [question])
    assert said.text == processor.post_process_image_text_to_text(ids)[0]
    assert said.text and said.finished is (ids.shape[1] < 12)


def test_choices_are_scored_by_their_likelihood_per_token(folder: str, ask_about: Callable) -> None:
    """As the model's own loss has it, which is computed for one choice at a time here."""
    choices = ("red", "a blue square", "In the top left there is a heart.")
    (question,) = ask_about("What is this?", choices=choices)
    speaker = open_speaker(folder, CPU)
    (said,) = told(speaker, [question])
    prompt, picture = speaker.written(question), question.picture.open()
    asked = speaker.inputs([prompt], [picture])
    first = asked["input_ids"]
    for choice, score in zip(choices, said.scores, strict=True):
        whole = prompt + ("" if prompt.endswith(" ") else " ") + choice
        inputs = speaker.inputs([whole], [picture])
        inputs.update({name: asked[name] for name in asked if name.startswith("qformer_")})  # which sees no answer
        ids = inputs["input_ids"][0]
        same = next(place for place in range(len(ids)) if place >= first.shape[1] or ids[place] != first[0, place])
        labels = inputs["input_ids"].clone()
        labels[0, :same] = -100
        with torch.no_grad():
            loss = speaker.model(**inputs, labels=labels).loss
        assert score == pytest.approx(-float(loss), abs=1e-4)
    assert len(set(said.scores)) == 3


def test_a_revision_tells_weights_apart(ours: str, tmp_path: Path) -> None:
    shutil.copytree(ours, copy := tmp_path / "copy")
    assert open_speaker(str(copy), CPU).revision == open_speaker(ours, CPU).revision
    weights = load_file(copy / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-6}, copy / "model.safetensors", {"format": "pt"})
    assert open_speaker(str(copy), CPU).revision != open_speaker(ours, CPU).revision


def test_a_model_without_a_chat_template_is_refused(llava: str, tmp_path: Path) -> None:
    shutil.copytree(llava, copy := tmp_path / "copy")
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(RecipeError, match=r"no chat template, so nobody knows how to ask it; save one as"):
        open_speaker(str(copy), CPU)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"There is no model at .*; name a folder, a repository, or openai:URL#MODEL"
    ):
        open_speaker(str(tmp_path), CPU)
