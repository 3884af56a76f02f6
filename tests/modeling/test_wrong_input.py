"""What is told when a model is made from, or given, what cannot be right."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import BertConfig, CLIPTextConfig, GPT2Config, LlamaConfig

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model, MiniGPT4Processor
from modeling_minigpt4 import checks_minigpt4 as checks
from modeling_minigpt4.checks_minigpt4 import InputError, max_positions
from processing_minigpt4 import MiniGPT4ImageProcessor


# ---- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["vision", "language_model"])
def test_a_part_that_is_none_is_told(part: str, backbones, tiny_config) -> None:
    with pytest.raises(ValueError, match=f"^`{part}` is None; name a repository or folder"):
        MiniGPT4ForConditionalGeneration.from_backbones(**{**backbones.parts(), part: None})
    sources = {"vision": backbones.vision, "language_model": backbones.language_model, part: None}
    with pytest.raises(ValueError, match="A backbone is a NoneType; name a repository or folder"):
        MiniGPT4Processor.from_backbones(**sources, config=tiny_config())


@pytest.mark.parametrize("part", ["vision", "language_model", "qformer"])
def test_a_model_is_not_a_name(part: str, backbones, make_model) -> None:
    with pytest.raises(TypeError, match="and not a LlamaModel; save a model with `save_pretrained`"):
        MiniGPT4ForConditionalGeneration.from_backbones(**{**backbones.parts(), part: make_model().language_model})


@pytest.mark.parametrize("source", ["None", "null", {"name_or_path": "none"}])
def test_a_none_that_became_a_text_is_told(source: Any, backbones) -> None:
    with pytest.raises(ValueError, match="leave the part out, or write None in Python and null in YAML"):
        MiniGPT4ForConditionalGeneration.from_backbones(**{**backbones.parts(), "qformer": source})


def test_a_misspelt_key_of_a_source_is_told(backbones) -> None:
    with pytest.raises(ValueError, match="has no revison; its keys are name_or_path, revision"):
        source = {"name_or_path": backbones.vision, "revison": "main"}
        MiniGPT4ForConditionalGeneration.from_backbones(source, backbones.language_model)


@pytest.mark.parametrize("part", ["vision", "qformer", "language_model"])
def test_the_commands_name_for_the_shipped_parts_is_told_at_once(part: str, backbones, monkeypatch) -> None:
    monkeypatch.setattr("socket.socket", None)  # nobody asks the Hub
    with pytest.raises(ValueError, match=r"from recipes_minigpt4\.tiny import VISION_BACKBONE, LANGUAGE_BACKBONE"):
        MiniGPT4ForConditionalGeneration.from_backbones(**{**backbones.parts(), part: "tiny"})


def test_swapped_parts_are_told(backbones) -> None:
    with pytest.raises(ValueError, match="is a 'llama' model, which takes input_ids and no pictures"):
        MiniGPT4ForConditionalGeneration.from_backbones(backbones.language_model, backbones.vision)


def test_an_encoder_of_text_is_no_language_model(backbones, tmp_path) -> None:
    for config, told in (
        (BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2), "reads in both directions"),
        (CLIPTextConfig(hidden_size=16), "is none that AutoModelForCausalLM knows"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=told):
            MiniGPT4ForConditionalGeneration.from_backbones(backbones.vision, str(tmp_path))


@pytest.mark.parametrize("full", [True, False])
def test_unknown_parts_and_dtypes_are_told_by_every_door(full: bool, backbones, tmp_path) -> None:
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts())
    model.save_pretrained(tmp_path, full=full)
    for kind in (MiniGPT4ForConditionalGeneration, MiniGPT4Model):
        with pytest.raises(ValueError, match="`backbones` names llm; the parts are vision, qformer, language_model"):
            kind.from_pretrained(tmp_path, backbones={"llm": backbones.language_model})
        with pytest.raises(ValueError, match="`dtype` is 'bfloat61', which torch does not have"):
            kind.from_pretrained(tmp_path, dtype="bfloat61")
    with pytest.raises(ValueError, match="`dtype` is 'bfloat61', which torch does not have"):
        MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts(), dtype="bfloat61")


def test_another_model_is_not_filled_with_defaults(backbones) -> None:
    for kind in (MiniGPT4Config, MiniGPT4Model, MiniGPT4ForConditionalGeneration):
        with pytest.raises(ValueError, match=r"This is a 'llama' model and no MiniGPT-4; .*from_backbones`"):
            kind.from_pretrained(backbones.language_model)


# ---- configuration --------------------------------------------------------------------------------------------------

FIELDS = [
    *((name, value) for name in ("num_query_tokens", "projector_num_layers", "patch_merge_size")
      for value in ("3", 0, -1, 2.5, math.nan, True, None)),
    *(("vision_post_layernorm_eps", value) for value in ("1e-5", 0, -1e-5, math.nan, math.inf, None)),
    *(("image_token_id", value) for value in ("5", 2.5, True)),
    *(("projector_hidden_act", value) for value in ("gellu", 3, None)),
    *(("vision_feature_select_strategy", value) for value in ("cls", 1)),
    *((name, 5) for name in ("vision_config", "text_config", "qformer_config", "backbones")),
    ("qformer_config", "llama"),
    ("text_config", "clip_vision_model"),
]  # fmt: skip


@pytest.mark.parametrize("field, value", FIELDS)
def test_every_field_of_the_configuration_is_checked(field: str, value: Any, tiny_config) -> None:
    base = tiny_config().to_dict()
    with pytest.raises((ValueError, TypeError), match=f"^`{field}` is "):
        MiniGPT4Config(**{**base, field: value})


def test_fields_are_checked_where_parts_are_joined(backbones) -> None:
    with pytest.raises(ValueError, match=r"^`projector_num_layers` is '3'"):
        MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts(), projector_num_layers="3")


# ---- inputs ---------------------------------------------------------------------------------------------------------

ROW = [1, "image", 7, 8]  # seven tokens with the four of the picture


def change(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], dict]:
    return lambda inputs: {**inputs, name: how(inputs[name])}


def set_id(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], value)], dim=1)


def features(*shape: int) -> Callable[[dict], dict]:
    return lambda inputs: {**without_pixels(inputs), "vision_features": torch.zeros(shape)}


def without_pixels(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


# What is done to good inputs, and what is told.
INPUTS: dict[str, tuple[Callable[[dict], dict], str]] = {
    "pictures of another size": (change("pixel_values", lambda p: p[..., :14]), r"\(pictures, 3, 28, 28\)"),
    "channels last": (change("pixel_values", lambda p: p.permute(0, 2, 3, 1)), "with channels last"),
    "five axes": (change("pixel_values", lambda p: p[None]), "join its first two axes"),
    "three axes": (change("pixel_values", lambda p: p[0]), r"have the shape \(3, 28, 28\)"),
    "one channel": (change("pixel_values", lambda p: p[:, :1]), r"have the shape \(1, 1, 28, 28\)"),
    "bytes": (change("pixel_values", lambda p: p.to(torch.uint8)), "are uint8, not normalized numbers"),
    "an id beyond": (change("input_ids", set_id(305)), r"hold 305, which .* \(0 to 299\) and not .* placeholder, 300"),
    "an id below": (change("input_ids", set_id(-200)), "hold -200, which is no token"),
    "ids without rows": (change("input_ids", lambda ids: ids[0]), r"have the shape \(7,\); ids are of shape"),
    "ids as numbers": (change("input_ids", lambda ids: ids.float()), "as integers"),
    "shorter labels": (lambda i: {**i, "labels": i["input_ids"][:, 1:]}, r"`labels` have the shape \(1, 6\), but"),
    "labels of another row": (lambda i: {**i, "labels": i["input_ids"].repeat(2, 1)}, "of 1 rows and 7 tokens"),
    "a shorter mask": (change("attention_mask", lambda m: m[:, 1:]), r"`attention_mask` has the shape \(1, 6\)"),
    "a longer mask": (change("attention_mask", lambda m: m.repeat(1, 2)), r"`attention_mask` has the shape \(1, 14\)"),
    "a mask of more rows": (change("attention_mask", lambda m: m.repeat(2, 1)), "a number for every token"),
    "a mask without rows": (change("attention_mask", lambda m: m[0]), r"`attention_mask` has the shape \(7,\)"),
    "features of another width": (features(1, 4, 5), "`vision_features` have 5 channels"),
    "features without pictures": (features(4, 24), r"`vision_features` have the shape \(4, 24\)"),
    "places beyond": (lambda i: {**i, "image_positions": torch.tensor([1, 2, 3, 99])}, "from 0 to 6"),
    "places below": (lambda i: {**i, "image_positions": torch.tensor([-1, 2, 3, 4])}, "from 0 to 6"),
    "places of two axes": (lambda i: {**i, "image_positions": torch.tensor([[1, 2, 3, 4]])}, "one integer for each"),
    "embeddings without a width": (
        lambda i: {"inputs_embeds": torch.zeros(1, 7), "attention_mask": i["attention_mask"]}, "of shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
@torch.no_grad()
def test_wrong_inputs_are_told(name: str, make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, [ROW])
    model(**inputs, labels=inputs["input_ids"])
    how, told = INPUTS[name]
    with pytest.raises(ValueError, match=told):
        model(**how(inputs))


@torch.no_grad()
def test_a_mask_may_be_longer_where_something_is_cached(make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, [ROW])
    first = model(**inputs, use_cache=True)
    cache = {name: first[name] for name in ("cache", "past_key_values") if name in first}
    step = model(input_ids=torch.tensor([[9]]), attention_mask=torch.ones(1, 8, dtype=torch.long), **cache)
    assert step.logits.shape[:2] == (1, 1)


@torch.no_grad()
def test_shapes_are_told_where_there_are_no_values(make_model, make_inputs) -> None:
    model = make_model().to("meta")
    inputs = {name: value.to("meta") for name, value in make_inputs(model, [ROW]).items() if name != "attention_mask"}
    places = torch.arange(1, 5, device="meta")
    with pytest.raises(InputError, match=r"`labels` have the shape \(1, 6\)"):
        model(**inputs, image_positions=places, labels=inputs["input_ids"][:, 1:])


# ---- length ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_more_tokens_than_positions_are_told(make_model) -> None:
    model = make_model(text={"max_position_embeddings": 16})
    row = torch.full((1, 16), 5)
    assert model(input_ids=row).logits.shape == (1, 16, 300)
    told = "The text has 10,000 tokens, image tokens included, but the language model has 16 positions"
    with pytest.raises(InputError, match=told):
        model.generate(input_ids=torch.full((1, 10_000), 5))
    model.train()
    for call in (model, model.model):
        with pytest.raises(InputError, match=told):
            call(input_ids=torch.full((1, 10_000), 5))
    model.eval()
    assert model(input_ids=torch.full((1, 20), 5)).logits.shape == (1, 20, 300)  # rotary positions go on
    with pytest.raises(InputError, match="16 positions, a reply included"):
        model.generate(input_ids=row)
    assert model.generate(input_ids=row[:, :10], max_new_tokens=20, min_new_tokens=20).shape == (1, 30)  # goes on


def test_positions_of_a_table_end(make_model) -> None:
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 300}
    model = make_model(text={"model_type": "gpt2", **sizes})
    with pytest.raises(InputError, match="20 tokens, image tokens included, but the language model has 16 positions"):
        model(input_ids=torch.full((1, 20), 5))


def test_only_positions_that_end_are_a_limit() -> None:
    assert max_positions(LlamaConfig(max_position_embeddings=512)) == 512
    assert max_positions(GPT2Config(n_positions=64)) == 64
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    assert max_positions(LlamaConfig(max_position_embeddings=512, rope_scaling=scaled)) is None


# ---- size -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def warnings_of_size(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What was said about size, with a limit that the tiny model is above."""
    monkeypatch.setattr(checks, "LARGE", 1000)
    logger = logging.getLogger(checks.__name__)
    monkeypatch.setattr(logger, "propagate", True)
    logger.addHandler(caplog.handler)
    yield lambda: [record.message for record in caplog.records if "random parameters" in record.message]
    logger.removeHandler(caplog.handler)


