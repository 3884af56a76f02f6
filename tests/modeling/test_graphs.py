"""The model as one graph: `torch.compile(fullgraph=True)`, `torch.export`, and transformers' exporter on top of it."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch.export import Dim
from transformers import CompileConfig

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.compat_minigpt4 import CACHE


MIXED = [[1, "image", 8], [1, 6, 4, 7, 3], [1, "image", 5, "image", 3, 20, 21]]
TEXT = [[1, 5, 9, 7]]
DO_NOT_MATCH = "Image features and image tokens do not match"


@pytest.fixture(scope="module", params=[True, False], ids=["qformer", "no_qformer"])
def model(request, make_model) -> MiniGPT4ForConditionalGeneration:
    """A frozen model, as trained adapters are; one layer is enough for a graph."""
    parts = {"vision": {"num_hidden_layers": 1}, "text": {"num_hidden_layers": 1}}
    model = make_model(qformer=request.param, **parts, **({} if request.param else {"patch_merge_size": 2}))
    model.freeze_backbones()
    return model


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs(list[torch.fx.GraphModule]):
    """A backend that notes every graph and runs it as it is."""

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.append(graph)
        return graph.forward


def as_features(model: MiniGPT4ForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with features instead of pixels, laid out in memory as stored ones are."""
    rest = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        features = model.model.encode_images(inputs["pixel_values"]).last_hidden_state
    return {**rest, "vision_features": features.contiguous()}


