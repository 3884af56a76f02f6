"""The forward pass: what goes in, what comes out, and what a row's result depends on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close, deviation

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model


ROWS = {
    "one_picture": [[1, 5, "image", 9, 7]],
    "text_only": [[1, 5, 9, 7]],
    "several_in_a_row": [[1, "image", "image", 9, "image", 7]],
    "different_numbers": [[1, "image", 8], [1, 6, 4, 7, 3], [1, "image", 5, "image", 3, 20, 21]],
    "begins_and_ends_with_one": [["image", 4, "image"]],
}


@pytest.fixture(scope="module", params=[True, False], ids=["qformer", "no_qformer"])
def model(request, make_model) -> MiniGPT4ForConditionalGeneration:
    return make_model(qformer=request.param, **({} if request.param else {"patch_merge_size": 2}))


def expected_embeddings(model: MiniGPT4ForConditionalGeneration, inputs: dict) -> torch.Tensor:
    """Embeddings put together token by token, with image tokens taken in order."""
    pixels = inputs.get("pixel_values")
    tokens = iter(() if pixels is None else model.get_image_features(pixels).pooler_output.flatten(0, 1))
    table = model.get_input_embeddings().weight
    image = model.config.image_token_id
    rows = [[next(tokens) if i == image else table[i] for i in row] for row in inputs["input_ids"].tolist()]
    assert next(tokens, None) is None
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_image_tokens_take_their_places_in_order(model, make_inputs, rows: list, side: str) -> None:
    inputs = make_inputs(model, rows, padding_side=side)
    mask = inputs["attention_mask"]
    outputs = model(**inputs)
    embeds = expected_embeddings(model, inputs)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoder = model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    expected = decoder.last_hidden_state @ model.lm_head.weight.T
    assert outputs.logits.shape == (*mask.shape, model.config.text_config.vocab_size)
    assert_close(outputs.logits[mask.bool()], expected[mask.bool()])
    same = model(inputs_embeds=embeds, attention_mask=mask)
    assert_close(same.logits[mask.bool()], outputs.logits[mask.bool()])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_row_does_not_depend_on_neighbours_or_padding(make_model, make_inputs, side: str, attention: str) -> None:
    model = make_model(attn_implementation=attention)
    rows = ROWS["different_numbers"]
    together = model(**make_inputs(model, rows, padding_side=side)).logits
    mask = make_inputs(model, rows, padding_side=side)["attention_mask"].bool()
    first_image = 0
    for row, logits, real in zip(rows, together, mask, strict=True):
        alone = model(**make_inputs(model, [row], first_image=first_image)).logits[0]
        assert_close(logits[real], alone)
        first_image += row.count("image")


@torch.no_grad()
def test_a_picture_changes_what_follows_and_nothing_before(model, make_inputs) -> None:
    inputs = make_inputs(model, [[1, 5, "image", 9, 7]])
    other = {**inputs, "pixel_values": make_inputs(model, [["image"]], first_image=7)["pixel_values"]}
    first, second = model(**inputs).logits, model(**other).logits
    assert_close(first[:, :2], second[:, :2])
    assert (first[:, -1] - second[:, -1]).abs().max() > 0.1


@torch.no_grad()
def test_stored_vision_features_replace_pixels(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS["different_numbers"])
    pixels = inputs.pop("pixel_values")
    features = model.model.encode_images(pixels).last_hidden_state
    assert features.shape[:2] == (3, model.config.num_image_tokens)
    with_pixels = model(**inputs, pixel_values=pixels)
    with_features = model(**inputs, vision_features=features)
    assert torch.equal(with_features.logits, with_pixels.logits)
    assert torch.equal(with_features.image_hidden_states, with_pixels.image_hidden_states)


@torch.no_grad()
def test_image_features_have_the_shape_that_servers_expect(model, make_inputs) -> None:
    model = copy.deepcopy(model)
    model.set_attn_implementation({"vision_config": "eager"})  # others keep no attentions
    pixels = make_inputs(model, [["image", "image"]])["pixel_values"]
    features = model.get_image_features(pixels)
    config = model.config
    assert features.pooler_output.shape == (2, config.num_image_tokens, config.text_config.hidden_size)
    as_tuple = model.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], features.pooler_output)
    assert torch.equal(features["pooler_output"], features.pooler_output)
    outputs = model.get_image_features(pixels, output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == config.vision_config.num_hidden_layers + 1
    assert len(outputs.attentions) == config.vision_config.num_hidden_layers
    alone = model.get_image_features(pixels[1:]).pooler_output
    assert_close(alone[0], features.pooler_output[1])


# ---- labels -------------------------------------------------------------------------------------------------------


def manual_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, over the positions that are labelled."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def test_loss_is_the_mean_cross_entropy_of_the_labels(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS["different_numbers"], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels = labels.masked_fill(labels == model.config.image_token_id, -100)
    outputs = model(**inputs, labels=labels)
    assert_close(outputs.loss, manual_loss(outputs.logits, labels))
    summed = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(10))
    labelled = (labels[:, 1:] != -100).sum()
    assert_close(summed.loss, outputs.loss * labelled / 10)


@torch.no_grad()
def test_placeholders_never_carry_loss_even_if_labelled(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS["different_numbers"], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    assert (labels == model.config.image_token_id).any()
    before = labels.clone()
    outputs = model(**inputs, labels=labels)
    without = labels.masked_fill(labels == model.config.image_token_id, -100)
    assert_close(outputs.loss, manual_loss(outputs.logits, without))
    assert torch.equal(labels, before)  # the caller's tensor stays as it was


@torch.no_grad()
def test_placeholders_carry_no_loss_where_a_trainer_replaces_forward(make_model, make_inputs) -> None:
    model = make_model()
    seen = {}
    model.forward = lambda **kwargs: seen.update(kwargs)
    inputs = make_inputs(model, ROWS["one_picture"])
    model(**inputs, labels=inputs["input_ids"], shift_labels=inputs["input_ids"])
    for name in ("labels", "shift_labels"):
        assert seen[name].max() < model.config.text_config.vocab_size
        assert (seen[name] == -100).sum() == model.config.num_image_tokens


# ---- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([0, 2, 5])], ids=["last", "three", "chosen"])
@torch.no_grad()
def test_logits_to_keep(model, make_inputs, keep) -> None:
    inputs = make_inputs(model, ROWS["different_numbers"])
    every = model(**inputs).logits
    kept = model(**inputs, logits_to_keep=keep).logits
    expected = every[:, -keep:] if isinstance(keep, int) else every[:, keep]
    assert_close(kept, expected)


@torch.no_grad()
def test_hidden_states_and_attentions_of_the_language_model(make_model, make_inputs) -> None:
    model = make_model(attn_implementation="eager")
    inputs = make_inputs(model, ROWS["one_picture"])
    length, layers = inputs["input_ids"].shape[1], model.config.text_config.num_hidden_layers
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in outputs.hidden_states] == [(1, length, 16)] * (layers + 1)
    assert [tuple(attention.shape) for attention in outputs.attentions] == [(1, 2, length, length)] * layers
    assert_close(outputs.attentions[0].sum(-1), torch.ones(1, 2, length))
    plain = model(**inputs)
    assert plain.hidden_states is None
    assert plain.attentions is None
    model.config.output_hidden_states = True
    assert len(model(**inputs).hidden_states) == layers + 1


@torch.no_grad()
def test_return_dict_false_gives_the_same_as_a_tuple(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS["one_picture"])
    named = model(**inputs, labels=inputs["input_ids"])
    plain = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(plain[1], named.logits)
    base = model.model(**inputs, return_dict=False)
    assert torch.equal(base[0], model.model(**inputs).last_hidden_state)


@torch.no_grad()
def test_cached_steps_equal_one_pass(model, make_inputs) -> None:
    inputs = make_inputs(model, [[1, "image", 5, 9, 7]])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = model(**inputs).logits
    step = model(
        input_ids=ids[:, :-2], attention_mask=mask[:, :-2], pixel_values=inputs["pixel_values"], use_cache=True
    )
    assert step.past_key_values.get_seq_length() == ids.shape[1] - 2
    rest = model(input_ids=ids[:, -2:], attention_mask=mask, past_key_values=step.past_key_values)
    assert_close(torch.cat([step.logits, rest.logits], 1), whole)
    assert model(**inputs, use_cache=False).past_key_values is None


@torch.no_grad()
def test_the_model_without_a_head_gives_the_last_hidden_state(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS["one_picture"])
    outputs = model.model(**inputs)
    assert isinstance(model.model, MiniGPT4Model)
    assert torch.equal(model.lm_head(outputs.last_hidden_state), model(**inputs).logits)


# ---- what is refused ----------------------------------------------------------------------------------------------

DO_NOT_MATCH = "Image features and image tokens do not match"


def test_wrong_numbers_of_pictures_are_refused(model, make_inputs) -> None:
    inputs = make_inputs(model, [[1, "image", "image", 5]])
    pixels = inputs["pixel_values"]
    count = model.config.num_image_tokens
    for given, features in ((pixels[:1], count), (pixels[[0, 1, 1]], 3 * count), (None, 0)):
        with pytest.raises(ValueError, match=f"{DO_NOT_MATCH}, tokens: {2 * count}, features: {features}"):
            model(**{**inputs, "pixel_values": given})
    inputs["input_ids"][0, 1] = 4  # as if truncation had cut an image
    with pytest.raises(ValueError, match=DO_NOT_MATCH):
        model(**inputs)


def test_unclear_inputs_are_refused(model, make_inputs) -> None:
    inputs = make_inputs(model, ROWS["one_picture"])
    embeds = expected_embeddings(model, inputs)
    features = model.model.encode_images(inputs["pixel_values"]).last_hidden_state
    cases = [
        ({**inputs, "inputs_embeds": embeds}, "exactly one of input_ids or inputs_embeds"),
        ({"pixel_values": inputs["pixel_values"]}, "exactly one of input_ids or inputs_embeds"),
        ({"inputs_embeds": embeds, "pixel_values": inputs["pixel_values"]}, "Pictures need `input_ids`"),
        ({**inputs, "vision_features": features}, "either `pixel_values` or `vision_features`"),
        ({"input_ids": inputs["input_ids"], "vision_features": features[..., :-1]}, "the projection takes"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**arguments)


# ---- attention, checkpointing -------------------------------------------------------------------------------------


def gradients(model: MiniGPT4ForConditionalGeneration, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient.clone() for name, gradient in found.items()}


@torch.no_grad()
@pytest.mark.parametrize("qformer", [True, False])
def test_eager_and_sdpa_agree(make_model, make_inputs, qformer: bool) -> None:
    model = make_model(qformer=qformer, attn_implementation="eager")
    inputs = make_inputs(model, ROWS["different_numbers"])
    real = inputs["attention_mask"].bool()
    results = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.language_model.config._attn_implementation == attention
        assert model.model.vision_model.config._attn_implementation == attention
        results[attention] = model(**inputs).logits[real]
    assert_close(results["eager"], results["sdpa"])
    loaded = make_model(qformer=qformer, attn_implementation="sdpa")
    assert_close(loaded(**inputs).logits[real], results["eager"])


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_inputs, frozen: bool, reentrant) -> None:
    model = make_model()
    if frozen:
        model.freeze_backbones()
    else:
        model.config.qformer_config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    model.train()
    inputs = make_inputs(model, ROWS["different_numbers"], padding_side="right")
    expected = gradients(model, inputs)
    calls = []
    layer = model.language_model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    found = gradients(model, inputs)
    assert len(calls) == 2, "the layer was not run again in the backward pass"
    assert found.keys() == expected.keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    # All at once: some have no gradient but what is left by rounding, such as biases of keys.
    assert_close(*(torch.cat([each[name].flatten() for name in expected]) for each in (found, expected)))


# ---- embeddings ---------------------------------------------------------------------------------------------------


def test_embeddings_are_those_of_the_language_model(make_model) -> None:
    model = make_model()
    assert model.get_input_embeddings() is model.language_model.embed_tokens
    assert model.model.get_input_embeddings() is model.language_model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_decoder() is model.language_model
    new_input = torch.nn.Embedding(300, 16)
    new_output = torch.nn.Linear(16, 300, bias=False)
    model.set_input_embeddings(new_input)
    model.set_output_embeddings(new_output)
    assert model.language_model.embed_tokens is new_input
    assert model.get_output_embeddings() is model.lm_head is new_output


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_resized_vocabulary(make_model, make_inputs, tied: bool) -> None:
    model = make_model(text={"tie_word_embeddings": tied})
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    inputs = make_inputs(model, [[1, "image", 5, 9]])
    before = model(**inputs).logits
    model.resize_token_embeddings(310)
    assert model.config.text_config.vocab_size == 310
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 310
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert model.config.image_token_id >= 310  # the placeholder never becomes a word
    outputs = model(**make_inputs(model, [[1, "image", 5, 305]]), labels=torch.full((1, 7), 305))
    assert outputs.logits.shape[-1] == 310
    assert outputs.loss.isfinite()
    after = model(**make_inputs(model, [[1, "image", 5, 9]])).logits
    assert_close(after[..., :300], before)


# ---- freezing -----------------------------------------------------------------------------------------------------


def trained(model: torch.nn.Module) -> set[str]:
    """The parts whose parameters require a gradient."""
    names = [name.removeprefix("model.") for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {name.split(".")[0] for name in names}


FREEZING = [
    ((), {"language_projection"}),
    (("qformer",), {"language_projection", "qformer", "query_tokens"}),
    (("vision",), {"language_projection", "vision_model"}),
    (("language_model", "qformer"), {"language_projection", "qformer", "query_tokens", "language_model", "lm_head"}),
]


@pytest.mark.parametrize(("train", "expected"), FREEZING)
def test_only_what_is_asked_for_trains(make_model, make_inputs, train: tuple, expected: set) -> None:
    model = make_model()
    model.freeze_backbones(train=train)
    assert trained(model) == expected
    model.train()
    training = {
        "vision": model.model.vision_model.training,
        "qformer": model.model.qformer.training,
        "language_model": model.language_model.training,
    }
    assert {part for part, is_training in training.items() if is_training} == set(train)
    assert model.training
    assert model.model.language_projection.training
    found = gradients(model, make_inputs(model, ROWS["one_picture"]))
    assert {name.removeprefix("model.").split(".")[0] for name in found} == expected
    model.eval()
    assert not any(module.training for module in model.modules())
    model.freeze_backbones()
    assert trained(model) == {"language_projection"}


def test_frozen_parts_have_no_dropout_in_training(make_model, make_inputs) -> None:
    model = make_model(text={"attention_dropout": 0.5})
    inputs = make_inputs(model, ROWS["one_picture"])
    expected = model(**inputs).logits
    model.train()
    assert deviation(model(**inputs).logits, expected) > 0.01  # nothing is frozen yet
    model.freeze_backbones()
    model.train()
    assert torch.equal(model(**inputs).logits, expected)


def test_the_model_without_a_head_freezes_too(make_model) -> None:
    base = copy.deepcopy(make_model().model)
    base.freeze_backbones()
    base.train()
    assert trained(base) == {"language_projection"}
    assert not base.language_model.training


def test_an_unknown_part_is_refused(make_model) -> None:
    with pytest.raises(ValueError, match=r"No such part to train: vit; choose among vision, qformer, language_model"):
        make_model().freeze_backbones(train=("vit",))
    with pytest.raises(ValueError, match=r"choose among vision, language_model"):
        make_model(qformer=False).freeze_backbones(train=("qformer",))


# ---- precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast", ["to", "bfloat16", "half"])
def test_the_projection_stays_in_float32(make_model, make_inputs, cast: str) -> None:
    model = make_model(projector_num_layers=3)
    weights = [parameter.clone() for parameter in model.model.language_projection.parameters()]
    model = model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()
    low = torch.float16 if cast == "half" else torch.bfloat16
    assert {parameter.dtype for parameter in model.language_model.parameters()} == {low}
    for parameter, weight in zip(model.model.language_projection.parameters(), weights, strict=True):
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, weight)
    if low == torch.bfloat16:
        outputs = model(**make_inputs(model, ROWS["one_picture"]))
        assert outputs.logits.dtype == low
        assert outputs.logits.isfinite().all()
