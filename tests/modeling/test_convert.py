"""Official checkpoints: names and shapes, files of every official format at small size, and the released sizes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from original_files import Files, config_of, logits, original_tensors, pick, save_checkpoint, save_llama
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.convert_minigpt4_to_hf import (
    PRESETS,
    convert_original_checkpoint,
    convert_original_state_dict,
    read_original_file,
)


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"


# ---- names and shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["qformer", "no_qformer"])
def test_recorded_state_dicts_load_strictly(variant: str) -> None:
    original = load_file(FIXTURES / variant / "checkpoint_original.safetensors")
    converted = convert_original_state_dict(original)
    sizes = json.loads((FIXTURES / variant / "config.json").read_text())
    learned = sum(tensor.numel() for tensor in original.values() if tensor.ndim and tensor.is_floating_point())
    computed = sum(t.numel() for name, t in original.items() if name.endswith("inv_freq"))
    key_biases = sizes["vision"]["depth"] * sizes["vision"]["embed_dim"]
    assert sum(tensor.numel() for tensor in converted.values()) == learned - computed + key_biases


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"qformer": None},
        {"width": 40, "mlp": 56, "blocks": 5, "patch": 14, "grid": 3, "qformer": 24, "layers": 6, "queries": 8},
        {"qformer": None, "hidden": 64, "key_heads": 64, "llama_layers": 1, "vocabulary": 99},
        {"layers": 2, "seed": 7, "width": 16, "qformer": 16},
        {"width": 10, "qformer": 40, "layers": 1},  # as wide as four patches without a Q-Former
    ],
)
def test_every_size_converts(sizes: dict) -> None:
    original = original_tensors(**sizes)
    converted = convert_original_state_dict(original)
    assert all(tensor.dtype == torch.float32 for tensor in converted.values())
    assert ("model.query_tokens" in converted) is (sizes.get("qformer", 16) is not None)
    bias = converted["model.vision_model.encoder.layers.0.self_attn.qkv.bias"]
    query, key, value = bias.chunk(3)
    assert torch.equal(query, original["visual_encoder.blocks.0.attn.q_bias"])
    assert torch.equal(value, original["visual_encoder.blocks.0.attn.v_bias"])
    assert not key.any()
    computed = sum(name.endswith(("inv_freq", "position_ids", "v_bias")) for name in original)
    assert len(converted) == len(original) - computed


@pytest.mark.parametrize("qformer", [True, False])
def test_converted_names_are_those_of_the_model(qformer: bool) -> None:
    model = MiniGPT4ForConditionalGeneration(config_of(qformer))
    converted = convert_original_state_dict(original_tensors(qformer=16 if qformer else None))
    model.load_state_dict(converted)  # strict
    weight = model.model.vision_model.encoder.layers[1].mlp.fc1.weight
    assert torch.equal(weight, converted["model.vision_model.encoder.layers.1.mlp.fc1.weight"])


@pytest.mark.parametrize(
    "name",
    [
        "visual_encoder.cls_token", "visual_encoder.blocks.1.attn.v_bias", "ln_vision.bias", "query_tokens",
        "Qformer.bert.encoder.layer.2.crossattention.self.key.weight", "Qformer.bert.embeddings.LayerNorm.weight",
        "llama_proj.bias", "llama_model.lm_head.weight", "llama_model.model.layers.0.mlp.up_proj.weight",
    ],
)  # fmt: skip
def test_a_missing_or_misshapen_tensor_is_named(name: str) -> None:
    original = original_tensors()
    tensor = original.pop(name)
    with pytest.raises(ValueError, match=f"missing: {re.escape(name)}[.;,]") as error:
        convert_original_state_dict(original)
    assert str(error.value).count("\n") == 0
    original[name] = torch.cat([tensor, tensor])
    # One other tensor knows the size of the vocabulary, so neither is known to be right.
    wanted = "(?, 32)" if name == "llama_model.lm_head.weight" else tuple(tensor.shape)
    told = re.escape(f"{name} {tuple(original[name].shape)} instead of {wanted}")
    with pytest.raises(ValueError, match=f"of a shape that does not fit the others: {told}"):
        convert_original_state_dict(original)


def test_tensors_that_contradict_each_other_are_both_named() -> None:
    original = original_tensors()
    original["llama_model.lm_head.weight"] = torch.ones(51, 32)
    original["visual_encoder.pos_embed"] = torch.ones(1, 18, 24)
    with pytest.raises(ValueError) as error:
        convert_original_state_dict(original)
    for told in (
        "llama_model.lm_head.weight (51, 32) instead of (?, 32)",
        "llama_model.model.embed_tokens.weight (50, 32) instead of (?, 32)",
        "visual_encoder.pos_embed (1, 18, 24) instead of (1, 17, 24)",
    ):
        assert told in str(error.value)


def test_everything_that_is_wrong_is_listed_at_once() -> None:
    original = original_tensors()
    del original["ln_vision.bias"], original["llama_model.model.norm.weight"]
    original["llama_model.base_model.lora_A"] = torch.ones(2)
    original["llama_proj.weight"] = original["llama_proj.weight"].T
    with pytest.raises(ValueError) as error:
        convert_original_state_dict(original)
    for told in (
        "missing: llama_model.model.norm.weight, ln_vision.bias", "unknown: llama_model.base_model.lora_A",
        "llama_proj.weight (16, 32) instead of (32, 16)",
    ):  # fmt: skip
        assert told in str(error.value)


@pytest.mark.parametrize("gone", ["Qformer.", "llama_model.", "visual_encoder.", "crossattention", ""])
def test_a_part_that_is_missing_is_not_overlooked(gone: str) -> None:
    original = {name: tensor for name, tensor in original_tensors().items() if gone not in name}
    with pytest.raises(ValueError, match="missing: "):
        convert_original_state_dict(original)


# ---- the released sizes ---------------------------------------------------------------------------------------------

# Name → parameters that train, parameters in all.
RELEASED = {
    "vicuna-7b": (3_149_824, 7_832_688_128),
    "vicuna-13b": (3_937_280, 14_110_926_336),
    "llama2-7b": (23_072_768, 7_747_440_640),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_released_shapes(name: str) -> None:
    """On the meta device: every tensor as the released code has it at its full size."""
    large = name.endswith("13b")
    expected = original_tensors_on_meta(
        width=1408, mlp=6144, blocks=39, patch=14, grid=16,
        qformer=768 if name.startswith("vicuna") else None, intermediate=3072, layers=12, queries=32,
        vocabulary=32001 if name.startswith("vicuna") else 32000, hidden=5120 if large else 4096,
        feed_forward=13824 if large else 11008, llama_layers=40 if large else 32, key_heads=5120 if large else 4096,
    )  # fmt: skip
    with torch.device("meta"):
        model = MiniGPT4ForConditionalGeneration(PRESETS[name].config())
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert found == {name: tuple(tensor.shape) for name, tensor in convert_original_state_dict(expected).items()}
    model.freeze_backbones()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (trained, sum(parameter.numel() for parameter in model.parameters())) == RELEASED[name]


def original_tensors_on_meta(**sizes: int | None) -> dict[str, torch.Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", lambda *shape, **options: torch.empty(*shape, device="meta"))
        return original_tensors(**sizes)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def save_language_model(tokenizer, tmp_path: Path) -> Callable[..., str]:
    """`save(tensors, **saving)`: write the language model of a state dict as a folder."""
    return lambda tensors, **saving: save_llama(tensors, tmp_path / "llama", tokenizer, **saving)


FORMATS = {"safetensors": {}, "sharded": {"max_shard_size": "20KB"}, "bin": {"binary": True}}


@pytest.mark.parametrize("saving", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("qformer", [True, False])
@pytest.mark.parametrize("full", [False, True])
def test_official_files_become_a_folder(
    tmp_path: Path, save_language_model: Callable, qformer: bool, saving: dict, full: bool, picture: Callable
) -> None:
    files = Files(tmp_path, qformer)
    language_model = save_language_model(files.tensors, **saving)
    files.convert(language_model, tmp_path / "out", full=full)
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    for file in (files.vit, files.checkpoint):
        Path(file).unlink()
    model = AutoModelForImageTextToText.from_pretrained(moved, dtype=torch.float32)
    assert_close(logits(model), logits(files.expected()))
    adapter = load_file(moved / "model.safetensors")
    if full:
        assert not model.config.backbones and len(adapter) == len(model.state_dict())
    else:
        assert set(adapter) == {"model.language_projection.weight", "model.language_projection.bias"}
        assert (moved / "vision" / "model.safetensors").is_file()
    assert sorted(path.name for path in moved.iterdir() if path.is_dir()) == ([] if full else ["vision"])

    processor = AutoProcessor.from_pretrained(moved)
    assert processor.image_token_id == model.config.image_token_id == 320 > len(processor.tokenizer)
    assert processor.separator == ("###" if qformer else None)
    assert processor.image_processor.background_color is None  # as in the original
    chat = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert processor.decode(inputs["input_ids"][0]).rstrip().endswith("###Assistant:" if qformer else "[/INST]")
    reply = model.generate(**inputs, max_new_tokens=3)
    assert reply.shape[1] <= inputs["input_ids"].shape[1] + 3
    settings = model.generation_config
    assert (settings.do_sample, settings.top_p, settings.temperature) == (True, 0.9, 1.0)
    assert (settings.repetition_penalty, settings.penalize_prompt, settings.max_new_tokens) == (1.05, False, 300)


def test_vision_backbone_leaves_the_projection_alone(tmp_path: Path, save_language_model: Callable) -> None:
    files = Files(tmp_path)
    language_model = save_language_model(files.tensors)
    files.convert(language_model, tmp_path / "whole")
    files.convert(language_model, tmp_path / "out", vision_backbone=str(tmp_path / "whole" / "vision"))
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {
        "model.language_projection.weight", "model.language_projection.bias",
    }  # fmt: skip
    assert not (tmp_path / "out" / "vision").exists()
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits(model), logits(files.expected()))


def test_without_a_qformer_the_norm_of_the_backbone_is_not_used(tmp_path: Path, save_language_model: Callable) -> None:
    """The original loads `ln_vision` with the Q-Former only; BLIP-2's own would give other image tokens."""
    blip2 = tmp_path / "with"
    blip2.mkdir()
    files = Files(tmp_path, qformer=False)
    language_model = save_language_model(files.tensors)
    Files(blip2).convert(language_model, tmp_path / "whole")
    files.convert(language_model, tmp_path / "out", vision_backbone=str(tmp_path / "whole" / "vision"))
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits(model), logits(files.expected()))


