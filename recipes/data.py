"""Image–text pairs: where they come from, in one piece or as a stream.

Whatever the source, pairs have the columns `image` and `text`, and no picture is decoded before somebody asks for it.
A stream has no end: its sources are repeated, mixed by their weights and shuffled in blocks. Its shards, the tar files
for example, are what `datasets` and accelerate share out among processes and workers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    Value,
    interleave_datasets,
    load_dataset,
    load_from_disk,
)

from recipes_minigpt4 import TINY, RecipeError, one_line
from recipes_minigpt4.streams import shuffle_blocks, shuffle_shards
from recipes_minigpt4.tars import names_tars, stream_tars


FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# What streams are made of: `cause` and `name` tell why a sample that has no picture and text has none.
PAIR = Features(
    {"image": Image(decode=False), "text": Value("string"), "name": Value("string"), "cause": Value("string")}
)
SHARDS = 64  # of data that lie on disk, when they are streamed


@dataclass
class DataArguments:
    """What to train on."""

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "A dataset on the Hub; a folder of pictures with metadata.csv or metadata.jsonl; a folder with "
            "filter_cap.json and image/ (cc_sbu_align); a .jsonl, .json, .csv, .tsv or .parquet file whose rows name "
            "pictures; tar files of webdataset, streamed from a path, hf:// or https:// with * and {000..099}; or "
            "`tiny`, the embedded world. Several are mixed."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How often each of several datasets is drawn from, such as 115 14. Default: equally."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read a dataset of the Hub while training instead of fetching it first; tars always are."},
    )
    shuffle_buffer: int = field(
        default=1000,  # released code, `wds.shuffle(1000)`
        metadata={"help": "Samples of a stream, still as files, that each worker reads at a time and shuffles."},
    )
    max_bad_share: float = field(
        default=0.1,
        metadata={"help": "Share of samples, 0 to 1, that may be damaged and skipped before the run stops."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on, slices allowed."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures or their paths."})
    text_column: str = field(default="caption", metadata={"help": "Column with the captions or answers."})
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths of pictures start from. Default: the folder of the file."},
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "Use only so many samples, the first ones. Default: all."}
    )
    max_txt_len: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer in tokens, end_sym included. Default: the original's 32 in stage 1 and 160 in "
            "stage 2."
        },
    )
    instruction_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of the training text of stage 2: a name or Jinja. Default: the processor's own, "
            "but vicuna_v0_alignment where it chats in vicuna_v0."
        },
    )
    end_sym: str | None = field(
        default=None,
        metadata={
            "help": "Text that ends an answer. Default: a line break in stage 1; in stage 2 what ends a turn of the "
            "chat template, such as ### or the EOS token."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # as a YAML file may have it
            self.dataset_name = [self.dataset_name]
        if not 0 <= self.max_bad_share <= 1:
            raise RecipeError(f"max_bad_share is {self.max_bad_share}; it is a share, from 0 to 1.")


# ---- loading --------------------------------------------------------------------------------------------------------


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
    if args.num_samples is not None and args.num_samples < 1:
        raise RecipeError(f"--num_samples is {args.num_samples}; it has to be 1 or more, or left out.")
    weights = check_weights(args)
    # Types are there to be mixed, and cost time for every sample.
    typed = len(args.dataset_name) > 1
    sources = [open_source(name, args, stage, typed, seed) for name in args.dataset_name]
    (first, *others) = sources
    if isinstance(first, Dataset) and not others and not args.streaming:
        return first
    return mix([_as_stream(source, seed) for source in sources], weights, args.shuffle_buffer, seed)


def check_weights(args: DataArguments) -> list[float] | None:
    """`dataset_weights` as probabilities."""
    names, weights = args.dataset_name or [], args.dataset_weights
    if weights is None:
        return None
    if len(weights) != len(names) or min(weights) <= 0:
        raise RecipeError(
            f"dataset_weights are {', '.join(f'{weight:g}' for weight in weights)} for {len(names)} dataset(s); give "
            "one number above 0 for each --dataset_name."
        )
    return [weight / sum(weights) for weight in weights]


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
    path = Path(name).expanduser()
    if name == TINY:
        return _tiny_pairs(stage, args.num_samples)
    if names_tars(name) or (path.is_dir() and any(path.glob("*.tar")) and not any(path.glob("metadata.*"))):
        pattern = name if "://" in name else str(path if names_tars(name) else path / "*.tar")
        columns = (args.image_column, args.text_column)
        return _first(stream_tars(pattern, *columns, PAIR if typed else None, seed), args.num_samples)
    if path.is_file():
        dataset, folder = _open_file(path), path.parent
    elif (path / "filter_cap.json").is_file():
        dataset, folder = _open_curated(path, args.max_bad_share), path
    else:
        dataset, folder = _open_dataset(name, path, args), path
    if isinstance(dataset, Dataset) and not len(dataset):
        raise RecipeError(f"{name} holds no samples; write one row per picture into it.")
    dataset = _first(_choose_columns(dataset, name, args), args.num_samples)
    folder = Path(args.image_folder or folder).absolute()
    if isinstance(dataset, IterableDataset):
        return (dataset if seed is None else shuffle_shards(dataset, seed)).map(_as_pair, features=PAIR)
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


def _as_pair(row: Mapping[str, Any]) -> dict[str, Any]:
    image, text = row["image"], row["text"]
    if isinstance(image, (str, bytes)):
        image = {"path": image, "bytes": None} if isinstance(image, str) else {"path": None, "bytes": image}
    if image and image["bytes"] is None and not image["path"]:
        image = None  # as `datasets` wants it
    return {"image": image, "text": text if isinstance(text, str) else None, "name": None, "cause": None}


def _tiny_pairs(stage: int, count: int | None) -> Dataset:
    """Draw the training pairs of the embedded world, by default as many as its own stage has."""
    from recipes_minigpt4.tiny import scenes

    examples = scenes.stage1_examples if stage == 1 else scenes.stage2_examples
    pairs = examples() if count is None else examples(count)
    columns = {"image": [pair["image"] for pair in pairs], "text": [pair["caption"] for pair in pairs]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))


def _open_file(path: Path) -> Dataset:
    """Read a table of rows; of a JSON object, the list that it holds under `annotations`."""
    if path.suffix not in FILE_TYPES:
        raise RecipeError(f"{path} is no data file: its name has to end in {', '.join(FILE_TYPES)}.")
    if not path.stat().st_size:
        raise RecipeError(f"{path} is empty; write one row per picture into it.")
    try:
        if path.suffix == ".json":
            return Dataset.from_list(_read_annotations(path))
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train", **options)
    except RecipeError:
        raise
    except Exception as error:  # whatever pandas, pyarrow or json say about a damaged file
        raise RecipeError(f"{path} cannot be read as {path.suffix[1:]} ({_reason(error)}); mend the file.") from error


def _reason(error: BaseException) -> str:
    """What the error at the root of an error says; `datasets` hides it behind general ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _read_annotations(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f'{path} must hold a list of objects, or {{"annotations": [...]}} with one.')
    return rows


