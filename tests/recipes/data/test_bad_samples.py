"""Samples that cannot be used: skipped, counted by cause, reported, and too many of them stop the run."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damaged import CAPTIONS, PICTURES, jpeg, sample, write_tar
from datasets import Dataset, Features, Image, Value
from safetensors.torch import load_file

from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.data import bad_samples
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.bad_samples import SampleCounts
from recipes_minigpt4.data.collator import COUNTS, StageCollator
from recipes_minigpt4.data.formatting import stage1_rows, stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.utils.errors import RecipeError


def write_pairs(folder: Path, pairs: list[tuple[bytes | None, object]]) -> Path:
    """A .jsonl file and its pictures; one whose bytes are None is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (picture, caption) in enumerate(pairs):
        if picture is not None:
            (folder / f"{number}.jpg").write_bytes(picture)
        lines.append(json.dumps({"image": f"{number}.jpg", "caption": caption}))
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    return folder / "pairs.jsonl"


def good(count: int, start: int = 0) -> list[tuple[bytes, str]]:
    return [(jpeg(number), f"a picture of colour {number}") for number in range(start, start + count)]


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- rows -----------------------------------------------------------------------------------------------------------

BAD = {f"picture {name}": ((content, "a"), cause) for name, (content, cause) in PICTURES.items()}
BAD |= {f"caption {name}": ((jpeg(), text), cause) for name, (text, cause) in CAPTIONS.items()}
BAD["picture missing"] = ((None, "a"), bad_samples.MISSING_FILE)


@pytest.mark.parametrize("make", [stage1_rows, stage2_rows])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_sample_tells_its_cause_and_name(name: str, make: Callable, tmp_path: Path, compose: Callable) -> None:
    pair, cause = BAD[name]
    args = DataArguments(dataset_name=str(write_pairs(tmp_path, [*good(1), pair, *good(1)])), max_bad_share=1)
    rows = make(load_pairs(args, stage=1), compose()[1], args)
    assert [row["skipped"] and row["skipped"]["cause"] for row in rows] == [None, cause, None]
    assert str(tmp_path / "1.jpg") in rows[1]["skipped"]["name"]


def test_punctuation_is_a_caption_only_where_none_is_cleaned_away(tmp_path: Path, compose: Callable) -> None:
    args = DataArguments(dataset_name=str(write_pairs(tmp_path, [(jpeg(), "...")])))
    pairs, processor = load_pairs(args, stage=1), compose()[1]
    assert stage1_rows(pairs, processor, args)[0]["skipped"]["cause"] == bad_samples.NO_CAPTION
    assert stage2_rows(pairs, processor, args)[0]["skipped"] is None


def test_a_row_without_a_picture_is_called_by_its_text(compose: Callable) -> None:
    features = Features({"image": Image(decode=False), "text": Value("string")})
    pairs = Dataset.from_list([{"image": None, "text": "a lonely text"}], features=features)
    (row,) = stage1_rows(pairs, compose()[1], DataArguments())
    assert row["skipped"]["cause"] == bad_samples.NO_PICTURE and "a lonely text" in row["skipped"]["name"]


# ---- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_leaves_bad_rows_out_and_loses_nothing_else(tmp_path: Path, compose: Callable) -> None:
    pairs = [*good(2), (b"", "a"), *good(1, start=2), (jpeg(), None)]
    processor = compose()[1]
    args = DataArguments(dataset_name=str(write_pairs(tmp_path, pairs)), max_bad_share=1)
    collate = StageCollator(processor, completion_only_loss=True)
    rows = list(stage1_rows(load_pairs(args, stage=1), processor, args))
    mixed, clean = collate([dict(row) for row in rows]), collate([dict(rows[index]) for index in (0, 1, 3)])
    counts, plain = mixed.pop(COUNTS), clean.pop(COUNTS)
    assert mixed.keys() == clean.keys()
    assert all(torch.equal(mixed[name], clean[name]) for name in mixed)
    assert (counts["drawn"], len(counts["skipped"]), counts["tokens"]) == (5, 2, plain["tokens"])
    assert plain["drawn"] == 3 and not plain["skipped"]


def test_positions_are_those_of_pictures_and_answers(tmp_path: Path, compose: Callable) -> None:
    processor = compose()[1]
    args = DataArguments(dataset_name=str(write_pairs(tmp_path, [(jpeg(), "a"), (jpeg(), "a long caption")])))
    batch = StageCollator(processor, completion_only_loss=True)(
        list(stage1_rows(load_pairs(args, 1), processor, args))
    )
    ids, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    assert set(ids[batch["image_positions"]].tolist()) == {processor.image_token_id}
    assert len(batch["image_positions"]) == 2 * processor.num_image_tokens
    assert torch.equal(batch["label_positions"], (labels != -100).nonzero().squeeze(-1))


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [stage1_pretrain, stage2_finetune])
def test_a_run_skips_bad_samples_and_reports_them(module, stage: Callable, tmp_path: Path, capsys) -> None:
    data = write_pairs(tmp_path / "data", [*good(9), (jpeg()[:-60], "truncated"), *good(9), (jpeg(), None)])
    trainer = module.main(stage(dataset_name=data, max_steps=10))
    assert all(loss > 0 for loss in losses_of(trainer))
    (report,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("samples:")]
    assert "20 drawn, 2 skipped" in report
    assert "1 × truncated picture" in report and "9.jpg" in report
    assert "1 × no caption" in report and "19.jpg" in report


