"""Adapter-only checkpoints: what is saved, what is loaded from where, and what is said when something is wrong."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from transformers import (
    Blip2QFormerConfig,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from modeling_minigpt4 import AutoModelForVision2Seq, MiniGPT4ForConditionalGeneration, MiniGPT4Model
from modeling_minigpt4.backbones import Checkpoint
from modeling_minigpt4.sources_minigpt4 import normalize_source


PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}


def compose(parts: dict, **options) -> MiniGPT4ForConditionalGeneration:
    torch.manual_seed(5)
    return MiniGPT4ForConditionalGeneration.from_backbones(**parts, **options).eval()


def load(folder, **options) -> MiniGPT4ForConditionalGeneration:
    torch.manual_seed(99)  # a random tensor would be another one
    return MiniGPT4ForConditionalGeneration.from_pretrained(folder, **options).eval()


@torch.no_grad()
def score(model, make_inputs) -> torch.Tensor:
    inputs = make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])
    return model(**inputs).logits


def saved_names(folder) -> set[str]:
    return set(load_file(Path(folder) / "model.safetensors"))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, backbones) -> Path:
    """An adapter-only checkpoint of the shared backbones, for reading only."""
    folder = tmp_path_factory.mktemp("adapter")
    compose(backbones.parts()).save_pretrained(folder)
    return folder


@pytest.fixture
def own(tmp_path, write_backbones):
    """Backbones and an adapter of this test alone, to be damaged at will."""
    parts = write_backbones(tmp_path / "parts")
    compose(parts.parts()).save_pretrained(tmp_path / "adapter")
    return parts, tmp_path / "adapter"


# ---- composing ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_composed_parts_are_those_of_their_folders(backbones) -> None:
    model = compose(backbones.parts())
    blip2 = load_file(Path(backbones.vision) / "model.safetensors")
    llama = load_file(Path(backbones.language_model) / "model.safetensors")
    ours = model.state_dict()
    for name, tensor in ours.items():
        if name.startswith("model.language_model."):
            assert torch.equal(tensor, llama["model." + name.removeprefix("model.language_model.")])
        elif name.startswith("lm_head"):
            assert torch.equal(tensor, llama[name])
        elif name not in PROJECTION:
            assert torch.equal(tensor, blip2[name.removeprefix("model.")])
    alone = LlamaForCausalLM.from_pretrained(backbones.language_model).eval()
    ids = torch.tensor([[1, 5, 9, 44]])
    assert torch.equal(model(input_ids=ids).logits, alone(input_ids=ids).logits)


def test_composed_models_are_frozen_and_record_their_parts(backbones) -> None:
    model = compose(backbones.parts())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == PROJECTION
    recorded = model.config.backbones
    assert set(recorded) == {"vision", "qformer", "language_model"}
    assert recorded["vision"]["name_or_path"] == recorded["qformer"]["name_or_path"] == backbones.vision
    assert recorded["language_model"]["name_or_path"] == backbones.language_model
    assert all(len(source["fingerprint"]) == 16 for source in recorded.values())


def test_the_projection_is_new_and_follows_the_seed(backbones) -> None:
    first, second = (compose(backbones.parts(), projector_init="linear") for _ in range(2))
    weights = [model.model.language_projection.weight for model in (first, second)]
    assert torch.equal(*weights)
    bound = 1 / weights[0].shape[1] ** 0.5  # nn.Linear's own initialization
    assert 0.8 * bound < weights[0].abs().max() <= bound


@torch.no_grad()
def test_one_part_of_a_larger_model_and_a_vision_tower_alone(tmp_path, backbones, make_inputs) -> None:
    """CLIP holds a vision tower and a text tower; only the first is wanted, and no Q-Former."""
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**small, "vocab_size": 20}, vision_config={**small, "image_size": 28, "patch_size": 14}
    )
    clip = CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    CLIPVisionModel.from_pretrained(tmp_path / "clip").save_pretrained(tmp_path / "tower")
    pixels = torch.randn(1, 3, 28, 28)
    expected = clip.vision_model(pixels).last_hidden_state[:, 1:].flatten(1)
    for folder in ("clip", "tower"):
        parts = {"vision": tmp_path / folder, "language_model": backbones.language_model}
        model = compose(parts)
        assert model.config.vision_feature_select_strategy == "default"
        assert torch.equal(model.model.encode_images(pixels).last_hidden_state[:, 0], expected)
        model.save_pretrained(tmp_path / f"adapter_{folder}")
        assert saved_names(tmp_path / f"adapter_{folder}") == PROJECTION
        again = load(tmp_path / f"adapter_{folder}")
        assert_close(score(again, make_inputs), score(model, make_inputs))


def test_a_repository_without_a_qformer_is_refused(backbones) -> None:
    with pytest.raises(ValueError, match="is a 'llama' model without a Q-Former; name a BLIP-2 repository"):
        compose({**backbones.parts(), "qformer": backbones.language_model})


def test_a_backbone_that_is_nowhere_is_refused(backbones, tmp_path) -> None:
    for missing in (str(tmp_path / "nowhere"), "nobody/nothing"):
        with pytest.raises(OSError, match=f"language_model backbone .*{Path(missing).name}.* cannot be opened"):
            compose({**backbones.parts(), "language_model": missing})


# ---- what is saved ------------------------------------------------------------------------------------------------


def test_an_adapter_holds_the_projection_and_nothing_else(adapter) -> None:
    assert saved_names(adapter) == PROJECTION
    tensors = load_file(adapter / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    files = {file.name for file in adapter.iterdir()}
    assert files == {
        "config.json", "generation_config.json", "model.safetensors", "configuration_minigpt4.py",
        "modeling_minigpt4.py", "backbones.py", "generation_minigpt4.py", "heads_minigpt4.py", "labels_minigpt4.py",
        "checks_minigpt4.py", "compat_minigpt4.py", "composition_minigpt4.py", "digest_minigpt4.py",
        "freezing_minigpt4.py", "patches_minigpt4.py", "peft_minigpt4.py", "projector_minigpt4.py",
        "quantization_minigpt4.py", "remote_code_minigpt4.py", "saving_minigpt4.py", "sources_minigpt4.py",
        "unchanged_minigpt4.py",
    }  # fmt: skip
    assert sum(file.stat().st_size for file in adapter.glob("*.safetensors")) < 3000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device_map", [None, "cpu", "auto"])
def test_a_loaded_adapter_gives_the_same_logits(adapter, backbones, make_inputs, dtype, device_map) -> None:
    options = {"dtype": dtype, **({"device_map": device_map} if device_map else {})}
    model, again = compose(backbones.parts(), **options), load(adapter, **options)
    for loaded in (model, again):
        assert {parameter.dtype for parameter in loaded.language_model.parameters()} == {dtype}
        assert {parameter.dtype for parameter in loaded.model.vision_model.parameters()} == {dtype}
        assert loaded.model.language_projection.weight.dtype == torch.float32
    assert_close(score(again, make_inputs), score(model, make_inputs))
    assert again.generation_config.separator == "###"
    assert {name for name, parameter in again.named_parameters() if parameter.requires_grad} == PROJECTION


def test_bfloat16_keeps_every_bit_of_the_projection(adapter, tmp_path) -> None:
    model = load(adapter, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    first, second = load_file(adapter / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in PROJECTION)


def test_saving_again_and_loading_again_changes_nothing(adapter, tmp_path, make_inputs) -> None:
    model = load(adapter)
    model.save_pretrained(tmp_path)
    assert saved_names(tmp_path) == PROJECTION
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (adapter, tmp_path))
    assert first["backbones"] == second["backbones"]
    assert_close(score(load(tmp_path), make_inputs), score(model, make_inputs))


def test_a_full_checkpoint_needs_no_backbone(own, tmp_path, make_inputs) -> None:
    _, adapter = own
    model = load(adapter)
    expected = score(model, make_inputs)
    model.save_pretrained(tmp_path / "full", full=True)
    assert saved_names(tmp_path / "full") == set(model.state_dict())
    assert json.loads((tmp_path / "full" / "config.json").read_text())["backbones"] == {}
    shutil.rmtree(tmp_path / "parts")
    again = load(tmp_path / "full")
    assert_close(score(again, make_inputs), expected)
    assert again.model.language_projection.weight.dtype == torch.float32
    # `full` is said each time: the next save is adapter-only again.
    model.save_pretrained(tmp_path / "after")
    assert saved_names(tmp_path / "after") == PROJECTION
    assert set(model.config.backbones) == {"vision", "qformer", "language_model"}


def test_a_tuned_qformer_is_saved_and_loaded(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts())
    model.freeze_backbones(train=("qformer",))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "tuned")
    tuned = {name for name in model.state_dict() if name.startswith(("model.qformer.", "model.query_tokens"))}
    assert saved_names(tmp_path / "tuned") == PROJECTION | tuned
    again = load(tmp_path / "tuned")
    assert_close(score(again, make_inputs), score(model, make_inputs))
    again.save_pretrained(tmp_path / "again")  # frozen now, and still of this checkpoint
    assert saved_names(tmp_path / "again") == PROJECTION | tuned
    assert_close(score(load(tmp_path / "again"), make_inputs), score(model, make_inputs))


def test_three_projection_layers(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts(), projector_num_layers=3)
    model.save_pretrained(tmp_path)
    expected = {f"model.language_projection.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    assert saved_names(tmp_path) == expected
    assert_close(score(load(tmp_path), make_inputs), score(model, make_inputs))


def test_without_qformer(backbones, tmp_path, make_inputs) -> None:
    model = compose(backbones.parts(qformer=False))
    model.save_pretrained(tmp_path)
    assert saved_names(tmp_path) == PROJECTION
    assert set(model.config.backbones) == {"vision", "language_model"}
    assert_close(score(load(tmp_path), make_inputs), score(model, make_inputs))


def test_the_model_without_a_head_loads_from_the_same_folder(adapter, backbones, make_inputs) -> None:
    whole = load(adapter)
    base = MiniGPT4Model.from_pretrained(adapter).eval()
    assert type(base) is type(MiniGPT4Model.from_backbones(**backbones.parts())) is MiniGPT4Model
    inputs = make_inputs(whole, [[1, "image", 5]])
    assert_close(base(**inputs).last_hidden_state, whole.model(**inputs).last_hidden_state)
    assert {name for name, parameter in base.named_parameters() if parameter.requires_grad} == {
        name.removeprefix("model.") for name in PROJECTION
    }


OTHER_LANGUAGE_MODELS = {
    "qwen2_tied": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, {"n_positions": 64}),
}


@pytest.mark.parametrize("case", OTHER_LANGUAGE_MODELS.values(), ids=OTHER_LANGUAGE_MODELS)
@torch.no_grad()
def test_tied_embeddings_and_other_names(case: tuple, backbones, tmp_path, make_inputs) -> None:
    model_class, config_class, fields = case
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    own = model_class(config_class(**sizes, intermediate_size=16, initializer_range=0.3, **fields)).eval()
    own.save_pretrained(tmp_path / "lm")
    model = compose({**backbones.parts(), "language_model": tmp_path / "lm"})
    ids = torch.tensor([[1, 5, 9, 44]])
    assert torch.equal(model(input_ids=ids).logits, own(input_ids=ids).logits)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for full, names in ((False, PROJECTION), (True, set(model.state_dict()) - {"lm_head.weight"})):
        model.save_pretrained(tmp_path / "saved", full=full)
        assert saved_names(tmp_path / "saved") == names
        again = load(tmp_path / "saved")
        assert_close(score(again, make_inputs), score(model, make_inputs))
        assert again.lm_head.weight.data_ptr() == again.get_input_embeddings().weight.data_ptr()


# ---- shards and old files -----------------------------------------------------------------------------------------


def poison(folder: str, *needed: str) -> list[str]:
    """Make every shard unreadable that holds no tensor whose name begins with one of `needed`."""
    index = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]
    used = {file for name, file in index.items() if name.startswith(needed)}
    spoilt = sorted(set(index.values()) - used)
    for file in spoilt:
        (Path(folder) / file).write_bytes(b"must not be opened")
    return spoilt


def test_only_the_shards_that_are_needed_are_opened(tmp_path, write_backbones, make_inputs) -> None:
    whole = write_backbones(tmp_path / "whole", seed=3)
    sharded = write_backbones(tmp_path / "sharded", seed=3, max_shard_size="4KB")
    expected = score(compose(whole.parts()), make_inputs)
    assert len(poison(sharded.vision, "vision_model.", "qformer.", "query_tokens")) >= 2  # BLIP-2's own OPT
    model = compose(sharded.parts())
    assert_close(score(model, make_inputs), expected)
    model.save_pretrained(tmp_path / "adapter")
    # Without the Q-Former not even its shards are touched.
    assert poison(sharded.vision, "vision_model.")
    assert compose(sharded.parts(qformer=False)).config.qformer_config is None
    with pytest.raises(OSError, match=r"\.safetensors cannot be read .*truncated or damaged"):
        load(tmp_path / "adapter")


def test_a_lost_shard_is_named(own, tmp_path, write_backbones) -> None:
    sharded = write_backbones(tmp_path / "sharded", max_shard_size="4KB")
    lost = sorted(Path(sharded.language_model).glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(OSError, match=rf"language_model backbone .* lacks its file {lost.name}.*download or copy"):
        compose(sharded.parts())


def test_old_bin_files_are_read_without_running_code(backbones, tmp_path, make_inputs) -> None:
    for folder in (backbones.vision, backbones.language_model):
        target = tmp_path / Path(folder).name
        shutil.copytree(folder, target)
        torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
        (target / "model.safetensors").unlink()
    parts = {"vision": tmp_path / "blip2", "qformer": tmp_path / "blip2", "language_model": tmp_path / "llama"}
    model = compose(parts)
    assert_close(score(model, make_inputs), score(compose(backbones.parts()), make_inputs))
    model.save_pretrained(tmp_path / "adapter")
    assert_close(score(load(tmp_path / "adapter"), make_inputs), score(model, make_inputs))

    class Harmful:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was_run",))

    torch.save({"lm_head.weight": Harmful()}, tmp_path / "llama" / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"pytorch_model\.bin|[Ww]eights.only"):
        load(tmp_path / "adapter")
    assert not (tmp_path / "was_run").exists()


def test_safetensors_come_before_bin(backbones, tmp_path, make_inputs) -> None:
    shutil.copytree(backbones.language_model, tmp_path / "llama")
    (tmp_path / "llama" / "pytorch_model.bin").write_bytes(b"must not be opened")
    checkpoint = Checkpoint(normalize_source(tmp_path / "llama"), "language_model")
    checkpoint.tensor("lm_head.weight")
    assert list(checkpoint._open_files) == ["model.safetensors"]


# ---- what is wrong is said ----------------------------------------------------------------------------------------


def test_a_renamed_backbone_is_named_with_its_remedy(own, tmp_path, make_inputs) -> None:
    parts, adapter = own
    expected = score(load(adapter), make_inputs)
    moved = tmp_path / "elsewhere"
    shutil.move(parts.language_model, moved)
    with pytest.raises(OSError) as caught:
        load(adapter)
    assert parts.language_model in str(caught.value)
    assert 'backbones={"language_model": ' in str(caught.value)
    again = load(adapter, backbones={"language_model": moved})
    assert_close(score(again, make_inputs), expected)
    assert again.config.backbones["language_model"]["name_or_path"] == str(moved)
    by_auto_class = AutoModelForVision2Seq.from_pretrained(adapter, backbones={"language_model": moved})
    assert_close(score(by_auto_class.eval(), make_inputs), expected)


@pytest.mark.parametrize("which", ["language_model", "vision", "adapter"])
def test_a_truncated_file_is_named_with_its_remedy(own, which: str) -> None:
    parts, adapter = own
    file = Path(adapter if which == "adapter" else getattr(parts, which)) / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError) as caught:
        load(adapter)
    assert str(file) in str(caught.value)
    assert "truncated or damaged, so download or save it again" in str(caught.value)


def change_adapter(adapter: Path, change) -> None:
    tensors = load_file(adapter / "model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "model.safetensors", metadata={"format": "pt"})


WRONG_ADAPTERS = {
    "missing": (
        lambda tensors: tensors.pop("model.language_projection.bias"),
        "lacks {name}", "bias", "save it again",
    ),
    "empty": (lambda tensors: tensors.clear(), "lacks {name}", "bias", "save it again"),
    "wrong_size": (
        lambda tensors: tensors.update({"model.language_projection.weight": torch.zeros(12, 24)}),
        "{name} in", "weight", "it was trained for another language model or vision encoder",
    ),
    "unknown": (
        lambda tensors: tensors.update({"model.language_projection.2.weight": torch.zeros(2)}),
        "holds {name}", "2.weight", "restore the config.json",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS)
@pytest.mark.parametrize("model_class", [MiniGPT4ForConditionalGeneration, MiniGPT4Model])
def test_a_wrong_adapter_is_refused(own, case: tuple, model_class) -> None:
    _, adapter = own
    change, says, name, remedy = case
    change_adapter(adapter, change)
    with pytest.raises(ValueError) as caught:
        model_class.from_pretrained(adapter)
    message = str(caught.value)
    assert says.format(name=f"model.language_projection.{name}") in message
    assert str(adapter) in message
    assert remedy in message


def test_a_missing_adapter_file_is_named(own) -> None:
    _, adapter = own
    (adapter / "model.safetensors").unlink()
    with pytest.raises(OSError) as caught:
        load(adapter)
    assert f"The adapter {adapter} has no weights; save it again" in str(caught.value)


def test_other_weights_of_the_same_shape_are_refused_unless_wanted(own, tmp_path, write_backbones) -> None:
    _, adapter = own
    other = write_backbones(tmp_path / "other", seed=77)
    for part in ("language_model", "vision"):
        with pytest.raises(ValueError) as caught:
            load(adapter, backbones={part: getattr(other, part)})
        message = str(caught.value)
        assert getattr(other, part) in message
        assert "are not those this checkpoint was trained with" in message
        assert '"fingerprint": None' in message
    knowingly = {"name_or_path": other.language_model, "fingerprint": None}
    model = load(adapter, backbones={"language_model": knowingly})
    assert torch.equal(
        model.lm_head.weight, load_file(Path(other.language_model) / "model.safetensors")["lm_head.weight"]
    )


def test_a_language_model_of_another_shape_is_refused(own, tmp_path, write_backbones) -> None:
    _, adapter = own
    wider = write_backbones(tmp_path / "wider", text={"intermediate_size": 48})
    with pytest.raises(ValueError, match=r"has the shape .*48.* but model\.language_model.* needs .*; name the"):
        load(adapter, backbones={"language_model": wider.language_model})
    deeper = write_backbones(tmp_path / "shallow", text={"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"not those this checkpoint was trained with|name the right backbones"):
        load(adapter, backbones={"language_model": deeper.language_model})


def test_a_backbone_that_lacks_a_tensor_is_refused(own) -> None:
    parts, adapter = own
    file = Path(parts.language_model) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    knowingly = {"name_or_path": parts.language_model, "fingerprint": None}
    with pytest.raises(
        ValueError, match=r"2 tensors are in no backbone .*(lm_head|up_proj).*name the right backbones"
    ):
        load(adapter, backbones={"language_model": knowingly})
    with pytest.raises(
        ValueError, match=r"2 tensors are in no backbone .*(lm_head|up_proj).*name the right backbones"
    ):
        compose(parts.parts())


def test_an_unknown_part_is_refused(adapter, backbones) -> None:
    with pytest.raises(ValueError, match="names llm; the parts are vision, qformer, language_model"):
        load(adapter, backbones={"llm": backbones.language_model})


# ---- publishing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings(caplog):
    """Texts of the warnings of this test."""
    logging.Logger.warning_once.cache_clear()  # transformers says such things once per process
    return lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_saving_an_adapter_of_local_backbones_warns(backbones, tmp_path, warnings) -> None:
    model = compose(backbones.parts())
    model.save_pretrained(tmp_path / "adapter")
    (text,) = [text for text in warnings() if "nobody else can load it" in text]
    assert backbones.vision in text
    assert backbones.language_model in text
    assert "`full=True`" in text


def test_saving_in_full_or_with_repositories_does_not_warn(backbones, tmp_path, warnings) -> None:
    model = compose(backbones.parts())
    model.save_pretrained(tmp_path / "full", full=True)
    for source in model.config.backbones.values():
        source.update(name_or_path="somebody/something", revision="0" * 40)
    model.save_pretrained(tmp_path / "adapter")
    assert [text for text in warnings() if "nobody else" in text] == []


def test_sources_are_spelt_out(backbones, tmp_path, monkeypatch) -> None:
    assert normalize_source("a/b@main") == {"name_or_path": "a/b", "revision": "main"}
    assert normalize_source({"name_or_path": "a/b", "subfolder": "c"}) == {"name_or_path": "a/b", "subfolder": "c"}
    monkeypatch.chdir(Path(backbones.vision).parent)
    assert normalize_source("blip2") == {"name_or_path": backbones.vision}
    with pytest.raises(ValueError, match="A backbone needs a `name_or_path`"):
        normalize_source({"revision": "main"})


def hub_cache(root: Path, repository: str, folder: str, revision: str) -> None:
    """Lay out a folder as huggingface_hub's cache does after a download of `main`."""
    base = root / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, base / "snapshots" / revision)
    (base / "refs").mkdir()
    (base / "refs" / "main").write_text(revision)


