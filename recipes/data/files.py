"""Files of data on disk: what they are by their endings, and how they are opened whatever characters their names have.

What exists is no pattern: `datasets` looks for `*`, `?` and `[` in every path that it is given, but takes lists of
files that are found already as they are.
"""

import bz2
import glob
import gzip
import json
import lzma
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import datasets.config
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import DataFilesDict, DataFilesList, get_data_patterns
from datasets.load import dataset_module_factory

from recipes_minigpt4.data.chats import chat_table
from recipes_minigpt4.data.columns import IMAGE_ENDINGS
from recipes_minigpt4.utils.errors import RecipeError, one_line


FILE_TYPES = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


# ---- tables ---------------------------------------------------------------------------------------------------------


def file_type(path: Path) -> str:
    """
    The ending that says what a data file is, in lower case and without that of a compression.

    Raises:
        RecipeError: if it is of no kind that is read.
    """
    is_compressed = path.suffix.lower() in COMPRESSED
    ending = (path.with_suffix("") if is_compressed else path).suffix.lower()
    if ending not in FILE_TYPES or (is_compressed and ending == ".parquet"):
        raise RecipeError(
            f"{path} is no data file: its name has to end in {', '.join(FILE_TYPES)}, or one of these and "
            f"{', '.join(COMPRESSED)}."
        )
    return ending


def open_binary(path: Path) -> IO[bytes]:
    """A data file to read its bytes from, compressed or not."""
    return COMPRESSED.get(path.suffix.lower(), open)(path, "rb")  # type: ignore[operator]  # of functions of many types


def open_table(path: Path) -> Dataset:
    """
    Read a file of rows; of a JSON object, the list that it holds under `annotations`.

    Raises:
        RecipeError: if it is of another kind, empty, or damaged.
    """
    ending = file_type(path)
    if not path.stat().st_size:
        raise RecipeError(f"{path} is empty; write one row per picture into it.")
    try:
        if ending == ".json":
            return Dataset.from_list(chat_table(read_annotations(path)))
        _refuse_path(path)
        options = {"sep": "\t"} if ending == ".tsv" else {}
        file = DataFilesList([str(path.absolute())], [(str(path.stat().st_mtime),)])  # the latter tells its version
        return load_dataset(FILE_TYPES[ending], data_files=DataFilesDict(train=file), split="train", **options)
    except RecipeError:
        raise
    except Exception as error:  # whatever pandas, pyarrow or json say about a damaged file
        raise RecipeError(f"{path} cannot be read as {ending[1:]} ({root_reason(error)}); fix the file.") from error


def read_annotations(path: Path) -> list[dict[str, Any]]:
    """The rows of a .json file: a list of objects, or an object with one under `annotations`."""
    with open_binary(path) as file:
        content = json.loads(file.read().decode("utf-8"))
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f'{path} must hold a list of objects, or {{"annotations": [...]}} with one.')
    return rows


# ---- folders and the Hub --------------------------------------------------------------------------------------------


def captioned_pictures(folder: Path, split: str) -> dict[str, list[Any]] | None:
    """
    The pictures of a folder and of those in it whose captions lie beside them, `1.txt` beside `1.jpg`.

    Args:
        folder: where they are; a folder that has tables of data is read from these.
        split: taken from the folder of this name, if there is one.

    Returns:
        Paths in `image` and captions in `text`, None where there is none; None for a folder of another kind.

    Raises:
        RecipeError: for a slice of a split, and for captions that cannot be read.
    """
    start = folder / split if (folder / split).is_dir() else folder
    files = [
        path
        for path in sorted(start.rglob("*"))
        if not any(part.startswith(".") for part in path.parts[len(start.parts) :])
    ]
    if any(path.name.lower().startswith("metadata.") or path.suffix == ".arrow" for path in files):
        return None
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in IMAGE_ENDINGS]
    captions = {path for path in files if path.suffix == ".txt"}
    if not any(path.with_suffix(".txt") in captions for path in pictures):
        return None
    if "[" in split:
        raise RecipeError(
            f"{folder} has captions beside its pictures, of which no slice {split} is taken; use --num_samples."
        )
    texts: list[str | None] = []
    for path in pictures:
        try:
            beside = path.with_suffix(".txt")
            texts.append(beside.read_text(encoding="utf-8").strip() if beside in captions else None)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{beside} cannot be read ({one_line(error)}); write it in UTF-8.") from error
    return {"image": [str(path.absolute()) for path in pictures], "text": texts}


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def open_dataset(
    name: str, path: Path, config: str | None, split: str, revision: str | None, streaming: bool
) -> Dataset | IterableDataset:
    """
    Open a folder or a dataset of the Hub with `datasets`.

    Args:
        name: as it was given.
        path: the same as a path.
        config, split, revision, streaming: see `load_dataset`.

    Raises:
        RecipeError: if that fails.
    """
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            _refuse_path(path)
            saved = load_from_disk(str(path))
            if isinstance(saved, DatasetDict) and split not in saved:
                raise KeyError(f"its splits are {', '.join(saved)}")
            return saved[split] if isinstance(saved, DatasetDict) else saved
        wanted = {"split": split, "revision": revision, "streaming": streaming}
        if path.is_dir():
            _refuse_path(path)
            return load_dataset(str(path), config, data_files=_files_of(path), **wanted)
        return load_dataset(name, config, **wanted)
    except RecipeError:
        raise
    except Exception as error:  # the many ways in which `datasets` says that something is not there
        raise RecipeError(
            f"{name} with the split {split} cannot be opened ({root_reason(error)}); name a dataset of the Hub, a "
            "folder with pictures and metadata, or a file with --dataset_name."
        ) from error


