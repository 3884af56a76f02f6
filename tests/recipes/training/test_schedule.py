"""The original's learning-rate schedule and optimizer, as a function and inside the trainer."""

import json
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from recipes_minigpt4 import stage1_pretrain
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.training.model import load_model
from recipes_minigpt4.training.trainer import MiniGPT4Trainer, original_lr


MEASURED = json.loads((Path(__file__).parents[2] / "fixtures" / "lr_schedule.json").read_text())
RUNS = [name for name, run in MEASURED.items() if isinstance(run, dict) and "lr" in run]


@pytest.mark.parametrize("name", RUNS)
def test_original_lr_is_the_original_s(name: str) -> None:
    run, config = MEASURED[name], MEASURED[name]["config"]
    total = config["iters_per_epoch"] * config["max_epoch"]
    for step, expected in run["lr"].items():
        rate = original_lr(
            int(step),
            total,
            learning_rate=config["init_lr"],
            min_learning_rate=config["min_lr"],
            warmup_start_learning_rate=config["warmup_start_lr"],
            warmup_steps=config["warmup_steps"],
            steps_per_epoch=config["iters_per_epoch"],
        )
        assert rate == pytest.approx(expected, rel=0, abs=1e-12), step


@pytest.mark.parametrize(
    "command, first, top, last",
    [("stage1", 1e-6, 1e-4, 8.00000001e-5), ("stage2", 1e-6, 3e-5, 1.0000049e-5)],
)
def test_defaults_of_the_stages_are_the_original_s(command: str, first: float, top: float, last: float) -> None:
    from recipes_minigpt4 import stage2_finetune

    module = {"stage1": stage1_pretrain, "stage2": stage2_finetune}[command]
    _, _, args = module.parse(["--output_dir", "unused", "--use_cpu", "true"])
    total = {"stage1": 20_000, "stage2": 1_000}[command]
    rates = [
        original_lr(
            step,
            total,
            args.learning_rate,
            args.min_learning_rate,
            args.warmup_start_learning_rate,
            int(args.warmup_steps),
        )
        for step in range(total)
    ]
    assert rates[0] == pytest.approx(first, abs=1e-12)
    assert max(rates) <= top
    assert rates[-1] == pytest.approx(last, rel=1e-7)
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2, args.seed) == (0.05, 0.9, 0.999, 42)
    assert args.max_length is None


class Recorder(TrainerCallback):
    """Notes the rates that the optimizer is about to use."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs) -> None:
        self.rates.append([group["lr"] for group in optimizer.param_groups])


@pytest.fixture
def make_trainer(stage, tmp_path: Path):
    def build(**fields) -> MiniGPT4Trainer:
        model_args, data_args, args = stage1_pretrain.parse(stage(**fields))
        model, processor = load_model(model_args, args)
        rows = stage1_rows(load_pairs(data_args, stage=1), processor, data_args)
        return MiniGPT4Trainer(model=model, args=args, train_dataset=rows, processing_class=processor)

    return build


@pytest.mark.parametrize("steps_per_epoch", [None, 2])
def test_trainer_sets_and_logs_these_rates(make_trainer, steps_per_epoch: int | None) -> None:
    numbers = {
        "learning_rate": 0.01,
        "min_learning_rate": 0.002,
        "warmup_start_learning_rate": 0.001,
        "warmup_steps": 3,
        "steps_per_epoch": steps_per_epoch,
    }
    trainer, recorder = make_trainer(max_steps=6, gradient_accumulation_steps=2, **numbers), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    expected = [original_lr(step, 6, **numbers) for step in range(6)]
    assert len(recorder.rates) == 6
    for rates, rate in zip(recorder.rates, expected, strict=True):
        assert rates == pytest.approx([rate] * len(rates), rel=1e-12)
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("original", [True, False])
def test_warmup_ratio_is_a_share_of_the_run(make_trainer, original: bool) -> None:
    fields = {"max_steps": 6, "warmup_start_learning_rate": 0.0, "original_schedule": original}
    (by_ratio, first), (by_steps, second) = (
        (make_trainer(**fields, **warmup), Recorder())
        for warmup in ({"warmup_steps": None, "warmup_ratio": 0.4}, {"warmup_steps": 3})
    )
    for trainer, recorder in ((by_ratio, first), (by_steps, second)):
        trainer.add_callback(recorder)
        trainer.train()
    assert first.rates == second.rates
    assert [rates[0] for rates in first.rates[:3]] == pytest.approx([0, 0.01 / 3, 0.02 / 3])


def test_another_schedule_can_be_chosen(make_trainer) -> None:
    trainer, recorder = make_trainer(max_steps=3, original_schedule=False, lr_scheduler_type="constant"), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert {rate for rates in recorder.rates for rate in rates} == {0.01}


def test_optimizer_is_adamw_with_decay_on_matrices_only(make_trainer) -> None:
    trainer = make_trainer()
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {id(tensor): group["weight_decay"] for group in optimizer.param_groups for tensor in group["params"]}
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    assert {name: decays.pop(id(tensor)) for name, tensor in trained.items()} == {
        "model.language_projection.weight": 0.05,
        "model.language_projection.bias": 0.0,
    }
    assert not decays  # nothing frozen is in the optimizer
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


def test_decay_follows_the_shape_of_whatever_trains(make_trainer) -> None:
    trainer = make_trainer(train_parts="qformer")
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    for name, tensor in trainer.model.named_parameters():
        assert (name in decayed) == (tensor.ndim >= 2), name


def test_a_trainer_made_in_python_warns_of_a_long_warmup(make_trainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(max_steps=3)
    trainer.args.warmup_steps = 30
    with caplog.at_level("WARNING", logger="recipes_minigpt4.training.trainer"):
        trainer.train()
    assert "The warm-up takes 30 steps and the run only 3" in caplog.text
