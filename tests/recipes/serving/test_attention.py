"""Where a model looks: on hand-made weights the right patch wins, and nobody else notices that somebody looks."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from PIL import Image
from transformers import Blip2ForConditionalGeneration, HieraConfig

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from processing_minigpt4 import MiniGPT4ImageProcessor
from recipes_minigpt4.serving.attention import ROLLOUT, look_at, roll_out
from recipes_minigpt4.serving.heat import COLORS, draw_heat
from recipes_minigpt4.utils.errors import RecipeError


ROWS, COLUMNS, PATCH = 2, 4, 14  # of a picture that is wider than high
SIZE = [ROWS * PATCH, COLUMNS * PATCH]
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def wide(make_model: Make) -> Any:
    """A random model with pictures of 2 × 4 patches."""
    return make_model(image_size=SIZE)


def pixels_of(model: Any, number: int = 0) -> torch.Tensor:
    return torch.randn(1, 3, *model.config.image_size, generator=torch.Generator().manual_seed(number))


# ---- the right place ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simple(make_model: Make) -> Any:
    """A model whose queries look at the brightest token: nothing is random but what they do with it afterwards."""
    model = make_model(image_size=SIZE)
    vision, qformer = model.model.vision_model, model.model.qformer
    with torch.no_grad():
        # The encoder's tokens are their own patches: channel 0 of each is its brightness, and 0 for CLS.
        for parameter in vision.parameters():
            parameter.zero_()
        vision.embeddings.patch_embedding.weight[0] = 1 / (3 * PATCH**2)
        vision.post_layernorm.weight.fill_(1)
        for layer in qformer.encoder.layer:
            if layer.has_cross_attention:
                attention = layer.crossattention.attention
                attention.query.weight.zero_()
                attention.key.weight.zero_()
                attention.key.bias.zero_()
                for head in (0, attention.attention_head_size):  # both heads ask for channel 0
                    attention.query.bias[head] = 20.0
                    attention.key.weight[head, 0] = 1.0
    return model


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (1, 0), (1, 2)])
@pytest.mark.parametrize("layer", [None, ROLLOUT])
def test_every_query_lights_up_the_one_bright_square(simple: Any, row: int, column: int, layer: str | None) -> None:
    scene = Image.new("RGB", (SIZE[1] * 3, SIZE[0] * 3), "black")
    square = (column * 42, row * 42, column * 42 + 41, row * 42 + 41)
    scene.paste("white", (square[0], square[1], square[2] + 1, square[3] + 1))
    processor = MiniGPT4ImageProcessor(size={"height": SIZE[0], "width": SIZE[1]})
    maps = look_at(simple, processor(scene, return_tensors="pt")["pixel_values"]).maps(layer)
    assert maps.patches.shape == (simple.config.num_query_tokens, ROWS, COLUMNS)
    assert (maps.patches[:, row, column] > 0.99).all()
    drawn = np.asarray(draw_heat(scene, maps.patches[0].numpy()).convert("L"), dtype=float)
    inside = np.zeros(drawn.shape, bool)
    inside[square[1] : square[3] + 1, square[0] : square[2] + 1] = True
    assert drawn[inside].min() > drawn[~inside].max() + 100


def test_what_goes_to_cls_is_on_no_patch(simple: Any) -> None:
    # A picture of one colour below the mean, so that CLS, which has none, is the brightest token.
    maps = look_at(simple, torch.full((1, 3, *SIZE), -1.0)).maps()
    assert (maps.elsewhere > 0.99).all()
    assert maps.patches.max() < 0.01


def test_a_layer_that_sees_no_picture_has_no_map(simple: Any) -> None:
    look = look_at(simple, pixels_of(simple))  # of two layers, the first looks at the picture
    assert look.layers == [0]
    with pytest.raises(RecipeError, match="Layer 1 does not look at the picture; name one of 0, or rollout"):
        look.maps(1)


# ---- the right numbers ----------------------------------------------------------------------------------------------


def test_shares_are_those_that_transformers_tells_and_add_up(wide: Any) -> None:
    pixels = pixels_of(wide)
    look = look_at(wide, pixels)
    qformer = wide.model.qformer
    implementation = qformer.config._attn_implementation
    encoded = wide.model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    try:
        qformer.set_attn_implementation("eager")
        told = qformer(
            query_embeds=wide.model.query_tokens, encoder_hidden_states=encoded, output_attentions=True
        ).cross_attentions
    finally:
        qformer.set_attn_implementation(implementation)
    maps = look.maps(0)
    expected = told[0][0].mean(0)  # over heads
    assert expected.shape == (4, 1 + ROWS * COLUMNS)
    assert_close(maps.elsewhere, expected[:, 0].detach())
    assert_close(maps.patches, expected[:, 1:].detach().view(4, ROWS, COLUMNS))
    for layer in (0, ROLLOUT):
        maps = look.maps(layer)
        assert_close(maps.patches.sum((1, 2)) + maps.elsewhere, torch.ones(4))
        assert maps.patches.min() >= 0


def test_rollout_follows_queries_through_each_other() -> None:
    # Query 1 looks at query 0 alone, after query 0 has seen token 0 and query 1 token 1.
    stay, picture = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    to_first = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    rolled = roll_out([stay, to_first], {0: picture})
    # Half of query 1 is still itself, half is query 0.
    assert rolled.tolist() == [[1.0, 0.0], [0.5, 0.5]]


def test_blip2_is_looked_into_in_the_same_way(backbones: Any) -> None:
    blip2 = Blip2ForConditionalGeneration.from_pretrained(backbones.vision).eval()
    ours = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts())
    pixels = torch.randn(1, 3, 28, 28)
    expected, found = (look_at(model, pixels).maps() for model in (ours, blip2))
    assert_close(found.patches, expected.patches)
    assert_close(found.elsewhere, expected.elsewhere)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_tokens_that_are_dropped_move_nothing(make_model: Make, strategy: str) -> None:
    model = make_model(image_size=SIZE, vision_feature_select_strategy=strategy)
    maps = look_at(model, pixels_of(model)).maps()
    assert maps.patches.shape == (4, ROWS, COLUMNS)
    assert (maps.elsewhere > 0).all() == (strategy == "full")
    assert_close(maps.patches.sum((1, 2)) + maps.elsewhere, torch.ones(4))


# ---- without a Q-Former ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "patches"),
    [
        ({"patch_merge_size": 4, "patch_merge_layout": "consecutive"}, [[(0, 0), (0, 1), (0, 2), (0, 3)]]),
        ({"patch_merge_size": 4, "patch_merge_layout": "square"}, [[(0, 0), (0, 1), (1, 0), (1, 1)]]),
        ({"patch_merge_size": 1}, [[(0, 0)], [(0, 1)]]),
    ],
)
def test_without_a_qformer_a_token_is_made_of_these_patches(make_model: Make, fields: Any, patches: Any) -> None:
    model = make_model(qformer=False, image_size=SIZE, **fields)
    look = look_at(model, pixels_of(model))
    maps = look.maps()
    assert look.layers == []
    assert len(maps.patches) == model.config.num_image_tokens
    for shares, expected in zip(maps.patches, patches, strict=False):
        assert [tuple(place) for place in shares.nonzero().tolist()] == expected
    assert_close(maps.patches.sum(0), torch.full((ROWS, COLUMNS), 1 / model.config.patch_merge_size))
    assert maps.elsewhere.tolist() == [0.0] * len(maps.patches)


# ---- nobody notices -------------------------------------------------------------------------------------------------


def state_of(model: Any) -> list[Any]:
    modules = list(model.modules())
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks), "forward" in vars(one)) for one in modules]
    attention = [one.config._attn_implementation for one in modules if hasattr(one, "config")]
    return [hooks, attention, [id(one) for one in model.parameters()]]


def test_looking_leaves_the_model_as_it_is(wide: Any) -> None:
    before = state_of(wide)
    look_at(wide, pixels_of(wide))
    assert state_of(wide) == before


def test_many_look_at_once_while_others_are_answered(wide: Any, make_inputs: Make) -> None:
    inputs = make_inputs(wide, [[1, "image", 7, 9]])
    alone = [look_at(wide, pixels_of(wide, number)).maps().patches for number in range(4)]
    reply = wide.generate(**inputs, max_new_tokens=8, do_sample=False)
    found: dict[Any, list[torch.Tensor]] = {number: [] for number in (*range(4), "reply")}

    def look(number: int) -> None:
        found[number] += [look_at(wide, pixels_of(wide, number)).maps().patches for _ in range(4)]

    def answer() -> None:
        found["reply"] += [wide.generate(**inputs, max_new_tokens=8, do_sample=False) for _ in range(2)]

    threads = [threading.Thread(target=look, args=(number,)) for number in range(4)]
    threads.append(threading.Thread(target=answer))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(told) for told in found.values()] == [4, 4, 4, 4, 2]
    for number, expected in enumerate(alone):
        assert all(torch.equal(maps, expected) for maps in found[number])
    assert all(torch.equal(ids, reply) for ids in found["reply"])


# ---- what cannot be drawn -------------------------------------------------------------------------------------------


def test_models_and_encoders_without_a_map_get_a_sentence(make_model: Make, tiny_config: Make) -> None:
    hiera = HieraConfig(
        embed_dim=8, image_size=[64, 64], patch_kernel=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3],
        depths=[1, 1], num_heads=[1, 1], query_stride=[2, 2], masked_unit_size=[4, 4], num_query_pool=1,
        masked_unit_attention=[True, False],
    )  # fmt: skip
    model = make_model(tiny_config(qformer=False, vision=hiera, patch_merge_size=1))
    with pytest.raises(RecipeError, match=r"Where the \d+ tokens of this vision encoder \(hiera\) lie"):
        look_at(model, torch.randn(1, 3, 64, 64))
    with pytest.raises(RecipeError, match="kind llama cannot be looked into here; MiniGPT-4 and BLIP-2 can"):
        look_at(model.language_model, torch.randn(1, 3, 64, 64))


# ---- colours --------------------------------------------------------------------------------------------------------


def test_colours_grow_lighter_in_even_steps() -> None:
    linear = COLORS / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    lightness = 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16  # CIE L*, 0 to 100
    steps = np.diff(lightness[::15])
    assert lightness[0] < 20 and lightness[-1] > 88
    assert (np.diff(lightness[::3]) > 0).all()  # bytes are rounded
    assert steps.max() < 1.6 * steps.min()
