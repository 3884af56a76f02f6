"""The language model in 8 or 4 bits: nothing else changes, gradients are right, and checkpoints do not tell."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from closeness import assert_close
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
)
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    TorchAoConfig,
    pipeline,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model, MiniGPT4Processor, quantization_minigpt4
from modeling_minigpt4.quantization_minigpt4 import is_exact, number_of_values
from recipes_minigpt4.training.last_layer import LastLayer


METHODS = ("torchao-int8", "torchao-int4", "bnb-int8", "bnb-nf4")
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
ROWS = [[1, "image", 7, 8, 9, 10], [1, "image", 9, 11]]


def config_of(method: str) -> Any:
    """What a user passes as `quantization_config`; bitsandbytes is tried where it is installed."""
    if method.startswith("bnb"):
        pytest.importorskip("bitsandbytes")
        # No threshold, beyond which bitsandbytes multiplies in another way.
        eight = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        return eight if method == "bnb-int8" else four
    if method == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    return TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory, write_backbones) -> dict[str, str]:
    """Backbones whose language model is wide enough for groups of weights, and for bitsandbytes' kernels."""
    text = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
    return write_backbones(tmp_path_factory.mktemp("wide"), text=text).parts()


@pytest.fixture(scope="module")
def adapter(parts, tmp_path_factory) -> Path:
    """An adapter-only checkpoint, with its processor."""
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts)
    processor = MiniGPT4Processor.from_backbones(
        language_model=parts["language_model"], vision=parts["vision"], config=model.config
    )
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(folder: Path, method: str | None = None, **options: Any) -> MiniGPT4ForConditionalGeneration:
    quantization = {} if method is None else {"quantization_config": config_of(method)}
    return MiniGPT4ForConditionalGeneration.from_pretrained(folder, **quantization, **options)


def linear_layers(model: MiniGPT4ForConditionalGeneration) -> set[str]:
    """Weights of the linear layers of an unquantized model's decoder."""
    prefix = next(name for name, module in model.named_modules() if module is model.get_decoder())
    layers = model.get_decoder().named_modules()
    return {f"{prefix}.{name}.weight" for name, layer in layers if isinstance(layer, nn.Linear)}


def changed(model: nn.Module, plain: nn.Module) -> set[str]:
    """Tensors of a model that are not, bit for bit, those of another one."""
    tensors, wanted = dict(model.named_parameters()), dict(plain.named_parameters())
    tensors |= dict(model.named_buffers())
    wanted |= dict(plain.named_buffers())
    assert tensors.keys() == wanted.keys()
    return {
        name
        for name, tensor in tensors.items()
        if type(tensor) is not type(wanted[name])
        or tensor.dtype != wanted[name].dtype
        or not torch.equal(tensor, wanted[name])
    }


def whole_again(weight: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    """The values that a quantized weight stands for."""
    if type(weight).__name__ == "Int8Params":
        return weight.data.float() * layer.weight.SCB[:, None] / 127
    if type(weight).__name__ == "Params4bit":
        import bitsandbytes

        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
    return weight.detach().dequantize()


def without_quantization(model: MiniGPT4ForConditionalGeneration, folder: Path) -> MiniGPT4ForConditionalGeneration:
    """The model in full precision, with the values that the quantized weights stand for."""
    plain = load(folder)
    layers = dict(plain.named_modules())
    for name, layer in model.named_modules():
        weight = layer._parameters.get("weight")
        if weight is not None and not is_exact(weight):
            layers[name].weight = nn.Parameter(whole_again(weight, layer).to(torch.float32), requires_grad=False)
    return plain


# ---- what is quantized ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_linear_layers_of_the_decoder_and_nothing_else(method: str, parts, adapter) -> None:
    plain = load(adapter)
    torch.manual_seed(0)  # of a new projection
    composed = MiniGPT4ForConditionalGeneration.from_backbones(**parts, quantization_config=config_of(method))
    for model in (load(adapter, method), composed):
        assert changed(model, plain) == linear_layers(plain)
        assert model.model.language_projection.weight.requires_grad
        assert not any(parameter.requires_grad for parameter in model.language_model.parameters())


@pytest.mark.parametrize("method", ["torchao-int8", "bnb-int8"])
def test_every_front_door_quantizes_it(method: str, adapter, tmp_path) -> None:
    plain, options = load(adapter), {"quantization_config": config_of(method)}
    pipe = pipeline("image-text-to-text", model=str(adapter), model_kwargs=options)
    load(adapter).save_pretrained(tmp_path, full=True)
    full = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path, **options)
    for model in (AutoModelForImageTextToText.from_pretrained(adapter, **options), pipe.model, full):
        assert changed(model, plain) == linear_layers(plain)
    bare = MiniGPT4Model.from_pretrained(adapter, **options)
    assert changed(bare, plain.model) == {name.removeprefix("model.") for name in linear_layers(plain)}


