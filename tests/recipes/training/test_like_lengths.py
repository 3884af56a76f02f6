"""Runs on batches of rows of like length: every token counts as much, every sample comes once, and they can go on."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged import sample, write_tar
from ranks import start
from safetensors.torch import load_file
from stopped import stop_after
from test_ranks import SHARE, batches, largest_deviation, tell_batches

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.data.collator import COUNTS, StageCollator
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


GROUPED = {"train_sampling_strategy": "group_by_length"}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[], list[list[str]]]:
    """The answers of every batch since it was asked last."""
    monkeypatch.setattr(StageCollator, "torch_call", StageCollator.torch_call)  # undone at the end
    tell_batches()
    return lambda: batches(capsys.readouterr().out)


def words(answer: str) -> int:
    return len(answer.split())


def test_an_epoch_has_every_sample_once_and_few_pads(
    stage: Callable, uneven_pairs_file: Path, capsys: pytest.CaptureFixture
) -> None:
    shares = []
    for strategy in ("random", "group_by_length", "sequential"):
        fields = {"dataset_name": uneven_pairs_file, "max_steps": 8, "train_sampling_strategy": strategy}
        trainer = stage1_pretrain.main(stage(**fields))
        said = capsys.readouterr().out
        ((share, remedy),) = re.findall(r"^pads    (\d+\.\d)% of what batches held(.*)$", said, re.M)
        assert ("group_by_length" in remedy) == (strategy == "random")
        assert float(share) == pytest.approx(100 * trainer.samples.pads, abs=0.05) and trainer.samples.drawn == 16
        shares.append(float(share))
    assert shares[0] > 15 and shares[1] <= shares[2] < 8  # the file is ordered by length, in words


def test_a_token_counts_as_much_in_every_batch_as_on_average(
    stage: Callable, uneven_pairs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss times its divisor is the sum over answers, and the divisor is the same for all batches of so many rows."""
    seen, log = [], []
    step, log_loss = MiniGPT4Trainer.compute_loss, MiniGPT4Trainer.log

    def compute_loss(trainer, model, inputs, return_outputs=False, num_items_in_batch=None):
        answers = int((inputs["labels"] != -100).sum())
        loss = step(trainer, model, inputs, return_outputs, num_items_in_batch)
        seen.append((float(loss.detach()), answers, float(num_items_in_batch)))
        return loss

    monkeypatch.setattr(MiniGPT4Trainer, "compute_loss", compute_loss)
    monkeypatch.setattr(
        MiniGPT4Trainer, "log", lambda trainer, logs, *args: log.append(logs) or log_loss(trainer, logs)
    )
    fields = {"dataset_name": uneven_pairs_file, "max_steps": 8, "learning_rate": 1e-9, "min_learning_rate": 1e-9,
              "warmup_start_learning_rate": 1e-9, "logging_steps": 8, **GROUPED}  # fmt: skip
    trainer = stage1_pretrain.main(stage(**fields))
    losses, answers, divisors = zip(*seen, strict=True)
    assert max(answers) > 4 * min(answers)
    assert len(set(divisors)) == 1 and sum(divisors) == pytest.approx(sum(answers))
    total = sum(loss * divisor for loss, divisor in zip(losses, divisors, strict=True))
    assert log[0]["loss"] == pytest.approx(total / sum(answers), rel=1e-4)
    # Were each batch's loss divided by its own answers, as in any order, short ones would count for more.
    means = [loss * divisor / own for loss, divisor, own in zip(losses, divisors, answers, strict=True)]
    assert sum(means) / 8 != pytest.approx(total / sum(answers), rel=1e-4)
    batch = next(iter(trainer.get_train_dataloader()))
    del batch[COUNTS]  # as in evaluation, where batches are taken as they come
    own = int((batch["labels"] != -100).sum())
    assert int(trainer._get_num_items_in_batch([batch], trainer.args.device)) == own != round(divisors[0])


