"""`minigpt4 plan` beside runs that are measured, part by part."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from planned import CASES, TOLERANCE, most_allocated, told
from torch.profiler import ProfilerActivity, profile

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.benchmark.models import SIZES, build_config
from recipes_minigpt4.planning.memory import Step, trace_encoding
from recipes_minigpt4.planning.plan import Plan, make_plan
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


class Measured:
    """What the second step of a run took, in bytes, and the trainer; the allocator of the CPU has counted."""

    trainer: MiniGPT4Trainer
    step: int = 0


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """Run a stage and measure its second optimizer step."""

    def run(stage: int, arguments: list[str]) -> Measured:
        measured, calls = Measured(), []
        take = MiniGPT4Trainer.training_step

        def training_step(trainer: MiniGPT4Trainer, *args, **kwargs):
            calls.append(None)
            if len(calls) != 2 * trainer.args.gradient_accumulation_steps:
                return take(trainer, *args, **kwargs)
            before = sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                result = take(trainer, *args, **kwargs)
            measured.step = before + most_allocated(profiler, tmp_path / "trace.json")
            return result

        monkeypatch.setattr(MiniGPT4Trainer, "training_step", training_step)
        measured.trainer = (stage1_pretrain if stage == 1 else stage2_finetune).main(arguments)
        return measured

    return run


def storages(tensors) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def check_measured(plan: Plan, measured: Measured) -> None:
    """Compare a plan with a run, part by part."""
    model, optimizer = measured.trainer.model, measured.trainer.optimizer
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    moving = told(plan, "gradients", "vision side", "activations", "logits")
    found = {
        "weights": (told(plan, "weights"), storages([*model.parameters(), *model.buffers()])),
        "optimizer": (told(plan, "optimizer"), storages(states)),
        "step": (moving, measured.step),
    }
    print({name: (*pair, f"{pair[0] / pair[1] - 1:+.2%}") for name, pair in found.items()})
    for name, (planned, real) in found.items():
        assert planned == pytest.approx(real, rel=TOLERANCE), name
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(part.count for part in plan.parts if part.trains) == trained
    assert sum(part.count for part in plan.parts) == sum(p.numel() for p in model.parameters())
    assert plan.schedule.steps == measured.trainer.state.max_steps == measured.trainer.state.global_step


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_then_takes(name: str, case: Callable, measure: Callable) -> None:
    stage, arguments = case(name, "tiny")
    check_measured(make_plan([*arguments, "--stage", str(stage)]), measure(stage, arguments))


@pytest.mark.parametrize("qformer, autocast", [(True, None), (False, torch.bfloat16)])
def test_encoding_for_the_cache_takes_what_is_planned(qformer: bool, autocast: Any, tmp_path: Path) -> None:
    whole, small = build_config(SIZES["mid"]), build_config(SIZES["tiny"])
    parts = {"vision_config": whole.vision_config, "text_config": small.text_config}
    config = MiniGPT4Config(**parts, qformer_config=whole.qformer_config if qformer else None)
    model = MiniGPT4ForConditionalGeneration(config)
    model.freeze_backbones()
    pixels = torch.randn(2, 3, *config.image_size)
    precision = torch.autocast("cpu", autocast) if autocast else nullcontext()
    with precision, torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        features = model.model.encode_images(pixels).last_hidden_state
    skeleton = MiniGPT4ForConditionalGeneration._skeleton(config)
    skeleton.freeze_backbones()
    encoding = trace_encoding(skeleton, Step(rows=2, length=1, answer=1, autocast=autocast, gpu=False))
    assert encoding.peak["batch"] == pixels.nbytes
    assert encoding.peak["vision side"] == pytest.approx(most_allocated(profiler, tmp_path / "trace.json"), rel=0.15)
    assert encoding.shape == features.shape[1:]


def test_filling_the_cache_is_told(case: Callable, capsys: pytest.CaptureFixture) -> None:
    _, arguments = case("stage 1", "tiny", cache_features="features", max_steps=1)
    cli.main(["plan", *arguments])
    told = capsys.readouterr().out
    for pattern in (
        r"filling the cache +[\d.]+ GB per process at the peak, before the first step\n",
        r"\n  made of +weights [\d.]+, batch [\d.]+, vision side [\d.]+, features [\d.]+\n",
        r"\n  pictures +16, equal ones once: [\d.]+ kB on disk, 512 bytes and [\d.e-]+ GFLOP each\n",
        r"\n  time +0 s of computing, at [\d.]+ TFLOP/s \(as measured here .*reading",
    ):
        assert re.search(pattern, told), pattern
    assert make_plan(case("stage 1", "tiny")[1]).filling is None


def test_features_of_the_released_vision_side_are_planned() -> None:
    whole, small = PRESETS["vicuna-7b"].config(), build_config(SIZES["tiny"])
    parts = {"vision_config": whole.vision_config, "qformer_config": whole.qformer_config}
    skeleton = MiniGPT4ForConditionalGeneration._skeleton(MiniGPT4Config(**parts, text_config=small.text_config))
    encoding = trace_encoding(skeleton, Step(rows=1, length=1, answer=1))
    assert encoding.shape == (32, 768)
    assert 5e11 < encoding.flops < 6e11  # 2 × 1.0 billion parameters × 257 patches, and attention


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_of_a_larger_model_takes(name: str, case: Callable, measure: Callable) -> None:
    stage, arguments = case(name, "mid")
    check_measured(make_plan([*arguments, "--stage", str(stage)]), measure(stage, arguments))
