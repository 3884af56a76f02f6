"""`--quantization`: runs train through the language model in fewer bits, and leave what runs without it leave."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.quantization_minigpt4 import is_exact, quantized_layers
from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.training.quantization import QUANTIZATIONS, quantization_config
from recipes_minigpt4.training.summary import describe_parameters
from recipes_minigpt4.utils.errors import RecipeError


METHODS = ("torchao-int8", "bnb-int8", "bnb-nf4")
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}


@pytest.fixture
def method(request: pytest.FixtureRequest) -> str:
    """A quantization whose package is installed."""
    pytest.importorskip(QUANTIZATIONS[request.param][0])
    return request.param


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check_sentence(caught: pytest.ExceptionInfo) -> None:
    assert "\n" not in str(caught.value) and str(caught.value).count(". ") == 0


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_both_stages_leave_what_they_leave_without_it(method: str, stage: Callable, tmp_path: Path) -> None:
    plain = stage1_pretrain.main(stage("plain"))
    first = stage1_pretrain.main(stage("one", quantization=method))
    model = first.model
    quantized = {name for name, parameter in model.named_parameters() if not is_exact(parameter)}
    assert quantized == {f"model.language_model.{name}.weight" for name, _ in quantized_layers(model.language_model)}
    assert len(quantized) == 7 * len(model.language_model.layers)
    assert describe_parameters(model) == describe_parameters(plain.model)
    assert losses(first) != losses(plain)
    assert losses(first) == pytest.approx(losses(plain), rel=0.01)

    second = stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one", quantization=method))
    assert second.model.is_language_model_quantized
    for folder in (tmp_path / "one", tmp_path / "two"):
        tensors = load_file(folder / "model.safetensors")
        wanted = load_file(tmp_path / "plain" / "model.safetensors")
        assert tensors.keys() == wanted.keys() == PROJECTION
        assert {name: (each.dtype, each.shape) for name, each in tensors.items()} == {
            name: (each.dtype, each.shape) for name, each in wanted.items()
        }
        assert (folder / "config.json").read_text() == (tmp_path / "plain" / "config.json").read_text()
        loaded = MiniGPT4ForConditionalGeneration.from_pretrained(folder)
        assert all(is_exact(parameter) for parameter in loaded.parameters())
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert all(torch.equal(second.model.state_dict()[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_resumed_run_is_quantized_again(method: str, stage: Callable, tmp_path: Path) -> None:
    options = {"quantization": method, "save_strategy": "steps", "save_steps": 1, "peft_config": json.dumps(LORA)}
    whole = stage1_pretrain.main(stage("run", **options, max_steps=3))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    resumed = stage1_pretrain.main(stage("again", **options, max_steps=3, resume_from_checkpoint=checkpoint))
    assert losses(resumed)[-2:] == losses(whole)[-2:]
    for file in ("model.safetensors", "peft/adapter_model.safetensors"):
        left, right = load_file(tmp_path / "run" / file), load_file(tmp_path / "again" / file)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_a_script_of_trl_trains_the_projection_in_float32(method: str, compose, pictures, tmp_path: Path) -> None:
    """TRL casts what trains in a quantized model to bfloat16, and transformers refuses one without an adapter."""
    model, processor = compose()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A square."}]},
    ]
    rows = Dataset.from_list([{"messages": chat, "images": [picture]} for picture in pictures[:4]])

    options = {
        "max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.01, "use_cpu": True, "bf16": False,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": None,
    }  # fmt: skip

    def run(peft_config: LoraConfig | None) -> SFTTrainer:
        trainer = SFTTrainer(
            model=str(tmp_path / "base"),
            args=SFTConfig(str(tmp_path / "out"), **options),
            train_dataset=rows,
            quantization_config=quantization_config(method, torch.float32),
            peft_config=peft_config,
        )
        trainer.train()
        return trainer

    trained = run(None).model
    assert trained.is_language_model_quantized
    after = trained.model.language_projection.weight
    assert after.dtype == torch.float32 and after.requires_grad
    assert not torch.equal(after, model.model.language_projection.weight)
    adapter = run(LoraConfig(target_modules=["q_proj", "v_proj"]))
    moved = [tensor for name, tensor in adapter.model.named_parameters() if "lora_B" in name]
    assert moved and all(tensor.abs().sum() > 0 for tensor in moved)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, indirect=True)
def test_two_processes_train_as_one_does(method: str, stage: Callable, tmp_path: Path) -> None:
    options = {"quantization": method, "max_steps": 2, "dataloader_drop_last": True}
    stage1_pretrain.main(stage("one", **options, per_device_train_batch_size=4))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = stage("two", **options, per_device_train_batch_size=2, ddp_backend="gloo")
    done = subprocess.run(
        [*launch, "-m", "recipes_minigpt4.stage1_pretrain", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert left.keys() == right.keys() == PROJECTION
    for name in left:
        assert_close(left[name], right[name], share=1e-3)


def test_pictures_are_described_on_the_way(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage("run", quantization="torchao-int8", panel_steps=1, max_steps=1))
    assert (tmp_path / "run" / "panel.html").is_file()


def test_the_card_tells_it(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage("run", quantization="torchao-int8", max_steps=1))
    assert "| language model in training | 8 bits (torchao) |" in (tmp_path / "run" / "README.md").read_text()


def test_features_of_the_vision_side_are_shared_with_other_runs(stage: Callable, tmp_path: Path) -> None:
    cache = {"cache_features": tmp_path / "features", "max_steps": 1}
    stage1_pretrain.main(stage("plain", **cache))
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("*.safetensors")}
    stage1_pretrain.main(stage("quantized", **cache, quantization="torchao-int8"))
    after = {file: file.stat().st_mtime_ns for file in (tmp_path / "features").rglob("*.safetensors")}
    assert before and after == before


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantization": "int8"}, "no quantization 'int8'; use bnb-int8, bnb-nf4, torchao-int8"),
        ({"quantization": "torchao-int4"}, "no backward pass; use bnb-nf4"),
        ({"quantization": "torchao-int8", "train_parts": "language_model"}, "quantized language model cannot train"),
    ],
)
def test_mistakes_are_told_in_one_sentence(fields: dict, said: str, stage: Callable) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        stage1_pretrain.main(stage(**fields))
    check_sentence(caught)


@pytest.mark.parametrize("name", METHODS)
def test_a_missing_package_is_named(name: str, stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    package = QUANTIZATIONS[name][0]
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *_: None if wanted == package else find(wanted))
    with pytest.raises(RecipeError, match=f"run `pip install {package}`") as caught:
        stage1_pretrain.main(stage(quantization=name))
    check_sentence(caught)


@pytest.mark.parametrize("full", [False, True])
def test_what_could_not_be_saved_is_told_before_training(full: bool, stage: Callable, tmp_path: Path) -> None:
    arguments = stage("one", max_steps=1)
    first = stage1_pretrain.main(arguments if full else [*arguments, "--train_parts", "language_model"])
    if full:
        first.model.save_pretrained(tmp_path / "one", full=True)
    with pytest.raises(RecipeError, match="cannot hold a quantized language model") as caught:
        stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one", quantization="torchao-int8"))
    check_sentence(caught)