@pytest.mark.parametrize(
    "fields",
    [
        {"modules_to_not_convert": []},
        {"modules_to_not_convert": ["lm_head"]},
        {"include_input_output_embeddings": True, "untie_embedding_weights": True},
    ],
)
def test_the_rest_stays_exact_whatever_the_config_says(fields: dict, adapter) -> None:
    given = TorchAoConfig(Int8WeightOnlyConfig(), **fields)
    before = copy.deepcopy(given.to_dict())
    plain = load(adapter)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter, quantization_config=given)
    assert changed(model, plain) == linear_layers(plain)
    assert given.to_dict() == before  # the user's own object


@pytest.mark.parametrize(
    ("quantization", "field"),
    [
        (lambda skip: TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skip), None),
        (lambda skip: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip), "bitsandbytes"),
        (
            lambda skip: {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": skip},
            "bitsandbytes",
        ),
    ],
    ids=["torchao", "bitsandbytes", "mapping"],
)
def test_what_the_user_leaves_out_stays_out(quantization: Callable, field: str | None, adapter) -> None:
    if field:
        pytest.importorskip(field)
    plain, skip = load(adapter), "model.language_model.layers.0.mlp"
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter, quantization_config=quantization([skip]))
    wanted = {name for name in linear_layers(plain) if not name.startswith(skip)}
    assert changed(model, plain) == wanted and len(wanted) == len(linear_layers(plain)) - 3


