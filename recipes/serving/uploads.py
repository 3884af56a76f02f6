"""Pictures that people send to the page: opened with limits, and kept in a folder that ends with the program."""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import PIL.Image

from recipes_minigpt4.serving.sent_pictures import open_sent
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.picture_fetching import PictureError


ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")  # what cameras, screens and pages make
MEGAPIXELS = 50.0  # the most of a picture (10⁶ pixels)
MOST_EXAMPLES = 24  # pictures that people may begin with
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
        RecipeError: if there are too many, or one of them was not sent.
        PictureError: if one of them is no picture, or too large.
    """
    if len(paths) > MOST_PICTURES:
        raise RecipeError(f"A question may have {MOST_PICTURES} pictures, and these are {len(paths)}; leave some out.")
    for path in paths:
        if not Path(path).resolve().is_relative_to(folder):
            raise RecipeError(f"{Path(path).name} was not uploaded; send the picture itself.")
    return [open_picture(Path(path)) for path in paths]


def open_picture(path: Path) -> PIL.Image.Image:
    """
    Open a picture that somebody else chose, upright and in RGB, on white where it is transparent.

    Raises:
        PictureError: if it is none, or too large.
    """
    return open_sent(path.read_bytes(), path.name, MEGAPIXELS, "white")


def find_examples(folder: Path) -> Iterator[tuple[Path, PIL.Image.Image]]:
    """
    The pictures of a folder that people may begin with; those that cannot be opened are told and left out.

    Raises:
        RecipeError: if there are none.
    """
    if not folder.is_dir():
        raise RecipeError(f"--examples {folder} is no folder; name one with pictures.")
    found = False
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)[:MOST_EXAMPLES]:
        try:
            picture = open_picture(path)
        except PictureError as error:
            print(f"An example is left out: {error}", file=sys.stderr)
            continue
        found = True
        yield path, picture
    if not found:
        raise RecipeError(f"There is no picture in {folder}; put some there, or leave --examples out.")


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
