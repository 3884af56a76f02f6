"""The examples run as they are, each on the shipped parts."""

import json
from pathlib import Path

import pytest
import torch
from hub_server import HubServer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.examples import (
    caption_folder,
    eyes_for_a_language_model,
    publish_and_load,
    several_pictures,
    train_with_trl,
)
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE
from recipes_minigpt4.tiny.scenes import evaluation_scenes


EXAMPLES = Path(caption_folder.__file__).parent


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained adapter on the shipped parts, whose replies are short."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        vision=VISION_BACKBONE, qformer=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE
    )
    model.generation_config.max_new_tokens = 8
    model.save_pretrained(folder)
    MiniGPT4Processor.from_backbones(
        vision=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE, config=model.config
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(3)]
    for path, (image, _) in zip(paths, evaluation_scenes(3, 1), strict=True):
        image.save(path)
    return [str(path) for path in paths]


def test_a_folder_is_described_in_batches(adapter: str, pictures: list[str], tmp_path: Path, monkeypatch) -> None:
    replies = []
    for size in (1, 2):
        monkeypatch.setattr(caption_folder, "BATCH_SIZE", size)
        caption_folder.main(adapter, str(tmp_path / "pictures"), str(tmp_path / "captions.jsonl"))
        replies.append([json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()])
    assert replies[0] == replies[1]  # whatever the batch
    assert [one["file"] for one in replies[0]] == ["0.png", "1.png", "2.png"]
    assert all(one["caption"] for one in replies[0])


def test_trl_trains_and_saves_the_projection(adapter: str, pictures: list[str], tmp_path: Path) -> None:
    question, answer = {"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "Shapes."}
    rows = [json.dumps({"prompt": [question], "completion": [answer], "images": [path]}) for path in pictures]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    train_with_trl.main(adapter, str(tmp_path / "chats.jsonl"), str(tmp_path / "mine"))
    before, after = (MiniGPT4ForConditionalGeneration.from_pretrained(place) for place in (adapter, tmp_path / "mine"))
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed == {"model.language_projection.weight", "model.language_projection.bias"}


def test_parts_are_joined_and_saved(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    parts = (str(VISION_BACKBONE), str(LANGUAGE_BACKBONE), str(tmp_path / "untrained"), str(VISION_BACKBONE))
    eyes_for_a_language_model.main(*parts)
    assert "12,416 of " in capsys.readouterr().out
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "untrained")
    assert model.model.language_projection.out_features == model.config.text_config.hidden_size


def test_several_pictures_a_batch_and_a_stream(adapter: str, pictures: list[str], capsys) -> None:
    several_pictures.main(adapter, *pictures[:2])
    common, _, one, reply, *streamed = capsys.readouterr().out.splitlines()
    assert common == "What do these images have in common?" and one == "Describe this image in detail."
    assert " ".join(" ".join(streamed).split()) == reply.strip()  # alone or in a batch


def test_what_is_published_loads_by_its_name(adapter: str, hub: HubServer, capsys: pytest.CaptureFixture) -> None:
    publish_and_load.main(adapter, "you/adapter")
    assert "you/adapter answers in the chat template of MiniGPT4Processor" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