def test_a_vision_side_that_is_quantized_is_noticed(adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above finds it, and so does the model by itself."""
    monkeypatch.setattr(quantization_minigpt4, "EXACT", ("lm_head",))
    with pytest.raises(ValueError, match=r"model\.vision_model\S+ would be quantized"):
        load(adapter, "torchao-int8")
    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "_after_quantization", lambda model: None)
    plain = load(adapter)
    beside = changed(load(adapter, "torchao-int8"), plain) - linear_layers(plain)
    assert {name.split(".")[1] for name in beside} == {"vision_model", "qformer", "language_projection"}


@pytest.mark.parametrize("method", ["torchao-int8", "bnb-int8", "bnb-nf4"])
def test_half_precision_is_that_of_the_unquantized_model(method: str, adapter) -> None:
    plain, model = load(adapter, dtype=torch.bfloat16), load(adapter, method, dtype=torch.bfloat16)
    assert changed(model, plain) == linear_layers(plain)
    assert model.model.language_projection.weight.dtype == torch.float32
    assert model.model.vision_model.dtype == model.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["torchao-int8", "bnb-int8"])
def test_weights_are_rounded_to_the_nearest_of_255_steps(method: str, adapter) -> None:
    plain, model = load(adapter), load(adapter, method)
    for name, layer in plain.get_decoder().named_modules():
        if isinstance(layer, nn.Linear):
            quantized = model.get_decoder().get_submodule(name)
            error = (whole_again(quantized.weight, quantized) - layer.weight).abs()
            half = layer.weight.abs().amax(dim=1, keepdim=True) / 127 / 2
            assert (error <= half * 1.001 + layer.weight.abs() * 2**-10).all()  # bitsandbytes starts from float16


def test_a_parameter_of_four_bits_counts_all_its_values(adapter) -> None:
    sizes = [
        sum(number_of_values(parameter) for parameter in load(adapter, method).parameters())
        for method in (None, "torchao-int8", "bnb-nf4")
    ]
    assert sizes[0] == sizes[1] == sizes[2]


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_logits_and_replies_are_those_of_the_rounded_weights(method: str, adapter, make_inputs) -> None:
    model = load(adapter, method)
    plain, inputs = without_quantization(model, adapter), make_inputs(model, ROWS)
    with torch.no_grad():
        found, wanted = model(**inputs).logits, plain(**inputs).logits
    options = {"max_new_tokens": 6, "do_sample": False, "separator": ""}
    if method.startswith("bnb"):  # which rounds activations too: to one of 255 steps, or without a GPU to bfloat16
        assert (found - wanted).norm() < wanted.norm() * 0.02
    else:
        assert_close(found, wanted)
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))
    assert model.generate(**inputs, **options, num_beams=2).shape[0] == len(ROWS)


def gradient(model, inputs: dict, attention: str, checkpointing: bool) -> torch.Tensor:
    """Of the projection, in a step as the recipes take it: what is not scored is left out of the last layer."""
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    answers, before = torch.tensor([9, 10, 11]), torch.tensor([6, 7, 14])
    with LastLayer(model.language_model):
        outputs = model(**inputs, answers=answers, answer_positions=before, use_cache=False)
        outputs.log_probs.sum().backward()
    found = model.model.language_projection.weight.grad.clone()
    model.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["torchao-int8", "torchao-int4", "bnb-nf4"])
def test_gradient_of_the_projection_is_that_through_the_rounded_weights(
    method: str, attention: str, checkpointing: bool, adapter, make_inputs
) -> None:
    model = load(adapter, method)
    plain, inputs = without_quantization(model, adapter), make_inputs(model, ROWS, padding_side="right")
    found, wanted = (gradient(each, inputs, attention, checkpointing) for each in (model, plain))
    assert_close(found, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_replies_on_the_way_leave_gradients_as_they_are(method: str, adapter, make_inputs) -> None:
    """On some processors, bitsandbytes packs weights for inference, where nothing can be learned from them."""
    found = []
    for replies in (False, True):
        model = load(adapter, method)
        for _ in range(2):  # before training and in between
            if replies:
                model.generate(**make_inputs(model, ROWS), max_new_tokens=2, separator="")
            model.train()
        found.append(gradient(model, make_inputs(model, ROWS, padding_side="right"), "sdpa", False))
    assert found[0].abs().max() > 0
    assert torch.equal(*found)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_layer_leaves_the_same_out(method: str, adapter, make_inputs) -> None:
    model, seen = load(adapter, method), []
    inputs, places = make_inputs(model, ROWS), torch.tensor([6, 14])
    with LastLayer(model.language_model) as last_layer, torch.no_grad():
        layer = model.get_decoder().layers[-1]
        assert last_layer.parts == [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp]
        for part in last_layer.parts:  # behind the hooks that leave positions out
            part.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
        model(**inputs, answers=torch.tensor([9, 10]), answer_positions=places)
    assert seen == [len(places)] * 3


def test_kernels_for_inference_only_are_no_way_to_train(adapter, make_inputs) -> None:
    quantization = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter, quantization_config=quantization)
    with torch.no_grad():
        assert model(**make_inputs(model, ROWS)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"q_proj of the language model .* lets no gradient pass"):
        model.train()
    assert not model.training


def test_the_quantized_language_model_itself_cannot_train(adapter) -> None:
    with pytest.raises(ValueError, match="quantized language model cannot train"):
        load(adapter, "torchao-int8").freeze_backbones(train=["language_model"])
    load(adapter, "torchao-int8").freeze_backbones(train=["vision", "qformer"])


@pytest.mark.parametrize("method", METHODS)
def test_data_parallelism_leaves_quantized_weights_alone(method: str, adapter, make_inputs) -> None:
    model = load(adapter, method)
    model.add_adapter(LoraConfig(**LORA))  # which changes names
    inputs = make_inputs(model, ROWS)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)  # alone, and without threads
    try:
        parallel = DistributedDataParallel(model.train())
        assert parallel(**inputs).logits.requires_grad
    finally:
        dist.destroy_process_group()
    assert parallel.parameters_to_ignore == {name for name, each in model.named_parameters() if not is_exact(each)}


# ---- an adapter on top ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "wrapper"),
    [("torchao-int8", "TorchaoLoraLinear"), ("bnb-int8", "Linear8bitLt"), ("bnb-nf4", "Linear4bit")],
)
def test_lora_trains_on_it_and_loads_on_the_unquantized_model(
    method: str, wrapper: str, adapter, make_inputs, tmp_path
) -> None:
    model = load(adapter, method)
    model.add_adapter(LoraConfig(**LORA))
    kinds = {type(layer) for layer in model.modules() if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")}
    assert {(kind.__module__.split(".")[0], kind.__name__) for kind in kinds} == {("peft", wrapper)}
    inputs = make_inputs(model, ROWS)
    model.train()
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    for _ in range(2):  # the second matrix of a new adapter is zero
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in trained.values())
    assert {each.dtype for each in trained.values()} == {torch.float32}
    model.save_pretrained(tmp_path)
    for loaded in (load(tmp_path), load(tmp_path, method)):
        found = dict(loaded.named_parameters())
        assert all(torch.equal(found[name], each) for name, each in trained.items())
    assert_close(loaded.eval()(**inputs).logits, model.eval()(**inputs).logits)


# ---- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_do_not_tell_of_quantization(method: str, adapter, make_inputs, tmp_path) -> None:
    plain, model = load(adapter), load(adapter, method)
    before = model.hf_quantizer, model.config.quantization_config
    for each, folder in ((plain, tmp_path / "plain"), (model, tmp_path / "quantized")):
        each.model.language_projection.weight.data += 1
        each.save_pretrained(folder)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "quantized"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left)
    left, right = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "quantized"))
    assert left == right  # fingerprints of the backbones too
    assert not changed(load(tmp_path / "quantized"), plain)
    assert before == (model.hf_quantizer, model.config.quantization_config)  # the model is what it was


def test_what_would_hold_quantized_weights_is_not_saved(adapter, tmp_path) -> None:
    model = load(adapter, "torchao-int8")
    with pytest.raises(ValueError, match="cannot hold a quantized language model"):
        model.save_pretrained(tmp_path / "full", full=True)
    assert not (tmp_path / "full" / "config.json").exists()
    tuned = load(adapter)
    tuned.freeze_backbones(train=["language_model"])
    tuned.save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="cannot hold a quantized language model"):
        load(tmp_path / "tuned", "torchao-int8").save_pretrained(tmp_path / "again")
    assert not changed(load(tmp_path / "tuned"), tuned)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["language_model", "vision"])
@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_backbones_that_are_stored_quantized_are_told(method: str, part: str, backbones, tmp_path) -> None:
    source = Path(getattr(backbones, part))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    fields = {"load_in_8bit": True} if method == "bitsandbytes" else {"quant_method": method, "bits": 4}
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": fields}))
    with pytest.raises(ValueError, match=rf"{part} backbone .* are quantized already \({method}\)"):
        MiniGPT4ForConditionalGeneration.from_backbones(**{**backbones.parts(), part: str(tmp_path)})


def test_methods_that_cannot_be_kept_to_it_are_told(adapter) -> None:
    with pytest.raises(ValueError, match="cannot be kept to the language model"):
        MiniGPT4ForConditionalGeneration.from_pretrained(adapter, quantization_config=QuantizationConfigMixin("other"))
    with pytest.raises(ValueError, match="fields of BitsAndBytesConfig"):
        MiniGPT4ForConditionalGeneration.from_pretrained(adapter, load_in_8bit=True)


def test_a_language_model_without_layers_to_quantize_is_told(parts, tmp_path) -> None:
    """GPT-2's layers are transposed, of a class of their own, which torchao passes over."""
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=300, n_positions=64)).save_pretrained(
        tmp_path
    )
    given = {**parts, "language_model": str(tmp_path)}
    with pytest.raises(ValueError, match="No layer of the language model was quantized"):
        MiniGPT4ForConditionalGeneration.from_backbones(
            **given, quantization_config=config_of("torchao-int8"), separator=None
        )