def test_a_tuned_qformer_comes_with_the_adapter(tmp_path: Path, save_language_model: Callable) -> None:
    files = Files(tmp_path)
    language_model = save_language_model(files.tensors)
    files.convert(language_model, tmp_path / "whole")
    tuned = {name: tensor + 0.1 for name, tensor in pick(files.tensors, "Qformer.", "query_tokens").items()}
    files.tensors.update(tuned)
    files.checkpoint = save_checkpoint(tmp_path / "tuned.pth", {**pick(files.tensors, "llama_proj."), **tuned})
    for vision in ({}, {"vision_backbone": str(tmp_path / "whole" / "vision")}):
        files.convert(language_model, tmp_path / "out", **vision)
        model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert_close(logits(model), logits(files.expected()))


def test_a_tuned_qformer_keeps_its_dtype(tmp_path: Path, save_language_model: Callable) -> None:
    files = Files(tmp_path)
    language_model = save_language_model(files.tensors)
    LlamaForCausalLM.from_pretrained(language_model, dtype=torch.bfloat16).save_pretrained(language_model)
    tuned = pick(files.tensors, "query_tokens")
    files.checkpoint = save_checkpoint(tmp_path / "tuned.pth", {**pick(files.tensors, "llama_proj."), **tuned})
    files.convert(language_model, tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.query_tokens"], tuned["query_tokens"])


def test_converting_again_into_the_same_folder(tmp_path: Path, save_language_model: Callable) -> None:
    """Whatever an earlier run has left there, the folder is what the last one makes of it."""
    files = Files(tmp_path)
    language_model = save_language_model(files.tensors)
    expected = logits(files.expected())
    files.convert(language_model, tmp_path / "blip2")
    vision = str((tmp_path / "blip2" / "vision").rename(tmp_path / "vision"))
    runs = [{}, {"full": True}, {"vision_backbone": vision}, {}, {"vision_backbone": vision}, {"full": True}, {}]
    for options in runs:
        returned = files.convert(language_model, tmp_path / "out", **options)
        model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
        assert_close(logits(model), expected)
        folders = [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()]
        assert folders == ([] if options else ["vision"])
        returned.save_pretrained(tmp_path / "again")
        model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "again", dtype=torch.float32)
        assert_close(logits(model), expected)


