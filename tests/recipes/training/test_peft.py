"""An adapter of PEFT on the language model through both stages: what trains, what is saved, resuming, mistakes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from closeness import assert_close
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.utils.errors import RecipeError


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
    assert names > PROJECTION
    part = "model.language_model."
    assert all(name.startswith(part) and f".{adapter['peft_type'].lower()}_" in name for name in names - PROJECTION)
    assert all(any(f".{target}." in name for name in names) for target in adapter["target_modules"])
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    assert_close(logits(loaded), logits(first.model))

    second = stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one"))
    assert trained_by(second) == names
    before, after = dict(loaded.named_parameters()), dict(second.model.named_parameters())
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert_close(logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "two")), logits(second.model))


def test_adapter_starts_at_stage_two_on_what_stage_one_left(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage("one"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "one")
    fields = {"peft_config": json.dumps(LORA), "original_schedule": False, "learning_rate": 1e-30}
    trainer = stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one", **fields))
    assert torch.equal(logits(trainer.model), logits(plain))  # LoRA begins as no change
    assert len(trained_by(trainer)) == 2 + 4


@pytest.mark.parametrize("loader", [MiniGPT4ForConditionalGeneration, AutoModelForImageTextToText])
def test_what_trl_s_peft_config_leaves_loads_in_one_call(loader, compose, pictures, tmp_path: Path) -> None:
    for part in compose():
        part.save_pretrained(tmp_path / "base")
    rows = [{"prompt": "<s><image> What? ", "completion": "A square.</s>", "image": picture} for picture in pictures]
    trainer = SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(tmp_path / "base"),
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=2,
            learning_rate=0.05,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=None,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoProcessor.from_pretrained(tmp_path / "base"),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["language_projection"]),
    )
    before = logits(trainer.model)
    trainer.train()
    trainer.save_model()
    model = loader.from_pretrained(tmp_path / "out")
    assert_close(logits(model), logits(trainer.model))
    assert not torch.equal(logits(model), before)
    stored = AutoModelForImageTextToText.from_pretrained(tmp_path / "base").state_dict()
    assert all(not torch.equal(model.state_dict()[name], stored[name]) for name in PROJECTION)


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


def test_best_checkpoint_brings_its_adapter_back(
    stage: Callable, uneven_pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = stage2_finetune.MiniGPT4Trainer.evaluate

    def first_is_best(trainer, *args, **kwargs):
        return {**evaluate(trainer, *args, **kwargs), "eval_loss": float(trainer.state.global_step)}

    monkeypatch.setattr(stage2_finetune.MiniGPT4Trainer, "evaluate", first_is_best)
    evaluation = {
        "eval_dataset_name": uneven_pairs_file, "eval_strategy": "steps", "eval_steps": 1,
        "load_best_model_at_end": True,
    }  # fmt: skip
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "peft_config": json.dumps(LORA)}
    stage2_finetune.main(stage(**fields, **evaluation))
    assert same_tensors(tmp_path / "run", tmp_path / "run" / "checkpoint-1")
    assert not same_tensors(tmp_path / "run", tmp_path / "run" / "checkpoint-3")


def test_card_tells_an_adapter_from_a_trained_language_model(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage(peft_config=json.dumps(LORA), max_steps=1))
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Trained: language_model (LORA adapter), language_projection (600 parameters)." in card  # 408 + 2 · 2 · 48


def test_vectors_of_ia3_do_not_decay(stage: Callable) -> None:
    trainer = stage1_pretrain.main(stage(peft_config=json.dumps(IA3), max_steps=1))
    assert {name for name in trainer.get_decay_parameter_names(trainer.model) if name in trained_by(trainer)} == {
        "model.language_projection.weight"
    }


@pytest.mark.parametrize(
    "value, said",
    [
        ('{"peft_type": "LORA"', "peft_config is no JSON"),
        ('["q_proj"]', "mapping with a peft_type that PEFT knows"),
        ('{"target_modules": ["q_proj"]}', "mapping with a peft_type that PEFT knows"),
        ('{"peft_type": "LARA", "target_modules": ["q_proj"]}', "LARA"),
        ('{"peft_type": "LORA", "rank": 8}', "a field that PEFT does not know: .*'rank'"),
        ('{"peft_type": "LORA", "target_modules": ["query"]}', r"target_modules=\['query'\].* q_proj"),
        ('{"peft_type": "LORA"}', "target_modules=None"),
        ('{"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": ["down_proj"]}', "subset"),
        ('{"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4}', "PrefixTuningConfig .* use LORA or IA3"),
    ],
)
def test_mistakes_are_told_in_one_sentence(value: str, said: str, stage: Callable) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        stage1_pretrain.main(stage(peft_config=value))
    assert "\n" not in str(caught.value)


def test_one_adapter_on_a_frozen_language_model(stage: Callable, tmp_path: Path) -> None:
    lora = json.dumps(LORA)
    with pytest.raises(RecipeError, match="needs a frozen language model"):
        stage1_pretrain.main([*stage(peft_config=lora), "--train_parts", "language_model"])
    stage1_pretrain.main(stage("one", peft_config=lora, max_steps=1))
    with pytest.raises(RecipeError, match="has an adapter, which goes on training; leave peft_config out"):
        stage2_finetune.main(stage("two", model_name_or_path=tmp_path / "one", peft_config=lora))
