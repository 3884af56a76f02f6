"""Training from stored features: what is not stored yet is computed first, by the training's own processes.

minigpt4 stage1 --config tiny_stage1 --cache_features features
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from datasets.utils import tqdm
from torch.utils.data import DataLoader

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.backbones import part_of
from recipes_minigpt4.data.bad_samples import SampleCounts
from recipes_minigpt4.data.feature_cache import (
    STORED,
    VISION_SIDE,
    FeatureCache,
    ShardWriter,
    StoredPictures,
    describe_computation,
    digests_of,
    pixels_of,
)
from recipes_minigpt4.data.formatting import rows_of, with_features
from recipes_minigpt4.training.evaluating import nothing_to_evaluate
from recipes_minigpt4.utils.errors import RecipeError, one_line


TRAIN, EVAL = "train", "eval"  # sets of rows


def train_from_features(trainer: Any) -> None:
    """
    Let a trainer train, and evaluate, from stored features; what is not stored yet is computed first.

    The trainer's rows then hold numbers of pictures instead of pictures, and TRL's collator gets `vision_features` for
    them from a copy of the processor.

    Args:
        trainer: a `MiniGPT4Trainer` before training, whose settings name the folder.

    Pictures that cannot be read are skipped and counted here, once, and their rows left out.

    Raises:
        RecipeError: if the vision side trains, too many pictures cannot be read, or the folder cannot be used.
    """
    sets = row_sets(trainer)
    if trained := trained_parts(trainer.model):
        raise RecipeError(
            f"Features cannot be cached while {' and '.join(trained)} trains; leave out --cache_features or its "
            "--train_parts."
        )
    if not all(isinstance(rows, Dataset) for rows in sets.values()):
        raise RecipeError("Features can be cached for data with a known length only; leave out --cache_features.")
    cache = open_cache(trainer)
    digests = {
        name: [digest for batch in _batches(trainer, rows, digests_of, title="pictures") for digest in batch]
        for name, rows in sets.items()
    }
    known = cache.index()
    trainer.accelerator.wait_for_everyone()  # before any process adds to it, so that all miss the same
    computed, unreadable = 0, dict[bytes, dict[str, str]]()
    for name, rows in sets.items():
        missing = {
            digest: row
            for row, digest in reversed(list(enumerate(digests[name])))
            if isinstance(digest, bytes) and digest not in known and digest not in unreadable
        }
        bad = fill_together(cache, trainer, rows, missing)
        computed += len(missing) - len(bad)
        known |= dict.fromkeys(missing, -1)  # until the shards are looked through again
        unreadable |= bad
    trainer.accelerator.wait_for_everyone()
    known = cache.index()
    numbers = set[int]()
    for name, rows in sets.items():
        skipped = [unreadable.get(digest) if isinstance(digest, bytes) else digest for digest in digests[name]]
        leave_out(trainer, name, skipped)
        if any(record is None and digest not in known for digest, record in zip(digests[name], skipped, strict=True)):
            raise RecipeError(
                f"Features of some pictures are missing in {cache.folder}; use a folder that all processes share, and "
                "leave the pictures alone while they are read."
            )
        good = [row for row, record in enumerate(skipped) if record is None]
        found = [known[digests[name][row]] for row in good]
        numbers.update(found)
        sets[name] = with_features(rows.select(good) if len(good) < len(rows) else rows, found)
    if trainer.is_world_process_zero():
        print(f"features: {len(numbers)} pictures in {cache.folder}, {computed} computed now")
        if cache.dropped:
            print(f"features: {cache.dropped} damaged shard(s) removed and computed again")
    trainer.train_dataset = sets.pop(TRAIN)
    trainer.eval_dataset = sets if isinstance(trainer.eval_dataset, dict) else sets.get(EVAL)
    trainer.data_collator.processor = processor = copy.copy(trainer.processing_class)
    processor.image_processor = StoredPictures(cache)


def row_sets(trainer: Any) -> dict[str, Any]:
    """The rows of the training and those it is evaluated on, by name."""
    evaluated = trainer.eval_dataset
    if not isinstance(evaluated, dict):
        evaluated = {} if evaluated is None else {EVAL: evaluated}
    return {TRAIN: trainer.train_dataset, **evaluated}


def fill_together(
    cache: FeatureCache, trainer: Any, rows: Dataset, missing: Mapping[bytes, int]
) -> dict[bytes, dict[str, str]]:
    """Compute what is missing, digest → row, on all processes; returns digest → why of what cannot be decoded."""
    ours = [key for key in missing if key[0] % trainer.args.world_size == trainer.args.process_index]
    with (
        torch.no_grad(),
        trainer.accelerator.autocast(),
        vision_side_on(trainer.model.model, trainer.args.device),
    ):
        unreadable = fill(cache, trainer, rows.select(sorted(missing[key] for key in ours)))
    return {key: record for found in gather_object([unreadable]) for key, record in found.items()}


def leave_out(trainer: Any, name: str, skipped: Sequence[Mapping[str, str] | None]) -> None:
    """Count the pictures of a set that have no features; stop if they are all, or too many to train on."""
    if name == TRAIN:
        count_skipped(trainer, skipped)
        return
    records = [record for record in skipped if record is not None]
    if len(records) == len(skipped):
        found = SampleCounts(1.0)
        found.leave_out(records)
        raise RecipeError(nothing_to_evaluate(found))
    if trainer.is_world_process_zero():
        trainer.evaluation_left_out += records


def count_skipped(trainer: Any, skipped: Sequence[Mapping[str, str] | None]) -> None:
    """Count the pictures that have no features, on one process for all, and stop if they are too many."""
    records = [record for record in skipped if record is not None]
    if trainer.is_world_process_zero():
        trainer.samples.leave_out(records)
    found = SampleCounts(trainer.samples.limit)
    found.add(len(skipped), records)
    found.check(enough=1)


def trained_parts(model: MiniGPT4ForConditionalGeneration) -> list[str]:
    """The parts of the vision side of which something trains."""
    trained = {part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [part for part in VISION_SIDE if part in trained]


def open_cache(trainer: Any) -> FeatureCache:
    """The cache for a trainer's model, image processor and precision, in its own folder below `cache_features`."""
    args, model = trainer.args, trainer.model
    name = args.cache_features_dtype or str(model.model.vision_model.dtype).removeprefix("torch.")
    if name not in STORED:
        raise RecipeError(f"Features are stored as {', '.join(STORED)}, not as {name!r}; see --cache_features_dtype.")
    settings = describe_computation(model, trainer.processing_class.image_processor)
    settings |= {"stored": name, "mixed_precision": str(trainer.accelerator.mixed_precision)}
    text = json.dumps(settings, indent=2, sort_keys=True, default=str)
    folder = Path(args.cache_features).expanduser() / hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise RecipeError(
            f"Features cannot be kept in {args.cache_features} ({one_line(error)}); name a folder with "
            "--cache_features."
        ) from error
    channels = next(model.model.language_projection.parameters()).shape[1]  # of its first weight, (out, in)
    return FeatureCache(folder, (model.config.num_image_tokens, channels), STORED[name])


