"""Training from stored features of the frozen vision side: the same losses, less work, and never stale features."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from closeness import assert_close
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor

from modeling_minigpt4 import MiniGPT4Model
from processing_minigpt4.image_processing_minigpt4 import MiniGPT4ImageProcessor
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.data.feature_cache import FeatureCache, ShardWriter, describe_computation
from recipes_minigpt4.data.formatting import Rows
from recipes_minigpt4.utils.errors import RecipeError


STAGES = {"stage1": stage1_pretrain, "stage2": stage2_finetune}
PICTURES = 8  # of `pairs_file`


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def projection_of(trainer) -> torch.Tensor:
    return trainer.model.model.language_projection.weight.detach().clone()


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


class Counts:
    """How many pictures went through what, and how often a picture's file was decoded."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.encoded = self.processed = self.decoded = 0
        encode, preprocess, picture = MiniGPT4Model.encode_images, MiniGPT4ImageProcessor.preprocess, Rows.picture

        def count_encoded(model, pixel_values, **kwargs):
            self.encoded += len(pixel_values)
            return encode(model, pixel_values, **kwargs)

        def count_processed(processor, images, **kwargs):
            self.processed += len(images)
            return preprocess(processor, images, **kwargs)

        def count_decoded(rows, stored):
            self.decoded += 1
            return picture(rows, stored)

        patch.setattr(MiniGPT4Model, "encode_images", count_encoded)
        patch.setattr(MiniGPT4ImageProcessor, "preprocess", count_processed)
        patch.setattr(Rows, "picture", count_decoded)

    def take(self) -> tuple[int, int, int]:
        """Pictures encoded, processed and decoded since the last call."""
        numbers = (self.encoded, self.processed, self.decoded)
        self.encoded = self.processed = self.decoded = 0
        return numbers


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    return Counts(monkeypatch)


@pytest.fixture
def train(stage: Callable, tmp_path: Path) -> Callable:
    """Train from features in `tmp_path / "features"`; keywords are fields of the stage."""

    def run(command: str = "stage1", **fields):
        return STAGES[command].main(stage(**{"cache_features": tmp_path / "features", **fields}))

    return run


# ---- the same training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", STAGES)
def test_float32_features_train_the_same(command: str, train: Callable) -> None:
    """But for rounding: with some kernels, the last bits of a picture's features depend on its place in a batch."""
    fields = {"max_steps": 6, "per_device_train_batch_size": 3}  # the last batch of an epoch is not full
    plain = train(command, cache_features=None, **fields)
    cached = train(command, **fields)
    assert losses_of(cached) == pytest.approx(losses_of(plain), rel=1e-4)
    assert len(set(losses_of(plain))) == 6
    assert_close(projection_of(cached), projection_of(plain))


@pytest.mark.parametrize("command", STAGES)
def test_bfloat16_storage_stays_within_a_thousandth(command: str, train: Callable, tmp_path: Path) -> None:
    plain = train(command, cache_features=None, max_steps=5)
    cached = train(command, cache_features_dtype="bfloat16", max_steps=5)
    (shard,) = shards_of(tmp_path / "features")
    assert load_file(shard)["features"].dtype == torch.bfloat16
    assert losses_of(cached) == pytest.approx(losses_of(plain), rel=1e-3)
    assert not torch.equal(projection_of(cached), projection_of(plain))  # so the features were rounded


@pytest.mark.parametrize("cache", [None, "features"])
def test_transparent_pixels_are_white(cache: str | None, train: Callable, pairs_file: Path, tmp_path: Path) -> None:
    """Whatever lies under them: in a step from pixels, from cached features, and in the panel."""
    for name in ("flat", "clear"):
        shutil.copytree(pairs_file.parent, tmp_path / name)
    for place, path in enumerate(sorted((tmp_path / "clear").glob("*.png"))):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGBA")).copy()
        pixels[(pixels == 255).all(-1)] = (37 * place % 256, 91 * place % 256, 5, 0)
        Image.fromarray(pixels).save(path)
    flat, clear = (
        train(
            output=name, dataset_name=tmp_path / name / "pairs.jsonl", max_steps=3, panel_steps=3,
            cache_features=cache and tmp_path / cache,
        )
        for name in ("flat", "clear")
    )  # fmt: skip
    assert losses_of(clear) == losses_of(flat)
    assert torch.equal(projection_of(clear), projection_of(flat))
    panels = [json.loads((tmp_path / name / "panel.json").read_text()) for name in ("flat", "clear")]
    assert panels[0] == panels[1]


def test_features_of_another_background_are_others(train: Callable, tmp_path: Path) -> None:
    first = train()
    first.processing_class.image_processor.background_color = None
    first.processing_class.save_pretrained(tmp_path / "run")
    train(model_name_or_path=tmp_path / "run", output="other")
    assert len(list((tmp_path / "features").iterdir())) == 2