def test_a_failed_run_leaves_an_earlier_folder_as_it_was(tmp_path: Path, save_language_model: Callable) -> None:
    files = Files(tmp_path)
    language_model = save_language_model(files.tensors)
    files.convert(language_model, tmp_path / "out")
    (tmp_path / "other").mkdir()
    other = Files(tmp_path / "other")
    torch.save({n: t + 1 for n, t in read_original_file(other.vit).items()}, other.vit)
    other.checkpoint = save_checkpoint(tmp_path / "wide.pth", pick(original_tensors(hidden=40), "llama_proj."))
    with pytest.raises(ValueError, match="width 40"):
        other.convert(language_model, tmp_path / "out")
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert_close(logits(model), logits(files.expected()))


# ---- wrong input ----------------------------------------------------------------------------------------------------


class Harmful:
    def __reduce__(self):
        return (print, ("this must never run",))


def test_a_file_that_could_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": {"llama_proj.weight": torch.ones(1)}, "config": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"could run code \(.*print.*\)"):
        read_original_file(tmp_path / "bad.pth")
    assert capsys.readouterr().out == ""


def test_damaged_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(500)}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    torch.save({"model": {"a": torch.ones(500)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    broken = {
        "half.pth": whole[:400], "cut.pth": whole[:-10], "nothing.pth": b"", "noise.pth": bytes(range(256)) * 9,
        "page.pth": b"<html>404</html>", "text.pth": b"hello, not found", "page.json": b'{"error": 404}',
        "pointer.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        "old_half.pth": (tmp_path / "old.pth").read_bytes()[:-50],
    }  # fmt: skip
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    for name, content in (("epoch.pth", {"epoch": 3}), ("none.pth", {"model": None}), ("tensor.pth", torch.ones(3))):
        torch.save(content, tmp_path / name)
    cases = [*((name, OSError, "download it again") for name in broken), ("gone.pth", OSError, "There is no file")]
    cases += [(name, ValueError, "no named tensors") for name in ("epoch.pth", "none.pth", "tensor.pth")]
    for name, kind, told in cases:
        with pytest.raises(kind, match=told) as error:
            read_original_file(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert read_original_file(tmp_path / "old.pth")["a"].sum() == 500


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path, save_language_model: Callable) -> None:
    files = Files(tmp_path)
    language_model = save_language_model(files.tensors)
    output = tmp_path / "out"
    other = save_checkpoint(tmp_path / "other.pth", pick(original_tensors(hidden=40), "llama_proj."))
    (tmp_path / "mine" / "vision").mkdir(parents=True)
    shutil.copytree(language_model, tmp_path / "copy" / "vision")
    vit = {name: tensor for name, tensor in read_original_file(files.vit).items() if not name.startswith("blocks.1")}
    torch.save(vit, few_blocks := tmp_path / "few_blocks.pth")
    unknown = save_checkpoint(tmp_path / "lora.pth", {**pick(files.tensors, "llama_proj."), "lora_A": torch.ones(1)})
    for changes, told in (
        ({"checkpoint": other}, "width 40, but .* has 32"),
        ({"checkpoint": unknown}, "unknown: lora_A"),
        ({"checkpoint": files.qformer}, "holds no projection"),
        ({"qformer": None}, "give the Q-Former's file too"),
        ({"vit": None}, "give one of them"),
        ({"vision_backbone": "some/blip2"}, "give one of them"),
        ({"vit": None, "vision_backbone": "some/blip2"}, "leave `qformer` out"),
        ({"vit": files.qformer}, "blip2.pth holds no ViT"),
        ({"qformer": files.vit}, "eva_vit_g.pth holds no Q-Former"),
        ({"config": None}, "eva_vit_g.pth is a ViT of another size: its pos_embed has the shape .1, 17, 24."),
        ({"vit": few_blocks}, "missing: visual_encoder.blocks.1.attn"),
        ({"output_dir": Path(files.vit)}, "is a file and no folder"),
        ({"output_dir": tmp_path / "mine"}, "is not from an earlier conversion"),
        ({"output_dir": tmp_path / "copy"}, "is not from an earlier conversion"),
        ({"output_dir": Path(files.vit) / "below"}, "cannot be made"),
        ({"output_dir": Path(language_model)}, "is read from and would be overwritten"),
        ({"preset": "vicuna-7b"}, "32 wide and behind a Q-Former, where vicuna-7b is 4096 wide"),
        ({"preset": "vicuna-9b"}, "no preset 'vicuna-9b'; choose among vicuna-7b"),
        ({"language_model": str(tmp_path)}, "cannot be opened"),
    ):  # fmt: skip
        options = {
            "checkpoint": files.checkpoint, "language_model": language_model, "vit": files.vit,
            "qformer": files.qformer, "config": files.config, "output_dir": output, **changes,
        }  # fmt: skip
        with pytest.raises((ValueError, OSError), match=told) as error:
            convert_original_checkpoint(options.pop("checkpoint"), options.pop("language_model"), **options)
        assert "\n" not in str(error.value)
        assert not output.exists() or not list(output.iterdir())
    LlamaForCausalLM.from_pretrained(language_model)  # is as it was
