"""An adapter of PEFT on the language model through both stages: what trains, what is saved, resuming, mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
IA3 = {
    "peft_type": "IA3", "target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"],
}  # fmt: skip
PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}


def trained_by(trainer) -> set[str]:
    return {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}


def same_tensors(left: Path, right: Path) -> bool:
    files = ("model.safetensors", "peft/adapter_model.safetensors")
    pairs = [(load_file(left / file), load_file(right / file)) for file in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def logits(model, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 3, *model.config.image_size, generator=generator)
    ids = torch.tensor([[1, *[model.config.image_token_id] * model.config.num_image_tokens, 9, 8, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels).logits


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_both_stages_train_projection_and_adapter(adapter: dict, stage: Callable, tmp_path: Path) -> None:
    first = stage1_pretrain.main(stage("one", peft_config=json.dumps(adapter)))
    names = trained_by(first)
    assert PROJECTION < names
    part = "model.language_model."
    assert all(name.startswith(part) and f".{adapter['peft_type'].lower()}_" in name for name in names - PROJECTION)
    assert all(any(f".{target}." in name for name in names) for target in adapter["target_modules"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(first.model))

    second = stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one"))
    assert trained_by(second) == names
    before, after = dict(loaded.named_parameters()), dict(second.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "two")), logits(second.model))


def test_adapter_starts_at_stage_two_on_what_stage_one_left(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage("one"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    fields = {"peft_config": json.dumps(LORA), "original_schedule": False, "learning_rate": 0}
    trainer = stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one", **fields))
    assert torch.equal(logits(trainer.model), logits(plain))  # LoRA begins as no change
    assert len(trained_by(trainer)) == 2 + 4


def test_yaml_tells_the_adapter_as_a_mapping(stage: Callable, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"peft_config": LORA}))
    model, *_ = stage1_pretrain.parse([*stage(), "--config", str(tmp_path / "run.yaml")])
    assert model.peft_config == LORA
    trainer = stage1_pretrain.main([*stage(), "--config", str(tmp_path / "run.yaml")])
    assert trainer.model.peft_config["default"].r == 2


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_resumed_run_equals_an_uninterrupted_one(adapter: dict, stage: Callable, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "peft_config": json.dumps(adapter)}
    stage2_finetune.main(stage("whole", **fields))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    trainer = stage2_finetune.main(stage("cut", **fields, resume_from_checkpoint="latest"))
    assert trainer.state.global_step == 4
    assert not same_tensors(tmp_path / "whole" / "checkpoint-2", tmp_path / "whole")
    assert same_tensors(tmp_path / "cut", tmp_path / "whole")


def test_resuming_says_nothing_about_missing_tensors(stage: Callable, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"save_strategy": "steps", "save_steps": 1, "peft_config": json.dumps(LORA)}
    stage2_finetune.main(stage(**fields))
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.set_verbosity_warning()
    try:
        stage2_finetune.main(stage(**fields, max_steps=3, resume_from_checkpoint="latest"))
    finally:
        transformers.utils.logging.set_verbosity_error()
    assert not [record.message for record in caplog.records if "missing keys" in record.message]