def test_repositories_are_pinned_to_the_commit_that_was_read(
    backbones, tmp_path, write_backbones, make_inputs
) -> None:
    first, second = "1" * 40, "2" * 40
    cache = tmp_path / "cache"
    hub_cache(cache, "some/blip2", backbones.vision, first)
    hub_cache(cache, "some/llama", backbones.language_model, second)
    parts = {"vision": "some/blip2", "qformer": "some/blip2", "language_model": "some/llama@main"}
    model = compose(parts, cache_dir=cache)
    assert model.config.backbones["vision"]["revision"] == model.config.backbones["qformer"]["revision"] == first
    assert model.config.backbones["language_model"]["revision"] == second
    model.save_pretrained(tmp_path / "adapter")
    # Later somebody pushes other weights to the same repository.
    newer = write_backbones(tmp_path / "newer", seed=8)
    base = cache / "models--some--llama"
    shutil.copytree(newer.language_model, base / "snapshots" / ("3" * 40))
    (base / "refs" / "main").write_text("3" * 40)
    again = load(tmp_path / "adapter", cache_dir=cache)
    assert_close(score(again, make_inputs), score(model, make_inputs))
    assert again.config.backbones == model.config.backbones


def test_subfolders(backbones, tmp_path, make_inputs) -> None:
    root = Path(backbones.vision).parent
    vision = {"name_or_path": root, "subfolder": "blip2"}
    parts = {"vision": vision, "qformer": vision, "language_model": {"name_or_path": root, "subfolder": "llama"}}
    model = compose(parts)
    model.save_pretrained(tmp_path)
    assert model.config.backbones["vision"]["subfolder"] == "blip2"
    assert_close(score(load(tmp_path), make_inputs), score(compose(backbones.parts()), make_inputs))


