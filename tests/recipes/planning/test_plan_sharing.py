"""`minigpt4 plan` for several processes, and for quantized language models."""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from planned import TOLERANCE, most_allocated, told
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4.benchmark.models import SIZES, build_config, build_ours
from recipes_minigpt4.planning.memory import Step, trace_step
from recipes_minigpt4.planning.model import SCHEMES, list_parts, quantize_skeleton
from recipes_minigpt4.planning.parallel import Parallelism, hold
from recipes_minigpt4.planning.plan import make_plan
from recipes_minigpt4.training.last_layer import LastLayer


# ---- parallelism ----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate_file(tmp_path: Path) -> Callable:
    """A configuration file of accelerate's; keywords are its fields."""

    def write(**fields) -> str:
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_processes": 4, **fields}))
        return str(path)

    return write


@pytest.mark.parametrize("bfloat16", [False, True])
def test_fsdp2_holds_what_torch_then_holds(bfloat16: bool, tmp_path: Path) -> None:
    """In a process of its own: what other tests have left there would be measured too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        weights, gathered, own, peaks = pool.submit(hold_and_measure, bfloat16, tmp_path).result()
    assert weights == pytest.approx(own, rel=0.02)  # whose shards are padded
    assert gathered == pytest.approx(peaks[1] - peaks[0], rel=TOLERANCE)
    assert weights + gathered + peaks[0] == pytest.approx(own + peaks[1], rel=0.05)


def hold_and_measure(bfloat16: bool, folder: Path) -> tuple[int, int, int, list[int]]:
    """
    torch shards a model and takes a step in a group of processes of which only this one is real.

    Returns:
        Bytes that are planned for weights and for what is gathered; bytes of the process's own weights; and the peaks
        of a step without and with shards.
    """
    wrapped = ("LlamaDecoderLayer", "Blip2QFormerLayer", "Blip2EncoderLayer")
    settings = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ",".join(wrapped)}
    dtype = torch.bfloat16 if bfloat16 else None
    peaks = []
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        for shards in (False, True):
            model = build_ours(SIZES["tiny"], seed=0)
            for name, parameter in model.named_parameters():
                if bfloat16 and "language_projection" not in name:
                    parameter.data = parameter.data.to(dtype)
            model.train()
            if shards:
                held = hold(model, Parallelism("fsdp2", 4, settings=settings), dtype)
                shard(model, wrapped, dtype)
            peaks.append(peak_of_a_step(model, dtype, folder))
        own = sum(p.to_local().nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    finally:
        dist.destroy_process_group()
    return held.weights, held.gathered, own, peaks


def shard(model: torch.nn.Module, wrapped: tuple[str, ...], dtype: torch.dtype | None) -> None:
    """What accelerate does for FSDP2 (`fsdp2_prepare_model`)."""
    options = {"mesh": init_device_mesh("cpu", (4,)), "mp_policy": MixedPrecisionPolicy(dtype, torch.float32)}
    for module in reversed(list(model.modules())[1:]):
        if type(module).__name__ in wrapped:
            fully_shard(module, **options, reshard_after_forward=True)
    fully_shard(model.get_input_embeddings(), **options, reshard_after_forward=True)
    fully_shard(model.lm_head, **options, reshard_after_forward=False)
    fully_shard(model, **options)


def peak_of_a_step(model: MiniGPT4ForConditionalGeneration, dtype: torch.dtype | None, folder: Path) -> int:
    """Bytes that the second of two steps allocates at most."""
    rows, answer, image = 8, 24, model.config.num_image_tokens
    ids = torch.zeros(rows, 1 + image + answer, dtype=torch.long)
    ids[:, 1 : 1 + image] = model.config.image_token_id
    places = (ids == model.config.image_token_id).flatten().nonzero().squeeze(-1)
    before = torch.arange(ids.numel()).view(ids.shape)[:, -answer:].flatten()
    # In the dtype that FSDP2 would cast them to, which has nothing to do with weights.
    pixels = torch.zeros(rows, 3, *model.config.image_size, dtype=dtype or torch.float32)
    answers = torch.zeros_like(before)

    def step() -> None:
        with LastLayer(model.language_model), torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = model(
                input_ids=ids, pixel_values=pixels, image_positions=places, answers=answers, answer_positions=before
            )
        outputs.log_probs.sum().backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return most_allocated(profiler, folder / "trace.json")


DEEPSPEED = {"distributed_type": "DEEPSPEED"}
LAYERS = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


@pytest.mark.parametrize(
    "fields, title",
    [
        ({"distributed_type": "NO", "num_processes": 1}, "one process"),
        ({"distributed_type": "MULTI_GPU", "num_machines": 2}, "DDP, 4 processes on 2 machines"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **LAYERS}}, "FSDP2, 4 processes"),
        ({**DEEPSPEED, "deepspeed_config": {"zero_stage": 2}}, "DeepSpeed ZeRO-2, 4 processes"),
        ({**DEEPSPEED, "deepspeed_config": {"zero_stage": 3}}, "DeepSpeed ZeRO-3, 4 processes"),
    ],
)
def test_files_of_accelerate_are_understood(
    fields: dict, title: str, accelerate_file: Callable, case: Callable
) -> None:
    _, arguments = case("stage 1", "tiny", use_cpu=False, warmup_steps=1)
    alone = make_plan([*arguments, "--stage", "1"])
    shared = make_plan([*arguments, "--stage", "1", "--accelerate_config", accelerate_file(**fields)])
    assert shared.parallelism.title == title
    sharded = any(name in title for name in ("FSDP2", "ZeRO-3"))
    assert (told(shared, "weights") < told(alone, "weights") / 2) is sharded
    assert bool(told(shared, "weights of other GPUs, gathered")) is sharded
    assert told(shared, "activations") == pytest.approx(told(alone, "activations"), rel=0.5)
    assert shared.schedule.global_batch == shared.parallelism.processes * 4


def test_a_run_on_several_processors_is_planned_for_them(accelerate_file: Callable, case: Callable) -> None:
    _, arguments = case("stage 1", "tiny", use_cpu=False)
    file = accelerate_file(distributed_type="MULTI_CPU", use_cpu=True)
    plan = make_plan([*arguments, "--stage", "1", "--accelerate_config", file])
    assert not plan.on_gpu and plan.precision is None and plan.parallelism.title == "DDP, 4 processes"


def test_what_zero_shares_and_buffers_follows_its_file(
    accelerate_file: Callable, case: Callable, tmp_path: Path
) -> None:
    _, arguments = case("language model trains", "tiny", use_cpu=False)
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}
    plans = []
    for offload in ("none", "cpu"):
        content = {"zero_optimization": {**zero, "offload_optimizer": {"device": offload}}}
        (tmp_path / "zero.json").write_text(json.dumps(content))
        file = accelerate_file(**DEEPSPEED, deepspeed_config={"deepspeed_config_file": str(tmp_path / "zero.json")})
        plans.append(make_plan([*arguments, "--stage", "1", "--accelerate_config", file]))
    trained = sum(part.count for part in plans[0].parts if part.trains)
    width = SIZES["tiny"].text["hidden_size"]
    buckets = 2 * 4 * width * width  # two of float32, of what transformers writes for "auto"
    masters, states = 4 * trained / 4, 8 * trained / 4
    assert told(plans[0], "optimizer") == pytest.approx(states, rel=0.01) and told(plans[1], "optimizer") == 0
    assert told(plans[0], "buffers for gradients, master copies") == pytest.approx(buckets + masters, rel=0.01)
    assert told(plans[1], "buffers for gradients, master copies") == buckets


# ---- quantization ---------------------------------------------------------------------------------------------------


def test_a_quantization_makes_weights_smaller(case: Callable) -> None:
    _, arguments = case("stage 1", "tiny", use_cpu=False)
    plain = make_plan([*arguments, "--stage", "1"])
    small = make_plan([*arguments, "--stage", "1", "--quantization", "bnb-nf4"])
    assert told(small, "weights") < told(plain, "weights")
    assert {part.name for part in small.parts if part.dtype == "bnb-nf4"} == {"language model"}


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


def test_torchaos_int8_takes_what_is_told() -> None:
    api = pytest.importorskip("torchao.quantization")
    layer = linear(320, 192)
    planned = SCHEMES["torchao-int8"].nbytes(layer.weight)
    api.quantize_(layer, api.Int8WeightOnlyConfig())
    weight = layer.weight
    assert planned == weight.qdata.nbytes + weight.scale.nbytes


@pytest.mark.parametrize("name", ["bnb-int8", "bnb-nf4"])
def test_bitsandbytes_takes_what_is_told(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = linear(320, 192).weight
    planned = SCHEMES[name].nbytes(weight)
    if name == "bnb-int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.data.half())
        assert planned == codes.nbytes + scales.nbytes
        return
    codes, state = bnb.functional.quantize_4bit(weight.data, compress_statistics=True, quant_type="nf4")
    beside = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert planned == codes.nbytes + sum(tensor.nbytes for tensor in beside)


@pytest.mark.parametrize("name", SCHEMES)
def test_only_linear_layers_of_the_decoder_are_quantized(name: str) -> None:
    model = MiniGPT4ForConditionalGeneration._skeleton(build_config(SIZES["tiny"]))
    model.freeze_backbones()
    before, after = list_parts(model), list_parts(model, name)
    layers = [m.weight for m in model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    exact = sum(part.nbytes for part in before) - sum(weight.nbytes for weight in layers)
    quantized = sum(part.nbytes for part in after)
    assert quantized == exact + sum(SCHEMES[name].nbytes(weight) for weight in layers)
    assert sum(part.count for part in after) == sum(part.count for part in before)
    quantize_skeleton(model, name)
    assert hold(model, Parallelism(), None).weights == quantized + sum(
        buffer.nbytes for key, buffer in model.named_buffers() if not key.endswith("scales")
    )


def test_a_step_through_quantized_layers_keeps_what_they_keep() -> None:
    """bitsandbytes' int8 keeps inputs, torchao's the weights that it has multiplied by, nf4 neither."""
    kept = {}
    for name in (None, "bnb-nf4", "bnb-int8", "torchao-int8"):
        model = MiniGPT4ForConditionalGeneration._skeleton(build_config(SIZES["tiny"]))
        model.freeze_backbones()
        quantize_skeleton(model, name)
        step = Step(rows=8, length=29, answer=24, gpu=False)
        kept[name] = trace_step(model, step, lambda parameters: torch.optim.AdamW(parameters, fused=True)).most
    activations = {name: most["activations"] for name, most in kept.items()}
    assert activations[None] <= activations["bnb-nf4"] < min(activations["bnb-int8"], activations["torchao-int8"])
    weights = {name: most["weights"] for name, most in kept.items()}
    assert weights["bnb-nf4"] < weights["bnb-int8"] == weights["torchao-int8"] < weights[None]