def _open_curated(folder: Path, max_missing: float) -> Dataset:
    """Read the layout of the original's stage 2 data: `filter_cap.json` and `image/ID.jpg`."""
    rows = _read_annotations(folder / "filter_cap.json")
    if rows and not {"image_id", "caption"} <= rows[0].keys():
        raise RecipeError(
            f"{folder / 'filter_cap.json'} needs `image_id` and `caption` in every annotation; it has "
            f"{', '.join(rows[0])}."
        )
    pictures = [f"image/{row['image_id']}.jpg" for row in rows]
    missing = [picture for picture in pictures if not (folder / picture).is_file()]
    if len(missing) > max_missing * len(pictures):
        raise RecipeError(
            f"{len(missing)} of {len(pictures)} pictures of {folder} are missing, {missing[0]} among them; copy them "
            "there."
        )
    return Dataset.from_dict({"image": pictures, "caption": [str(row["caption"]) for row in rows]})


def _open_dataset(name: str, path: Path, args: DataArguments) -> Dataset | IterableDataset:
    """Open a folder or a dataset of the Hub with `datasets`."""
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            if isinstance(saved, DatasetDict) and args.dataset_split not in saved:
                raise KeyError(f"its splits are {', '.join(saved)}")
            return saved[args.dataset_split] if isinstance(saved, DatasetDict) else saved
        where = str(path) if path.is_dir() else name
        wanted = {"split": args.dataset_split, "revision": args.dataset_revision, "streaming": args.streaming}
        return load_dataset(where, args.dataset_config, **wanted)
    except Exception as error:  # the many ways in which `datasets` says that something is not there
        raise RecipeError(
            f"{name} with the split {args.dataset_split} cannot be opened "
            f"({_reason(error)}); name a dataset of the Hub, a folder with pictures and metadata, or a "
            "file with --dataset_name."
        ) from error


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
    """Let `datasets` decode the column `image`, whatever it holds: pictures, bytes or paths relative to `folder`."""
    kind = dataset.features["image"]
    if isinstance(kind, Image):
        return dataset
    if isinstance(kind, Value) and "string" in kind.dtype:
        dataset = dataset.map(_join_paths, batched=True, fn_kwargs={"folder": str(folder)})
        paths = list(dataset["image"])
        if (nameless := sum(not path for path in paths)) > max_missing * len(paths):
            raise RecipeError(f"{nameless} of {len(paths)} rows have no picture; remove them from the dataset.")
        missing = [path for path in paths if path and "://" not in path and not Path(path).is_file()]
        if len(missing) > max_missing * len(paths):
            raise RecipeError(
                f"{len(missing)} of {len(paths)} pictures are missing, {missing[0]} among them; say with "
                "--image_folder where relative paths start from."
            )
    elif not (isinstance(kind, Mapping) or (isinstance(kind, Value) and "binary" in kind.dtype)):
        raise RecipeError(
            f"The image column holds neither pictures nor paths but {kind}; name another with --image_column."
        )
    return dataset.cast_column("image", Image())


def _join_paths(batch: Mapping[str, Sequence[str | None]], folder: str) -> dict[str, list[str | None]]:
    paths = batch["image"]
    return {"image": [path if not path or "://" in path else str(Path(folder, path)) for path in paths]}
