"""Which pictures are curated: a seeded sample of what is there, without damage and without doubles."""

import io
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image

from recipes_minigpt4.curation.picture_hash import SeenHashes, picture_hash
from recipes_minigpt4.curation.source import Source
from recipes_minigpt4.curation.store import Step, fingerprint
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.errors import one_line
from recipes_minigpt4.utils.progress import phase


KEPT_FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # files that stay as they are


def gather(folder: Path, source: Source, count: int | None, distance: int) -> Counter[str]:
    """
    Draw pictures, look at each, and keep those that can be used in `folder/picture`.

    Args:
        folder: of the curation.
        source: where they come from.
        count: how many are drawn; None for all that there are.
        distance: bits of the perceptual hash by which pictures that look alike differ at most; below 0, only equal
            files are left out.

    Returns:
        `kept`, and reason → how many were left out for it.
    """
    made = fingerprint(source=source.name, seed=source.seed, count=count, distance=distance)
    (folder / "picture").mkdir(exist_ok=True)
    counts: Counter[str] = Counter()
    digests: dict[str, str] = {}
    seen = SeenHashes(distance)
    with Step(folder, "pictures") as step, phase("Look at pictures", count or 0) as line:
        for place, picture in enumerate(islice(source.pictures(), count)):
            record = step.get(picture.name, made)
            if record is None:
                record = step.put(picture.name, made, **_look(picture, folder, digests, seen))
            if record["reason"] is None:
                digests[record["picture"]] = picture.name
                seen.add(int(record["hash"], 16), picture.name)
            counts[record["reason"] or "kept"] += 1
            line.reach(place + 1)
    return counts


def gathered(folder: Path) -> list[dict[str, Any]]:
    """The pictures that are curated: `picture`, their digest, `name` and `file`; each once, in the order drawn."""
    with Step(folder, "pictures") as step:
        records = step.records()
    last = records[-1]["made"] if records else None
    kept = [record for record in records if record["made"] == last and record["reason"] is None]
    return [{"picture": record["picture"], "name": record["digest"], "file": record["file"]} for record in kept]


def _look(picture: Picture, folder: Path, digests: dict[str, str], seen: SeenHashes) -> dict[str, Any]:
    """Digest, hash and file of a picture; or why it is left out."""
    nothing = {"picture": None, "hash": None, "file": None}
    try:
        opened, digest = picture.open(), picture.digest
    except (ValueError, OSError) as error:
        return {**nothing, "reason": "cannot be read", "detail": one_line(error)}
    if digest in digests:
        return {**nothing, "reason": "the same file", "detail": digests[digest]}
    looks = picture_hash(opened)
    if seen.distance >= 0 and (other := seen.find(looks)) is not None:
        return {**nothing, "reason": "looks like another", "detail": other}
    file = _store(picture, opened, digest, folder)
    return {"picture": digest, "hash": f"{looks:x}", "file": file, "reason": None}


def _store(picture: Picture, opened: PIL.Image.Image, digest: str, folder: Path) -> str:
    """Keep a picture beside what will be said about it: its own file if browsers and the recipes read it."""
    content = picture.source if isinstance(picture.source, bytes) else None
    if isinstance(picture.source, (str, Path)):
        content = Path(picture.source).read_bytes()
    ending = None
    if content is not None:
        with PIL.Image.open(io.BytesIO(content)) as image:
            ending = KEPT_FORMATS.get(image.format or "")
    file = f"picture/{digest}.{ending or 'png'}"
    if ending is None:
        opened.save(folder / file)
    else:
        (folder / file).write_bytes(content or b"")
    return file
