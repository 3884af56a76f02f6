"""Evaluation while a stage trains: the numbers, the best checkpoint, breaks, and splits that make no sense."""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from ranks import start
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model
from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.evaluation_split import FilledUp, load_evaluation_pairs
from recipes_minigpt4.data.formatting import stage1_rows, stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


STAGES = {"stage1": stage1_pretrain, "stage2": stage2_finetune}
ROWS = {"stage1": stage1_rows, "stage2": stage2_rows}
MEASURES = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")


@pytest.fixture
def train(stage: Callable, uneven_pairs_file: Path) -> Callable:
    """Train a stage and evaluate on sixteen uneven pairs, three at a time; keywords are fields of the stage."""

    def run(command: str = "stage1", **fields):
        held_out = {"eval_dataset_name": uneven_pairs_file, "eval_strategy": "steps", "eval_steps": 2}
        return STAGES[command].main(stage(**{**held_out, "per_device_eval_batch_size": 3, **fields}))

    return run


def evaluations(trainer_or_folder) -> list[dict]:
    if isinstance(trainer_or_folder, Path):
        history = json.loads((trainer_or_folder / "trainer_state.json").read_text())["log_history"]
    else:
        history = trainer_or_folder.state.log_history
    return [entry for entry in history if "eval_loss" in entry]


def numbers(entries: list[dict]) -> list[tuple]:
    return [(entry["step"], *(entry[name] for name in MEASURES)) for entry in entries]