def _refuse_path(path: Path) -> None:
    """Refuse the few names that `datasets` reads as something else even where a file is found already."""
    text = str(path.absolute())
    if "::" in text or os.path.expandvars(text) != text or (os.sep == "/" and "\\" in text):
        raise RecipeError(
            f"{path} has `::`, a backslash, or the name of an environment variable behind `$` in its path, which "
            "`datasets` takes for something else; rename it, or name a link to it."
        )


def _files_of(folder: Path) -> DataFilesDict | None:
    """
    The files of every split of a folder whose path looks like a pattern, as `datasets` finds them; None of others.

    They are looked for through a link with a plain name.
    """
    folder = folder.resolve()
    if not glob.has_magic(str(folder)):
        return None
    with tempfile.TemporaryDirectory() as scratch:
        link = os.path.join(os.path.realpath(scratch), "data")
        os.symlink(folder, link, target_is_directory=True)
        try:
            found = DataFilesDict.from_patterns(get_data_patterns(link), base_path=link)
        except FileNotFoundError:
            raise FileNotFoundError(f"there are no files of data in {folder}") from None
    files = DataFilesDict(
        {
            split: DataFilesList([str(folder) + path.removeprefix(link) for path in paths], paths.origin_metadata)
            for split, paths in found.items()
        }
    )
    # Which of them are data depends on the kind of most of them.
    (builder_config, *_) = dataset_module_factory(
        str(folder), data_files=files
    ).builder_configs_parameters.builder_configs
    return builder_config.data_files if isinstance(builder_config.data_files, DataFilesDict) else files


def refuse_address(name: str) -> None:
    """
    Refuse an address as the name of a dataset; those of tar files are read elsewhere.

    Raises:
        RecipeError: if it is one.
    """
    if "://" not in name or name.startswith("hf://buckets/"):
        return
    where, _, repository = name.partition("/datasets/")
    owner = "/".join(repository.split("?")[0].split("/")[:2])
    if owner and where in ("https://huggingface.co", "http://huggingface.co", "hf:/"):
        raise RecipeError(f"{name} is the address of a dataset of the Hub; name it {owner}.")
    raise RecipeError(
        f"{name} is an address, from which only tar files are read; fetch what is there and name the file or folder, "
        "or name a dataset of the Hub as owner/name."
    )


# ---- errors ---------------------------------------------------------------------------------------------------------


def root_reason(error: BaseException) -> str:
    """What the error at the root of an error says; `datasets` hides it behind general ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


@contextmanager
def writable_cache() -> Iterator[None]:
    """
    Tell an error of the cache of `datasets`, which says nothing about the data, with the remedy for it.

    Raises:
        RecipeError: instead of an error that a folder of the cache cannot be written.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError) and isinstance(cause.filename, str) and _is_of_cache(Path(cause.filename)):
                raise RecipeError(
                    f"Data cannot be prepared in the cache at {datasets.config.HF_DATASETS_CACHE} ({cause.strerror}); "
                    "name a folder that can be written, with enough room, in the environment variable HF_HOME."
                ) from error
            cause = cause.__cause__ or cause.__context__
        raise


def _is_of_cache(path: Path) -> bool:
    """Whether a path is in the cache, or is a folder that the cache is to be made in."""
    cache = Path(datasets.config.HF_DATASETS_CACHE).expanduser().absolute()
    return path.is_relative_to(cache) or cache.is_relative_to(path)
