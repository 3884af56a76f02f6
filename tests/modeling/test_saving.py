"""`save_pretrained` writes whole tensors or nothing, whatever has become of the model's own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration


PROJECTION = "model.language_projection.weight"
BIAS = "model.language_projection.bias"


@pytest.fixture
def model(backbones) -> MiniGPT4ForConditionalGeneration:
    return MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts())


def empty(parameter: nn.Parameter) -> None:
    """What ZeRO-3 leaves of a parameter."""
    parameter.ds_shape = parameter.shape
    parameter.data = torch.empty(0)


def empty_without_a_trace(parameter: nn.Parameter) -> None:
    parameter.data = torch.empty(0)


def halve(parameter: nn.Parameter) -> None:
    """What the first FSDP leaves of it."""
    parameter.data = parameter.data.flatten()[: parameter.numel() // 2].clone()


@pytest.mark.parametrize("leave", [empty, empty_without_a_trace, halve])
def test_a_part_of_the_projection_is_refused(
    leave: Callable, model: MiniGPT4ForConditionalGeneration, tmp_path: Path
) -> None:
    weight = model.model.language_projection.weight
    shape = list(weight.shape)
    leave(weight)
    with pytest.raises(ValueError) as told:
        model.save_pretrained(tmp_path / "saved")
    sentence = str(told.value)
    assert f"{PROJECTION} has the shape {list(weight.shape)} here instead of {shape}" in sentence
    assert "nothing was written" in sentence and "trainer.save_model()" in sentence
    assert not (tmp_path / "saved").exists()


def test_what_was_saved_before_stays(model: MiniGPT4ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    empty(model.model.language_projection.weight)
    with pytest.raises(ValueError):
        model.save_pretrained(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_gathered_tensors_are_saved_in_the_place_of_parts(
    model: MiniGPT4ForConditionalGeneration, tmp_path: Path
) -> None:
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        empty(parameter)
    model.save_pretrained(tmp_path, state_dict=dict(gathered))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == {PROJECTION, BIAS}
    assert all(torch.equal(saved[name], gathered[name]) for name in saved)


def test_gathered_tensors_have_to_be_whole_and_all_there(
    model: MiniGPT4ForConditionalGeneration, tmp_path: Path
) -> None:
    whole = model.state_dict()
    for given, named in (
        ({}, "model.language_projection.bias trains but is not among"),
        ({**whole, PROJECTION: whole[PROJECTION][:3]}, f"{PROJECTION} has the shape"),
        ({**whole, PROJECTION: whole[PROJECTION].new_empty(0)}, f"{PROJECTION} has the shape [0]"),
    ):
        with pytest.raises(ValueError, match="nothing was written") as told:
            model.save_pretrained(tmp_path / "saved", state_dict=dict(given))
        assert named in str(told.value)
    assert not (tmp_path / "saved").exists()


def test_a_process_that_does_not_write_is_not_asked(model: MiniGPT4ForConditionalGeneration, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, is_main_process=False, state_dict={})
    assert not (tmp_path / "model.safetensors").exists()


def test_other_trained_parts_and_whole_models_are_looked_at_too(
    model: MiniGPT4ForConditionalGeneration, tmp_path: Path
) -> None:
    weight = model.lm_head.weight
    halve(weight)
    model.save_pretrained(tmp_path / "adapter")  # which does not hold it
    with pytest.raises(ValueError, match="lm_head"):
        model.save_pretrained(tmp_path / "full", full=True)
    model.freeze_backbones(train=["language_model"])
    with pytest.raises(ValueError, match="lm_head"):
        model.save_pretrained(tmp_path / "trained")
    assert not (tmp_path / "full").exists() and not (tmp_path / "trained").exists()


def test_an_empty_adapter_of_peft_is_refused(model: MiniGPT4ForConditionalGeneration, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    empty(next(parameter for name, parameter in model.named_parameters() if "lora_B" in name))
    with pytest.raises(ValueError, match=r"lora_B.*instead of \[16, 2\]"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.fixture
def process_group(tmp_path: Path):
    """A process group of one, so that tensors become DTensors."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_changes_neither_code_nor_class_of_a_checkpoint(
    process_group: None, model: MiniGPT4ForConditionalGeneration, tmp_path: Path
) -> None:
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fully_shard(model)
    with pytest.raises(ValueError, match="spread over several processes"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", state_dict=gathered)
    assert isinstance(model, FSDPModule)  # again
    assert (tmp_path / "saved" / "modeling_minigpt4.py").is_file()
    assert not list((tmp_path / "saved").glob("_fsdp*"))
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.auto_map["AutoModelForImageTextToText"].startswith("modeling_minigpt4.MiniGPT4For")


# ---- layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qformer", [True, False])
def test_a_model_names_the_layers_that_it_has(qformer: bool, make_model: Callable) -> None:
    """FSDP stumbles over names that are not there, and would gather a part at once whose layers are not named."""
    model = make_model(qformer=qformer)
    names = {type(module).__name__ for module in model.modules()}
    expected = {"Blip2EncoderLayer", "LlamaDecoderLayer"} | ({"Blip2QFormerLayer"} if qformer else set())
    assert expected <= set(model._no_split_modules) <= names
    assert not {"Blip2Attention", "Blip2QFormerMultiHeadAttention"} & set(model._no_split_modules)  # inside others
