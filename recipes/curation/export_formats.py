"""The forms in which rows are exported. Each is read by stage 2, and by what else reads such data."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from datasets import Features, Image, List, Value

from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.curation.provenance import ExportedRow, Makers, provenance
from recipes_minigpt4.data.formatting import INSTRUCTIONS
from recipes_minigpt4.utils.errors import RecipeError, one_line


QUALITY = 95  # of a JPEG that is made of another file
SHARD = 400_000_000  # bytes of pictures in a file of a table
GROUP = 100  # rows that are written at a time


def write_cc_sbu_align(folder: Path, source: Path, rows: Sequence[ExportedRow], makers: Makers) -> None:
    """The original's: `filter_cap.json`, and `image/ID.jpg`, made new only where a file is no JPEG."""
    (folder / "image").mkdir()
    for one in rows:
        path = folder / "image" / f"{one.number}.jpg"
        if one.row.file.lower().endswith((".jpg", ".jpeg")):
            _copy(source / one.row.file, path)
        else:
            open_image(_read(source / one.row.file), "white").save(path, "JPEG", quality=QUALITY, subsampling=0)
    annotations = [{"image_id": str(one.number), "caption": one.row.text} for one in rows]
    _write(folder / "filter_cap.json", json.dumps({"annotations": annotations}, ensure_ascii=False))


def write_imagefolder(folder: Path, source: Path, rows: Sequence[ExportedRow], makers: Makers) -> None:
    """The one of `datasets`: pictures as they are, and `metadata.jsonl` with texts and where they come from."""
    (folder / "image").mkdir()
    lines = []
    for one in rows:
        name = f"image/{one.number}{Path(one.row.file).suffix}"
        _copy(source / one.row.file, folder / name)
        lines.append({"file_name": name, "text": one.row.text, **provenance(one, makers)})
    names = dict.fromkeys(name for line in lines for name in line)
    full = [{name: line.get(name) for name in names} for line in lines]
    _write(folder / "metadata.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in full))


def write_parquet(folder: Path, source: Path, rows: Sequence[ExportedRow], makers: Makers) -> None:
    """Tables with pictures in them, as the Hub shows them, and where every row comes from."""
    told = [provenance(one, makers) for one in rows]
    names = dict.fromkeys(name for of_row in told for name in of_row)
    kinds = {name: "float64" if name.startswith("score_") else "string" for name in names} | {"continued": "bool"}
    features = Features({"image": Image(), "text": Value("string"), **{name: Value(kinds[name]) for name in names}})
    content = (
        {"image": _stored(source, one), "text": one.row.text, **of_row} for one, of_row in zip(rows, told, strict=True)
    )
    _write_tables(folder / "data", content, features, _sizes(source, rows))


def write_messages(folder: Path, source: Path, rows: Sequence[ExportedRow], makers: Makers) -> None:
    """Tables with `images` and `messages`, as TRL trains on them. The question is one of stage 2's four."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"images": List(Image()), "messages": List({"role": Value("string"), "content": List(part)})})
    content = ({"images": [_stored(source, one)], "messages": messages_of(one)} for one in rows)
    _write_tables(folder / "data", content, features, _sizes(source, rows))


def messages_of(one: ExportedRow) -> list[dict[str, Any]]:
    """A chat about a row's picture; which question it begins with, the picture decides."""
    question = INSTRUCTIONS[int(one.row.picture[:8], 16) % len(INSTRUCTIONS)]
    asked = [{"type": "image", "text": None}, {"type": "text", "text": question}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": one.row.text}]},
    ]


WRITERS: dict[str, Callable[[Path, Path, Sequence[ExportedRow], Makers], None]] = {
    "cc_sbu_align": write_cc_sbu_align,
    "imagefolder": write_imagefolder,
    "parquet": write_parquet,
    "messages": write_messages,
}


# ---- files ----------------------------------------------------------------------------------------------------------


def _write_tables(folder: Path, rows: Iterator[dict[str, Any]], features: Features, sizes: Sequence[int]) -> None:
    """Files `train-00000-of-00001.parquet`, each of about `SHARD` bytes of pictures."""
    folder.mkdir()
    counts, room = [0], SHARD
    for size in sizes:
        if room < size and counts[-1]:
            counts.append(0)
            room = SHARD
        counts[-1] += 1
        room -= size
    for number, count in enumerate(counts):
        path = folder / f"train-{number:05d}-of-{len(counts):05d}.parquet"
        with pq.ParquetWriter(path, features.arrow_schema) as writer:
            for start in range(0, count, GROUP):
                group = [next(rows) for _ in range(min(GROUP, count - start))]
                writer.write_table(pa.Table.from_pylist(group, schema=features.arrow_schema))


def _stored(source: Path, one: ExportedRow) -> dict[str, Any]:
    """A picture as `datasets` stores it, under a name that tells its kind."""
    return {"bytes": _read(source / one.row.file), "path": f"{one.number}{Path(one.row.file).suffix}"}


def _sizes(source: Path, rows: Sequence[ExportedRow]) -> list[int]:
    return [_checked(source / one.row.file).stat().st_size for one in rows]


def _read(path: Path) -> bytes:
    return _checked(path).read_bytes()


def _copy(path: Path, target: Path) -> None:
    shutil.copyfile(_checked(path), target)


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise RecipeError(
            f"The picture {path} is gone; put it back, or run `minigpt4 curate` into another folder. Nothing was "
            "exported."
        )
    return path


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(f"{path.name} cannot be written in UTF-8 ({one_line(error)}).") from error
