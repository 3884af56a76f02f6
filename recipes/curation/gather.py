"""Which pictures are curated: a seeded sample of what is there, without damage and without doubles."""

import io
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import PIL.Image

from recipes_minigpt4.curation.picture_hash import SeenHashes, picture_hash
from recipes_minigpt4.curation.source import Keyed, Source, first
from recipes_minigpt4.curation.store import Record, Step
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import replace_bytes, writing
from recipes_minigpt4.utils.progress import phase


KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # files that stay as they are
FOLDER = "picture"  # where copies lie: what happens to the source later changes nothing
ADDRESS_TIMEOUT = 30.0  # seconds
END = ""  # the key of a record that says how far a stream was read
UNREADABLE, SAME_FILE, ALIKE, VANISHED = "cannot be read", "the same file", "looks like another", "vanished since"


@dataclass
class Gathered:
    """
    What was drawn.

    Args:
        rows: the pictures that are curated, each once, in the order drawn: `picture`, their digest, `name` and `file`.
        left_out: the others: `name`, `reason` and `detail`.
        total: how many pictures the source has; None where nobody knows.
        seconds: that it took to look at all of them, in this start or an earlier one.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    total: int | None = None
    seconds: float = 0.0

    @property
    def drawn(self) -> int:
        return len(self.rows) + len(self.left_out)

    def leave_out(self, row: Any, reason: str, detail: str) -> None:
        self.left_out.append({"name": row["name"], "reason": reason, "detail": detail})


def gather(folder: Path, source: Source, count: int | None, distance: int) -> Gathered:
    """
    Draw pictures, look at each once, and keep a copy of those that can be read in `folder/picture`.

    Args:
        folder: of the curation.
        source: where they come from.
        count: how many are drawn; None for all that there are.
        distance: bits of the perceptual hash by which pictures that look alike differ at most; below 0, only equal
            files are left out.

    Raises:
        RecipeError: if nothing is left.
    """
    with Step(folder, "pictures") as step:
        records = _of_stream(folder, step, source, count) if source.is_stream else None
        total = None
        if records is None:
            pictures = source.open()
            total, expected = pictures.total, _least(count, pictures.total)
            with phase("Look at pictures", expected, unit="pictures") as line:
                records = []
                for record in _looked_at(folder, step, source.made, first(pictures, count)):
                    records.append(record)
                    line.reach(len(records))
            if source.is_stream:
                ended = count is None or len(records) < count
                step.put(END, source.made, drawn=len(records), ended=ended)
    gathered = _without_doubles(records, distance)
    gathered.total = total
    if not gathered.rows:
        raise RecipeError(_nothing_left(gathered, source))
    return gathered


def _least(count: int | None, total: int | None) -> int | None:
    known = [number for number in (count, total) if number is not None]
    return min(known) if known else None


def _of_stream(folder: Path, step: Step, source: Source, count: int | None) -> list[Record] | None:
    """What was drawn from a stream before, if that is enough and its copies are there: it is not fetched again."""
    end = step.get(END, source.made)
    if end is None or not (end["ended"] or (count is not None and count <= end["drawn"])):
        return None
    records = [record for record in step.records() if record["made"] == source.made and record["digest"] != END]
    records = records[:count]
    return records if all(_is_there(folder, record) for record in records) else None


def _looked_at(folder: Path, step: Step, made: str, drawn: Iterator[Keyed]) -> Iterator[Record]:
    """A record of each picture; those that were looked at before are not opened, unless they could not be read."""
    for key, picture in drawn:
        record = step.get(key, made)
        if record is None or record["name"] != picture.name or record["file"] is None or not _is_there(folder, record):
            started = time.perf_counter()
            found = {"name": picture.name, **_look(picture, folder)}
            if record is None or any(record[name] != value for name, value in found.items()):
                record = step.put(key, made, **found, seconds=round(time.perf_counter() - started, 4))
        yield record


def _is_there(folder: Path, record: Record) -> bool:
    return record["file"] is None or (folder / record["file"]).is_file()


def _look(picture: Picture, folder: Path) -> dict[str, Any]:
    """Digest, hash and file of a picture; or why there is none."""
    try:
        content = _content_of(picture)
        opened = Picture(picture.name, picture.source if content is None else content).open()
        digest = Picture(picture.name, picture.source if content is None else content).digest
    except Exception as error:  # files, addresses and decoders fail in many ways
        return {"picture": None, "hash": None, "file": None, "detail": reason_of(error)}
    ending = None
    if content is not None:
        with PIL.Image.open(io.BytesIO(content)) as image:
            ending = KEPT_FORMATS.get(image.format or "")
    if ending is None:
        opened.save(buffer := io.BytesIO(), "PNG")
        content = buffer.getvalue()
    file = f"{FOLDER}/{digest}.{ending or 'png'}"
    with writing(folder / file):
        (folder / FOLDER).mkdir(exist_ok=True)
        replace_bytes(folder / file, content or b"")
    return {"picture": digest, "hash": f"{picture_hash(opened):x}", "file": file, "detail": None}


def reason_of(error: Exception) -> str:
    """Why a picture cannot be read, without what it is and where it lies."""
    found = re.search(r"\((.+)\); pass a file", str(error))
    return found[1] if found else getattr(error, "strerror", None) or one_line(error)[:200]


def _content_of(picture: Picture) -> bytes | None:
    """The bytes of a picture's file or address; None for one that never was a file."""
    source = picture.source
    if isinstance(source, bytes):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        asked = urllib.request.Request(source, headers={"User-Agent": "minigpt4"})
        with urllib.request.urlopen(asked, timeout=ADDRESS_TIMEOUT) as answer:
            return bytes(answer.read())
    if isinstance(source, str) and "://" in source:
        with fsspec.open(source, "rb") as file:
            return bytes(file.read())
    return Path(source).read_bytes() if isinstance(source, (str, Path)) else None


def _without_doubles(records: Sequence[Record], distance: int) -> Gathered:
    """Decided anew by every start, from what was seen of each picture: another distance needs no other look."""
    gathered, digests, seen = Gathered(), dict[str, str](), SeenHashes(distance)
    for record in records:
        gathered.seconds += record["seconds"]
        digest = record["picture"]
        if digest is None:
            gathered.leave_out(record, UNREADABLE, record["detail"])
        elif digest in digests:
            gathered.leave_out(record, SAME_FILE, digests[digest])
        elif (other := seen.find(int(record["hash"], 16))) is not None:
            gathered.leave_out(record, ALIKE, other)
        else:
            digests[digest] = record["name"]
            seen.add(int(record["hash"], 16), record["name"])
            gathered.rows.append({"picture": digest, "name": record["name"], "file": record["file"]})
    return gathered


def _nothing_left(gathered: Gathered, source: Source) -> str:
    if not gathered.left_out:
        return f"{source.name} holds no pictures."
    reasons = Counter(one["reason"] for one in gathered.left_out)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
    one = gathered.left_out[0]
    remedy = "" if source.images else "; if a table names them, --images tells where they are"
    why = f"{told}; {one['name']}: {one['detail']}"
    return f"None of {gathered.drawn} pictures of {source.name} can be used ({why}){remedy}."