def same_weights(first: Path, second: Path) -> bool:
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def by_hand(folder: Path, command: str, file: Path, count: int = 16) -> tuple[float, float, float]:
    """Loss, accuracy and entropy of all answer tokens, row by row and from the logits of the saved model."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    args = DataArguments(dataset_name=[str(file)], num_samples=count)
    rows = ROWS[command](load_pairs(args, stage=int(command[-1])), processor, args)
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    for row in rows:
        plain = {"add_special_tokens": False, "return_tensors": "pt"}
        prompt = processor(images=row["images"], text=row["prompt"], **plain)
        (answer,) = processor(text=row["completion"], **plain)["input_ids"]
        ids = torch.cat([prompt["input_ids"], answer[None]], dim=1)
        with torch.no_grad():
            logits = model(input_ids=ids, pixel_values=prompt["pixel_values"]).logits
        scores = logits[0, -len(answer) - 1 : -1].double().log_softmax(-1)
        sums += torch.stack([
            -scores.gather(1, answer[:, None]).sum(),
            (scores.argmax(-1) == answer).sum(),
            -(scores.exp() * scores).sum(),
        ])  # fmt: skip
        tokens += len(answer)
    return tuple((sums / tokens).tolist())


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", STAGES)
def test_numbers_are_those_of_all_answer_tokens(command: str, train: Callable, uneven_pairs_file, tmp_path) -> None:
    """Of long and short answers alike, the last batch of one row included; not a mean of means."""
    learning = {"train_parts": "language_model", "learning_rate": 0.1, "warmup_start_learning_rate": 0.1}
    trainer = train(command, eval_steps=5, **learning)
    assert [entry["step"] for entry in evaluations(trainer)] == [2]  # and at the end, whatever eval_steps are
    last = evaluations(trainer)[-1]
    expected = by_hand(tmp_path / "run", command, uneven_pairs_file)
    assert 0.03 < last["eval_mean_token_accuracy"] < 0.95
    assert [last[name] for name in MEASURES] == pytest.approx(expected, rel=1e-5)
    again = trainer.evaluate()
    assert [again[name] for name in MEASURES] == pytest.approx(expected, rel=1e-5)
    trainer.args.per_device_eval_batch_size = 16
    assert [trainer.evaluate()[name] for name in MEASURES] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "fields", [{}, {"dataloader_drop_last": True}, {"dataloader_num_workers": 1},
               {"train_sampling_strategy": "group_by_length"}, {"label_smoothing_factor": 0.2},
               {"bf16": True}],
    ids=lambda fields: next(iter(fields), "plain"),
)  # fmt: skip
def test_training_goes_on_as_if_nothing_had_been(fields: dict, train: Callable, tmp_path: Path) -> None:
    evaluated = train(max_steps=6, **fields)  # more than an epoch
    train(output="alone", max_steps=6, eval_strategy="no", eval_dataset_name=None, eval_steps=None, **fields)
    assert same_weights(tmp_path / "run", tmp_path / "alone")
    assert len(evaluations(evaluated)) == 3


def test_a_step_of_evaluation_keeps_no_logits(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, forward = [], MiniGPT4ForConditionalGeneration.forward

    def watched(model, *args, **kwargs):
        outputs = forward(model, *args, **kwargs)
        seen.append((model.training, model.model.vision_model.training, outputs.logits))
        return outputs

    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "forward", watched)
    train(max_steps=1)
    assert [training for training, *_ in seen] == [True] + 6 * [False]  # six batches of sixteen rows
    assert not any(vision or logits is not None for _, vision, logits in seen)


def test_metrics_of_ones_own_get_logits(train: Callable) -> None:
    seen = []
    trainer = train(max_steps=1)
    trainer.compute_metrics = lambda found: seen.append((found.predictions.shape, found.label_ids.shape)) or {}
    assert 0 < trainer.evaluate()["eval_loss"] < 20
    ((logits, labels),) = seen
    assert labels[0] == 16 and logits == (*labels, trainer.model.config.text_config.vocab_size)


def test_logged_lines_and_the_card_tell_the_evaluation(train: Callable, tmp_path: Path, capsys) -> None:
    trainer = train(max_steps=4, eval_on_start=True, save_strategy="steps", save_steps=2)
    lines = capsys.readouterr().out.splitlines()
    (begin, end) = [line for line in lines if line.startswith("eval    ")]
    assert begin == "eval    16 samples every 2 steps and at the end"
    found = evaluations(trainer)
    assert [entry["step"] for entry in found] == [0, 2, 4]
    loss, accuracy = found[-1]["eval_loss"], found[-1]["eval_mean_token_accuracy"]
    assert end == f"eval    loss {loss:.4f}, token accuracy {accuracy:.3f} at step 4"
    assert f"step 4/4  evaluation loss {loss:.4f}  accuracy {accuracy:.3f}" in lines
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"| evaluation loss | {loss:.4g} |" in card and "| training loss |" in card


def test_images_per_second_leave_evaluation_out(train: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    now, evaluate = [0.0], MiniGPT4Trainer.prediction_step

    def slow(trainer, *args, **kwargs):
        now[0] += 100
        return evaluate(trainer, *args, **kwargs)

    def step(trainer, *args, **kwargs):
        now[0] += 1
        return train_step(trainer, *args, **kwargs)

    train_step = MiniGPT4Trainer.training_step
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr(MiniGPT4Trainer, "prediction_step", slow)
    monkeypatch.setattr(MiniGPT4Trainer, "training_step", step)
    trainer = train(max_steps=4, eval_steps=1)
    assert [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry] == [2.0] * 4


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5, 16])  # the last batch of a rank is not full, or nothing is left for it
def test_two_processes_tell_what_one_tells(size: int, train: Callable, stage, uneven_pairs_file, tmp_path) -> None:
    fields = {"max_steps": 3, "per_device_train_batch_size": 2, "eval_steps": 3}
    train(output="one", **{**fields, "per_device_train_batch_size": 4})
    two = stage(output="two", eval_dataset_name=uneven_pairs_file, eval_strategy="steps",
                per_device_eval_batch_size=size, **fields)  # fmt: skip
    with start(["stage1", *two]) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
    (alone,), (together,) = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert [together[name] for name in MEASURES] == pytest.approx([alone[name] for name in MEASURES], rel=1e-5)
    assert "evaluation loss" in ranks.output(0) and "evaluation loss" not in ranks.output(1)


# ---- the best checkpoint --------------------------------------------------------------------------------------------

# A rate at which the loss falls first and rises then.
RISING = {
    "max_steps": 6, "train_parts": "language_model", "weight_decay": 0, "learning_rate": 0.1,
    "min_learning_rate": 0, "warmup_start_learning_rate": 0.03, "original_schedule": False,
    "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "load_best_model_at_end": True,
}  # fmt: skip


def best_of(entries: list[dict], name: str = "eval_loss", sign: int = 1) -> int:
    return min(entries, key=lambda entry: sign * entry[name])["step"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"save_total_limit": 1}, {"save_strategy": "best", "metric_for_best_model": "eval_loss", "save_steps": None},
     {"eval_steps": 1, "learning_rate": 0.03}],
    ids=lambda fields: next(iter(fields), "plain"),
)  # fmt: skip
def test_the_best_checkpoint_is_what_is_saved(fields: dict, train: Callable, tmp_path: Path, capsys) -> None:
    trainer = train(**{**RISING, **fields})
    found = evaluations(trainer)
    if "eval_steps" in fields:  # the steps that leave a checkpoint are compared
        assert best_of(found) % 2
        found = [entry for entry in found if entry["step"] % 2 == 0]
    best = best_of(found)
    assert best < 6 and trainer.state.best_metric == min(entry["eval_loss"] for entry in found)
    assert Path(trainer.state.best_model_checkpoint) == tmp_path / "run" / f"checkpoint-{best}"
    assert same_weights(tmp_path / "run", tmp_path / "run" / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-6)
    assert f"at step {best}, the best" in capsys.readouterr().out
    assert f"| evaluation loss | {trainer.state.best_metric:.4g} |" in (tmp_path / "run" / "README.md").read_text()


def die_while_evaluating() -> None:
    """Let a process kill itself in the evaluation after step 4."""
    evaluate = MiniGPT4Trainer.prediction_step

    def prediction_step(self: MiniGPT4Trainer, *args: object, **kwargs: object) -> tuple:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(self, *args, **kwargs)

    MiniGPT4Trainer.prediction_step = prediction_step


def test_a_killed_run_goes_on_and_knows_the_best(train: Callable, stage, uneven_pairs_file, tmp_path: Path) -> None:
    train(output="whole", **RISING)
    fields = {"eval_dataset_name": uneven_pairs_file, "eval_strategy": "steps", "eval_steps": 2}
    killed = stage(output="killed", **fields, per_device_eval_batch_size=3, **RISING)
    with start(["stage1", *killed], ranks=1, before=die_while_evaluating) as ranks:
        assert ranks.wait() == [-signal.SIGKILL], ranks.output()
    assert not (tmp_path / "killed" / "checkpoint-4").exists()
    (tmp_path / "killed").rename(tmp_path / "moved")
    trainer = train(output="moved", **RISING, resume_from_checkpoint="auto")
    assert numbers(evaluations(trainer)) == numbers(evaluations(tmp_path / "whole"))
    assert trainer.state.best_global_step == 2
    assert same_weights(tmp_path / "moved", tmp_path / "whole")
    again = train(output="moved", **RISING, resume_from_checkpoint="latest")  # which is done
    assert again.state.global_step == 6
    assert same_weights(tmp_path / "moved", tmp_path / "whole")


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(uneven_pairs_file: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The uneven pairs with a broken picture and an empty caption, and those that are left of them."""
    folder = tmp_path / "damaged"
    shutil.copytree(uneven_pairs_file.parent, folder)
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "3.png").write_bytes(b"nothing to see")
    silent = json.dumps({**json.loads(lines[10]), "caption": " "})
    (folder / "pairs.jsonl").write_text("\n".join([*lines[:10], silent, *lines[11:]]))
    left = [line for number, line in enumerate(lines) if number not in (3, 10)]
    (folder / "left.jsonl").write_text("\n".join(left))
    return folder / "pairs.jsonl", folder / "left.jsonl"


