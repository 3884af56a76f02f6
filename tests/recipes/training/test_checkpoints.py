"""Checkpoints are whole or not there, at whatever moment writing them ends."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.trainer_utils import get_last_checkpoint

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.training.checkpoints import UNFINISHED, latest_checkpoint, what_is_missing, write_whole
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


SAVING = {"save_strategy": "steps", "save_steps": 2}


class KilledError(BaseException):
    """The process ends here; nothing behind it is run."""


def one_process() -> SimpleNamespace:
    args = SimpleNamespace(local_process_index=0, should_save=True)
    return SimpleNamespace(args=args, accelerator=SimpleNamespace(wait_for_everyone=lambda: None))


def write_step(folder: Path, step: int) -> None:
    """A checkpoint of two files in folders, by the way of the recipes."""
    scratch = folder / UNFINISHED / f"checkpoint-{step}"

    def write() -> None:
        (scratch / "peft").mkdir(parents=True)
        (scratch / "model.safetensors").write_text(f"weights of step {step}")
        (scratch / "peft" / "adapter.safetensors").write_text(f"adapter of step {step}")
        (scratch / "trainer_state.json").write_text("{}")

    write_whole(one_process(), folder / f"checkpoint-{step}", write)


def killing_at(moment: int, patch: pytest.MonkeyPatch) -> list[str]:
    """End the process at one of the things that it asks the file system for; returns what it has asked for."""
    asked: list[str] = []

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*args, **kwargs):
            asked.append(name)
            if len(asked) == moment:
                raise KilledError
            return original(*args, **kwargs)

        patch.setattr(owner, name, call)

    for owner, name in (
        (os, "replace"), (os, "fsync"), (os, "rmdir"), (os, "unlink"), (Path, "write_text"), (Path, "mkdir"),
    ):  # fmt: skip
        wrap(owner, name)
    return asked


@pytest.mark.parametrize("alone", [False, True], ids=["one of several", "the only one"])
@pytest.mark.parametrize("again", [False, True], ids=["new", "of the same step"])
def test_a_checkpoint_is_whole_or_not_there_at_every_moment(again: bool, alone: bool, tmp_path: Path) -> None:
    step = 4 if again else 6
    ended = 0
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        folder.mkdir()
        for earlier in (4,) if alone else (2, 4):
            write_step(folder, earlier)
        with pytest.MonkeyPatch.context() as patch:
            asked = killing_at(moment, patch)
            try:
                write_step(folder, step)
                ended = moment
            except KilledError:
                pass
        # Nothing with the name of a checkpoint is broken, also not for tools that look at names only.
        for path in folder.glob("checkpoint-*"):
            assert what_is_missing(path) is None, (moment, asked[-1])
        newest = latest_checkpoint(folder)  # also if the only one was about to be replaced
        assert newest is not None and get_last_checkpoint(folder) == str(newest)
        write_step(folder, 8)  # and the next one is written as if nothing had been
        assert {path.name for path in folder.iterdir()} <= {f"checkpoint-{n}" for n in (2, 4, 6, 8)}
        if ended:
            break
    assert ended > 10  # so many moments were tried


def test_an_error_while_a_checkpoint_is_replaced_leaves_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_step(tmp_path, 4)
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if source.name == "checkpoint-4" and source.parent.name == UNFINISHED:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RecipeError, match=r"could not be written .* go on from .*checkpoint-4 with"):
        write_step(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    assert what_is_missing(tmp_path / "checkpoint-4") is None


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 3), "has 3 of 18 bytes"),
        (lambda folder: (folder / "files.json").unlink(), "has no files.json"),
        (lambda folder: (folder / "files.json").write_text('{"model'), "has no files.json"),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(damage: Callable, reason: str, tmp_path: Path) -> None:
    write_step(tmp_path, 2), write_step(tmp_path, 10)
    damage(tmp_path / "checkpoint-10")
    told: list[str] = []
    assert latest_checkpoint(tmp_path, told.append) == tmp_path / "checkpoint-2"
    assert len(told) == 1 and reason in told[0] and "checkpoint-10" in told[0]


def test_a_damaged_checkpoint_that_is_named_is_refused(
    stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stage1_pretrain.main(stage(**SAVING))
    os.truncate(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", 100)
    assert cli.main(["stage1", *stage(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")]) == 2
    assert "optimizer.pt has 100 of" in capsys.readouterr().err
    assert cli.main(["stage1", *stage(resume_from_checkpoint="latest")]) == 2
    assert "No checkpoint of" in (said := capsys.readouterr().err) and "is whole, for optimizer.pt has 100 of" in said
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    assert cli.main(["stage1", *stage(resume_from_checkpoint="latest")]) == 2
    assert "There is no checkpoint to resume from" in capsys.readouterr().err


def test_auto_starts_anew_or_goes_on(stage: Callable, tmp_path: Path) -> None:
    fields = {**SAVING, "max_steps": 4, "resume_from_checkpoint": "auto"}
    first = stage1_pretrain.main(stage(**fields))
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = stage1_pretrain.main(stage(**fields))
    assert [len([e for e in t.state.log_history if "loss" in e]) for t in (first, again)] == [4, 4]
    assert again.state.log_history[2]["loss"] == first.state.log_history[2]["loss"]
    # Only the two steps behind the checkpoint were taken.
    assert again.samples.drawn == first.samples.drawn == 8


@pytest.mark.parametrize("data", ["map-style", "stream"])
def test_a_run_that_was_done_is_not_trained_further(
    data: str, stage: Callable, pairs_file: Path, tmp_path: Path
) -> None:
    """Killed between its last checkpoint and its end, it is only saved; transformers would take another step."""
    fields = {**SAVING, "max_steps": 6, "per_device_train_batch_size": 3, "streaming": data == "stream"}
    first = stage1_pretrain.main(stage(**fields))
    before = load_file(tmp_path / "run" / "model.safetensors")
    (tmp_path / "run" / "model.safetensors").unlink()
    again = stage1_pretrain.main(stage(**fields, resume_from_checkpoint="auto"))
    after = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert again.state.global_step == 6 and again.samples.drawn == first.samples.drawn
    assert not (tmp_path / "run" / "checkpoint-7").exists()


@pytest.mark.parametrize("wanted", ["auto", "latest"])
def test_checkpoints_of_others_are_neither_taken_nor_ignored(
    wanted: str, stage: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Starting anew beside them would end in deleting them."""
    stage1_pretrain.main(stage(**SAVING))
    (tmp_path / "run" / "checkpoint-2" / "files.json").unlink()
    assert cli.main(["stage1", *stage(resume_from_checkpoint=wanted)]) == 2
    assert "it has no files.json (checkpoint-2); name one that another trainer has saved" in capsys.readouterr().err
    named = stage(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2", max_steps=3)
    assert stage1_pretrain.main(named).state.global_step == 3


def test_checkpoints_of_an_earlier_run_are_told(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    stage1_pretrain.main(stage(**SAVING))
    assert "of an earlier run" not in capsys.readouterr().out
    stage1_pretrain.main(stage())
    assert "checkpoint-2 is of an earlier run; remove it" in capsys.readouterr().out


def test_a_trainer_can_be_resumed_twice(stage: Callable, tars: Path, tmp_path: Path) -> None:
    """On a stream, where the place has to be found each time."""
    fields = {"dataset_name": tars, "shuffle_buffer": 5, **SAVING, "save_steps": 4, "max_steps": 12}
    whole = stage1_pretrain.main(stage("whole", **fields))
    trainer = stage1_pretrain.main(stage(**{**fields, "max_steps": 4, "original_schedule": False}))
    trainer.args.original_schedule, told = True, []
    for last in (8, 12):
        trainer.args.max_steps = last
        trainer.lr_scheduler = None
        trainer.train(resume_from_checkpoint=True)
        told.append([entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry])
    assert told[-1] == [entry["num_tokens"] for entry in whole.state.log_history if "loss" in entry]


def test_old_checkpoints_are_deleted_once_the_new_one_is_there(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage(**SAVING, max_steps=6, save_total_limit=1))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (tmp_path / "run" / UNFINISHED).exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Have the system refuse longer files, as it does when the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 700, 3000, 20_000])
def test_a_full_disk_costs_the_checkpoint_that_is_written(
    size: int, stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Sizes at which the weights, the optimizer, or code and tokenizer are what cannot be written."""
    save = MiniGPT4Trainer._save_checkpoint

    def with_a_full_disk(trainer, model, trial) -> None:
        if trainer.state.global_step < 4:
            return save(trainer, model, trial)
        with files_of_at_most(size):
            return save(trainer, model, trial)

    fields = {**SAVING, "max_steps": 6}
    whole = stage1_pretrain.main(stage(output="whole", **fields))
    monkeypatch.setattr(MiniGPT4Trainer, "_save_checkpoint", with_a_full_disk)
    assert cli.main(["stage1", *stage(**fields)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"{tmp_path / 'run' / 'checkpoint-4'} could not be written" in said
    assert os.strerror(errno.EFBIG) in said or "PytorchStreamWriter" in said or "No space" in said
    assert f"go on from {tmp_path / 'run' / 'checkpoint-2'} with --resume_from_checkpoint latest" in said
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["README.md", "checkpoint-2"]
    monkeypatch.setattr(MiniGPT4Trainer, "_save_checkpoint", save)
    again = stage1_pretrain.main(stage(**fields, resume_from_checkpoint="latest"))
    assert same_weights(whole.args.output_dir, again.args.output_dir)


def test_a_full_disk_at_the_end_leaves_the_former_adapter(
    stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    stage1_pretrain.main(stage())
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    save = MiniGPT4Trainer._save

    def with_a_full_disk(trainer, *args, **kwargs) -> None:
        with files_of_at_most(20_000):
            save(trainer, *args, **kwargs)

    monkeypatch.setattr(MiniGPT4Trainer, "_save", with_a_full_disk)
    assert cli.main(["stage1", *stage(max_steps=4)]) == 2
    assert "Training is done, but the adapter could not be written" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def same_weights(*folders: str | Path) -> bool:
    first, *others = (load_file(Path(folder) / "model.safetensors") for folder in folders)
    return all(
        first.keys() == other.keys() and all(torch.equal(first[name], other[name]) for name in first)
        for other in others
    )


def test_the_list_of_files_is_what_lies_there(stage: Callable, tmp_path: Path) -> None:
    stage1_pretrain.main(stage(**SAVING))
    folder = tmp_path / "run" / "checkpoint-2"
    listed = json.loads((folder / "files.json").read_text())
    there = {path.name: path.stat().st_size for path in folder.iterdir() if path.suffix != ".bin"}
    del there["files.json"]
    assert listed == there and {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= there.keys()


def test_frozen_weights_that_were_changed_are_in_checkpoints_and_come_back(
    stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save, name = MiniGPT4Trainer._save_checkpoint, "model.vision_model.post_layernorm.bias"

    def edit_and_save(self: MiniGPT4Trainer, *args: object) -> None:
        self.model.get_parameter(name).data[0] = self.state.global_step
        save(self, *args)

    monkeypatch.setattr(MiniGPT4Trainer, "_save_checkpoint", edit_and_save)
    stage1_pretrain.main(stage(**SAVING, max_steps=4))
    for step in (2, 4):
        assert load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")[name][0] == step
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    monkeypatch.undo()
    stage1_pretrain.main(stage(**SAVING, max_steps=4, resume_from_checkpoint="latest"))
    assert load_file(tmp_path / "run" / "model.safetensors")[name][0] == 2
    assert "missing keys" not in caplog.text
