"""Runs of two ranks that are killed, pre-empted or left alone, and losses that are not finite."""

import functools
import http.server
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from transformers import IntervalStrategy, TrainerCallback

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.training import non_finite
from recipes_minigpt4.training.checkpoints import UNFINISHED, what_is_missing
from recipes_minigpt4.training.train import train_and_save
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import PreemptedError, RecipeError


KILLS = 20
SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3, "resume_from_checkpoint": "auto"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = weights(first), weights(second)
    assert one.keys() == two.keys() and len(one) > 0
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))


def wait_for(condition: Callable[[], object], running: ranks.Ranks, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end and any(p.exitcode is None for p in running.processes), running.output()
        time.sleep(0.005)


def run(arguments: list[str], **options) -> None:
    with ranks.start(["stage1", *arguments], **options) as running:
        codes = running.wait()
        assert codes == [0, 0], running.output(0)[-3000:] + running.output(1)[-3000:]


# ---- killed ---------------------------------------------------------------------------------------------------------


def kill_at_random(arguments: list[str], folder: Path, draw: random.Random) -> bool:
    """Start a run and kill both ranks at its start, in training or in saving; returns whether it was in saving."""
    moment, more = draw.choice(["start", "training", "saving", "saving"]), draw.randrange(3)
    newest, scratch, started = max(steps_of(folder), default=0), folder / UNFINISHED, time.time()

    def is_saving() -> bool:  # and it is not what an earlier kill has left
        try:
            return scratch.stat().st_mtime > started
        except FileNotFoundError:
            return False

    with ranks.start(["stage1", *arguments]) as running:
        if moment != "start":
            wait_for(lambda: max(steps_of(folder), default=0) >= newest + 2 * more, running)
        if moment == "saving":
            wait_for(is_saving, running)
        time.sleep(draw.uniform(0, {"start": 0.8, "training": 0.3, "saving": 0.04}[moment]))
        running.kill(signal.SIGKILL)
        assert -signal.SIGKILL in running.wait()
    return is_saving()


@pytest.mark.parametrize("data", ["map-style", "stream"])
def test_twenty_kills_change_nothing(data: str, stage: Callable, tars: Path, tmp_path: Path) -> None:
    """Random moments, whose effect differs from run to run; the outcome must not."""
    fields = {**SAVING, "max_steps": 100}
    if data == "stream":
        fields |= {"dataset_name": tars, "shuffle_buffer": 5, "dataloader_num_workers": 1}
    run(stage(output="whole", **fields))
    folder, draw = tmp_path / "run", random.Random(0)
    newest, in_saving = [], 0
    for _ in range(KILLS):
        in_saving += kill_at_random(stage(**fields), folder, draw)
        newest.append(max(steps_of(folder), default=0))
    print(f"{data}: newest checkpoint after each kill {newest}, {in_saving} left a checkpoint half written")
    assert newest == sorted(newest) and 0 < newest[-1] < 100  # none was lost, and all fell into the run
    run(stage(**fields))
    assert_same_weights(tmp_path / "whole", folder)


# ---- pre-empted -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [0, 1, None], ids=["the first rank", "the second rank", "both"])
def test_sigterm_saves_after_the_same_step_and_can_go_on(asked: int | None, stage: Callable, tmp_path: Path) -> None:
    fields = {**SAVING, "save_strategy": "no", "max_steps": 120}
    run(stage(output="whole", **fields))
    with ranks.start(["stage1", *stage(**fields)]) as running:
        wait_for(lambda: running.output(0).count("  loss ") >= 3, running)
        running.kill(signal.SIGTERM, rank=asked)
        assert running.wait() == [cli.PREEMPTED] * 2
    (step,) = steps_of(tmp_path / "run")
    assert 3 <= step < 120
    for rank in range(2):
        said = running.output(rank)
        assert f"minigpt4 stage1: Stopped by SIGTERM after step {step}; go on from {tmp_path / 'run'}" in said
        assert "Traceback" not in said
    assert not (tmp_path / "run" / "model.safetensors").exists()  # a run that is not done publishes nothing
    run(stage(**fields))
    assert_same_weights(tmp_path / "whole", tmp_path / "run")


def test_sigterm_in_the_end_of_a_run_does_not_cut_it_short(
    stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter is written whole, and the signal is what it was before."""
    save, before = MiniGPT4Trainer._save, signal.getsignal(signal.SIGTERM)

    def signalled(trainer, *args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(trainer, *args, **kwargs)

    monkeypatch.setattr(MiniGPT4Trainer, "_save", signalled)
    assert cli.main(["stage1", *stage()]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_preempted_run_keeps_its_checkpoint_beside_the_best(stage: Callable, tmp_path: Path) -> None:
    """transformers deletes all but the best at the end, and evaluates first."""
    trainer = stage1_pretrain.main(stage("first"))
    trainer.eval_dataset = trainer.train_dataset
    trainer.args.eval_strategy = trainer.args.save_strategy = IntervalStrategy.STEPS
    trainer.args.eval_steps = trainer.args.save_steps = trainer.state.eval_steps = trainer.state.save_steps = 2
    trainer.args.load_best_model_at_end, trainer.args.metric_for_best_model = True, "eval_loss"
    trainer.args.greater_is_better, trainer.args.save_total_limit, trainer.args.max_steps = True, 1, 8
    trainer.lr_scheduler = None

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Ask())
    with pytest.raises(PreemptedError, match=r"after step 6; go on from .*checkpoint-6 with"):
        train_and_save(trainer)
    assert what_is_missing(tmp_path / "first" / "checkpoint-6") is None
    # The same trainer, asked again, is not stopped by the old signal.
    trainer.pop_callback(Ask)
    assert (trainer.args.save_total_limit, trainer.args.load_best_model_at_end) == (1, True)
    train_and_save(trainer)
    assert trainer.state.global_step == 8


def test_the_checkpoint_of_a_preempted_run_counts(stage: Callable, tmp_path: Path) -> None:
    """`save_total_limit` holds for it as for any other, now and when the run goes on."""

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    fields = {**SAVING, "save_steps": 1, "max_steps": 8, "save_total_limit": 2, "resume_from_checkpoint": "auto"}
    with pytest.raises(PreemptedError, match="after step 6; go on from"):
        stage1_pretrain.main(stage(**fields), callbacks=[Ask()])
    assert steps_of(tmp_path / "run") == [5, 6]
    stage1_pretrain.main(stage(**fields))
    assert steps_of(tmp_path / "run") == [7, 8]


# ---- left alone -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0, 1])
def test_a_rank_that_dies_is_told_by_the_other(dead: int, stage: Callable, tmp_path: Path) -> None:
    fields = {**SAVING, "max_steps": 400}
    with ranks.start(["stage1", *stage(**fields)]) as running:
        wait_for(lambda: steps_of(tmp_path / "run"), running)
        running.kill(signal.SIGKILL, rank=dead)
        codes = running.wait()
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 2
    said = running.output(1 - dead).splitlines()[-1]
    newest = tmp_path / "run" / f"checkpoint-{steps_of(tmp_path / 'run')[-1]}"
    assert "Another process of this run is gone" in said
    assert f"go on from {newest} with --resume_from_checkpoint latest" in said


def find_different_checkpoints() -> None:
    """Each rank on a machine of its own, that shares no disk."""
    os.chdir(Path(os.environ["DISKS"], os.environ["RANK"]))


def test_ranks_that_see_different_checkpoints_do_not_train(stage: Callable, tmp_path: Path) -> None:
    run(stage(**SAVING, max_steps=4))
    for rank, steps in enumerate([(2, 4), (2,)]):
        for step in steps:
            name = f"checkpoint-{step}"
            shutil.copytree(tmp_path / "run" / name, tmp_path / "disks" / str(rank) / "own" / name)
    arguments = ["stage1", *stage(**SAVING, output_dir="own", max_steps=8)]
    disks = {"DISKS": str(tmp_path / "disks")}
    with ranks.start(arguments, environment=disks, before=find_different_checkpoints) as running:
        assert running.wait() == [2, 2]
    for rank in range(2):
        assert "see different newest checkpoints, own/checkpoint-4 and own/checkpoint-2" in running.output(rank)


def fail_with_a_best_model() -> None:
    """A disk that is full for one rank, where transformers lets ranks wait for each other in the middle of saving."""
    fill_the_disk_of_the_first_rank()
    save = MiniGPT4Trainer._save_checkpoint

    def with_best(trainer, model, trial) -> None:
        trainer.state.best_global_step = 2
        save(trainer, model, trial)

    MiniGPT4Trainer._save_checkpoint = with_best


def fill_the_disk_of_the_first_rank() -> None:
    """From the second checkpoint on, the system refuses files of rank 0 that are longer than its log will be."""
    import resource

    save = MiniGPT4Trainer._save_checkpoint

    def limited(trainer, model, trial) -> None:
        if os.environ["RANK"] == "0" and trainer.state.global_step > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (25_000, resource.RLIM_INFINITY))
        save(trainer, model, trial)

    MiniGPT4Trainer._save_checkpoint = limited


@pytest.mark.parametrize("before", [fill_the_disk_of_the_first_rank, fail_with_a_best_model])
def test_a_disk_that_is_full_for_one_rank_stops_all(before: Callable, stage: Callable, tmp_path: Path) -> None:
    arguments = ["stage1", *stage(**SAVING, max_steps=40)]
    with ranks.start(arguments, before=before) as running:
        assert running.wait() == [2, 2]
    assert steps_of(tmp_path / "run") == [2]
    for rank in range(2):
        assert "checkpoint-4 could not be written" in running.output(rank)
        assert f"go on from {tmp_path / 'run' / 'checkpoint-2'}" in running.output(rank)


# ---- losses that are not finite ------------------------------------------------------------------------------------


def poison(patch: pytest.MonkeyPatch, steps: set[int], value: float = float("nan")) -> None:
    """Have the loss of some steps, counted from 1, be no number."""
    original = MiniGPT4Trainer.compute_loss

    def compute_loss(trainer, *args, **kwargs):
        loss = original(trainer, *args, **kwargs)
        return loss * value if trainer.state.global_step + 1 in steps else loss

    patch.setattr(MiniGPT4Trainer, "compute_loss", compute_loss)


def test_a_loss_that_is_not_finite_stops_the_run(
    stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, {5})
    assert cli.main(["stage1", *stage(**SAVING, max_steps=8)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "The loss was not finite in 1 batch(es) at or before step 5; lower --learning_rate" in said
    assert f"go on from {tmp_path / 'run' / 'checkpoint-4'} with --resume_from_checkpoint latest" in said
    assert steps_of(tmp_path / "run") == [2, 4] and not (tmp_path / "run" / "model.safetensors").exists()
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run" / "checkpoint-4").values())


@pytest.mark.parametrize("logging_steps", [3, 100])
def test_what_is_not_finite_is_never_saved(
    logging_steps: int, stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if nothing was logged since, or the last step is the one."""
    poison(monkeypatch, {4})
    with pytest.raises(RecipeError, match="not finite"):
        stage1_pretrain.main(stage(**SAVING, max_steps=4, logging_steps=logging_steps))
    assert steps_of(tmp_path / "run") == [2] and not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(RecipeError, match="not finite"):
        stage1_pretrain.main(stage("other", max_steps=4, logging_steps=logging_steps))
    assert not (tmp_path / "other" / "model.safetensors").exists()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_skipped_steps_change_nothing_and_are_reported(
    accumulation: int, stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fields = {"max_steps": 6, "gradient_accumulation_steps": accumulation, "non_finite": "skip"}
    with monkeypatch.context() as patch:  # what should come out: those updates are not made
        step = torch.optim.AdamW.step

        def leave_out(optimizer, *args, **kwargs):
            leave_out.count += 1
            if leave_out.count not in (2, 5):
                step(optimizer, *args, **kwargs)

        leave_out.count = 0
        patch.setattr(torch.optim.AdamW, "step", leave_out)
        stage1_pretrain.main(stage("expected", **fields))
    assert leave_out.count == 6
    poison(monkeypatch, {2, 5}, float("inf"))
    trainer = stage1_pretrain.main(stage(**fields))
    assert_same_weights(tmp_path / "expected", tmp_path / "run")
    assert "steps: 2 of 6 skipped, as loss or gradient was not finite: 2, 5" in capsys.readouterr().out
    assert all(abs(entry["loss"]) < 1e9 for entry in trainer.state.log_history if "loss" in entry)


def test_steps_that_were_skipped_before_a_checkpoint_are_reported_too(
    stage: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    fields = {**SAVING, "max_steps": 6, "non_finite": "skip"}
    with monkeypatch.context() as patch:
        poison(patch, {2})
        save = MiniGPT4Trainer._save_checkpoint

        def stop_behind(trainer, *args) -> None:
            save(trainer, *args)
            if trainer.state.global_step == 4:
                raise RecipeError("stopped")

        patch.setattr(MiniGPT4Trainer, "_save_checkpoint", stop_behind)
        with pytest.raises(RecipeError, match="stopped"):
            stage1_pretrain.main(stage(**fields))
    stage1_pretrain.main(stage(**fields))
    assert "steps: 1 of 6 skipped, as loss or gradient was not finite: 2" in capsys.readouterr().out


def test_nothing_but_such_steps_ends_the_run(
    stage: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    poison(monkeypatch, set(range(3, 100)))
    assert cli.main(["stage1", *stage(max_steps=60, non_finite="skip")]) == 2
    assert f"{non_finite.MOST_IN_A_ROW} steps in a row were not finite at or before step 21" in capsys.readouterr().err


def poison_the_second_rank() -> None:
    if os.environ["RANK"] == "1":
        poison(pytest.MonkeyPatch(), {3})


def test_both_ranks_skip_what_is_not_finite_on_one(stage: Callable, tmp_path: Path) -> None:
    fields = {"max_steps": 6, "non_finite": "skip"}
    with ranks.start(["stage1", *stage(**fields)], before=poison_the_second_rank) as running:
        assert running.wait() == [0, 0], running.output()
    assert "steps: 1 of 6 skipped, as loss or gradient was not finite: 3" in running.output(0)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_both_ranks_stop_at_what_is_not_finite_on_one(stage: Callable) -> None:
    with ranks.start(["stage1", *stage(max_steps=6)], before=poison_the_second_rank) as running:
        assert running.wait() == [2, 2]
    assert all("not finite" in running.output(rank) for rank in range(2))


def test_an_unknown_policy_is_refused(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["stage1", *stage(non_finite="ignore")]) == 2
    assert "non_finite is 'ignore'; it is stop or skip." in capsys.readouterr().err


# ---- data that is gone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_goes_away_ends_the_run(
    workers: int, stage: Callable, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    save = MiniGPT4Trainer._save_checkpoint

    def take_the_tars_away(trainer, *args) -> None:
        save(trainer, *args)
        if tars.exists():
            tars.rename(tmp_path / "elsewhere")

    monkeypatch.setattr(MiniGPT4Trainer, "_save_checkpoint", take_the_tars_away)
    fields = {**SAVING, "max_steps": 4000, "dataset_name": tars, "shuffle_buffer": 5, "max_bad_share": 1}
    assert cli.main(["stage1", *stage(**fields, dataloader_num_workers=workers)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "5 tar files in a row cannot be read" in said and "(not found); see whether their source" in said
    assert said.startswith("minigpt4 stage1: 5 tar files")
    assert steps_of(tmp_path / "run")


def test_sigterm_to_all_processes_of_a_job_spares_the_workers(stage: Callable, tars: Path, tmp_path: Path) -> None:
    """Schedulers signal everything that a job has started, workers of data loaders among it."""
    fields = {**SAVING, "save_strategy": "no", "max_steps": 4000, "dataset_name": tars, "dataloader_num_workers": 2}
    with ranks.start(["stage1", *stage(**fields)]) as running:
        wait_for(lambda: running.output(0).count("  loss ") >= 3, running)
        for pid in running.pids:
            os.killpg(pid, signal.SIGTERM)
        assert running.wait() == [cli.PREEMPTED] * 2, running.output()
    assert len(steps_of(tmp_path / "run")) == 1


def test_a_server_that_goes_away_ends_the_run(
    stage: Callable, tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tars))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    save = MiniGPT4Trainer._save_checkpoint

    def close_the_server(trainer, *args) -> None:
        save(trainer, *args)
        server.shutdown(), server.server_close()

    monkeypatch.setattr(MiniGPT4Trainer, "_save_checkpoint", close_the_server)
    address = f"http://127.0.0.1:{server.server_port}/{{0..5}}.tar"
    fields = {**SAVING, "max_steps": 4000, "dataset_name": address, "shuffle_buffer": 5, "max_bad_share": 1}
    assert cli.main(["stage1", *stage(**fields)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("minigpt4 stage1: 5 tar files in a row cannot be read, http://127.0.0.1:")
    first = steps_of(tmp_path / "run")[-1]
    assert f"then go on from {tmp_path / 'run' / f'checkpoint-{first}'} with --resume_from_checkpoint latest" in said
    # Nobody answers there now, and a run that wants to begin hears it at once.
    assert cli.main(["stage1", *stage("other", **fields)]) == 2
    assert "0.tar cannot be read" in capsys.readouterr().err.splitlines()[-1]
    assert what_is_missing(tmp_path / "run" / f"checkpoint-{first}") is None


def test_training_by_hand_looks_at_the_end_too(stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps than are logged, and nothing saved by the recipes."""
    trainer = stage1_pretrain.main(stage(logging_steps=100))
    trainer.args.max_steps, trainer.lr_scheduler = 3, None
    poison(monkeypatch, {2})
    with pytest.raises(RecipeError, match="not finite"):
        trainer.train()