def test_without_bad_samples_the_report_says_so(stage: Callable, capsys) -> None:
    stage1_pretrain.main(stage(max_steps=2))
    assert "samples: 4 drawn, none skipped" in capsys.readouterr().out


def test_counts_come_from_workers_too(stage: Callable, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", [*good(18), (b"", "a"), *good(1)])
    trainer = stage1_pretrain.main(stage(dataset_name=data, max_steps=10, dataloader_num_workers=2))
    assert (trainer.samples.drawn, trainer.samples.causes) == (20, Counter({bad_samples.EMPTY_FILE: 1}))


def test_a_batch_of_bad_samples_changes_nothing(stage: Callable, tmp_path: Path) -> None:
    """Its loss is nought and so is its gradient; weight decay is off to see that."""
    samples = [sample(0, picture=b""), sample(1, picture=b""), sample(2), sample(3)]
    data = write_tar(tmp_path / "data.tar", samples)
    fields = {"dataset_name": data, "shuffle_buffer": 1, "max_bad_share": 0.5, "weight_decay": 0}
    trainer = stage1_pretrain.main(stage(**fields, max_steps=2, save_strategy="steps", save_steps=1))
    bad, good = losses_of(trainer)
    assert bad == 0 < good
    stage1_pretrain.main(stage("fresh", max_steps=1, learning_rate=1e-30, original_schedule=False, weight_decay=0))
    names = ("run/checkpoint-1", "fresh", "run")
    first, second, last = (load_file(tmp_path / name / "model.safetensors") for name in names)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], last[name]) for name in first)
    assert (trainer.samples.skipped, trainer.samples.drawn) == (2, 4)


@pytest.mark.parametrize("share, stops", [(0.1, True), (0.19, True), (0.2, False), (1, False)])
def test_too_many_bad_samples_stop_the_run(share, stops, stage: Callable, tmp_path: Path, capsys) -> None:
    data = write_pairs(tmp_path / "data", [*good(8), (b"<html>", "a"), (b"", "b")])
    arguments = stage(dataset_name=data, max_steps=5, max_bad_share=share)
    assert cli.main(["stage1", *arguments]) == (2 if stops else 0)
    if stops:
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"2 of 10 samples cannot be used, more than max_bad_share ({share:.0%})" in told
        assert "8.jpg" in told and "9.jpg" in told and told.endswith("or raise --max_bad_share.")


def test_the_share_counts_once_enough_samples_are_drawn() -> None:
    counts = SampleCounts(limit=0.1, enough=200)
    record = {"cause": bad_samples.TRUNCATED, "name": "a.jpg"}
    counts.add(100, [record] * 50)
    counts.check()
    counts.add(100, [])
    with pytest.raises(RecipeError, match="50 of 200 samples"):
        counts.check()


def test_what_comes_after_the_last_log_counts_too(stage: Callable, tmp_path: Path, capsys) -> None:
    data = write_pairs(tmp_path / "data", [*good(2), (b"", "a"), (b"", "b")])
    arguments = stage(dataset_name=data, max_steps=2, logging_strategy="no", logging_steps=None)
    assert cli.main(["stage1", *arguments]) == 2
    assert "2 of 4 samples cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_is_between_nought_and_one(share: float) -> None:
    with pytest.raises(RecipeError, match="max_bad_share is"):
        DataArguments(dataset_name="x", max_bad_share=share)


# ---- stored features ------------------------------------------------------------------------------------------------


def test_features_leave_bad_pictures_out(stage: Callable, tmp_path: Path, capsys) -> None:
    pairs = [*good(9), (jpeg()[:-60], "truncated"), *good(9, start=9), (jpeg(70), None)]
    data = write_pairs(tmp_path / "data", pairs)
    fields = {"dataset_name": data, "max_steps": 10, "cache_features": tmp_path / "features"}
    for _ in range(2):
        trainer = stage1_pretrain.main(stage(**fields))
        printed = capsys.readouterr().out
        assert trainer.samples.causes == Counter({bad_samples.TRUNCATED: 1, bad_samples.NO_CAPTION: 1})
        assert len(trainer.train_dataset) == 19
        assert "9.jpg" in printed and "2 skipped" in printed


def test_pictures_left_out_before_training_are_no_part_of_the_share(stage: Callable, tmp_path: Path, capsys) -> None:
    data = write_pairs(tmp_path / "data", [*good(38), (b"", "a"), (b"", "b")])
    fields = {"dataset_name": data, "max_steps": 3, "max_bad_share": 0.06, "cache_features": tmp_path / "features"}
    trainer = stage1_pretrain.main(stage(**fields))
    trainer.samples.enough = 1  # 2 beside 6 drawn ones would be too many
    trainer.samples.check()
    assert "samples: 6 drawn, 2 skipped (2 before training)" in capsys.readouterr().out


def test_features_of_too_many_bad_pictures_stop_the_run(stage: Callable, tmp_path: Path) -> None:
    data = write_pairs(tmp_path / "data", [*good(3), (b"", "a")])
    with pytest.raises(RecipeError, match=r"1 of 4 samples cannot be used"):
        stage1_pretrain.main(stage(dataset_name=data, cache_features=tmp_path / "features"))
