"""Two processes train as one does with twice the batch: real ranks over gloo."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import SHARE, deviation
from ranks import start
from safetensors.torch import load_file

from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.accelerate import LAUNCH_CONFIGS
from recipes_minigpt4.data.collator import StageCollator


MAINS = {"stage1": stage1_pretrain.main, "stage2": stage2_finetune.main}
# Two epochs of sixteen samples; gradients accumulate over two batches and are clipped.
SETTINGS = {"max_steps": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 0.02, "weight_decay": 0.05}


def tell_batches() -> None:
    """Let a process print the answers of every batch that it collates."""
    collate = StageCollator.torch_call

    def torch_call(self: StageCollator, examples: list) -> dict:
        print("batch:", json.dumps([example["completion"] for example in examples]))
        return collate(self, examples)

    StageCollator.torch_call = torch_call


def batches(printed: str) -> list[list[str]]:
    return [json.loads(line) for line in re.findall(r"^batch: (.*)$", printed, flags=re.MULTILINE)]


def largest_deviation(first: Path, second: Path, file: str = "model.safetensors") -> float:
    """Of all tensors, each as a share of its largest element."""
    one, other = load_file(first / file), load_file(second / file)
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    return torch.tensor([deviation(other[name], one[name]) for name in one]).max().item()  # keeps what is not a number


def logs(folder: Path) -> list[dict]:
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry for entry in history if "loss" in entry]


@pytest.fixture
def one_and_two(stage: Callable, uneven_pairs_file: Path, tmp_path: Path) -> Callable:
    """`one_and_two(command, **fields)`: train with one process and twice the batch, and with two; both folders."""

    def train(command: str = "stage1", **fields) -> tuple[Path, Path]:
        fields = {"dataset_name": uneven_pairs_file, **SETTINGS, **fields}
        MAINS[command](stage(output="one", per_device_train_batch_size=4, **fields))
        with start([command, *stage(output="two", per_device_train_batch_size=2, **fields)]) as ranks:
            assert ranks.wait() == [0, 0], ranks.output()
        return tmp_path / "one", tmp_path / "two"

    return train


@pytest.mark.parametrize("command", MAINS)
def test_two_processes_train_as_one_with_twice_the_batch(command: str, one_and_two: Callable) -> None:
    one, two = one_and_two(command)
    assert largest_deviation(one, two) <= SHARE
    steps = list(zip(logs(one), logs(two), strict=True))
    assert len(steps) == 4
    assert any(single["grad_norm"] > SETTINGS["max_grad_norm"] for single, _ in steps), "nothing was clipped"
    for single, both in steps:
        for name in ("loss", "grad_norm", "learning_rate", "mean_token_accuracy", "entropy", "num_tokens", "epoch"):
            assert both[name] == pytest.approx(single[name], abs=1e-4), name


def test_answers_count_alike_whichever_process_has_them(one_and_two: Callable) -> None:
    """Were each process's mean taken by itself, the longest answers would count for less, and it would show."""
    one, two = one_and_two(average_tokens_across_devices="false")
    assert largest_deviation(one, two) > 1e-4


def test_processes_share_out_the_samples_of_every_step(
    stage: Callable, uneven_pairs_file: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    fields = {"dataset_name": uneven_pairs_file, "max_steps": 8}
    monkeypatch.setattr(StageCollator, "torch_call", StageCollator.torch_call)  # undone at the end
    tell_batches()
    stage1_pretrain.main(stage(output="one", per_device_train_batch_size=4, **fields))
    single = batches(capsys.readouterr().out)
    with start(["stage1", *stage(output="two", **fields)], before=tell_batches) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    first, second = (batches(ranks.output(rank)) for rank in range(2))
    assert len(single) == len(first) == len(second) == 8
    for whole, half, other in zip(single, first, second, strict=True):
        assert whole == half + other and len(half) == len(other) == 2
    assert len({answer for batch in single[:4] for answer in batch}) == 16  # an epoch has every sample once


def test_one_process_writes_what_all_have_trained(stage: Callable, tmp_path: Path) -> None:
    arguments = stage(save_strategy="steps", save_steps=1, save_total_limit=1)
    with start(["stage1", *arguments]) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    assert "trains  language_projection" in ranks.output(0)
    assert "trains  language_projection" not in ranks.output(1)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert largest_deviation(tmp_path / "run", checkpoint) == 0
    assert {path.name for path in checkpoint.glob("rng_state_*")} == {"rng_state_0.pth", "rng_state_1.pth"}


def test_a_mistake_is_told_once_by_every_process(stage: Callable) -> None:
    with start(["stage1", *stage(dataset_name="/none")]) as ranks:
        assert ranks.wait() == [2, 2]
    for rank in range(2):
        assert ranks.output(rank).splitlines()[-1].startswith("minigpt4 stage1: /none")
        assert "Traceback" not in ranks.output(rank)


@pytest.mark.slow
def test_accelerate_launches_two_processes(stage: Callable, tmp_path: Path) -> None:
    config = str(LAUNCH_CONFIGS / "ddp.yaml")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command = [*launch, "-m", "recipes_minigpt4.stage1_pretrain", *stage()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "samples: 8 drawn" in done.stdout, done.stdout
    assert cli.main(["stage1", *stage(output="one", per_device_train_batch_size=4)]) == 0
    assert largest_deviation(tmp_path / "one", tmp_path / "run") <= SHARE


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one_with_twice_the_batch(stage: Callable, uneven_pairs_file: Path, tmp_path: Path) -> None:
    fields = {"dataset_name": uneven_pairs_file, **SETTINGS, "use_cpu": "false", "bf16": "false"}
    for folder, number in (("one", 1), ("two", 2)):
        arguments = stage(output=folder, per_device_train_batch_size=4 // number, **fields)
        with start(["stage1", *arguments], ranks=number) as ranks:
            assert ranks.wait(300) == [0] * number, ranks.output()
    assert largest_deviation(tmp_path / "one", tmp_path / "two") <= SHARE
