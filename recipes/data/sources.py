"""Image–text pairs: where they come from, in one piece or as a stream.

Whatever the source, pairs have the columns `image` and `text`, and no picture is decoded before somebody asks for it.
A stream has no end: its sources are repeated, mixed by their weights and shuffled in blocks. Its shards, the tar files
for example, are what `datasets` and accelerate share out among processes and workers.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute  # type: ignore[import-untyped]
from datasets import Dataset, Features, Image, IterableDataset, Value, interleave_datasets

from processing_minigpt4.image_opening_minigpt4 import inline_picture, path_of_url, without_content
from recipes_minigpt4.data.arguments import DataArguments, check_dataset_weights
from recipes_minigpt4.data.files import open_dataset, open_table, read_annotations, refuse_address, writable_cache
from recipes_minigpt4.data.streaming import shuffle_blocks, shuffle_shards
from recipes_minigpt4.data.webdataset import stream_tars, tars_named
from recipes_minigpt4.utils.embedded_world import TINY, stage_examples
from recipes_minigpt4.utils.errors import RecipeError


# What streams are made of: `cause` and `name` tell why a sample that has no picture and text has none.
PAIR = Features(
    {"image": Image(decode=False), "text": Value("string"), "name": Value("string"), "cause": Value("string")}
)
SHARDS = 64  # of data that lie on disk, when they are streamed


def load_pairs(args: DataArguments, stage: int, seed: int = 42) -> Dataset | IterableDataset:
    """
    Open image–text pairs without decoding a picture.

    Args:
        args: where they are.
        stage: 1 or 2; tells which pairs of the embedded world are meant.
        seed: of the order and the mixture of streams.

    Returns:
        Dataset with the columns `image` (decoded when asked for) and `text`. An endless stream, whose pictures are
        `bytes` and `path`, for tar files, several datasets, or `streaming`.

    Raises:
        RecipeError: if there is no such dataset, file or column, or too many pictures are missing.
    """
    if not args.dataset_name:
        raise RecipeError("No data: name a dataset, a folder or a file with --dataset_name.")
    weights = check_dataset_weights(args)
    # Types are there to be mixed, and cost time for every sample.
    typed = len(args.dataset_name) > 1
    sources = [open_source(name, args, stage, typed, seed) for name in args.dataset_name]
    (first, *others) = sources
    if isinstance(first, Dataset) and not others and not args.streaming:
        return first
    return mix([_as_stream(source, seed) for source in sources], weights, args.shuffle_buffer, seed)


def mix(
    streams: Sequence[IterableDataset], probabilities: list[float] | None, shuffle_buffer: int, seed: int
) -> IterableDataset:
    """Repeat streams without end, draw from them by their probabilities, and shuffle what is drawn."""
    endless = [stream.repeat(None) for stream in streams]
    mixed = endless[0] if len(endless) == 1 else interleave_datasets(endless, probabilities=probabilities, seed=seed)
    return shuffle_blocks(mixed, shuffle_buffer, seed)


def open_source(
    name: str, args: DataArguments, stage: int, typed: bool = True, seed: int | None = None
) -> Dataset | IterableDataset:
    """
    Open one dataset, for one pass over it.

    Args:
        name: one of `args.dataset_name`.
        args, stage: see `load_pairs`.
        typed: whether a stream of tars knows its features.
        seed: of the order of tars; None leaves them in theirs.

    Returns:
        A dataset with the columns `image` and `text`, or a stream with those of `PAIR`.
    """
    if name == TINY:
        return _tiny_pairs(stage, args.num_samples)
    if (pattern := tars_named(name)) is not None:
        columns = (args.image_column, args.text_column)
        return _first(stream_tars(pattern, *columns, PAIR if typed else None, seed), args.num_samples)
    refuse_address(name)
    with writable_cache():
        return _open_rows(name, Path(name).expanduser(), args, seed)


def _open_rows(name: str, path: Path, args: DataArguments, seed: int | None) -> Dataset | IterableDataset:
    """Open a table, a folder, or a dataset of the Hub."""
    dataset: Dataset | IterableDataset
    if os.path.isfile(path):
        dataset, folder = open_table(path), path.parent
    elif (path / "filter_cap.json").is_file():
        dataset, folder = _open_curated(path, args.max_bad_share), path
    else:
        wanted = (args.dataset_config, args.dataset_split, args.dataset_revision, args.streaming)
        dataset, folder = open_dataset(name, path, *wanted), path
    if isinstance(dataset, Dataset) and not len(dataset):
        raise RecipeError(f"{name} holds no samples; write one row per picture into it.")
    dataset = _first(_choose_columns(dataset, name, args), args.num_samples)
    folder = Path(args.image_folder or folder).absolute()
    if isinstance(dataset, IterableDataset):
        shuffled = dataset if seed is None else shuffle_shards(dataset, seed)
        is_local = path.is_dir() or args.image_folder is not None
        return shuffled.map(_as_pair, features=PAIR, fn_kwargs={"folder": str(folder) if is_local else None})
    return _as_images(dataset, folder, args.max_bad_share)


def _first(dataset: Any, count: int | None) -> Any:
    """The first samples of a dataset or a stream."""
    if count is None:
        return dataset
    return (
        dataset.take(count)
        if isinstance(dataset, IterableDataset)
        else dataset.select(range(min(count, len(dataset))))
    )


def _as_stream(source: Dataset | IterableDataset, seed: int) -> IterableDataset:
    """Pairs as one pass of a stream with the columns of `PAIR`."""
    if isinstance(source, IterableDataset):
        return source
    stored = source.cast_column("image", Image(decode=False)).shuffle(seed=seed)
    return stored.to_iterable_dataset(num_shards=min(SHARDS, len(stored))).map(_as_pair, features=PAIR)


def _as_pair(row: Mapping[str, Any], folder: str | None = None) -> dict[str, Any]:
    text = row["text"]
    image = _stored(row["image"], folder)
    return {"image": image, "text": text if isinstance(text, str) else None, "name": None, "cause": None}


def _stored(image: Any, folder: str | None) -> dict[str, Any] | None:
    """
    A picture as `datasets` stores it, `bytes` or `path`; None if there is none.

    Args:
        image: a path, an address, base64 or a data URI; bytes; or a picture as it is stored.
        folder: where relative paths start from; None leaves them as they are.
    """
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return {"bytes": image["bytes"], "path": image.get("path")}
        image = image.get("path")
    if isinstance(image, bytes) or not image:
        return {"bytes": image, "path": None} if image is not None and image != "" else None
    if (content := inline_picture(image)) is not None:
        return {"bytes": content, "path": None}
    if image.startswith("file://"):
        image = path_of_url(image)
    return {"bytes": None, "path": image if folder is None or "://" in image else str(Path(folder, image))}


def _tiny_pairs(stage: int, count: int | None) -> Dataset:
    """Draw the training pairs of the embedded world, by default as many as its own stage has."""
    examples = stage_examples(stage)
    pairs = examples() if count is None else examples(count)
    columns = {"image": [pair["image"] for pair in pairs], "text": [pair["caption"] for pair in pairs]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))


def _open_curated(folder: Path, max_missing: float) -> Dataset:
    """Read the layout of the original's stage 2 data: `filter_cap.json` and `image/ID.jpg`."""
    rows = read_annotations(folder / "filter_cap.json")
    if rows and not {"image_id", "caption"} <= rows[0].keys():
        raise RecipeError(
            f"{folder / 'filter_cap.json'} needs `image_id` and `caption` in every annotation; it has "
            f"{', '.join(rows[0])}."
        )
    pictures = [f"image/{row['image_id']}.jpg" for row in rows]
    missing = [picture for picture in pictures if not os.path.isfile(folder / picture)]
    if len(missing) > max_missing * len(pictures):
        raise RecipeError(
            f"{len(missing)} of {len(pictures)} pictures of {folder} are missing, {missing[0]} among them; copy them "
            "there."
        )
    return Dataset.from_dict({"image": pictures, "caption": [str(row["caption"]) for row in rows]})


