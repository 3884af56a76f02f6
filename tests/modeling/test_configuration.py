"""MiniGPT4Config: defaults, exact round trips, and what it refuses."""

import json

import pytest
import transformers
from transformers import AutoConfig, LlamaConfig

from modeling_minigpt4 import MiniGPT4Config


VIT = {
    "model_type": "vit", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}

ROUND_TRIPS = {
    "default": {},
    "no_qformer": {"qformer_config": None},
    "three_layers": {"projector_num_layers": 3, "projector_hidden_act": "relu", "vision_post_layernorm_eps": 1e-6},
    "other_parts": {"vision_config": VIT, "qformer_config": None, "text_config": GPT2, "patch_merge_size": 2},
    "tied_qwen": {"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}, "image_token_id": 200000},
    "backbones": {"backbones": {"vision": {"name_or_path": "a/b", "revision": "0" * 40, "fingerprint": "ab"}}},
}


def test_defaults_are_the_released_model() -> None:
    config = MiniGPT4Config()
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    assert (vision.num_hidden_layers, vision.hidden_size, vision.num_attention_heads) == (39, 1408, 16)
    assert (vision.intermediate_size, vision.image_size, vision.patch_size) == (6144, 224, 14)
    assert (vision.layer_norm_eps, config.vision_post_layernorm_eps) == (1e-6, 1e-5)
    assert (qformer.hidden_size, qformer.num_hidden_layers, qformer.cross_attention_frequency) == (768, 12, 2)
    assert (qformer.encoder_hidden_size, config.num_query_tokens, config.num_image_tokens) == (1408, 32, 32)
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("llama", 4096, 32, 32000)
    assert (text.num_attention_heads, text.intermediate_size) == (32, 11008)
    assert (config.projector_num_layers, config.projector_hidden_act, config.patch_merge_size) == (1, "gelu", 4)
    assert (config.image_token_id, config.image_size, config.backbones) == (32000, (224, 224), {})


def test_without_qformer_patches_are_joined_as_in_the_llama2_release() -> None:
    config = MiniGPT4Config(qformer_config=None)
    assert config.vision_feature_select_strategy == "default"  # without the CLS token
    assert config.num_image_tokens == 64


@pytest.mark.parametrize("fields", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trip_is_exact(fields: dict, tmp_path) -> None:
    config = MiniGPT4Config(**fields)
    for name, value in fields.items():
        if not isinstance(value, dict) or name == "backbones":
            assert getattr(config, name) == value
    through_json = json.loads(config.to_json_string(use_diff=False))
    config.save_pretrained(tmp_path)
    for again in (
        MiniGPT4Config.from_dict(config.to_dict()),
        MiniGPT4Config.from_dict(through_json),
        MiniGPT4Config.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
    ):
        assert type(again) is MiniGPT4Config
        assert type(again.vision_config) is type(config.vision_config)
        assert type(again.text_config) is type(config.text_config)
        # A saved file names the code that reads it, and what was read knows where from; all else is the same.
        place = {"auto_map": None, "_name_or_path": None}
        assert {**again.to_dict(), **place} == {**config.to_dict(), **place}


def test_to_dict_names_every_part_and_keeps_the_absence_of_the_qformer() -> None:
    saved = MiniGPT4Config(vision_config=VIT, qformer_config=None, text_config=GPT2).to_dict()
    assert saved["qformer_config"] is None
    assert (saved["model_type"], saved["vision_config"]["model_type"]) == ("minigpt4", "vit")
    assert saved["text_config"]["model_type"] == "gpt2"


def test_parts_can_be_objects_dicts_or_names_of_model_types() -> None:
    by_name = MiniGPT4Config(text_config="qwen2", vision_config="siglip_vision_model")
    assert (by_name.text_config.model_type, by_name.vision_config.model_type) == ("qwen2", "siglip_vision_model")
    text = LlamaConfig(vocab_size=77)
    assert MiniGPT4Config(text_config=text).text_config.vocab_size == 77
    assert MiniGPT4Config(text_config={"vocab_size": 77}).text_config.to_dict() == text.to_dict()


def test_given_dicts_are_not_changed() -> None:
    options = {"model_type": "llama", "vocab_size": 10}
    backbones = {"vision": {"name_or_path": "a/b"}}
    config = MiniGPT4Config(text_config=options, backbones=backbones)
    config.backbones["vision"]["revision"] = "main"
    assert options == {"model_type": "llama", "vocab_size": 10}
    assert backbones == {"vision": {"name_or_path": "a/b"}}


def test_the_qformer_reads_the_width_of_the_encoder() -> None:
    config = MiniGPT4Config(vision_config=VIT, qformer_config={"encoder_hidden_size": 999})
    assert config.qformer_config.encoder_hidden_size == 16


@pytest.mark.parametrize("tied", [True, False])
def test_tying_follows_the_language_model(tied: bool) -> None:
    config = MiniGPT4Config(text_config={"model_type": "qwen2", "tie_word_embeddings": tied})
    assert config.tie_word_embeddings is tied


# (vision fields, fields, image tokens): 28 pixels in patches of 14 are 4 patches and, in ViT, a CLS token.
TOKEN_COUNTS = [
    (VIT, {}, 1),
    (VIT, {"patch_merge_size": 2}, 2),
    (VIT, {"vision_feature_select_strategy": "full", "patch_merge_size": 5}, 1),
    ({**VIT, "image_size": 56}, {}, 4),
    ({**VIT, "model_type": "siglip_vision_model"}, {"vision_feature_select_strategy": "full"}, 1),
    ({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}, {}, 28 * 28 // 4),
]


@pytest.mark.parametrize(("vision", "fields", "expected"), TOKEN_COUNTS)
def test_number_of_image_tokens(vision: dict, fields: dict, expected: int) -> None:
    config = MiniGPT4Config(vision_config=vision, qformer_config=None, text_config=GPT2, **fields)
    assert config.num_image_tokens == expected


def test_patches_that_cannot_be_joined_are_refused_with_a_remedy() -> None:
    config = MiniGPT4Config(vision_config=VIT, qformer_config=None, patch_merge_size=3)
    with pytest.raises(ValueError, match="4 tokens, which cannot be joined 3 at a time; set `patch_merge_size`"):
        _ = config.num_image_tokens


ERRORS = [
    ({"text_config": {"model_type": "no_such_lm"}}, "`text_config` asks for the model type 'no_such_lm'"),
    ({"vision_config": "no_such_encoder"}, "`vision_config` asks for the model type 'no_such_encoder'"),
    ({"image_token_id": 31999}, "`image_token_id` is 31999, a token of the language model itself"),
    ({"vision_feature_select_strategy": "cls"}, "must be 'default' .* or 'full'"),
    ({"patch_merge_size": 0}, "`patch_merge_size` is 0; it must be 1 or more"),
    ({"projector_num_layers": 0}, "`projector_num_layers` is 0; it must be 1 or more"),
    ({"num_query_tokens": 0}, "`num_query_tokens` is 0; it must be 1 or more"),
]


@pytest.mark.parametrize(("fields", "message"), ERRORS)
def test_impossible_values_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiniGPT4Config(**fields)


def test_an_encoder_of_unknown_width_is_refused_with_a_remedy() -> None:
    vision = transformers.PretrainedConfig()
    with pytest.raises(ValueError, match=r"neither `hidden_size` nor `hidden_sizes`.* set `hidden_size`"):
        MiniGPT4Config(vision_config=vision)


def test_where_parts_were_read_from_is_not_written(tmp_path) -> None:
    """A path of this machine in the language model's configuration would be published with ours."""
    LlamaConfig(vocab_size=50).save_pretrained(tmp_path / "llama")
    config = MiniGPT4Config(text_config=AutoConfig.from_pretrained(tmp_path / "llama"))
    config.save_pretrained(tmp_path / "ours")
    assert str(tmp_path) not in (tmp_path / "ours" / "config.json").read_text()
    assert MiniGPT4Config.from_pretrained(tmp_path / "ours").text_config.vocab_size == 50