def test_the_qformer_of_one_repository_reads_the_encoder_of_another(backbones, tmp_path, write_backbones) -> None:
    other = write_backbones(tmp_path, seed=4)
    model = compose({**backbones.parts(), "qformer": other.vision})
    assert isinstance(model.config.qformer_config, Blip2QFormerConfig)
    assert torch.equal(model.model.query_tokens, load_file(Path(other.vision) / "model.safetensors")["query_tokens"])
    expected = load_file(Path(backbones.vision) / "model.safetensors")["vision_model.post_layernorm.weight"]
    assert torch.equal(model.model.vision_model.post_layernorm.weight, expected)


def test_backbones_that_lie_in_the_repository_of_the_adapter(backbones, tmp_path, make_inputs) -> None:
    """`"."` is the repository or folder that is loaded, so that both can be moved, pushed and pinned together."""
    model = compose(backbones.parts())
    model.save_pretrained(tmp_path / "whole")
    for part, folder in (("vision", backbones.vision), ("language_model", backbones.language_model)):
        shutil.copytree(folder, tmp_path / "whole" / part)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    for part, folder in (("vision", "vision"), ("qformer", "vision"), ("language_model", "language_model")):
        config["backbones"][part].update(name_or_path=".", subfolder=folder)
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    expected = score(model, make_inputs)
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    assert_close(score(load(moved), make_inputs), expected)
    hub_cache(tmp_path / "cache", "some/eyes", str(moved), "4" * 40)
    shutil.rmtree(moved)
    again = load("some/eyes", cache_dir=tmp_path / "cache")
    assert_close(score(again, make_inputs), expected)
    source = again.config.backbones["qformer"]
    assert (source["name_or_path"], source["subfolder"], source["revision"]) == ("some/eyes", "vision", "4" * 40)


