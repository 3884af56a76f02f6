"""Any vision encoder with any language model: a table of both."""

import copy
from typing import Any

import pytest
import torch
from closeness import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration


SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GPT = {
    "vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

# What is special: the head (scaled, capped, with a bias, tied), positions (learned, ALiBi, rotary) or the mask.
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "llama_tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "qwen3": {"model_type": "qwen3", **SMALL, "tie_word_embeddings": True},
    "mistral_window": {"model_type": "mistral", **SMALL, "sliding_window": 4},
    "gpt2": {"model_type": "gpt2", **GPT},
    "opt": {
        "model_type": "opt", "vocab_size": 60, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "word_embed_proj_dim": 16, "max_position_embeddings": 64, "init_std": 0.3,
    },
    "gemma": {"model_type": "gemma", **SMALL},
    "gemma2": {"model_type": "gemma2", **SMALL, "final_logit_softcapping": 3.0, "sliding_window": 4},
    "gemma3": {"model_type": "gemma3_text", **SMALL, "sliding_window": 4},
    "cohere": {"model_type": "cohere", **SMALL, "logit_scale": 0.25},
    "granite": {"model_type": "granite", **SMALL, "logits_scaling": 4.0, "embedding_multiplier": 3.0},
    "phi": {"model_type": "phi", **SMALL},
    "gpt_neox": {"model_type": "gpt_neox", **SMALL},
    "smollm3": {"model_type": "smollm3", **SMALL},
    "olmo2": {"model_type": "olmo2", **SMALL},
    "bloom": {"model_type": "bloom", "vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2,
              "initializer_range": 0.3},
}  # fmt: skip

ONE_LAYER = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
# Their heads are a small network, or something that is no matrix at all.
REFUSED = {
    "xlm": {"model_type": "xlm", "vocab_size": 60, "emb_dim": 16, "n_layers": 1, "n_heads": 2},
    "bert": {"model_type": "bert", **ONE_LAYER, "is_decoder": True},
    "roberta": {"model_type": "roberta", **ONE_LAYER, "is_decoder": True},
}  # fmt: skip

ENCODER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "initializer_range": 0.3,
}  # fmt: skip
# Encoder, fields of MiniGPT4Config, image tokens of a picture.
VISION_ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "blip2": ({"model_type": "blip_2_vision_model", **ENCODER}, {}, 1),
    "vit": ({"model_type": "vit", **ENCODER}, {"patch_merge_size": 2}, 2),
    "clip": ({"model_type": "clip_vision_model", **ENCODER}, {}, 1),
    "siglip": ({"model_type": "siglip_vision_model", **ENCODER}, {"vision_feature_select_strategy": "full"}, 1),
    "dinov2": ({"model_type": "dinov2", **ENCODER}, {}, 1),
    "resnet": (
        {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32,
         "layer_type": "basic"},
        {"patch_merge_size": 8}, 2,
    ),
    "convnext": (
        {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32},
        {}, 4,
    ),
}  # fmt: skip


def make_language_model(options: dict[str, Any]) -> torch.nn.Module:
    """A causal language model on its own; every weight random, so that no two tokens score the same."""
    options = copy.deepcopy(options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def combine(
    tiny_config, causal_lm: torch.nn.Module, qformer: bool = True, **fields
) -> MiniGPT4ForConditionalGeneration:
    """MiniGPT-4 around a language model that already has its weights."""
    model = MiniGPT4ForConditionalGeneration(tiny_config(qformer=qformer, text=causal_lm.config, **fields)).eval()
    decoder = next(child for child in causal_lm.children() if isinstance(child, PreTrainedModel))
    model.language_model.load_state_dict(decoder.state_dict())
    model.lm_head.load_state_dict(causal_lm.get_output_embeddings().state_dict())
    for parameter in model.model.language_projection.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module", params=LANGUAGE_MODELS.values(), ids=LANGUAGE_MODELS)
def causal_lm(request) -> torch.nn.Module:
    return make_language_model(request.param)


@torch.no_grad()
def test_text_gets_the_logits_of_the_language_model_alone(tiny_config, causal_lm) -> None:
    ids = torch.tensor([[1, 5, 9, 7, 33, 8, 12], [1, 40, 41, 42, 43, 44, 45]])
    model = combine(tiny_config, causal_lm)
    assert torch.equal(model(input_ids=ids).logits, causal_lm(input_ids=ids).logits)
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), causal_lm.generate(ids, **options))


