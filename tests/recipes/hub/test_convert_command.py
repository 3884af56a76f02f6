"""`minigpt4 convert`: the folder it writes, what it tells, and what it does with mistakes."""

import json
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from hub_server import HubServer
from original_files import Files, logits, save_llama
from transformers import pipeline

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4 import cli


@pytest.fixture
def command(tmp_path: Path, tokenizer) -> tuple[list[str], Files]:
    """Arguments of the command for tiny files, and these files."""
    files = Files(tmp_path)
    files.config.save_pretrained(tmp_path / "sizes")
    folder = save_llama(files.tensors, tmp_path / "llama", tokenizer)
    arguments = ["convert", "--checkpoint", files.checkpoint, "--language_model", folder]
    return [*arguments, "--output_dir", str(tmp_path / "out")], files


def from_files(files: Files, folder: Path) -> list[str]:
    return ["--vit", files.vit, "--qformer", str(files.qformer), "--config", str(folder / "sizes")]


@pytest.mark.parametrize("full", [False, True])
def test_a_folder_that_loads_and_says_what_it_is(command, tmp_path: Path, full: bool, capsys, picture) -> None:
    arguments, files = command
    assert cli.main([*arguments, *from_files(files, tmp_path), *["--full"] * full]) == 0
    out = tmp_path / "out"
    told = capsys.readouterr().out
    assert "a projection of 544 parameters" in told  # 16 × 32 and 32
    assert (f"language_model  from {tmp_path / 'llama'}" in told) is not full
    card = (out / "README.md").read_text()
    assert ("holds all weights" in card) is full
    assert ("holds the projection and the vision side" in card) is not full
    assert str(tmp_path) not in card
    model = MiniGPT4ForConditionalGeneration.from_pretrained(out, dtype=torch.float32)
    assert_close(logits(model), logits(files.expected()))
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
    describe = pipeline("image-text-to-text", model=str(out), device="cpu")
    (answer,) = describe(text=chat, return_full_text=False, generate_kwargs={"max_new_tokens": 3})
    assert isinstance(answer["generated_text"], str)


def test_vision_backbone_makes_a_small_folder(command, tmp_path: Path) -> None:
    arguments, files = command
    assert cli.main([*arguments, *from_files(files, tmp_path)]) == 0
    vision = (tmp_path / "out" / "vision").rename(tmp_path / "blip2")
    assert cli.main([*arguments[:-1], str(tmp_path / "small"), "--vision_backbone", str(vision)]) == 0
    weights = list((tmp_path / "small").rglob("*.safetensors"))
    assert [path.name for path in weights] == ["model.safetensors"] and weights[0].stat().st_size < 5000
    assert json.loads((tmp_path / "small" / "config.json").read_text())["backbones"]["vision"]["fingerprint"]


def test_the_folder_is_pushed_with_its_card(command, tmp_path: Path, hub: HubServer, capsys) -> None:
    arguments, files = command
    given = [*arguments, *from_files(files, tmp_path), "--push_to_hub", "eyes", "--private", "--license", "mit"]
    assert cli.main(given) == 0
    repo = hub.repos["model", "you/eyes"]
    assert repo.private and hub.messages("you/eyes") == ["Converted MiniGPT-4"]
    sent = hub.files("you/eyes")
    assert sent.keys() >= {"config.json", "model.safetensors", "README.md", "processor_config.json"}
    assert {"vision/config.json", "vision/model.safetensors"} <= sent.keys()
    assert "license: mit" in sent["README.md"].decode()
    told = capsys.readouterr().out
    assert f"Uploaded to {hub.endpoint}/you/eyes" in told
    assert 'from_pretrained("you/eyes", backbones={"language_model": ...})' in told


def test_a_failed_push_leaves_the_folder_and_says_so(command, tmp_path: Path, hub: HubServer, capsys) -> None:
    arguments, files = command
    hub.fail("POST", "/commit/", status=503, times=100)
    assert cli.main([*arguments, *from_files(files, tmp_path), "--push_to_hub", "eyes"]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'out'} is whole but not on the Hub: the Hub is overloaded or out of order (503)" in told
    assert f"`minigpt4 push {tmp_path / 'out'} eyes`" in told
    assert (tmp_path / "out" / "model.safetensors").is_file() and not hub.files("you/eyes")


def test_mistakes_are_told_in_one_line(command, tmp_path: Path, capsys) -> None:
    arguments, files = command
    for given, told in (
        (["convert"], "required: --checkpoint, --language_model, --output_dir"),
        (arguments, "give one of them"),
        ([*arguments, "--vit", files.vit], "give the Q-Former's file too"),
        ([*arguments, *from_files(files, tmp_path), "--preset", "gpt5"], "invalid choice: 'gpt5'"),
        ([*arguments, *from_files(files, tmp_path)[:-1], str(tmp_path / "nothing")], "no configuration that can be"),
        ([*arguments, *from_files(files, tmp_path)[:-1], str(tmp_path / "llama")], "the configuration of a 'llama'"),
        ([*arguments[:-1], str(tmp_path / "sizes"), *from_files(files, tmp_path)], "would be overwritten"),
        ([*arguments, "--vision_backbone", "x/y", "--config", str(tmp_path / "sizes")], "leave --config out"),
        ([*arguments, "--vision_backbone", "x/y", "--private"], "name it with --push_to_hub"),
        ([*arguments, "--vit", str(tmp_path / "none.pth")], "There is no file"),
        ([*arguments, "--vision_backbone", str(tmp_path / "llama")], "has no vision encoder"),
    ):
        assert cli.main(given) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("minigpt4 convert: ") and printed.count("\n") == 1
        assert told in printed
    assert not (tmp_path / "out" / "model.safetensors").exists()
