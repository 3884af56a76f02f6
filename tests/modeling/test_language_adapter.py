"""An adapter of PEFT on the language model: where it goes, what trains, and one folder for it and the projection."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from closeness import assert_close
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model


PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}
LORA = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CONFIGS = [lambda: LoraConfig(**LORA), lambda: IA3Config(**IA3)]


def compose(parts: dict, **options) -> MiniGPT4ForConditionalGeneration:
    torch.manual_seed(5)
    return MiniGPT4ForConditionalGeneration.from_backbones(**parts, **options)


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def change(model) -> None:
    """Train, so to speak: everything that may move does."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.3)


@torch.no_grad()
def score(model, make_inputs) -> torch.Tensor:
    return model.eval()(**make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])).logits


@pytest.fixture(params=CONFIGS, ids=["lora", "ia3"])
def tuned(request, backbones) -> MiniGPT4ForConditionalGeneration:
    """A model whose projection and adapter have been trained."""
    model = compose(backbones.parts())
    model.add_adapter(request.param())
    change(model)
    return model


# ---- what trains ----------------------------------------------------------------------------------------------------


def test_adapter_and_projection_train_and_nothing_else(tuned) -> None:
    names = trained(tuned)
    assert names > PROJECTION
    kind = tuned.peft_config["default"].peft_type.value.lower()
    assert all(name.startswith("model.language_model.") and f".{kind}_" in name for name in names - PROJECTION)
    tuned.freeze_backbones()
    assert trained(tuned) == names
    tuned.freeze_backbones(train=["qformer"])
    assert {name.split(".")[1] for name in trained(tuned) - names} == {"qformer", "query_tokens"}


def test_new_lora_changes_nothing(backbones, make_inputs) -> None:
    model = compose(backbones.parts())
    before = score(model, make_inputs)
    model.add_adapter(LoraConfig(**LORA))
    assert torch.equal(score(model, make_inputs), before)


def test_layers_of_the_vision_encoder_with_the_same_names_are_left_alone(backbones, tmp_path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPVisionModel(vision).save_pretrained(tmp_path)
    for target in (["q_proj", "v_proj"], "all-linear", r".*\.(q|v)_proj"):
        model = compose({"vision": str(tmp_path), "language_model": backbones.language_model}, patch_merge_size=2)
        model.add_adapter(LoraConfig(**{**LORA, "target_modules": target}))
        assert {name.split(".")[1] for name in trained(model)} == {"language_model", "language_projection"}


def test_layers_that_the_user_excludes_stay_out(backbones) -> None:
    for exclude in (["layers.0.self_attn.q_proj"], r".*layers\.0\.self_attn\.q_proj"):
        model = compose(backbones.parts())
        model.add_adapter(LoraConfig(**LORA, exclude_modules=exclude))
        assert not any("layers.0.self_attn.q_proj" in name for name in trained(model))
        assert any("layers.1.self_attn.q_proj" in name for name in trained(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_s_own_dropout_works_in_training(checkpointing, backbones, tmp_path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, n_positions=64)  # dropout 0.1 everywhere
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = compose({**backbones.parts(), "language_model": str(tmp_path)}, separator=None)
    model.add_adapter(LoraConfig(**{**LORA, "target_modules": ["c_attn"], "fan_in_fan_out": True}))
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    working = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout) and m.training}
    assert working and all(".lora_dropout." in name for name in working)
    model.eval()
    assert not any(module.training for module in model.modules())


def test_checkpointing_changes_no_gradient(backbones, make_inputs) -> None:
    found = []
    for checkpointing in (False, True):
        model = compose(backbones.parts())
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(**{**LORA, "lora_dropout": 0.0}))
        change(model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        inputs = make_inputs(model.train(), [[1, "image", 8, 30]])
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad})
    for name, gradient in found[0].items():
        assert_close(found[1][name], gradient)


def test_adapter_trains_in_float32_on_a_bfloat16_model(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts(), dtype=torch.bfloat16)
    model.add_adapter(LoraConfig(**LORA))
    change(model)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}
    model.save_pretrained(tmp_path)
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in again.parameters() if parameter.requires_grad} == {torch.float32}
    assert_close(score(again, make_inputs), score(model, make_inputs))


# ---- one folder -----------------------------------------------------------------------------------------------------


def test_one_folder_holds_projection_and_adapter(tuned, tmp_path) -> None:
    tuned.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == PROJECTION
    adapter = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(adapter) == len(trained(tuned) - PROJECTION)
    assert all(name.startswith("base_model.model.model.language_model.") for name in adapter)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["peft_type"] == tuned.peft_config["default"].peft_type and config["base_model_name_or_path"] is None
    assert set(config["target_modules"]) == set(tuned.peft_config["default"].target_modules)


@pytest.mark.parametrize("loader", [MiniGPT4ForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize("full", [False, True])
def test_one_call_loads_both(loader, full, tuned, tmp_path, make_inputs) -> None:
    expected = score(tuned, make_inputs)
    tuned.save_pretrained(tmp_path / "saved", full=full)
    assert torch.equal(score(tuned, make_inputs), expected)  # saving leaves the model as it was
    assert trained(tuned) > PROJECTION
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = loader.from_pretrained(tmp_path / "moved")
    assert type(again) is MiniGPT4ForConditionalGeneration and not again.training
    assert_close(score(again, make_inputs), expected)
    assert trained(again) == trained(tuned)
    again.disable_adapters()
    assert not torch.equal(score(again, make_inputs), expected)


def test_saving_twice_and_the_model_without_a_head(tuned, tmp_path, make_inputs) -> None:
    tuned.save_pretrained(tmp_path / "one")
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "one")
    change(again)
    again.save_pretrained(tmp_path / "two")
    expected = score(again, make_inputs)
    assert_close(score(MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "two"), make_inputs), expected)
    bare = MiniGPT4Model.from_pretrained(tmp_path / "two")
    inputs = make_inputs(again, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])
    with torch.no_grad():
        assert_close(again.lm_head(bare(**inputs).last_hidden_state), expected)