def test_a_run_that_is_resumed_within_its_second_epoch_is_the_run_that_never_stopped(
    stage: Callable, uneven_pairs_file: Path, told: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"dataset_name": uneven_pairs_file, "max_steps": 12, "per_device_train_batch_size": 3,
              "save_strategy": "steps", "save_steps": 8, **GROUPED}  # fmt: skip
    stage1_pretrain.main(stage("whole", **fields))
    whole = told()
    for epoch in (whole[:6], whole[6:]):
        assert len({answer for batch in epoch for answer in batch}) == 16
    assert whole[:6] != whole[6:12]
    with monkeypatch.context() as patch:
        stop_after(8, patch)
        with pytest.raises(RecipeError, match="stopped"):
            stage1_pretrain.main(stage(**fields))
    told()
    stage1_pretrain.main(stage(**fields, resume_from_checkpoint="latest"))
    assert told() == whole[8:]
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_a_stream_goes_on_where_it_was_and_not_in_another_order(
    stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for tar in range(3):
        samples = [sample(20 * tar + n, "red " * (1 + n % 9), picture=b"" if n == 7 else None) for n in range(20)]
        write_tar(tmp_path / "tars" / f"{tar}.tar", samples)
    fields = {"dataset_name": tmp_path / "tars", "shuffle_buffer": 6, "max_steps": 30, "save_strategy": "steps",
              "save_steps": 19, "gradient_accumulation_steps": 2, **GROUPED}  # fmt: skip
    stage1_pretrain.main(stage("whole", **fields))
    whole = capsys.readouterr().out
    with monkeypatch.context() as patch:
        stop_after(19, patch)
        with pytest.raises(RecipeError, match="stopped"):
            stage1_pretrain.main(stage(**fields))
    again = {**fields, "resume_from_checkpoint": "latest"}
    assert cli.main(["stage1", *stage(**{**again, "train_sampling_strategy": "random"})]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was saved with --train_sampling_strategy group_by_length, and cannot go on with random" in said
    stage1_pretrain.main(stage(**again))
    resumed = capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    for line in ("samples:", "pads"):  # of both parts
        found = [[text for text in printed.splitlines() if text.startswith(line)] for printed in (whole, resumed)]
        assert found[0] == found[1] != []


def test_two_processes_have_as_many_steps_and_train_as_one_with_twice_the_batch(
    stage: Callable, uneven_pairs_file: Path, told: Callable, tmp_path: Path
) -> None:
    fields = {"dataset_name": uneven_pairs_file, "max_steps": 6, "gradient_accumulation_steps": 2, **GROUPED}
    stage1_pretrain.main(stage("one", per_device_train_batch_size=4, **fields))
    single = told()
    with start(["stage1", *stage("two", per_device_train_batch_size=2, **fields)], before=tell_batches) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    first, second = (batches(ranks.output(rank)) for rank in range(2))
    assert len(first) == len(second) and [one + other for one, other in zip(first, second, strict=True)] == single
    for batch in single:
        assert max(map(words, batch)) - min(map(words, batch)) <= 6  # of 16, in tokens they are closer
    assert largest_deviation(tmp_path / "one", tmp_path / "two") <= SHARE


def test_stored_features_are_trained_in_the_same_batches(
    stage: Callable, uneven_pairs_file: Path, told: Callable, tmp_path: Path
) -> None:
    fields = {"dataset_name": uneven_pairs_file, "max_steps": 8, **GROUPED}
    stage1_pretrain.main(stage("pixels", **fields))
    pixels = told()
    stage1_pretrain.main(stage("stored", cache_features=tmp_path / "features", **fields))
    assert told() == pixels
    assert largest_deviation(tmp_path / "pixels", tmp_path / "stored") <= SHARE


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"train_sampling_strategy": "batch_rebalance"}, "random, sequential and group_by_length"),
        ({"train_sampling_strategy": "sequential", "streaming": True}, "streams are shuffled in blocks"),
        ({"train_sampling_strategy": "group_by_length", "length_column_name": "words"}, "--length_column_name"),
    ],
)
def test_orders_that_there_are_not_are_told(
    fields: dict, named: str, stage: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["stage1", *stage(**fields)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("minigpt4 stage1: ") and named in said


def test_rows_of_ones_own_without_lengths_are_refused(stage: Callable, uneven_pairs_file: Path) -> None:
    trainer = stage1_pretrain.main(stage(dataset_name=uneven_pairs_file))
    trainer.args.train_sampling_strategy = "group_by_length"
    with pytest.raises(RecipeError, match=r"tell no lengths; make them with stage1_rows .*`grouping=args\.grouping`"):
        MiniGPT4Trainer(
            model=trainer.model, args=trainer.args, train_dataset=trainer.train_dataset,
            processing_class=trainer.processing_class,
        )  # fmt: skip
