"""Rows of evaluation data from wherever they are: COCO's files, GQA's, A-OKVQA's and POPE's, tables, folders, the Hub.

Whatever they come from, `image` holds a `Picture` that nobody has opened yet. What stands beside it is left to suites.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Image

from processing_minigpt4.image_opening_minigpt4 import inline_picture
from recipes_minigpt4.data.columns import IMAGE_ENDINGS, PICTURES
from recipes_minigpt4.data.files import (
    FILE_TYPES,
    file_type,
    open_binary,
    open_dataset,
    open_table,
    refuse_address,
    writable_cache,
)
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.errors import RecipeError, one_line


BESIDE = ("imageId", "image_id")  # names of pictures without an ending: GQA's, A-OKVQA's


@dataclass(frozen=True)
class Places:
    """
    Where rows of evaluation data are.

    Args:
        names: files, a folder or a repository. Several COCO files about the same pictures are read as one.
        images: folder of the pictures that files name; None for the folder of the first file.
        split, config, revision: of a dataset.
        num_samples: how many rows are taken; None for all.
        seed: of which.
        option: the one that names them, for what is told to people.
    """

    names: Sequence[str]
    images: Path | None = None
    split: str = "validation"
    config: str | None = None
    revision: str | None = None
    num_samples: int | None = None
    seed: int = 0
    option: str = "--data"


def open_rows(places: Places) -> list[dict[str, Any]]:
    """
    Read the rows, a seeded sample of them if so many are there.

    Raises:
        RecipeError: if they cannot be found or read, or name pictures that are not there.
    """
    rows, folder = find_rows(places)
    if places.num_samples is not None and places.num_samples < len(rows):  # before their pictures are read
        chosen = sorted(random.Random(places.seed).sample(range(len(rows)), places.num_samples))
        rows = [rows[place] for place in chosen]
    return _with_pictures(rows, folder, places.names[0])


def find_rows(places: Places) -> tuple[Sequence[Mapping[str, Any]], Path]:
    """
    All rows as they are stored, with `picture_in` for their pictures, and the folder that these may lie in.

    Raises:
        RecipeError: if there are none, or they cannot be read.
    """
    files = [Path(name).expanduser() for name in places.names]
    for file in files:  # whose name tells that it is no dataset of the Hub
        if file.suffix.lower() in FILE_TYPES and not file.exists():
            raise RecipeError(f"There is no file {file}; write its path anew.")
    folder = places.images or (files[0].parent if files[0].is_file() else files[0])
    rows: Sequence[dict[str, Any]]
    contents = [_read_json(file) for file in files if file.is_file() and file.suffix.lower() == ".json"]
    if contents and all(isinstance(content, dict) and "images" in content for content in contents):
        rows = _coco_rows(files, contents)
    elif len(files) > 1:
        raise RecipeError(
            f"{' and '.join(places.names)} are not all COCO's files, an object with `images` and `annotations`; name "
            "several of these, or one of others."
        )
    elif contents:
        rows = _listed(contents[0], files[0])
    elif files[0].is_file():
        file_type(files[0])
        rows = _undecoded(open_table(files[0]))
    elif files[0].is_dir() and (pictures := _pictures_of(files[0])):
        folder = files[0]
        rows = [{"image": str(path.relative_to(folder)), "kind": path.parent.name} for path in pictures]
    else:
        rows = _dataset_rows(places)
    if not rows:
        raise RecipeError(f"{places.names[0]} holds no rows.")
    return rows, folder


def _read_json(path: Path) -> Any:
    """What a file holds; a list for one with an object per line, as POPE's files have it whatever their names say."""
    try:
        with open_binary(path) as file:
            text = file.read().decode("utf-8")
        lines = text.strip().splitlines()
        if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines[:2]):
            return [json.loads(line) for line in lines if line.strip()]
        return json.loads(text)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read as JSON ({one_line(error)}); fetch it again.") from error


