"""
The same numbers as the original code, stage by stage.

`fixtures/parity` holds tiny random weights under the original's names and every tensor that the released MiniGPT-4
computed from them (fp32, CPU). Each stage is compared, because errors hide: with a wrong epsilon in `ln_vision` the
image features are off by 1e-4 while the loss still agrees.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration


FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "parity"

# The original's names and ours, tried in order.
NAMES = [
    (r"^visual_encoder\.cls_token$", "model.vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "model.vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"model.vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"model.vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"model.vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"model.vision_model.encoder.layers.\1.mlp."),
    (r"^ln_vision\.", "model.vision_model.post_layernorm."),
    (r"^query_tokens$", "model.query_tokens"),
    (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "model.qformer.layernorm."),
    (r"^Qformer\.bert\.encoder\.(layer\.\d+\.(?:cross)?attention)\.self\.", r"model.qformer.encoder.\1.attention."),
    (r"^Qformer\.bert\.encoder\.", "model.qformer.encoder."),
    (r"^llama_proj\.", "model.language_projection."),
    (r"^llama_model\.model\.", "model.language_model."),
    (r"^llama_model\.lm_head\.", "lm_head."),
]


def rename(original: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of the original under our names; the key bias, which the original fixes to zero, is put in."""
    tensors = {}
    for name, tensor in original.items():
        if name.endswith(("position_ids", "inv_freq", "v_bias")):
            continue
        if name.endswith("q_bias"):
            values = original[name.replace("q_bias", "v_bias")]
            name, tensor = name.replace("q_bias", "qkv.bias"), torch.cat([tensor, torch.zeros_like(tensor), values])
        pattern, ours = next(pair for pair in NAMES if re.search(pair[0], name))
        tensors[re.sub(pattern, ours, name)] = tensor
    return tensors


def read_config(sizes: dict, attention: str) -> MiniGPT4Config:
    vision, qformer, text = sizes["vision"], sizes.get("qformer"), sizes["llm"]
    return MiniGPT4Config(
        vision_config={
            "hidden_size": vision["embed_dim"], "intermediate_size": vision["mlp_hidden_dim"],
            "num_hidden_layers": vision["depth"], "num_attention_heads": vision["num_heads"],
            "image_size": vision["img_size"], "patch_size": vision["patch_size"],
            "layer_norm_eps": vision["block_norm_eps"],
        },
        qformer_config=qformer and {
            "vocab_size": qformer["vocab_size"], "hidden_size": qformer["hidden_size"],
            "num_hidden_layers": qformer["num_hidden_layers"], "num_attention_heads": qformer["num_attention_heads"],
            "intermediate_size": qformer["intermediate_size"], "layer_norm_eps": qformer["layer_norm_eps"],
            "cross_attention_frequency": qformer["cross_attention_freq"],
        },
        text_config={name: text[name] for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id", "eos_token_id", "pad_token_id",
        )},
        num_query_tokens=qformer["query_length"] if qformer else 1,
        attn_implementation=attention,
    )  # fmt: skip


CASES = [(variant, attention) for variant in ("qformer", "no_qformer") for attention in ("eager", "sdpa")]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request) -> tuple[MiniGPT4ForConditionalGeneration, dict[str, torch.Tensor], dict]:
    """The model with the original's weights, what the original computed with them, and its sizes."""
    variant, attention = request.param
    sizes = json.loads((FIXTURES / variant / "config.json").read_text())
    model = MiniGPT4ForConditionalGeneration(read_config(sizes, attention)).eval()
    model.load_state_dict(rename(load_file(FIXTURES / variant / "checkpoint_original.safetensors")))
    assert model.language_model.config._attn_implementation == attention
    return model, load_file(FIXTURES / variant / "reference.safetensors"), sizes


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def to_ids(layout: torch.Tensor, model: MiniGPT4ForConditionalGeneration) -> torch.Tensor:
    """The fixture's ids, in which -1 is the place of an image token."""
    return layout.masked_fill(layout == -1, model.config.image_token_id)


@torch.no_grad()
def test_every_stage_of_the_vision_side(case) -> None:
    model, reference, sizes = case
    pixels = reference["pixel_values"]
    encoder = model.model.vision_model
    outputs = encoder(pixels, output_hidden_states=True, return_dict=True)
    close(outputs.last_hidden_state, reference["image_embeds"])
    before_norm = encoder.encoder(encoder.embeddings(pixels)).last_hidden_state
    close(before_norm, reference["vit_output"])
    features = model.model.encode_images(pixels).last_hidden_state
    close(features, reference["query_output" if sizes["has_qformer"] else "image_embeds_grouped"])
    tokens = model.get_image_features(pixels).pooler_output
    assert tokens.shape[1] == model.config.num_image_tokens == sizes["num_image_tokens"]
    close(tokens, reference["inputs_llama"])


@pytest.mark.parametrize("stage", ["stage1", "stage2", "ragged"])
def test_logits_loss_and_gradient(case, stage: str) -> None:
    model, every, _ = case
    prefix = f"forward.{stage}."
    reference = {name.removeprefix(prefix): tensor for name, tensor in every.items() if name.startswith(prefix)}
    model.freeze_backbones()
    model.zero_grad()
    model.train()
    outputs = model(
        input_ids=to_ids(reference["layout_ids"], model),
        attention_mask=reference["attention_mask"],
        pixel_values=every["pixel_values"],
        labels=reference["targets"],
    )
    real = reference["attention_mask"].bool()
    close(outputs.logits[real], reference["logits"][real])
    close(outputs.loss, reference["loss"])
    outputs.loss.backward()
    for name, parameter in model.model.language_projection.named_parameters():
        expected = reference[f"grad.llama_proj.{name}"]
        assert (parameter.grad - expected).norm() <= 1e-4 * expected.norm()
    model.eval()


@torch.no_grad()
@pytest.mark.parametrize("image", [0, 1])
def test_greedy_replies_are_the_same(case, image: int) -> None:
    model, reference, sizes = case
    ids = to_ids(reference[f"generate.image{image}.layout_ids"], model)
    given = {"input_ids": ids, "pixel_values": reference["pixel_values"][image : image + 1], "do_sample": False}
    # The original was run with an EOS that never comes, and once with one that does.
    for name, eos in (("greedy_ids", -1), ("greedy_eos_ids", sizes["greedy_eos_token_ids"][image])):
        expected = reference[f"generate.image{image}.{name}"]
        options = {"eos_token_id": None if eos < 0 else eos, "max_new_tokens": 12, "pad_token_id": 0}
        assert model.generate(**given, **options)[:, ids.shape[1] :].tolist() == expected.tolist()


@torch.no_grad()
def test_greedy_replies_of_a_batch_are_the_same(case) -> None:
    model, reference, _ = case
    replies = model.generate(
        inputs_embeds=reference["generate.batch.inputs_embeds"],
        attention_mask=reference["generate.batch.attention_mask"],
        do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert replies.tolist() == reference["generate.batch.num_beams1_ids"].tolist()
