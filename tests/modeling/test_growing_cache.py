"""The cache of generation: the same keys and values as transformers' own, not copied for every token."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from modeling_minigpt4.compat_minigpt4 import CACHE
from modeling_minigpt4.generation_minigpt4 import GrowingLayer, with_growing_layers


ROWS = [[1, "image", 8, 30, 31], [1, 6], [1, "image", 5, "image", 3, 9, 20, 21]]


def states(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(2, 3, tokens, 4, generator=torch.Generator().manual_seed(seed))


def same(ours: GrowingLayer, theirs: DynamicLayer) -> bool:
    return torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)


@pytest.fixture
def layers(monkeypatch: pytest.MonkeyPatch) -> tuple[GrowingLayer, DynamicLayer]:
    """One of ours, whose rooms are soon full, and one of transformers."""
    monkeypatch.setattr(GrowingLayer, "LEAST", 3)
    return GrowingLayer(), DynamicLayer()


@torch.no_grad()
def test_tokens_are_appended_in_place(layers: tuple[GrowingLayer, DynamicLayer]) -> None:
    rooms = set()
    for step, tokens in enumerate([5, 1, 1, 2, 1, 1, 1, 4, 1]):
        for layer in layers:
            found = layer.update(states(tokens, step), states(tokens, step + 100))
            assert found[0] is layer.keys and found[1] is layer.values
        assert same(*layers)
        rooms.add(layers[0].keys.data_ptr())
    assert len(rooms) < 6  # a new one for every token would be 9
    assert layers[0].get_seq_length() == 17


@torch.no_grad()
@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "copy"])
def test_whoever_changes_the_keys_is_followed(change: str, layers: tuple[GrowingLayer, DynamicLayer]) -> None:
    layers = list(layers)
    for step, tokens in enumerate([5, 1, 1]):
        for layer in layers:
            layer.update(states(tokens, step), states(tokens, step))
    before = copy.deepcopy(layers[1])
    if change == "crop":
        for layer in layers:
            layer.crop(-2)
    elif change == "reorder":
        for layer in layers:
            layer.reorder_cache(torch.tensor([1, 1]))
    elif change == "repeat":
        for layer in layers:
            layer.batch_repeat_interleave(2)
    elif change == "select":
        for layer in layers:
            layer.batch_select_indices(torch.tensor([1]))
    else:
        first = layers[0]
        layers[0] = copy.deepcopy(first)
    rows = {"repeat": 4, "select": 1}.get(change, 2)
    for _ in range(4):
        more = torch.randn(rows, 3, 1, 4)
        for layer in layers:
            layer.update(more, -more)
        assert same(*layers)
    if change == "copy":  # and the one that was copied has not changed
        assert same(first, before)


def test_gradients_go_through_it(layers: tuple[GrowingLayer, DynamicLayer]) -> None:
    gradients = []
    for layer in layers:
        first, second = states(3, 0).requires_grad_(), states(1, 1).requires_grad_()
        layer.update(first, first)
        keys, values = layer.update(second, 2 * second)
        (keys * values).sum().backward()
        gradients.append(torch.cat([first.grad, second.grad], dim=-2))
    assert torch.equal(*gradients)


def test_only_plain_layers_grow(tiny_config) -> None:
    text = tiny_config().text_config
    cache = DynamicCache(config=text)
    with_growing_layers(cache)
    assert cache.layers and {type(layer) for layer in cache.layers} == {GrowingLayer}
    bare = DynamicCache()
    with_growing_layers(bare)
    bare.update(states(1, 0), states(1, 0), 0)
    assert type(bare.layers[0]) is GrowingLayer
    with_growing_layers(None)
    offloaded = DynamicCache(offloading=True)
    with_growing_layers(offloaded)
    assert offloaded.layer_class_to_replicate is DynamicLayer  # a room would keep the memory that it gives back


def test_a_cache_of_inference_mode_can_be_continued(layers: tuple[GrowingLayer, DynamicLayer]) -> None:
    with torch.inference_mode():
        for step, tokens in enumerate([5, 1]):
            for layer in layers:
                layer.update(states(tokens, step), states(tokens, step))
    with torch.no_grad():
        for layer in layers:
            layer.update(states(1, 7), states(1, 8))
    assert same(*layers)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_replies_are_those_of_the_plain_cache(options: dict, make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, ROWS)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options}
    replies = []
    for cache in (None, DynamicCache()):
        torch.manual_seed(0)
        given = {} if cache is None else {CACHE: cache}
        output = model.generate(
            **inputs, **given, generation_config=GenerationConfig(**settings), return_dict_in_generate=True
        )
        kinds = {type(layer) for layer in getattr(output, CACHE).layers}
        # One that is given stays as it is, and beams copy theirs for every token anyway.
        assert kinds == {GrowingLayer if cache is None and "num_beams" not in options else DynamicLayer}
        replies.append(output.sequences)
    assert torch.equal(*replies)
