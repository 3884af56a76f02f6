"""Samples as the web has them: what is wrong with each, and tar files that hold them."""

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from recipes_minigpt4.data import bad_samples


def jpeg(number: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
    """A picture of one colour, another one for every number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 90)).save(file, "JPEG")
    return file.getvalue()


def bomb() -> bytes:
    """A small PNG that says to be 30,000 pixels wide and high."""
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(bytes(1000)), b"IEND": b""}
    parts = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# What is wrong → the cause that it is counted under.
PICTURES = {
    "truncated": (jpeg()[:-60], bad_samples.TRUNCATED),
    "cut in its header": (jpeg()[:20], bad_samples.NO_IMAGE),
    "zero bytes": (b"", bad_samples.EMPTY_FILE),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", bad_samples.HTML),
    "noise": (bytes(range(200)), bad_samples.NO_IMAGE),
    "a bomb": (bomb(), bad_samples.BOMB),
}
CAPTIONS = {"none": (None, bad_samples.NO_CAPTION), "blank": (" \n", bad_samples.NO_CAPTION)}


def write_tar(path: Path, samples: Sequence[tuple[str, Mapping[str, bytes]]], mode: str = "w") -> Path:
    """Write samples, a name and ending → content each, as webdataset does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, members in samples:
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def sample(number: int, caption: object = ..., picture: bytes | None = None) -> tuple[str, dict[str, bytes]]:
    """A sample whose caption is `number N`, or another one."""
    text = {"caption": f"number {number}" if caption is ... else caption, "width": 64}
    picture = jpeg(number) if picture is None else picture
    return f"{number:06d}", {"jpg": picture, "json": json.dumps(text).encode()}
