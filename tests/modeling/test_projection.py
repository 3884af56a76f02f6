"""The projection: what it normalizes, and where a new one starts."""

import pytest
import torch
from closeness import assert_close
from transformers import Blip2Config, CLIPVisionConfig, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from modeling_minigpt4.composition_minigpt4 import compose_config


def compose(parts: dict, **options) -> MiniGPT4ForConditionalGeneration:
    torch.manual_seed(5)
    return MiniGPT4ForConditionalGeneration.from_backbones(**parts, **options).eval()


@torch.no_grad()
def image_tokens(model, scale: float = 1.0) -> torch.Tensor:
    """What many features become, `(tokens, hidden_size)`."""
    torch.manual_seed(1)
    features = torch.randn(1024, model.config.num_image_tokens, model.config.qformer_config.hidden_size) * scale
    return model.get_image_features(vision_features=features).pooler_output.flatten(0, 1)


@torch.no_grad()
def words(model) -> torch.Tensor:
    vocab_size = model.config.text_config.vocab_size
    return model.get_input_embeddings()(torch.arange(vocab_size)).float()


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("norm", [False, True], ids=["as-they-are", "normalized"])
def test_a_new_projection_starts_where_words_are(backbones, layers: int, norm: bool) -> None:
    model = compose(backbones.parts(), projector_num_layers=layers, projector_norm=norm)
    assert model.config.projector_init == "embeddings"
    tokens, known = image_tokens(model), words(model)
    assert tokens.std(dim=0) / known.std(dim=0) == pytest.approx(1, abs=0.1)
    assert (tokens.mean(dim=0) - known.mean(dim=0)).abs().max() < 0.1 * known.std()


def test_without_it_image_tokens_are_elsewhere(backbones) -> None:
    model = compose(backbones.parts(), projector_init="linear")
    assert image_tokens(model).norm(dim=-1).mean() > 2 * words(model).norm(dim=-1).mean()


def test_normalized_features_have_no_size(backbones) -> None:
    model = compose(backbones.parts(), projector_norm=True)
    assert_close(image_tokens(model, scale=10.0), image_tokens(model, scale=100.0))
    as_they_are = compose(backbones.parts(), projector_norm=False)
    assert image_tokens(as_they_are, scale=100.0).norm() > 50 * image_tokens(as_they_are).norm()


def test_a_saved_projection_is_loaded_as_it_was(backbones, tmp_path) -> None:
    model = compose(backbones.parts())
    model.save_pretrained(tmp_path)
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.projector_norm is True
    assert torch.equal(image_tokens(again), image_tokens(model))


def test_scaled_embeddings_are_looked_up_as_the_model_does(backbones, tmp_path) -> None:
    """Gemma 3 multiplies its embeddings by the root of their width."""
    config = Gemma3TextConfig(
        vocab_size=99, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=16, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    model = compose({**backbones.parts(), "language_model": tmp_path})
    known = words(model)
    assert known.std() > 4 * model.get_input_embeddings().weight.std()
    assert image_tokens(model).std() / known.std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    ("vision", "vocab_size", "start"),
    [
        (Blip2Config, 32_000, (False, "linear")),
        (Blip2Config, 32_001, (False, "linear")),
        (Blip2Config, 49_152, (True, "embeddings")),
        (CLIPVisionConfig, 32_000, (True, "embeddings")),
    ],
    ids=["llama-2", "vicuna-v0", "another-language-model", "another-encoder"],
)
def test_the_original_s_parts_start_as_the_original(tmp_path, vision, vocab_size: int, start) -> None:
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = {**small, "image_size": 28, "patch_size": 14}
    config = Blip2Config(vision_config=encoder) if vision is Blip2Config else vision(**encoder)
    config.save_pretrained(tmp_path / "vision")
    LlamaConfig(vocab_size=vocab_size, **small).save_pretrained(tmp_path / "llama")
    config = compose_config(tmp_path / "vision", tmp_path / "llama", None, {})
    assert (config.projector_norm, config.projector_init) == start


def test_a_configuration_alone_is_the_original_s() -> None:
    config = MiniGPT4Config()
    assert (config.projector_norm, config.projector_init) == (False, "linear")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"projector_norm": "layer"}, "must be true or false"),
        ({"projector_init": "zeros"}, "'linear' .* or 'embeddings'"),
    ],
    ids=["norm", "init"],
)
def test_wrong_values_are_told(wrong: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MiniGPT4Config(**wrong)