@pytest.mark.parametrize("fields", [{"bf16": True}, {"bf16": True, "dtype": "bfloat16"}])
def test_low_precision_trains_the_same(fields: dict, train: Callable) -> None:
    fields = {**fields, "max_steps": 4}
    plain, cached = train(cache_features=None, **fields), train(**fields)
    assert losses_of(cached) == pytest.approx(losses_of(plain), rel=1e-3)


def test_workers_read_the_same_features(train: Callable) -> None:
    assert losses_of(train(dataloader_num_workers=1)) == pytest.approx(losses_of(train(cache_features=None)), rel=1e-4)


def test_the_saved_processor_takes_pictures(train: Callable, tmp_path: Path, pictures: list) -> None:
    train(max_steps=1)
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    pixels = processor(images=pictures[:1], text="<image>", return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 28, 28)


# ---- less work ------------------------------------------------------------------------------------------------------


def test_every_picture_goes_through_the_vision_side_once(train: Callable, counts: Counts) -> None:
    looked_at = 1  # TRL looks at the first row to see what it holds
    train("stage1", max_steps=12)  # three epochs
    assert counts.take() == (PICTURES, PICTURES, PICTURES + looked_at)
    train("stage1", max_steps=12)
    assert counts.take() == (0, 0, looked_at)
    train("stage2", max_steps=12)  # asks other questions about the same pictures
    assert counts.take() == (0, 0, looked_at)


