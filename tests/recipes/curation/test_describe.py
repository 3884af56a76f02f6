"""Descriptions in two turns: in the model's own template, in batches that change nothing, seen once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch
from chat_models import save_llava, save_ours
from curation_runs import Run, noise, noises
from safetensors.torch import load_file, save_file

from modeling_minigpt4 import MiniGPT4Model
from recipes_minigpt4.curation.curate import PROMPTS, read_prompt
from recipes_minigpt4.curation.describe import Describer, Draft, Prompts, describe_all
from recipes_minigpt4.curation.gather import gather
from recipes_minigpt4.curation.source import Source
from recipes_minigpt4.evaluation.questions import Sampling
from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions
from recipes_minigpt4.utils.errors import RecipeError


CPU = SpeakerOptions("cpu", "float32")
PAPERS = {name: read_prompt(name, None) for name in PROMPTS}


@pytest.fixture(scope="session")
def ours(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_ours(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def load(ours: str, llava: str) -> Callable[..., Describer]:
    """`load(kind, enough, max_new_tokens)`: one that describes, `ours` or `llava`."""
    speakers = {kind: ChatSpeaker.load(place, CPU) for kind, place in (("ours", ours), ("llava", llava))}

    def build(kind: str = "ours", enough: int = 80, max_new_tokens: int = 6) -> Describer:
        place = {"ours": ours, "llava": llava}[kind]
        words = Prompts(PAPERS["describe"], PAPERS["continue"])
        describer = Describer(place, CPU, words, Sampling(max_new_tokens), enough)
        describer.speaker = speakers[kind]  # in the place of the property, which would load it again
        return describer

    return build


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that models complete."""
    prompts: list[str] = []
    complete = ChatSpeaker.complete

    def note(speaker: ChatSpeaker, texts, *rest):
        prompts.extend(texts)
        return complete(speaker, texts, *rest)

    monkeypatch.setattr(ChatSpeaker, "complete", note)
    return prompts


def pictures(count: int) -> list[PIL.Image.Image]:
    return [noise(number) for number in range(count)]


def test_both_turns_are_asked_in_the_papers_words_and_the_models_template(load: Callable, asked: list) -> None:
    (draft,) = load().describe(pictures(1))
    first, second = asked
    assert first == (
        "<s>###Human: <Img><image></Img> Describe this image in detail. Give as many details as possible. "
        "Say everything you see. ###Assistant: "
    )
    reply = second.removeprefix(first).removesuffix("###Human: Continue ###Assistant: ")
    assert (
        reply and draft.text.startswith(f"{reply} ") and second == f"{first}{reply}###Human: Continue ###Assistant: "
    )


@pytest.mark.parametrize("kind", ["ours", "llava"])
def test_the_batch_changes_nothing(kind: str, load: Callable) -> None:
    """Also where some of a batch are continued and others are not."""
    describer = load(kind, enough=5, max_new_tokens=8)
    alone = [describer.describe([picture])[0] for picture in pictures(5)]
    for size in (2, 5):
        batches = [pictures(5)[start : start + size] for start in range(0, 5, size)]
        assert [draft for batch in batches for draft in describer.describe(batch)] == alone
    assert len({draft.text for draft in alone}) > 1


def test_a_reply_is_continued_once_where_it_has_no_more_tokens_than_enough(load: Callable, asked: list) -> None:
    """By the model's own tokenizer; both replies are joined."""
    (plain,) = load(enough=0, max_new_tokens=8).describe(pictures(1))
    tokenizer = load().speaker.processor.tokenizer
    length = len(tokenizer(plain.text, add_special_tokens=False)["input_ids"])
    assert plain == Draft(plain.text, length, False) and len(asked) == 1 and length > 1
    assert load(enough=length - 1, max_new_tokens=8).describe(pictures(1)) == [plain]
    (longer,) = load(enough=length, max_new_tokens=8).describe(pictures(1))
    assert longer.continued and longer.tokens == length and len(asked) == 1 + 1 + 2
    more, _ = load().speaker.complete(asked[-1:], pictures(1), Sampling(8))[0]
    assert longer.text == f"{plain.text} {more}"