def test_the_size_of_a_large_model_is_told_before_it_is_built(warnings_of_size, tiny_config, monkeypatch) -> None:
    model = MiniGPT4ForConditionalGeneration(tiny_config())
    count = sum(parameter.numel() for parameter in model.parameters())
    (told,) = set(warnings_of_size())
    assert f"{count:,} random parameters" in told and "`from_pretrained`" in told and "`from_backbones`" in told


def test_the_size_of_what_is_loaded_is_not_told(warnings_of_size, backbones, tmp_path) -> None:
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts())
    for full in (False, True):
        model.save_pretrained(tmp_path / str(full), full=full)
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / str(full))
    with torch.device("meta"):
        MiniGPT4ForConditionalGeneration(model.config)
    assert warnings_of_size() == []


# ---- text and chats -------------------------------------------------------------------------------------------------


@pytest.fixture
def processor(tokenizer) -> MiniGPT4Processor:
    image_processor = MiniGPT4ImageProcessor(size={"height": 28, "width": 28})
    return MiniGPT4Processor(image_processor, tokenizer, 300, 4, chat_template="vicuna_v0")


def test_a_placeholder_typed_into_a_message_is_told(processor, picture) -> None:
    """As LLaVA's scripts write it."""
    chat = [{"role": "user", "content": "<image> what is it?"}]
    told = r"<image> in the content of a message is text .*; write .* \[\{\"type\": \"image\"\}, \{\"type\": \"text\""
    for images in ([picture()], picture()):
        with pytest.raises(ValueError, match=told):
            processor(images=images, text=processor.apply_chat_template(chat, add_generation_prompt=True))
        with pytest.raises(ValueError, match=told):
            processor.apply_chat_template(chat, tokenize=True, return_dict=True, images=images)
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert processor.image_token_id not in processor(text=text)["input_ids"][0]  # without a picture it stays text


