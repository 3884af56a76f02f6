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
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, interleave_datasets

from processing_minigpt4.image_opening_minigpt4 import inline_picture, path_of_url, without_content
from recipes_minigpt4.data.arguments import DataArguments, check_dataset_weights, column_of
from recipes_minigpt4.data.columns import choose_columns, tell_columns
from recipes_minigpt4.data.files import (
    captioned_pictures,
    open_dataset,
    open_table,
    read_annotations,
    refuse_address,
    writable_cache,
)
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
    sources = [
        open_source(name, args, stage, typed, seed, place=place) for place, name in enumerate(args.dataset_name)
    ]
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
    name: str, args: DataArguments, stage: int, typed: bool = True, seed: int | None = None, place: int = 0
) -> Dataset | IterableDataset:
    """
    Open one dataset, for one pass over it.

    Args:
        name: one of `args.dataset_name`.
        args, stage: see `load_pairs`.
        typed: whether a stream of tars knows its features.
        seed: of the order of tars; None leaves them in theirs.
        place: of the name among those of `args.dataset_name`, which may each have columns of their own.

    Returns:
        A dataset with the columns `image` and `text`, or a stream with those of `PAIR`.
    """
    if name == TINY:
        return _tiny_pairs(stage, args.num_samples)
    named = (column_of(args.image_column, place), column_of(args.text_column, place))
    if (pattern := tars_named(name)) is not None:
        return _first(stream_tars(pattern, *named, PAIR if typed else None, seed), args.num_samples)
    refuse_address(name)
    with writable_cache():
        return _open_rows(name, Path(name).expanduser(), args, named, stage, seed)


def _open_rows(
    name: str, path: Path, args: DataArguments, named: tuple[str | None, str | None], stage: int, seed: int | None
) -> Dataset | IterableDataset:
    """Open a table, a folder, or a dataset of the Hub."""
    dataset: Dataset | IterableDataset
    if os.path.isfile(path):
        dataset, folder = open_table(path), path.parent
    elif (path / "filter_cap.json").is_file():
        dataset, folder = _open_curated(path, args.max_bad_share), path
    elif pictures := captioned_pictures(path, args.dataset_split):
        dataset, folder = Dataset.from_dict(pictures), path
    else:
        wanted = (args.dataset_config, args.dataset_split, args.dataset_revision, args.streaming)
        dataset, folder = open_dataset(name, path, *wanted), path
    if isinstance(dataset, Dataset) and not len(dataset):
        raise RecipeError(f"{name} holds no samples; write one row per picture into it.")
    dataset = _first(_choose_columns(dataset, name, named, stage), args.num_samples)
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
    if isinstance(image, list):
        image = _only_one(image)
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


def _choose_columns(dataset: Any, name: str, named: tuple[str | None, str | None], stage: int) -> Any:
    """Keep the pictures and the text, as `image` and `text`, and the instructions of rows as `question`."""
    found = dataset.column_names or list(next(iter(dataset)))  # a stream may know its columns from its first row only
    features = dataset.features or {}
    classes = [kind.names for kind in features.values() if isinstance(kind, ClassLabel)]
    columns = choose_columns(found, name, *named, stage, classes=classes[0] if classes else ())
    for option, column in (("text_column", columns.text), ("question", columns.question)):
        text = features.get(column)
        if text and (not isinstance(text, Value) or "string" not in text.dtype):
            raise RecipeError(
                f"The column {column!r} of {name} holds no text but {text}; name another of {', '.join(found)} "
                f"with --{option}."
                if option == "text_column"
                else f"The column {column!r} of {name} holds no text but {text}; rename or remove it."
            )
    tell_columns(name, columns.names)
    if isinstance(dataset, IterableDataset) and isinstance(features.get(columns.image), Image):
        dataset = dataset.cast_column(columns.image, Image(decode=False))  # before something asks for a row
    dataset = dataset.select_columns(columns.names)
    # Away with all old names first, for the text may stand in a column called `image`.
    dataset = dataset.rename_columns({column: str(number) for number, column in enumerate(columns.names)})
    new = ["image", "text"] if columns.question is None else ["image", "question", "text"]
    return dataset.rename_columns({str(number): column for number, column in enumerate(new)})


def _as_images(dataset: Dataset, folder: Path, max_missing: float) -> Dataset:
    """
    Let `datasets` decode the column `image`, whatever it holds.

    That is pictures, bytes, base64, data URIs, addresses, or paths relative to `folder`.
    """
    if isinstance(dataset.features["image"], List):
        dataset = _unpack(dataset)
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


def _unpack(dataset: Dataset) -> Dataset:
    """Lists of one picture each as pictures, not decoded."""
    kind = dataset.features["image"].feature
    if isinstance(kind, Image):
        kind = Image(decode=False)
        dataset = dataset.cast_column("image", List(kind))
    features = Features({**dataset.features, "image": kind})
    return dataset.map(_only_pictures, batched=True, batch_size=100, features=features)


def _only_pictures(batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
    return {"image": [_only_one(images) for images in batch["image"]]}


def _only_one(images: Sequence[Any] | None) -> Any:
    if len(images or ()) > 1:
        raise RecipeError(
            f"A row has {len(images or ())} pictures for one caption; write it as a chat, with `messages` and "
            "`images`, for stage 2."
        )
    return images[0] if images else None


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