@pytest.mark.parametrize("cache", [None, "features"])
def test_samples_that_cannot_be_used_are_left_out(cache, train: Callable, damaged, tmp_path: Path, capsys) -> None:
    cache = cache and tmp_path / cache
    trainer = train(eval_dataset_name=damaged[0], eval_steps=1, cache_features=cache, max_bad_share=0)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("evaluation samples")]
    assert "2 skipped" in line and "1 × no known image format, such as" in line and "1 × no caption" in line
    assert trainer.samples.skipped == 0
    other = train(output="other", eval_dataset_name=damaged[1], eval_steps=1)
    assert [entry[:3] for entry in numbers(evaluations(trainer))] == [
        pytest.approx(entry[:3], rel=1e-4) for entry in numbers(evaluations(other))
    ]


@pytest.mark.parametrize("cache", [None, "features"])
def test_a_split_of_which_nothing_can_be_used_is_told(cache, train: Callable, damaged, tmp_path: Path) -> None:
    for picture in damaged[0].parent.glob("*.png"):
        picture.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"None of the 16 samples to evaluate on .* × empty file, such as"):
        train(eval_dataset_name=damaged[0], cache_features=cache and tmp_path / cache)


def test_features_of_the_split_are_kept_as_well(train: Callable, tmp_path: Path, monkeypatch, capsys) -> None:
    plain = train(max_steps=3)
    first = train(output="first", max_steps=3, cache_features=tmp_path / "features")
    assert "features: 16 pictures in" in capsys.readouterr().out

    def encode(*args, **kwargs):
        raise AssertionError("a picture was encoded")

    monkeypatch.setattr(MiniGPT4Model, "encode_images", encode)
    second = train(output="second", max_steps=3, cache_features=tmp_path / "features")
    assert ", 0 computed now" in capsys.readouterr().out
    for one, other in zip(numbers(evaluations(first)), numbers(evaluations(plain)), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert numbers(evaluations(first)) == numbers(evaluations(second))


def test_slices_of_a_file_are_trained_and_evaluated_on(train: Callable, uneven_pairs_file: Path, own_cache) -> None:
    trainer = train(
        dataset_name=uneven_pairs_file, dataset_split="train[:75%]", eval_dataset_name=None, eval_split="train[75%:]"
    )
    trained, held_out = ([row["completion"] for row in rows] for rows in (trainer.train_dataset, trainer.eval_dataset))
    assert (len(trained), len(held_out)) == (12, 4) and not set(trained) & set(held_out)


def test_a_stream_gives_its_first_samples(train: Callable, tars: Path) -> None:
    trainer = train(eval_dataset_name=f"{tars}/*.tar", eval_num_samples=9)
    assert len(trainer.eval_dataset) == 9
    assert all(math.isfinite(value) for entry in numbers(evaluations(trainer)) for value in entry)


def test_a_split_has_columns_of_its_own(train: Callable, uneven_pairs_file: Path, tmp_path: Path, pairs_file) -> None:
    rows = [json.loads(line) for line in uneven_pairs_file.read_text().splitlines()]
    other = tmp_path / "other.csv"
    other.write_text("\n".join(["shot,said", *(f"{row['image']},{row['caption']}" for row in rows)]))
    named = {"image_column": "image", "text_column": "caption"}
    with pytest.raises(RecipeError, match="--eval_image_column"):
        train(eval_dataset_name=other, **named)
    own = {"eval_image_column": "shot", "eval_text_column": "said", "eval_image_folder": uneven_pairs_file.parent}
    trainer = train(eval_dataset_name=other, **named, **own)
    assert numbers(evaluations(trainer)) == numbers(evaluations(train(output="plain")))


@pytest.mark.parametrize("command", STAGES)
def test_the_embedded_world_has_scenes_that_are_never_trained_on(command: str) -> None:
    args = DataArguments(dataset_name=["tiny"], num_samples=300, eval_split="validation")
    stage = int(command[-1])
    trained, held_out = load_pairs(args, stage=stage), load_evaluation_pairs(args, stage)
    assert len(held_out) == 240 and len(set(held_out["text"])) > 100
    pixels = {picture.tobytes() for picture in trained["image"]}
    assert not any(picture.tobytes() in pixels for picture in held_out["image"])


def test_rows_are_filled_up_without_repeating_one() -> None:
    rows = datasets.Dataset.from_dict({"text": list("abcde"), "skipped": [None] * 5})
    filled = FilledUp(rows, 4)
    assert len(filled) == 8 and [row["text"] for row in filled.__getitems__([0, 3, 4])] == ["a", "d", "e"]
    assert [bool(row["skipped"]) for row in map(filled.__getitem__, range(8))] == [False] * 5 + [True] * 3
    assert len(FilledUp(rows, 5)) == 5


# ---- what makes no sense --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"eval_dataset_name": None}, ("--eval_strategy is 'steps'", "--eval_dataset_name")),
        ({"eval_dataset_name": None, "eval_strategy": "no", "eval_num_samples": 3}, ("--eval_num_samples",)),
        ({"eval_strategy": "no"}, ("--eval_dataset_name", "--eval_strategy steps")),
        ({"metric_for_best_model": "accuracy"}, ("'accuracy'", "loss, mean_token_accuracy")),
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, ("load_best_model_at_end", "save")),
        ({"save_strategy": "best"}, ("metric_for_best_model",)),
        ({"do_predict": True}, ("--do_predict",)),
        ({"eval_num_samples": 0}, ("--eval_num_samples is 0",)),
        ({"eval_dataset_name": "nowhere.jsonl"}, ("nowhere.jsonl", "--eval_dataset_name")),
        ({"eval_text_column": "words"}, ("'words'", "--eval_text_column")),
    ],
)
def test_settings_that_make_no_sense_are_told(fields: dict, named: tuple[str, ...], train: Callable) -> None:
    with pytest.raises(RecipeError) as told:
        train(**fields)
    assert all(word in str(told.value) for word in named), told.value


