"""Features of the frozen vision side: computed once per picture, kept in a folder, and trained from instead of pixels.

    minigpt4 stage1 --config tiny_stage1 --cache_features features

The folder gets a folder for every way in which features can come about: weights and settings of the vision side, the
image processor's settings, and the precision of computing and of storing. `settings.json` tells them; features of
another way are never used. A shard is a safetensors file with `digests` of shape (pictures, 16), uint8, of the
pictures' files, and `features` of shape (pictures, image tokens, channels). Shards appear whole or not at all, so an
interrupted run goes on where it was. A shard that cannot be read is removed and its pictures are computed again.
"""

import bisect
import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from datasets.utils import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.backbones import part_of
from recipes_minigpt4.data.bad_samples import BadSampleError, SampleCounts
from recipes_minigpt4.data.formatting import Rows, name_of, rows_of, with_features
from recipes_minigpt4.utils.errors import RecipeError, one_line


DIGEST_BYTES = 16
SHARD_BYTES = 1 << 28  # held in memory until it is written
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
VISION_SIDE = ("vision", "qformer")
# What a configuration tells beside the computation: where it came from, which release wrote it, and what 4.57 notes
# in every part when the language model is quantized.
INCIDENTAL = (
    "_name_or_path",
    "name_or_path",
    "transformers_version",
    "processor_class",
    "auto_map",
    "_pre_quantization_dtype",
)