@torch.no_grad()
def test_pictures_count_and_left_padding_does_not(tiny_config, make_inputs, causal_lm) -> None:
    model = combine(tiny_config, causal_lm)
    rows = [[1, "image", 8, 30, 31, 32, 33], [1, "image", 5], [1, 6, 4]]
    together = model(**make_inputs(model, rows)).logits[:, -1]
    for row, logits in zip(rows, together, strict=True):
        first = 1 if row is rows[1] else 0
        alone = model(**make_inputs(model, [row], first_image=first)).logits[0, -1]
        assert_close(logits, alone)
    other = model(**make_inputs(model, rows, first_image=5)).logits[:, -1]
    assert (other - together)[:2].abs().max(-1).values.min() > 1e-3
    assert_close(other[2], together[2])


@torch.no_grad()
def test_padded_prompts_get_the_replies_of_unpadded_ones(tiny_config, make_inputs, causal_lm) -> None:
    model = combine(tiny_config, causal_lm)
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}
    rows = [[1, "image", 8, 30, 31], [1, "image", 5], [1, 6]]
    together = model.generate(**make_inputs(model, rows), **options)[:, -6:]
    for number, (row, reply) in enumerate(zip(rows, together, strict=True)):
        alone = model.generate(**make_inputs(model, [row], first_image=number), **options)[0, -6:]
        assert reply.tolist() == alone.tolist()


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_heads_that_would_score_differently_are_refused(tiny_config, options: dict) -> None:
    with pytest.raises(ValueError, match=r"cannot be the language model: its head .*choose a decoder whose LM head"):
        MiniGPT4ForConditionalGeneration(tiny_config(text=options))


@pytest.mark.parametrize("encoder", VISION_ENCODERS.values(), ids=VISION_ENCODERS)
@pytest.mark.parametrize("language_model", ["llama", "gpt2"])
@torch.no_grad()
def test_every_encoder_is_seen(tiny_config, make_inputs, encoder: tuple, language_model: str) -> None:
    vision, fields, tokens = encoder
    model = combine(
        tiny_config, make_language_model(LANGUAGE_MODELS[language_model]), qformer=False, vision=vision, **fields
    )
    assert model.config.num_image_tokens == tokens
    inputs = make_inputs(model, [[1, "image", 5], [1, 7, 9, "image", 6]])
    logits = model(**inputs).logits
    assert logits.isfinite().all()
    assert model.get_image_features(inputs["pixel_values"]).pooler_output.shape == (2, tokens, 16)
    swapped = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(0)}).logits
    assert (swapped - logits)[:, -1].abs().max(-1).values.min() > 1e-4
    replies = model.generate(**inputs, do_sample=False, max_new_tokens=4, pad_token_id=0)
    assert replies.shape[1] <= inputs["input_ids"].shape[1] + 4
    assert replies[:, inputs["input_ids"].shape[1] :].max() < model.config.text_config.vocab_size


@pytest.mark.parametrize("encoder", ["vit", "siglip", "resnet"])
@torch.no_grad()
def test_the_qformer_reads_any_encoder(tiny_config, make_inputs, encoder: str) -> None:
    vision, _, _ = VISION_ENCODERS[encoder]
    model = combine(tiny_config, make_language_model(LANGUAGE_MODELS["llama"]), vision=vision)
    inputs = make_inputs(model, [[1, "image", 5]])
    logits = model(**inputs).logits
    other = model(**make_inputs(model, [[1, "image", 5]], first_image=3)).logits
    assert (other - logits)[:, -1].abs().max() > 1e-4