def _listed(content: Any, path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON file that is not COCO's: a list, or an object whose values they are, as GQA has it."""
    if isinstance(content, dict):
        content = content.get("annotations", list(content.values()))
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise RecipeError(
            f"{path} is neither COCO's, an object with `images` and `annotations`, nor a list of objects, nor an "
            "object of them; name another file."
        )
    return content


def _coco_rows(files: Sequence[Path], contents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per picture: `image`, `captions` if a file has captions, `objects` if one has instances."""
    rows: dict[Any, dict[str, Any]] = {}
    for path, content in zip(files, contents, strict=True):
        try:
            names = {kind["id"]: kind["name"] for kind in content.get("categories", ())}
            for picture in content["images"]:
                row = rows.setdefault(picture["id"], {"image": picture["file_name"]})
                row.setdefault("objects" if names else "captions", [])
            for note in content["annotations"]:
                row = rows[note["image_id"]]
                if names:
                    row["objects"].append(names[note["category_id"]])
                else:
                    row["captions"].append(note["caption"])
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"{path} is not as COCO's files are (no {one_line(error)}); its pictures need `id` and `file_name`, "
                "its annotations `image_id`, and `caption` or `category_id`."
            ) from error
    complete = max(map(len, rows.values()), default=0)
    return [row for row in rows.values() if len(row) == complete]  # pictures that all files know


def _pictures_of(folder: Path) -> list[Path]:
    """The pictures of a folder that has nothing but pictures."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    pictures = [path for path in files if path.suffix.lower().lstrip(".") in IMAGE_ENDINGS]
    return pictures if len(pictures) == len(files) else []


def _dataset_rows(places: Places) -> Sequence[dict[str, Any]]:
    """The rows of a folder with metadata or of a dataset of the Hub."""
    (name,) = places.names
    refuse_address(name)
    try:
        with writable_cache():
            data: Any = open_dataset(
                name, Path(name).expanduser(), places.config, places.split, places.revision, streaming=False
            )
    except RecipeError as error:
        raise RecipeError(str(error).replace("--dataset_name", places.option)) from error
    return _undecoded(data)


def _undecoded(data: Any) -> Sequence[dict[str, Any]]:
    """The same rows, with pictures as they are stored: nobody has looked at them yet."""
    for column, kind in data.features.items():
        if isinstance(kind, Image):
            data = data.cast_column(column, Image(decode=False))
    return data


def _with_pictures(rows: Iterable[Mapping[str, Any]], folder: Path, name: str) -> list[dict[str, Any]]:
    """The same rows, with a `Picture` under `image`."""
    found, missing = [], []
    for place, row in enumerate(rows):
        picture = picture_in(row, folder, place)
        if picture is None:
            raise RecipeError(
                f"Row {place} of {name} names no picture; it has {', '.join(row) or 'nothing'}, and needs `image`."
            )
        if isinstance(picture.source, Path) and not picture.source.is_file():
            missing.append(picture.name)
        found.append({**row, "image": picture})
    if missing:
        raise RecipeError(
            f"{len(missing)} of {len(found)} pictures of {name} are not in {folder}, {missing[0]} among them; name "
            "their folder with --images."
        )
    return found


def picture_in(row: Mapping[str, Any], folder: Path, place: int) -> Picture | None:
    """The picture of a row, by the first of the names that people use for it; None if it names none."""
    lowered = {column.lower(): value for column, value in row.items()}
    for column in (name for names in PICTURES for name in names):
        value = lowered.get(column)
        if isinstance(value, Mapping):
            if value.get("bytes") is not None:
                return Picture(_shown(folder / str(value.get("path") or place), folder), value["bytes"])
            value = value.get("path")
        if isinstance(value, str) and (content := inline_picture(value)) is not None:
            return Picture(str(place), content)
        if isinstance(value, str) and "://" in value:
            return Picture(value, value)
        if isinstance(value, Path) or (isinstance(value, str) and value):
            return Picture(_shown(folder / value, folder), folder / value)
        if value is not None and not isinstance(value, str):
            return Picture(str(place), value)
    for column in BESIDE:
        if row.get(column) is not None:
            path = _numbered(folder, row[column])
            return Picture(path.name, path)
    return None


def _shown(path: Path, folder: Path) -> str:
    """The name of a picture, which is written down and shown: nobody has to know where on a machine it lies."""
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _numbered(folder: Path, number: Any) -> Path:
    """The file of a picture that is known by a number; COCO's have twelve digits."""
    stems = [str(number), *([f"{int(number):012d}"] if str(number).isdigit() else [])]
    paths = [folder / f"{stem}.{ending}" for stem in reversed(stems) for ending in ("jpg", "png", "jpeg")]
    return next((path for path in paths if path.is_file()), paths[0])