def fill(cache: FeatureCache, trainer: Any, rows: Dataset) -> dict[bytes, dict[str, str]]:
    """
    Compute the features of the rows' pictures and store them.

    Pictures go through the model in batches of the training's size, the last one filled up, because the last bits of
    a matrix product may depend on its shape.

    Returns:
        Digest of a picture that cannot be decoded → why.
    """
    model = trainer.model.model
    prepare = partial(pixels_of, trainer.processing_class.image_processor)
    size = trainer.args.per_device_train_batch_size
    writer = ShardWriter(cache, len(rows))
    unreadable: dict[bytes, dict[str, str]] = {}
    for keys, pixels, bad in _batches(trainer, rows, prepare, title="features"):
        unreadable |= bad
        if not keys:
            continue
        if len(pixels) < size:
            pixels = torch.cat([pixels, pixels[-1:].expand(size - len(pixels), -1, -1, -1)])
        features = model.encode_images(pixels.to(model.vision_model.device)).last_hidden_state
        writer.add(keys, features[: len(keys)])
    writer.flush()
    return unreadable


@contextmanager
def vision_side_on(model: Any, device: torch.device) -> Iterator[None]:
    """Move the frozen vision side for a while: FSDP and DeepSpeed leave a model on the CPU until training begins."""
    before = model.vision_model.device
    try:
        _move_vision_side(model, device)
        yield
    finally:
        _move_vision_side(model, before)


def _move_vision_side(model: Any, device: torch.device) -> None:
    for part in (model.vision_model, model.qformer):
        if part is not None and part.device != device:
            part.to(device)
    if model.query_tokens is not None:
        model.query_tokens.data = model.query_tokens.data.to(device)


def _batches(trainer: Any, rows: Dataset, prepare: Callable[..., Any], title: str) -> Iterator[Any]:
    """What `prepare` makes of the stored pictures, a batch at a time and in their order, by the training's workers."""
    make, pictures = rows_of(rows)
    args = trainer.args
    loader: DataLoader[Any] = DataLoader(
        pictures,  # type: ignore[arg-type]  # torch asks for no more than `len` and `[]`
        batch_size=args.per_device_train_batch_size,
        num_workers=args.dataloader_num_workers,
        collate_fn=partial(prepare, make),
        generator=torch.Generator(),  # leaves the random numbers of the training alone
    )
    quiet = args.disable_tqdm or not trainer.is_world_process_zero()
    return iter(tqdm(loader, desc=title, unit="batch", disable=quiet))
