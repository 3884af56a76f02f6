"""Image–text pairs: where they come from, in one piece or as a stream.

Whatever the source, pairs have the columns `image` and `text`, and no picture is decoded before somebody asks for it.
A stream has no end: its sources are repeated, mixed by their weights and shuffled in blocks. Its shards, the tar files
for example, are what `datasets` and accelerate share out among processes and workers.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute  # type: ignore[import-untyped]
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, interleave_datasets

from processing_minigpt4.image_opening_minigpt4 import inline_picture, path_of_url, without_content
from recipes_minigpt4.data.arguments import DataArguments, check_dataset_weights, column_of
from recipes_minigpt4.data.bad_samples import BadSampleError
from recipes_minigpt4.data.chats import read_chat
from recipes_minigpt4.data.columns import Columns, choose_columns, tell_columns
from recipes_minigpt4.data.files import (
    captioned_pictures,
    open_dataset,
    open_table,
    read_annotations,
    refuse_address,
    writable_cache,
)
from recipes_minigpt4.data.splits import take_slice
from recipes_minigpt4.data.streaming import shuffle_blocks, shuffle_shards
from recipes_minigpt4.data.webdataset import stream_tars, tars_named
from recipes_minigpt4.utils.embedded_world import TINY, stage_examples
from recipes_minigpt4.utils.errors import RecipeError


# What streams are made of: `cause` and `name` tell why a sample that has no picture and text has none.
PAIR = Features(
    {"image": Image(decode=False), "text": Value("string"), "name": Value("string"), "cause": Value("string")}
)
# Those of rows with an instruction of their own; of chats, JSON with places for `images`; and of mixtures of all.
ASKED = Features({**PAIR, "question": Value("string")})
CHAT = Features(
    {"images": List(Image(decode=False)), "chat": Value("string"), "name": Value("string"), "cause": Value("string")}
)
MIXED = Features({**ASKED, **CHAT})
SHARDS = 64  # of data that lie on disk, when they are streamed
TINY_HELD_OUT = 240  # samples of the embedded world's split `validation`


def features_of(columns: Columns) -> Features:
    """The features of a stream whose rows come from these columns."""
    return CHAT if columns.is_chat else PAIR if columns.question is None else ASKED


def load_pairs(args: DataArguments, stage: int, seed: int = 42) -> Dataset | IterableDataset:
    """
    Open image–text pairs without decoding a picture.

    Args:
        args: where they are.
        stage: 1 or 2; tells which pairs of the embedded world are meant.
        seed: of the order and the mixture of streams.

    Returns:
        Dataset with the columns `image` (decoded when asked for) and `text`. An endless stream, whose pictures are
        `bytes` and `path`, for tar files, several datasets, or `streaming`. In stage 2 also `question`, where rows
        have instructions of their own; chats have the columns of `CHAT`.

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
    streams = [_as_stream(source, seed) for source in sources]
    if len({tuple(sorted(stream.features or PAIR)) for stream in streams}) > 1:
        streams = [stream.map(_as_mixed, features=MIXED) for stream in streams]
    return mix(streams, weights, args.shuffle_buffer, seed)


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
        A dataset with the columns `image` and `text`, or a stream with those of `PAIR`; in stage 2 see `load_pairs`.
    """
    if name == TINY:
        return _tiny_pairs(stage, args.num_samples, args.dataset_split)
    named = (column_of(args.image_column, place), column_of(args.text_column, place))
    if (pattern := tars_named(name)) is not None:

        def features(columns: Columns) -> Features | None:
            return features_of(columns) if typed or columns.is_chat or columns.question else None

        return _first(stream_tars(pattern, *named, stage, features, seed), args.num_samples)
    refuse_address(name)
    with writable_cache():
        return _open_rows(name, Path(name).expanduser(), args, named, stage, seed)


def _open_rows(
    name: str, path: Path, args: DataArguments, named: tuple[str | None, str | None], stage: int, seed: int | None
) -> Dataset | IterableDataset:
    """Open a table, a folder, or a dataset of the Hub."""
    dataset: Dataset | IterableDataset
    if os.path.isfile(path):
        dataset, folder = take_slice(open_table(path), args.dataset_split), path.parent
    elif (path / "filter_cap.json").is_file():
        dataset, folder = take_slice(_open_curated(path, args.max_bad_share), args.dataset_split), path
    elif pictures := captioned_pictures(path, args.dataset_split):
        dataset, folder = Dataset.from_dict(pictures), path
    else:
        wanted = (args.dataset_config, args.dataset_split, args.dataset_revision, args.streaming)
        dataset, folder = open_dataset(name, path, *wanted), path
    if isinstance(dataset, Dataset) and not len(dataset):
        raise RecipeError(f"{name} holds no samples; write one row per picture into it.")
    dataset, columns = _choose_columns(dataset, name, named, stage)
    dataset = _first(dataset, args.num_samples)
    folder = Path(args.image_folder or folder).absolute()
    is_stream = isinstance(dataset, IterableDataset)
    is_local = not is_stream or path.is_dir() or args.image_folder is not None
    places = {"folder": str(folder) if is_local else None}
    if is_stream:
        dataset = dataset if seed is None else shuffle_shards(dataset, seed)
        if columns.is_chat:
            old = ["text"] if columns.image is None else ["image", "text"]
            return dataset.map(_as_chat, features=features_of(columns), fn_kwargs=places, remove_columns=old)
        return dataset.map(_as_pair, features=features_of(columns), fn_kwargs=places)
    if columns.is_chat:
        chats = dataset.map(_as_chat, features=CHAT, fn_kwargs=places, remove_columns=dataset.column_names)
        _check_missing(_paths_of_chats(chats), len(chats), str(folder), args.max_bad_share)
        return chats
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
    is_chat = "chat" in source.column_names
    stored = (source if is_chat else source.cast_column("image", Image(decode=False))).shuffle(seed=seed)
    stream = stored.to_iterable_dataset(num_shards=min(SHARDS, len(stored)))
    if is_chat:
        return stream
    return stream.map(_as_pair, features=ASKED if "question" in source.column_names else PAIR)


def _as_pair(row: Mapping[str, Any], folder: str | None = None) -> dict[str, Any]:
    text = row["text"]
    image = _stored(row["image"], folder)
    asked = {"question": row["question"]} if "question" in row else {}
    return {**asked, "image": image, "text": text if isinstance(text, str) else None, "name": None, "cause": None}


def _as_chat(row: Mapping[str, Any], folder: str | None = None) -> dict[str, Any]:
    """A chat in one form; of one that cannot be trained on, why."""
    try:
        chat, images = read_chat(row["text"], row.get("image"))
    except BadSampleError as error:
        name = f"a chat that begins with {str(row['text'])[:60]!r}"
        return {"images": [], "chat": None, **error.record(name)}
    stored = [_stored(image, folder) for image in images]
    return {"images": stored, "chat": json.dumps(chat, ensure_ascii=False), "name": None, "cause": None}


def _as_mixed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in MIXED}


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


def _tiny_pairs(stage: int, count: int | None, split: str) -> Dataset:
    """Draw pairs of the embedded world: by default as many as its own stage trains on, or `TINY_HELD_OUT`."""
    examples = stage_examples(stage)
    if split == "validation":
        pairs = examples(count or TINY_HELD_OUT, reserved=True)
    else:
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


def _choose_columns(dataset: Any, name: str, named: tuple[str | None, str | None], stage: int) -> tuple[Any, Columns]:
    """Keep the pictures and the text, as `image` and `text`, and the instructions of rows as `question`."""
    found = dataset.column_names or list(next(iter(dataset)))  # a stream may know its columns from its first row only
    features = dataset.features or {}
    classes = [kind.names for kind in features.values() if isinstance(kind, ClassLabel)]
    columns = choose_columns(found, name, *named, stage, classes=classes[0] if classes else ())
    for option, column in (("text_column", columns.text), (None, columns.question)):
        kind = features.get(column)
        if kind and not columns.is_chat and (not isinstance(kind, Value) or "string" not in kind.dtype):
            remedy = f"name another of {', '.join(found)} with --{option}" if option else "rename it"
            raise RecipeError(f"The column {column!r} of {name} holds no text but {kind}; {remedy}.")
    tell_columns(name, columns.names)
    if not isinstance(dataset, Dataset) or columns.is_chat:
        dataset = _undecoded(dataset, columns.image, features.get(columns.image))  # before something asks for a row
    dataset = dataset.select_columns(columns.names)
    # Away with all old names first, for the text may stand in a column called `image`.
    new = {columns.image: "image", columns.question: "question", columns.text: "text"}
    dataset = dataset.rename_columns({column: str(number) for number, column in enumerate(columns.names)})
    renamed = {str(number): new[column] for number, column in enumerate(columns.names)}
    return dataset.rename_columns(renamed), columns


def _undecoded(dataset: Any, column: str | None, kind: Any) -> Any:
    """The same with pictures as they are stored."""
    if isinstance(kind, Image):
        return dataset.cast_column(column, Image(decode=False))
    if isinstance(kind, List) and isinstance(kind.feature, Image):
        return dataset.cast_column(column, List(Image(decode=False)))
    return dataset


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
    _check_missing(paths, len(dataset), folder, max_missing)


def _paths_of_chats(chats: Dataset) -> list[str | None]:
    return [image["path"] for images in chats["images"] for image in images if image and image["bytes"] is None]


def _check_missing(paths: Sequence[str | None], count: int, folder: str, max_missing: float) -> None:
    missing = [path for path in paths if path and "://" not in path and not os.path.isfile(path)]
    if len(missing) > max_missing * count:
        first = missing[0].removeprefix(folder + os.sep)
        raise RecipeError(
            f"{len(missing)} of {count} pictures are missing, "
            f"{missing[0] if without_content(first) == first else without_content(first)} among them; say with "
            "--image_folder where relative paths start from."
        )
