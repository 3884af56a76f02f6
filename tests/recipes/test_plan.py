"""`minigpt4 plan`: what it tells before a run, against what the run then is."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged import jpeg
from torch.profiler import ProfilerActivity, profile
from transformers import Blip2Config, LlamaConfig

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4 import RecipeError, cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.benchmark.models import SIZES, build_config, build_processor
from recipes_minigpt4.plan import Plan, make_plan
from recipes_minigpt4.trainer import MiniGPT4Trainer


TOLERANCE = 0.15
LORA = '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}'


# ---- measuring a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def long_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs whose captions are longer than any answer may be."""
    folder = tmp_path_factory.mktemp("long")
    pairs = [{"image": f"{number}.jpg", "caption": "a long picture of a square " * 40} for number in range(16)]
    for number, pair in enumerate(pairs):
        (folder / pair["image"]).write_bytes(jpeg(number))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Folder of a whole model of one of the benchmarks' sizes, with a Q-Former or without."""
    folders: dict[tuple[str, bool], str] = {}

    def save(size: str, qformer: bool) -> str:
        if (size, qformer) not in folders:
            config = build_config(SIZES[size])
            if not qformer:
                parts = {"vision_config": config.vision_config, "text_config": config.text_config}
                config = MiniGPT4Config(qformer_config=None, **parts)
            torch.manual_seed(0)
            folder = str(tmp_path_factory.mktemp(size))
            MiniGPT4ForConditionalGeneration(config).save_pretrained(folder)
            build_processor(config).save_pretrained(folder)
            folders[size, qformer] = folder
        return folders[size, qformer]

    return save


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


def most_allocated(profiler: profile, path: Path) -> int:
    """The most bytes that were allocated at once, above what there was at the start."""
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


def storages(tensors) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def told(plan: Plan, *names: str) -> int:
    """Bytes of these parts at the peak."""
    return sum(size for name, size, _ in plan.memory if name in names)


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


CASES = {
    "stage 1": (1, True, {}),
    "stage 1, checkpointing": (1, True, {"gradient_checkpointing": True}),
    "stage 1, bfloat16, checkpointing": (1, True, {"bf16": True, "gradient_checkpointing": True}),
    "stage 1, bfloat16, no Q-Former": (1, False, {"bf16": True}),
    "stage 2": (2, True, {"per_device_train_batch_size": 3, "max_txt_len": 60}),
    "stage 2, no Q-Former, checkpointing": (2, False, {"gradient_checkpointing": True}),
    "stage 2, bfloat16": (2, True, {"bf16": True}),
    "accumulation, cached features": (1, True, {"gradient_accumulation_steps": 2, "cache_features": "features"}),
    "adapter": (1, True, {"peft_config": LORA}),
    "language model trains": (1, True, {"train_parts": "language_model"}),
    "Q-Former trains": (1, True, {"train_parts": "qformer"}),
}


@pytest.fixture
def case(saved: Callable, long_pairs: Path, tmp_path: Path) -> Callable:
    """Arguments of a case of `CASES` and its stage."""

    def build(name: str, size: str, **more) -> tuple[int, list[str]]:
        stage, qformer, changes = CASES[name]
        fields = {
            "model_name_or_path": saved(size, qformer), "dataset_name": long_pairs, "output_dir": tmp_path / "run",
            "num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 4, "max_txt_len": 24,
            "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
            "warmup_steps": 1, **changes, **more,
        }  # fmt: skip
        if "cache_features" in fields:
            fields["cache_features"] = tmp_path / fields["cache_features"]
        return stage, [text for key, value in fields.items() for text in (f"--{key}", str(value))]

    return build


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_then_takes(name: str, case: Callable, measure: Callable) -> None:
    stage, arguments = case(name, "tiny")
    check_measured(make_plan([*arguments, "--stage", str(stage)]), measure(stage, arguments))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_of_a_larger_model_takes(name: str, case: Callable, measure: Callable) -> None:
    stage, arguments = case(name, "mid")
    check_measured(make_plan([*arguments, "--stage", str(stage)]), measure(stage, arguments))