def test_equal_pictures_are_encoded_once(train: Callable, counts: Counts, pairs_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()[:4]]
    for row in rows:
        shutil.copy(pairs_file.parent / row["image"], folder / f"again_{row['image']}")
        shutil.copy(pairs_file.parent / row["image"], folder)
    rows += [{**row, "image": f"again_{row['image']}"} for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plain = train(dataset_name=folder / "pairs.jsonl", cache_features=None, max_steps=4)
    counts.take()
    cached = train(dataset_name=folder / "pairs.jsonl", max_steps=4)
    assert counts.take()[1] == 4
    assert losses_of(cached) == losses_of(plain)


def test_only_new_pictures_are_computed(train: Callable, counts: Counts) -> None:
    train(num_samples=3, max_steps=1)
    counts.take()
    train(max_steps=1)
    assert counts.take()[1] == PICTURES - 3


# ---- never stale ----------------------------------------------------------------------------------------------------


def test_a_changed_picture_is_computed_again(
    train: Callable, counts: Counts, pairs_file: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(pairs_file.parent, tmp_path / "pairs")
    train(dataset_name=folder / "pairs.jsonl", max_steps=1)
    counts.take()
    (folder / "red.png").write_bytes((folder / "blue.png").read_bytes() + b"\0")
    train(dataset_name=folder / "pairs.jsonl", max_steps=1)
    assert counts.take()[1] == 1


def test_other_weights_do_not_use_old_features(train: Callable, counts: Counts, parts, tmp_path: Path) -> None:
    train(max_steps=1)
    other = shutil.copytree(parts["vision"], tmp_path / "other")
    counts.take()
    train(max_steps=1, vision=other, qformer=other)
    assert counts.take()[1] == 0  # the same weights in another place
    tensors = load_file(other / "model.safetensors")
    name = next(name for name in tensors if name.startswith("qformer") and name.endswith("bias"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    train(max_steps=1, vision=other, qformer=other)
    assert counts.take()[1] == PICTURES


def test_other_preprocessing_does_not_use_old_features(train: Callable, counts: Counts) -> None:
    train(max_steps=1)
    whole = MiniGPT4ImageProcessor.__init__
    for change in ({"resample": 0}, {"image_mean": [0.4, 0.5, 0.5]}):
        counts.take()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MiniGPT4ImageProcessor, "__init__", lambda self, **given: whole(self, **given | change))  # noqa: B023
            train(max_steps=1)
        assert counts.take()[1] == PICTURES


@pytest.mark.parametrize("fields", [{"cache_features_dtype": "float16"}, {"bf16": True}, {"dtype": "bfloat16"}])
def test_another_precision_does_not_use_old_features(fields: dict, train: Callable, counts: Counts) -> None:
    train(max_steps=1)
    counts.take()
    AcceleratorState._reset_state(reset_partial_state=True)  # a run of its own has its own precision
    train(max_steps=1, **fields)
    assert counts.take()[1] == PICTURES


def test_other_tokens_of_the_same_shape_do_not_use_old_features(train: Callable, counts: Counts, clip: str) -> None:
    parts = {"vision": clip, "qformer": None, "max_steps": 1}
    others = ({"patch_merge_layout": "consecutive"}, {"vision_feature_layer": -2}, {"vision_feature_layer": -1})
    for fields in ({}, *others):
        train(**parts, **fields)
        assert counts.take()[1] == PICTURES
    train(**parts, **others[-1])
    assert counts.take()[1] == 0


def test_every_way_to_make_tokens_has_features_of_its_own(compose: Callable, clip: str) -> None:
    ways = [
        {},
        {"patch_merge_layout": "consecutive"},
        {"patch_merge_size": 2},
        {"patch_merge_size": 1},
        {"patch_merge_size": 1, "vision_feature_select_strategy": "full"},
        {"vision_feature_layer": -1},
        {"image_size": 56},
        {"image_size": 56, "vision_feature_layer": -1},
    ]
    told = set()
    for fields in ways:
        model, processor = compose(vision=clip, qformer=None, **fields)
        told.add(json.dumps(describe_computation(model, processor.image_processor), sort_keys=True))
    assert len(told) == len(ways)


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 10)


def empty(shard: Path) -> None:
    shard.write_bytes(b"")


def replace(shard: Path) -> None:
    save_file({"something": torch.zeros(3)}, shard)


def test_damaged_shards_are_computed_again(train: Callable, counts: Counts, tmp_path: Path, capsys) -> None:
    train(num_samples=3, max_steps=1)
    plain = train()
    for damage in (truncate, empty, replace, Path.unlink):
        shard = shards_of(tmp_path / "features")[0]
        lost = len(load_file(shard)["digests"])
        damage(shard)
        counts.take()
        capsys.readouterr()
        assert losses_of(train()) == losses_of(plain)
        assert counts.take()[1] == lost
        assert ("1 damaged shard" in capsys.readouterr().out) == (damage is not Path.unlink)
        assert not shard.exists()
        assert sum(len(load_file(path)["digests"]) for path in shards_of(tmp_path / "features")) == PICTURES


@pytest.mark.parametrize("limit, value", [("SHARD_BYTES", 2 * 3 * 16 * 4), ("FLUSH_SECONDS", 0)])  # of a batch
def test_an_interrupted_run_goes_on(
    limit: str, value: int, train: Callable, counts: Counts, monkeypatch, tmp_path: Path
) -> None:
    plain = train(cache_features=None)
    monkeypatch.setattr(f"recipes_minigpt4.data.feature_cache.{limit}", value)
    encode = MiniGPT4Model.encode_images

    def fail(model, pixel_values, **kwargs):
        if len(shards_of(tmp_path / "features")) == 2:
            raise KeyboardInterrupt
        return encode(model, pixel_values, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiniGPT4Model, "encode_images", fail)
        with pytest.raises(KeyboardInterrupt):
            train()
    counts.take()
    assert losses_of(train()) == losses_of(plain)
    assert counts.take()[1] == 4
    assert len(shards_of(tmp_path / "features")) == 4
    assert {path.suffix for path in tmp_path.glob("features/*/*")} == {".safetensors", ".json"}


def test_features_are_written_when_a_minute_is_over(tmp_path: Path) -> None:
    """However few they are, so that a kill costs a minute and not all of the work."""
    now = 0.0
    cache = FeatureCache(tmp_path, (3, 16), torch.float32)
    writer = ShardWriter(cache, most=100, clock=lambda: now)
    features, keys = torch.randn(8, 3, 16), [bytes([number]) * 16 for number in range(8)]
    seen = []
    for number, seconds in enumerate((10, 59, 61, 100, 119, 122, 130, 131)):
        now = float(seconds)
        writer.add(keys[number : number + 1], features[number : number + 1])
        seen.append(len(cache.index()))
    assert seen == [0, 0, 3, 3, 3, 6, 6, 6]
    writer.flush()
    known = cache.index()
    assert (len(known), len(list(tmp_path.glob("*.safetensors")))) == (8, 3)
    assert all(torch.equal(cache.read(known[key]), features[number]) for number, key in enumerate(keys))


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["vision", "qformer"])
def test_a_vision_side_that_trains_is_refused(part: str, stage: Callable, tmp_path: Path, capsys) -> None:
    assert cli.main(["stage1", *stage(cache_features=tmp_path / "features", train_parts=part)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot be cached while {part} trains" in told and "--train_parts" in told
    assert not (tmp_path / "features").exists()


def test_an_adapter_of_the_language_model_may_train(train: Callable) -> None:
    lora = json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    fields = {"peft_config": lora, "max_steps": 4}
    assert losses_of(train(**fields)) == losses_of(train(cache_features=None, **fields))


def test_mistakes_are_told_in_a_sentence(train: Callable, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="stored as float32, bfloat16, float16, not as 'int8'"):
        train(cache_features_dtype="int8")
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"cannot be written into .*file"):
        train(cache_features=tmp_path / "file")