def test_full_folder_has_the_language_model_under_its_plain_names(tuned, backbones, tmp_path) -> None:
    tuned.save_pretrained(tmp_path, full=True)
    saved = load_file(tmp_path / "model.safetensors")
    plain = compose(backbones.parts()).state_dict()
    assert saved.keys() == plain.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in plain.items() if name not in PROJECTION)


def test_trained_parts_travel_beside_an_adapter(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts())
    model.freeze_backbones(train=["qformer"])
    model.add_adapter(LoraConfig(**LORA))
    assert any(name.startswith("model.qformer.") for name in trained(model))
    change(model)
    model.save_pretrained(tmp_path / "one")
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")  # the tuned Q-Former is now frozen, and still the checkpoint's own
    expected = score(model, make_inputs)
    assert_close(score(MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "two"), make_inputs), expected)


def test_deleted_adapter_leaves_an_ordinary_checkpoint(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts())
    before = score(model, make_inputs)
    model.add_adapter(LoraConfig(**LORA))
    model.save_pretrained(tmp_path / "with")
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "with")
    again.delete_adapter("default")
    again.save_pretrained(tmp_path / "without")
    assert not (tmp_path / "without" / "peft").exists()
    plain = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "without")
    assert not plain.has_adapter and torch.equal(score(plain, make_inputs), before)


def test_generation_is_the_same_after_loading(tuned, tmp_path, make_inputs) -> None:
    inputs = make_inputs(tuned.eval(), [[1, "image", 8, 30]])
    expected = tuned.generate(**inputs, max_new_tokens=8, do_sample=False)
    tuned.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(again.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_adapter_of_peft_s_own_format_fits_a_wrapped_model(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts())
    model.add_adapter(LoraConfig(**LORA))
    change(model)
    model.save_pretrained(tmp_path)
    base = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)
    base.delete_adapter("default")
    wrapped = PeftModel.from_pretrained(base, tmp_path, subfolder="peft")
    assert_close(score(wrapped, make_inputs), score(model, make_inputs))


@pytest.mark.parametrize("loader", [MiniGPT4ForConditionalGeneration, AutoModelForImageTextToText])
def test_folder_that_peft_has_saved_loads_in_one_call(loader, backbones, tmp_path, make_inputs) -> None:
    compose(backbones.parts()).save_pretrained(tmp_path / "base")
    base = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "base")
    wrapped = get_peft_model(base, LoraConfig(**LORA, modules_to_save=["language_projection"]))
    change(wrapped)
    wrapped.save_pretrained(tmp_path / "wrapped")
    assert not (tmp_path / "wrapped" / "config.json").exists()
    again = loader.from_pretrained(tmp_path / "wrapped")
    assert_close(score(again, make_inputs), score(wrapped, make_inputs))
    assert trained(again) > PROJECTION
    again.save_pretrained(tmp_path / "ours")
    assert_close(score(loader.from_pretrained(tmp_path / "ours"), make_inputs), score(wrapped, make_inputs))


# ---- mistakes -------------------------------------------------------------------------------------------------------


def test_unknown_layers_leave_the_model_as_it_was(backbones, make_inputs) -> None:
    model = compose(backbones.parts())
    before = score(model, make_inputs)
    with pytest.raises(ValueError, match=r"meant by target_modules=\['nowhere'\].* it has down_proj, .* v_proj\.$"):
        model.add_adapter(LoraConfig(target_modules=["nowhere"]))
    assert not model.has_adapter and trained(model) == PROJECTION
    model.add_adapter(LoraConfig(**LORA))
    assert torch.equal(score(model, make_inputs), before)


def test_the_head_gets_no_adapter(backbones) -> None:
    """Trainers multiply by its weights themselves, and would pass the adapter by."""
    model = compose(backbones.parts())
    with pytest.raises(ValueError, match=r"lm_head.*leave it out"):
        model.add_adapter(LoraConfig(target_modules=["q_proj", "lm_head"]))
    assert not model.has_adapter


def test_adapter_that_is_gone_or_damaged_is_told(backbones, tmp_path) -> None:
    model = compose(backbones.parts())
    model.add_adapter(LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    settings = tmp_path / "peft" / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"q_proj"', '"o_proj"'))
    with pytest.raises(ValueError, match=r"adapter_config\.json: 8 tensors are missing or unknown"):
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match=r"peft lacks adapter_model\.safetensors"):
        AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_folder_of_peft_without_a_base_is_told(backbones, tmp_path) -> None:
    get_peft_model(compose(backbones.parts()), LoraConfig(**LORA)).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="names no base model: save a model with `save_pretrained`"):
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)


def test_missing_peft_is_told(backbones, tmp_path, monkeypatch) -> None:
    model = compose(backbones.parts())
    model.add_adapter(LoraConfig(**LORA))
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"language model, which needs PEFT, .* run `pip install peft`\.$"):
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)


def test_code_of_the_folder_loads_it_alone_in_a_new_process(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts())
    model.add_adapter(LoraConfig(**LORA))
    change(model)
    expected = score(model, make_inputs)
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "peft_minigpt4.py").is_file()
    script = f"""
import sys, torch
sys.modules["modeling_minigpt4"] = None
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / "saved")!r}, trust_remote_code=True)
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
torch.set_num_threads({torch.get_num_threads()})
torch.save(model(**inputs).logits.detach(), {str(tmp_path / "logits.pt")!r})
"""
    torch.save(make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]]), tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert_close(torch.load(tmp_path / "logits.pt"), expected)