def _choose_columns(dataset: Any, name: str, args: DataArguments) -> Any:
    """Keep the pictures and the text, as `image` and `text`."""
    found = dataset.column_names or list(next(iter(dataset)))  # a stream may know its columns from its first row only
    for option, column in (("image_column", args.image_column), ("text_column", args.text_column)):
        if column not in found:
            raise RecipeError(
                f"{name} has no column {column!r}; it has {', '.join(found) or 'none'}, so name the right one with "
                f"--{option}."
            )
    text = dataset.features and dataset.features[args.text_column]
    if text and (not isinstance(text, Value) or "string" not in text.dtype):
        raise RecipeError(
            f"The column {args.text_column!r} of {name} holds no text but {text}; name another of {', '.join(found)} "
            "with --text_column."
        )
    pictures = dataset.features and dataset.features[args.image_column]
    if isinstance(dataset, IterableDataset) and isinstance(pictures, Image):
        dataset = dataset.cast_column(args.image_column, Image(decode=False))  # before something asks for a row
    dataset = dataset.select_columns([args.image_column, args.text_column])
    # Away with both old names first, for the text may stand in a column called `image`.
    dataset = dataset.rename_columns({args.image_column: "0", args.text_column: "1"})
    return dataset.rename_columns({"0": "image", "1": "text"})