class FeatureCache:
    """
    Features in a folder of shards; every picture has a number while the program runs.

    Args:
        folder: where the shards are; it is made if need be.
        shape: (image tokens, channels) of a picture.
        dtype: what features are stored in.
    """

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.dropped = 0
        self._paths: list[Path] = []
        self._starts: list[int] = []  # number of every shard's first picture
        self._opened: dict[int, Any] = {}

    def index(self) -> dict[bytes, int]:
        """Look through the shards and remove damaged ones; returns digest of a picture → its number."""
        found: dict[bytes, int] = {}
        self._paths, self._starts, self._opened = [], [], {}
        count = 0
        for path in sorted(self.folder.glob("*.safetensors")):
            digests = self._digests(path)
            if digests is None:
                path.unlink(missing_ok=True)
                self.dropped += 1
                continue
            self._paths.append(path)
            self._starts.append(count)
            found.update((digest, number) for number, digest in enumerate(digests, count))
            count += len(digests)
        return found

    def _digests(self, path: Path) -> list[bytes] | None:
        """The digests that a shard holds features of, or None if it is damaged."""
        try:
            with safe_open(path, framework="pt") as shard:  # which compares the file's length with its header
                digests, features = shard.get_tensor("digests"), shard.get_slice("features")
                if features.get_shape() != [len(digests), *self.shape]:
                    return None
                return [row.tobytes() for row in digests.numpy()]
        except (SafetensorError, ValueError):
            return None

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        """Write a shard with features of shape (pictures, image tokens, channels)."""
        stored = features.to(self.dtype)
        if not torch.isfinite(stored).all():
            raise RecipeError(
                f"The features do not fit into {self.dtype}; choose another type with --cache_features_dtype."
            )
        keys = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, DIGEST_BYTES)
        path = self.folder / f"{uuid4().hex}.safetensors"
        partial = path.with_suffix(".partial")
        try:
            save_file({"digests": keys, "features": stored.contiguous()}, partial)
            partial.replace(path)
        except (OSError, SafetensorError) as error:
            raise RecipeError(f"Features cannot be written to {self.folder} ({one_line(error)}).") from error
        finally:
            partial.unlink(missing_ok=True)

    def read(self, number: int) -> torch.Tensor:
        """Features of a picture, of shape (image tokens, channels); only they are read."""
        place = bisect.bisect_right(self._starts, number) - 1
        if place not in self._opened:
            self._opened[place] = safe_open(self._paths[place], framework="pt").get_slice("features")
        return self._opened[place][number - self._starts[place]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # open files do not travel to workers


class StoredPictures:
    """
    Stands where a processor has its image processor, and takes numbers of pictures instead of pictures.

    Args:
        cache: where their features are.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def fetch_images(self, numbers: Sequence[int]) -> Sequence[int]:
        return numbers

    def __call__(self, numbers: Sequence[int], **options: Any) -> dict[str, torch.Tensor]:
        return {"vision_features": torch.stack([self.cache.read(number) for number in numbers])}


# ---- use ------------------------------------------------------------------------------------------------------------


def train_from_features(trainer: Any) -> None:
    """
    Let a trainer train from stored features; what is not stored yet is computed first.

    The trainer's rows then hold numbers of pictures instead of pictures, and TRL's collator gets `vision_features` for
    them from a copy of the processor.

    Args:
        trainer: a `MiniGPT4Trainer` before training, whose settings name the folder.

    Pictures that cannot be read are skipped and counted here, once, and their rows left out.

    Raises:
        RecipeError: if the vision side trains, too many pictures cannot be read, or the folder cannot be used.
    """
    rows = trainer.train_dataset
    if trained := trained_parts(trainer.model):
        raise RecipeError(
            f"Features cannot be cached while {' and '.join(trained)} trains; leave out --cache_features or its "
            "--train_parts."
        )
    if not isinstance(rows, Dataset):
        raise RecipeError("Features can be cached for data with a known length only; leave out --cache_features.")
    cache = open_cache(trainer)
    digests = [digest for batch in _batches(trainer, rows, _digests_of, title="pictures") for digest in batch]
    known = cache.index()
    trainer.accelerator.wait_for_everyone()  # before any process adds to it, so that all miss the same
    missing = {
        digest: row
        for row, digest in reversed(list(enumerate(digests)))
        if isinstance(digest, bytes) and digest not in known
    }
    ours = [key for key in missing if key[0] % trainer.args.world_size == trainer.args.process_index]
    with (
        torch.no_grad(),
        trainer.accelerator.autocast(),
        vision_side_on(trainer.model.model, trainer.args.device),
    ):
        unreadable = fill(cache, trainer, rows.select(sorted(missing[key] for key in ours)))
    unreadable = {key: record for found in gather_object([unreadable]) for key, record in found.items()}
    trainer.accelerator.wait_for_everyone()
    known = cache.index()
    skipped = [unreadable.get(digest) if isinstance(digest, bytes) else digest for digest in digests]
    count_skipped(trainer, skipped)
    if any(record is None and digest not in known for digest, record in zip(digests, skipped, strict=True)):
        raise RecipeError(
            f"Features of some pictures are missing in {cache.folder}; use a folder that all processes share, and "
            "leave the pictures alone while they are read."
        )
    good = [row for row, record in enumerate(skipped) if record is None]
    numbers = [known[digests[row]] for row in good]
    if trainer.is_world_process_zero():
        computed = len(missing) - len(unreadable)
        print(f"features: {len(set(numbers))} pictures in {cache.folder}, {computed} computed now")
        if cache.dropped:
            print(f"features: {cache.dropped} damaged shard(s) removed and computed again")
    trainer.train_dataset = with_features(rows.select(good) if len(good) < len(rows) else rows, numbers)
    trainer.data_collator.processor = processor = copy.copy(trainer.processing_class)
    processor.image_processor = StoredPictures(cache)


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


def describe_computation(model: MiniGPT4ForConditionalGeneration, image_processor: Any) -> dict[str, Any]:
    """
    All that features of a picture depend on, as JSON.

    Weights count by their content, all of it: a backbone that has moved is still the same, and one that was trained
    on is another.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if part_of(name) in VISION_SIDE:
            weights.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            weights.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = model.config
    names = ("num_query_tokens", "vision_feature_select_strategy", "patch_merge_size", "vision_post_layernorm_eps")
    return {
        "weights": weights.hexdigest(),
        "model": {name: getattr(config, name) for name in names},
        "vision": _essential(config.vision_config.to_dict()),
        "qformer": None if config.qformer_config is None else _essential(config.qformer_config.to_dict()),
        "image_processor": _essential(image_processor.to_dict()),
    }


def _essential(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in INCIDENTAL}


# ---- computing ------------------------------------------------------------------------------------------------------


def fill(cache: FeatureCache, trainer: Any, rows: Dataset) -> dict[bytes, dict[str, str]]:
    """
    Compute the features of the rows' pictures and store them.

    Pictures go through the model in batches of the training's size, the last one filled up, because the last bits of
    a matrix product may depend on its shape.

    Returns:
        Digest of a picture that cannot be decoded → why.
    """
    model = trainer.model.model
    prepare = partial(_pixels_of, trainer.processing_class.image_processor)
    size = trainer.args.per_device_train_batch_size
    shard = max(1, SHARD_BYTES // (math.prod(cache.shape) * cache.dtype.itemsize))  # pictures
    digests: list[bytes] = []
    parts: list[torch.Tensor] = []
    unreadable: dict[bytes, dict[str, str]] = {}
    for keys, pixels, bad in _batches(trainer, rows, prepare, title="features"):
        unreadable |= bad
        if not keys:
            continue
        whole = torch.cat([pixels, pixels[-1:].expand(size - len(pixels), -1, -1, -1)])
        features = model.encode_images(whole.to(model.vision_model.device)).last_hidden_state
        digests += keys
        parts.append(features[: len(keys)].to("cpu", cache.dtype))
        if len(digests) >= shard:
            cache.add(digests, torch.cat(parts))
            digests, parts = [], []
    if digests:
        cache.add(digests, torch.cat(parts))
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


def _digests_of(make: Rows, batch: list[Mapping[str, Any]]) -> list[bytes | dict[str, str]]:
    """Digests of pictures as they are stored, of the bytes of their files; of one that cannot be read, why."""
    return [_digest(make, row) for row in batch]


def _digest(make: Rows, row: Mapping[str, Any]) -> bytes | dict[str, str]:
    try:
        return hashlib.blake2b(make.content(row["image"]), digest_size=DIGEST_BYTES).digest()
    except BadSampleError as error:
        return error.record(name_of(row))


def _pixels_of(
    image_processor: Any, make: Rows, batch: list[Mapping[str, Any]]
) -> tuple[list[bytes], torch.Tensor | None, dict[bytes, dict[str, str]]]:
    """Digests of pictures and their pixels, of shape (pictures, 3, height, width); digest → why of the others."""
    keys: list[bytes] = []
    pictures: list[Any] = []
    bad: dict[bytes, dict[str, str]] = {}
    for row in batch:
        key = _digest(make, row)
        if not isinstance(key, bytes):
            continue  # gone since it was read first
        try:
            pictures.append(make.picture(row["image"]))
            keys.append(key)
        except BadSampleError as error:
            bad[key] = error.record(name_of(row))
    return keys, image_processor(pictures, return_tensors="pt")["pixel_values"] if pictures else None, bad


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