def test_rows_that_are_trained_on_are_no_test(train: Callable, uneven_pairs_file: Path, tars: Path, tmp_path) -> None:
    pairs = uneven_pairs_file
    splits = (
        ("train", "train[90%:]"), ("train[:50%]", "train[40%:]"), ("train[:10]", "train[9:]"), ("train", None),
        ("train[:90%]", "train[-3:]"), ("train", "validation"),
    )  # fmt: skip
    for trained, held_out in splits:
        with pytest.raises(RecipeError, match=r"The run trains on .*tell nothing new.*--eval_split"):
            train(dataset_name=pairs, dataset_split=trained, eval_split=held_out)
    with pytest.raises(RecipeError, match="The run trains on"):
        train(dataset_name=tars / "0.tar", eval_dataset_name=tars / "0.tar", eval_num_samples=2)
    with pytest.raises(RecipeError, match="The run trains on the split train of tiny"):
        train(dataset_name="tiny", eval_dataset_name="tiny", eval_split="train", num_samples=3)
    with pytest.raises(RecipeError, match=r"read as a stream.*--eval_num_samples"):
        train(eval_dataset_name=tars / "0.tar")
    with pytest.raises(RecipeError, match=r"2 datasets.*--eval_dataset_name"):
        load_evaluation_pairs(DataArguments(dataset_name=["a", "b"], eval_split="test"), 1)


def test_splits_of_one_dataset_are_apart(train: Callable, pictures, tmp_path: Path, own_cache) -> None:
    for split, count in (("train", 5), ("validation", 3)):
        for number in range(count):
            place = tmp_path / "set" / split
            place.mkdir(parents=True, exist_ok=True)
            pictures[number].save(place / f"{number}.png")
            (place / f"{number}.txt").write_text(f"a {split} picture {number}")
    trainer = train(dataset_name=tmp_path / "set", eval_dataset_name=None, eval_split="validation")
    assert {row["completion"].split()[1] for row in trainer.eval_dataset} == {"validation"}
    assert {row["completion"].split()[1] for row in trainer.train_dataset} == {"train"}
    with pytest.raises(RecipeError, match="The run trains on the split test of"):
        train(dataset_name=tmp_path / "set", eval_dataset_name=None, eval_split="test")  # no folder: the whole set