def _as_images(dataset: Dataset, folder: Path, max_missing: float) -> Dataset:
    """
    Let `datasets` decode the column `image`, whatever it holds.

    That is pictures, bytes, base64, data URIs, addresses, or paths relative to `folder`.
    """
    kind = dataset.features["image"]
    if isinstance(kind, Image):
        return dataset
    is_text = isinstance(kind, Value) and "string" in kind.dtype
    if not (is_text or isinstance(kind, Mapping) or (isinstance(kind, Value) and "binary" in kind.dtype)):
        raise RecipeError(
            f"The image column holds neither pictures nor paths but {kind}; name another with --image_column."
        )
    if is_text or (isinstance(kind, Mapping) and any(_paths(dataset.cast_column("image", Image())))):
        features = Features({**dataset.features, "image": Image(decode=False)})
        places = {"fn_kwargs": {"folder": str(folder)}, "features": features}
        dataset = dataset.map(_store_batch, batched=True, batch_size=100, **places)
        _check_paths(dataset, str(folder), max_missing)
    return dataset.cast_column("image", Image())


def _store_batch(batch: Mapping[str, Sequence[Any]], folder: str) -> dict[str, list[Any]]:
    return {"image": [_stored(image, folder) for image in batch["image"]]}


def _paths(dataset: Dataset) -> Iterator[str | None]:
    """The paths of pictures that are not stored themselves, which are left alone; None where there is no picture."""
    for batch in dataset.select_columns("image").with_format("arrow").iter(1000):
        pictures = batch["image"]
        is_elsewhere = pyarrow.compute.is_null(pyarrow.compute.struct_field(pictures, "bytes"))
        yield from pyarrow.compute.struct_field(pictures.filter(is_elsewhere), "path").to_pylist()


def _check_paths(dataset: Dataset, folder: str, max_missing: float) -> None:
    """Refuse data of which too many pictures are not where they should be."""
    paths = list(_paths(dataset))
    if (nameless := sum(not path for path in paths)) > max_missing * len(dataset):
        raise RecipeError(f"{nameless} of {len(dataset)} rows have no picture; remove them from the dataset.")
    missing = [path for path in paths if path and "://" not in path and not os.path.isfile(path)]
    if len(missing) > max_missing * len(dataset):
        first = missing[0].removeprefix(folder + os.sep)
        raise RecipeError(
            f"{len(missing)} of {len(dataset)} pictures are missing, "
            f"{missing[0] if without_content(first) == first else without_content(first)} among them; say with "
            "--image_folder where relative paths start from."
        )