@pytest.mark.parametrize(
    "message, told",
    [
        (
            {"role": "user", "content": [{"type": "image", "imgae": "x" * 500}]},
            "has the key 'imgae'",
        ),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"ulr": "y"}}]}, "has no `url`, only ulr"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "has no `url`, only nothing"),
        ({"role": "user", "contnet": "x"}, "has no `content`, only contnet, role"),
    ],
)
def test_unknown_keys_of_a_message_are_told(message: dict, told: str, processor) -> None:
    with pytest.raises(ValueError, match=told) as caught:
        processor.apply_chat_template([message], tokenize=True, return_dict=True)
    assert len(str(caught.value)) < 250  # whatever the picture is


@pytest.mark.parametrize("part", [{"type": "image", "text": None}, {"type": "image", "text": ""}, {"type": "image"}])
def test_a_place_for_a_picture_may_come_with_other_columns(part: dict, processor, picture) -> None:
    text = processor.apply_chat_template([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}])
    ids = processor(images=picture(), text=text)["input_ids"][0]
    assert ids.count(processor.image_token_id) == 4


@pytest.mark.parametrize(
    "options, told",
    [({"padding_side": "lft"}, "'lft'; it is 'left' or 'right'"), ({"truncation": True, "max_length": -1}, "is -1")],
)
def test_options_of_the_processor_are_checked(options: dict[str, Any], told: str, processor) -> None:
    with pytest.raises(ValueError, match=told):
        processor(text=["a", "b c"], padding=True, **options)