def test_the_vision_side_sees_each_picture_once(load: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the replies are those of a model that looks in both turns."""
    seen: list[int] = []
    encode = MiniGPT4Model.encode_images

    def count(model: MiniGPT4Model, pixel_values: torch.Tensor, **kwargs):
        seen.append(len(pixel_values))
        return encode(model, pixel_values, **kwargs)

    monkeypatch.setattr(MiniGPT4Model, "encode_images", count)
    describer = load()
    told = describer.describe(pictures(3))
    assert seen == [3] and all(draft.continued for draft in told)
    monkeypatch.setattr(describer, "_see", lambda pictures: None)
    assert describer.describe(pictures(3)) == told and sum(seen) == 3 + 2 * 3


def test_a_model_is_told_from_others_without_loading_it(
    ours: str, tmp_path: Path, load: Callable, monkeypatch
) -> None:
    monkeypatch.setattr(ChatSpeaker, "load", lambda *_: pytest.fail("it is loaded"))
    words, sampling = Prompts("Describe.", "Continue"), Sampling(8)
    known = Describer(ours, CPU, words, sampling)
    assert known.revision == load().speaker.revision
    assert known.made == Describer(ours, CPU, words, sampling).made
    shutil.copytree(ours, copy := tmp_path / "copy")
    weights = load_file(copy / "model.safetensors")
    save_file({name: value + 1e-6 for name, value in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    others = [
        Describer(str(copy), CPU, words, sampling),
        Describer(ours, CPU, Prompts("Describe!", "Continue"), sampling),
        Describer(ours, CPU, Prompts("Describe.", "Go on"), sampling),
        Describer(ours, CPU, words, Sampling(9)),
        Describer(ours, CPU, words, sampling, enough=81),
    ]
    assert len({known.made, *(one.made for one in others)}) == 6


def test_what_cannot_describe_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"There is no model at .*nowhere"):
        Describer(str(tmp_path / "nowhere"), CPU, Prompts("a", "b"), Sampling(8))
    with pytest.raises(RecipeError, match=r"--model openai:MODEL is a server; name a folder or a repository"):
        Describer("openai:MODEL", CPU, Prompts("a", "b"), Sampling(8))


def test_a_batch_that_is_too_large_is_told_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "out", "--dataset_name", noises(tmp_path / "pictures", 4))
    words = Prompts("a", "b")
    monkeypatch.setattr("recipes_minigpt4.curation.describe.revision_named", lambda *_: "1")
    describer = Describer("none", CPU, words, Sampling(8))
    describer.speaker = None
    batches: list[int] = []

    def describe(pictures):
        batches.append(len(pictures))
        if len(batches) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [Draft("A picture.", 3, False) for _ in pictures]

    monkeypatch.setattr(describer, "_describe", describe)
    run.describer = describer
    with pytest.raises(
        RecipeError, match=r"2 pictures at a time do not fit .*; lower --batch_size\. What was describ"
    ):
        run()
    assert len(run.lines("drafts")) == 2
    run("--batch_size", 1)
    assert batches == [2, 2, 1, 1]


def test_pictures_are_seen_upright(tmp_path: Path) -> None:
    """As the recipes will show them to stage 2, whatever their camera says."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turn it by a quarter
    (tmp_path / "in").mkdir()
    noise(1).resize((40, 20)).save(tmp_path / "in" / "turned.jpg", exif=exif)
    sizes = []

    class Measuring:
        revision = made = "1"

        def load(self) -> None: ...

        def describe(self, pictures):
            sizes.extend(picture.size for picture in pictures)
            return [Draft("A picture.", 3, False) for _ in pictures]

    rows = gather(tmp_path, Source(str(tmp_path / "in")), None, 6).rows
    describe_all(tmp_path, rows, Measuring(), 4)
    assert sizes == [(20, 40)]
