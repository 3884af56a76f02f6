"""Pictures that people send: opened with limits, and kept in a folder that ends with the program."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.utils.errors import RecipeError, one_line


FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")  # what cameras, screens and pages make
ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
MOST_PIXELS = 50_000_000  # of a picture; larger ones are refused before they are decoded
MOST_PICTURES = 10  # of a question
SHOWN_SIDE = 768  # pixels of the longer side of what a page shows


@contextlib.contextmanager
def upload_folder() -> Iterator[Path]:
    """Have Gradio keep what people send, and what it shows, in a new folder, and remove it at the end."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="minigpt4-app-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder).resolve())
        try:
            yield Path(folder).resolve()
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


def kept_folder() -> Path:
    """Where Gradio keeps what people send."""
    return Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio").resolve()


def open_uploads(paths: Sequence[str], folder: Path) -> list[PIL.Image.Image]:
    """
    Open the pictures of a question, upright and in RGB.

    Args:
        paths: files that Gradio says were sent.
        folder: that of `upload_folder`, in which they have to lie.

    Raises:
        RecipeError: if there are too many, or one of them is no picture, too large, or was not sent.
    """
    if len(paths) > MOST_PICTURES:
        raise RecipeError(f"A question may have {MOST_PICTURES} pictures, and these are {len(paths)}; leave some out.")
    for path in paths:
        if not Path(path).resolve().is_relative_to(folder):
            raise RecipeError(f"{Path(path).name} was not uploaded; send the picture itself.")
    return [open_picture(Path(path)) for path in paths]


def open_picture(path: Path) -> PIL.Image.Image:
    """
    Open a picture that somebody else chose, upright and in RGB.

    Raises:
        RecipeError: if it is none, or too large.
    """
    try:
        picture: Any = PIL.Image.open(path, formats=FORMATS)
    except PIL.Image.DecompressionBombError:
        raise RecipeError(_too_large(path)) from None
    except Exception:  # Pillow's decoders raise errors of many types
        raise RecipeError(f"{path.name} is no picture that can be opened; send a JPEG, PNG or WebP file.") from None
    with picture:
        if picture.width * picture.height > MOST_PIXELS:
            raise RecipeError(_too_large(path))
        try:
            opened = open_image(picture)
        except ValueError as error:
            raise RecipeError(
                f"{path.name} cannot be read to its end ({one_line(error.__cause__ or error)})."
            ) from None
        return opened.copy() if opened is picture else opened


def _too_large(path: Path) -> str:
    return f"{path.name} has more than {MOST_PIXELS // 10**6} million pixels; make it smaller and send it again."


def save_shown(picture: PIL.Image.Image, folder: Path) -> str:
    """
    Write a small copy of a picture for the page, without anything but its pixels.

    Args:
        picture: a picture in RGB.
        folder: that of `upload_folder`.

    Returns:
        Its path.
    """
    small = picture.copy()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    small.info = {}
    name = hashlib.sha256(repr(small.size).encode() + small.tobytes()).hexdigest()
    path = folder / "shown" / name / "picture.webp"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{os.getpid()}-{id(small)}.part")
        small.save(part, format="WEBP", quality=85)
        part.replace(path)
    return str(path)
