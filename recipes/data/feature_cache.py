"""Features of the frozen vision side: computed once per picture, kept in a folder, and trained from instead of pixels.

    minigpt4 stage1 --config tiny_stage1 --cache_features features

The folder gets a folder for every way in which features can come about: weights and settings of the vision side, the
image processor's settings, and the precision of computing and of storing. `settings.json` tells them; features of
another way are never used. A shard is a safetensors file with `digests` of shape (pictures, 16), uint8, of the
pictures' files, and `features` of shape (pictures, image tokens, channels). Shards appear whole or not at all, so an
interrupted run goes on where it was. A shard that cannot be read is removed and its pictures are computed again.
"""

import bisect
import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.backbones import part_of
from recipes_minigpt4.data.bad_samples import BadSampleError
from recipes_minigpt4.data.formatting import Rows, name_of
from recipes_minigpt4.utils.errors import RecipeError, one_line


DIGEST_BYTES = 16
# Held in memory until it is written, and twice while it is. A pass over 5 million pictures makes 4,000 such shards.
SHARD_BYTES = 1 << 26
FLUSH_SECONDS = 60  # between two shards at most: what a kill costs. An hour makes no more than 60 shards by it.
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


class ShardWriter:
    """
    Collects features for a cache, and writes a shard when there are `SHARD_BYTES` of them or `FLUSH_SECONDS` are over.

    Args:
        cache: where they go.
        most: the most pictures that will come.
        clock: tells seconds.
    """

    def __init__(self, cache: FeatureCache, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.cache, self.clock = cache, clock
        size = max(1, SHARD_BYTES // (math.prod(cache.shape) * cache.dtype.itemsize))  # pictures of a shard
        self._features = torch.empty(min(size, max(most, 1)), *cache.shape, dtype=cache.dtype)
        self._digests: list[bytes] = []
        self._written = clock()

    def add(self, digests: Sequence[bytes], features: torch.Tensor) -> None:
        """Take features of shape (pictures, image tokens, channels), on any device and of any dtype."""
        while digests:
            place = len(self._digests)
            fitting = min(len(digests), len(self._features) - place)
            self._features[place : place + fitting] = features[:fitting]
            self._digests += digests[:fitting]
            digests, features = digests[fitting:], features[fitting:]
            if len(self._digests) == len(self._features) or self.clock() - self._written >= FLUSH_SECONDS:
                self.flush()

    def flush(self) -> None:
        """Write what there is."""
        if self._digests:
            self.cache.add(self._digests, self._features[: len(self._digests)])
        self._digests, self._written = [], self.clock()


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
    code = code_of(model.model.vision_model)
    names = (
        "num_query_tokens",
        "vision_feature_select_strategy",
        "vision_feature_layer",
        "image_size",
        "patch_merge_size",
        "patch_merge_layout",
        "vision_post_layernorm_eps",
    )
    return {
        "weights": weights.hexdigest(),
        "model": {name: getattr(config, name) for name in names},
        "vision": _essential(config.vision_config.to_dict()),
        "qformer": None if config.qformer_config is None else _essential(config.qformer_config.to_dict()),
        "image_processor": _essential(image_processor.to_dict()),
        **({} if code is None else {"code": code}),
    }


def code_of(encoder: Any) -> str | None:
    """A digest of the code of an encoder that is none of transformers', as far as its files are there."""
    if type(encoder).__module__.startswith("transformers."):
        return None
    try:
        file = inspect.getfile(type(encoder))
        files = [Path(file), *map(Path, sorted(get_relative_import_files(file)))]
        return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()
    except (OSError, TypeError):  # made in a notebook, say
        return None


def _essential(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in INCIDENTAL}


def digests_of(make: Rows, batch: list[Mapping[str, Any]]) -> list[bytes | dict[str, str]]:
    """Digests of pictures as they are stored, of the bytes of their files; of one that cannot be read, why."""
    return [digest_of(make, row) for row in batch]


def digest_of(make: Rows, row: Mapping[str, Any]) -> bytes | dict[str, str]:
    try:
        return hashlib.blake2b(make.content(row["image"]), digest_size=DIGEST_BYTES).digest()
    except BadSampleError as error:
        return error.record(name_of(row))


def pixels_of(
    image_processor: Any, make: Rows, batch: list[Mapping[str, Any]]
) -> tuple[list[bytes], torch.Tensor | None, dict[bytes, dict[str, str]]]:
    """Digests of pictures and their pixels, of shape (pictures, 3, height, width); digest → why of the others."""
    keys: list[bytes] = []
    pictures: list[Any] = []
    bad: dict[bytes, dict[str, str]] = {}
    for row in batch:
        key = digest_of(make, row)
        if not isinstance(key, bytes):
            continue  # gone since it was read first
        try:
            pictures.append(make.picture(row["image"]))
            keys.append(key)
        except BadSampleError as error:
            bad[key] = error.record(name_of(row))
    return keys, image_processor(pictures, return_tensors="pt")["pixel_values"] if pictures else None, bad