def too_many_words(model: MiniGPT4ForConditionalGeneration, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with a word in the place of an image token."""
    ids = inputs["input_ids"].clone()
    ids[tuple((ids == model.config.image_token_id).nonzero()[0])] = 5
    return {**inputs, "input_ids": ids}


# ---- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [False], ids=[""], indirect=True)
@torch.no_grad()
def test_one_compiled_model_takes_any_pictures_and_rows(model, make_inputs) -> None:
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for number, rows in enumerate(([[1, "image"], [1, "image", 8]], MIXED, [["image"] * 4] * 2, MIXED * 2)):
        inputs = make_inputs(model, rows)
        assert_close(compiled(**inputs).logits, model(**inputs).logits)
        assert len(graphs) == min(number + 1, 2), "one for these numbers, one for any others"
    with pytest.raises(RuntimeError, match=DO_NOT_MATCH):
        compiled(**too_many_words(model, inputs))


def loss_of_labels(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return model(**inputs, labels=labels).loss


def loss_of_answers(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    outputs = model(**inputs, answers=torch.tensor([7, 3, 20]), answer_positions=torch.tensor([2, 10, 20]))
    assert not (outputs.entropy.requires_grad or outputs.is_top1.requires_grad)
    return -(outputs.log_probs - outputs.entropy + outputs.is_top1).mean()


def loss_of_a_trainer(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    return -model(**inputs).logits.log_softmax(-1)[:, -1, 5].mean()


STEPS = {
    "labels": (True, loss_of_labels, False), "no_qformer": (False, loss_of_labels, False),
    "positions": (False, loss_of_labels, True), "answers": (False, loss_of_answers, True),
    "trainer": (False, loss_of_a_trainer, False),
}  # fmt: skip


@pytest.mark.parametrize(("model", "loss", "positions"), STEPS.values(), ids=STEPS, indirect=["model"])
def test_a_compiled_step_trains_the_projection_as_a_plain_one(model, make_inputs, loss, positions: bool) -> None:
    inputs = make_inputs(model, MIXED, padding_side="right")
    if positions:
        inputs["image_positions"] = (inputs["input_ids"] == model.config.image_token_id).flatten().nonzero()[:, 0]
    results = []
    model.train()
    try:
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            model.zero_grad()
            found = loss(run, inputs)
            found.backward()
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            results.append([found.detach(), *(parameter.grad.clone() for parameter in trained)])
    finally:
        model.eval()
    assert len(results[0]) == 3  # the loss, and gradients of weight and bias of the projection
    for plain, compiled in zip(*results, strict=True):
        assert_close(compiled, plain)


@pytest.mark.parametrize("model", [False], ids=[""], indirect=True)
def test_a_compiled_step_on_text_alone_has_gradients_too(model, make_inputs) -> None:
    model.train()
    model.zero_grad()
    try:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        loss_of_labels(compiled, make_inputs(model, TEXT)).backward()
    finally:
        model.eval()
    assert all(parameter.grad is not None for parameter in model.model.language_projection.parameters())


# ---- generation ---------------------------------------------------------------------------------------------------

REPLY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@pytest.mark.parametrize("model", [False], ids=[""], indirect=True)
def test_a_compiled_forward_writes_the_same_replies_in_one_graph(model, make_inputs, monkeypatch) -> None:
    inputs = make_inputs(model, MIXED)
    expected = model.generate(**inputs, **REPLY)
    graphs = Graphs()
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend=graphs, fullgraph=True))
    assert torch.equal(model.generate(**inputs, **REPLY), expected)
    assert len(graphs) <= 3  # the prompt, one token behind it, and one token behind any number of them


@pytest.mark.parametrize("model", [False], ids=[""], indirect=True)
def test_a_static_cache_compiles_the_steps(model, make_inputs) -> None:
    inputs = make_inputs(model, MIXED)
    expected = model.generate(**inputs, **REPLY)
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True  # transformers would not on a CPU
    found = model.generate(**inputs, **REPLY, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


# ---- torch.export -------------------------------------------------------------------------------------------------


def export(model: torch.nn.Module, inputs: dict[str, Any]) -> Callable[..., Any]:
    """The model's program for any numbers of rows, tokens and pictures."""
    several = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "attention_mask": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    shapes = {name: several.get(name, {0: Dim.DYNAMIC}) for name in inputs}
    given, shapes = {**inputs, "use_cache": False}, {**shapes, "use_cache": None}  # a cache is no tensor
    with torch.no_grad():
        program = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    return functools.partial(program, use_cache=False)


GIVEN = {"pixels": (True, False), "no_qformer": (False, False), "features": (False, True)}


@pytest.mark.parametrize(("model", "stored"), GIVEN.values(), ids=GIVEN, indirect=["model"])
@torch.no_grad()
def test_an_exported_model_takes_any_pictures_and_rows(model, make_inputs, stored: bool) -> None:
    def prepare(rows: list[list[Any]]) -> dict[str, Any]:
        inputs = make_inputs(model, rows)
        return as_features(model, inputs) if stored else inputs

    program = export(model, prepare(MIXED))
    for rows in (MIXED, [[1, "image", 5]], [[1, 5, "image", "image", "image", 9, 7, 8]] * 2):
        inputs = prepare(rows)
        assert_close(program(**inputs).logits, model(**inputs).logits)
    with pytest.raises(RuntimeError, match=DO_NOT_MATCH):
        program(**too_many_words(model, inputs))


@torch.no_grad()
def test_text_alone_is_exported_too(make_model, make_inputs) -> None:
    model = make_model(text={"num_hidden_layers": 1})
    program = export(model, make_inputs(model, TEXT * 2))
    for rows in (TEXT, [[1, 5], [1, 5, 9]]):
        inputs = make_inputs(model, rows)
        assert_close(program(**inputs).logits, model(**inputs).logits)
    with pytest.raises(RuntimeError, match=DO_NOT_MATCH):
        program(input_ids=torch.full((1, 3), model.config.image_token_id), attention_mask=torch.ones(1, 3).long())


class Eyes(torch.nn.Module):
    """Pictures to image tokens."""

    def __init__(self, model: MiniGPT4ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values).pooler_output


@torch.no_grad()
def test_the_vision_side_and_the_projection_are_exported_alone(model, make_inputs) -> None:
    pixels = make_inputs(model, [["image"] * 3])["pixel_values"]
    program = torch.export.export(Eyes(model), (pixels,), dynamic_shapes=({0: Dim.DYNAMIC},)).module()
    for number in (1, 2, 3):
        assert_close(program(pixels[:number]), model.get_image_features(pixels[:number]).pooler_output)


@torch.no_grad()
def test_exported_programs_write_the_reply(make_model, make_inputs) -> None:
    """With the exporter of transformers 5.24, which knows caches: one program for the prompt, one for each token."""
    exporter = pytest.importorskip("transformers.exporters.exporter_dynamo", reason="transformers has no exporter")
    model = make_model(vision={"num_hidden_layers": 1}, text={"num_hidden_layers": 1})
    inputs = make_inputs(model, MIXED)
    expected = model.generate(**inputs, **REPLY)
    write = exporter.DynamoExporter().export
    read = write(model, inputs, {"dynamic": False})
    outputs, ids, mask = read(**inputs), inputs["input_ids"], inputs["attention_mask"]
    step = None
    for _ in range(REPLY["max_new_tokens"]):
        ids = torch.cat([ids, outputs.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        given = {"input_ids": ids[:, -1:], "attention_mask": mask, CACHE: outputs[CACHE]}
        step = step or write(model, given, {"dynamic": True})
        outputs = step(**given)
    assert torch.equal(ids, expected)