def test_auto_dtype_is_that_of_the_language_model(own) -> None:
    """Not the projection's, which is float32: a language model of 13 GB would become one of 27."""
    parts, _ = own
    LlamaForCausalLM.from_pretrained(parts.language_model, dtype=torch.bfloat16).save_pretrained(parts.language_model)
    model = compose(parts.parts(), dtype="auto")
    assert {parameter.dtype for parameter in model.language_model.parameters()} == {torch.bfloat16}
    assert model.model.language_projection.weight.dtype == torch.float32


def test_saving_over_another_kind_of_checkpoint(adapter, tmp_path, make_inputs) -> None:
    """One file, shards, one file: what is loaded is always what was saved last."""
    model = load(adapter)
    for options in (
        {"full": True, "max_shard_size": "20KB"},
        {},
        {"full": True, "max_shard_size": "20KB"},
        {"full": True},
    ):
        torch.nn.init.normal_(model.model.language_projection.bias)
        model.save_pretrained(tmp_path, **options)
        assert_close(score(load(tmp_path), make_inputs), score(model, make_inputs))
    names = {path.name for path in tmp_path.glob("model*")} - {"modeling_minigpt4.py"}
    assert names == {"model.safetensors"}


def test_a_language_model_that_was_saved_whole_over_its_shards(own, make_inputs) -> None:
    parts, _ = own
    language_model = LlamaForCausalLM.from_pretrained(parts.language_model)
    language_model.save_pretrained(parts.language_model, max_shard_size="20KB")
    for parameter in language_model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    language_model.save_pretrained(parts.language_model)
    expected = LlamaForCausalLM.from_pretrained(parts.language_model).model.norm.weight
    assert torch.equal(compose(parts.parts()).language_model.norm.weight, expected)


def test_saving_where_the_backbones_lie_keeps_the_folder_movable(backbones, tmp_path, make_inputs) -> None:
    shutil.copytree(backbones.vision, tmp_path / "whole" / "vision")
    vision = {"name_or_path": tmp_path / "whole", "subfolder": "vision"}
    model = compose({**backbones.parts(), "vision": vision, "qformer": vision})
    model.save_pretrained(tmp_path / "whole")
    load(tmp_path / "whole").save_pretrained(tmp_path / "whole")
    moved = (tmp_path / "whole").rename(tmp_path / "moved")
    assert_close(score(load(moved), make_inputs), score(model, make_inputs))
