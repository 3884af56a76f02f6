"""Small copies of the pictures that models were asked about, so that pages can be made from replies alone."""

import base64
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.utils.errors import RecipeError


FOLDER = "pictures"
SIDE = 384  # pixels of the longer side, enough for a person to judge what is said


def keep_pictures(folder: Path, questions: Iterable[Question]) -> None:
    """
    Write a small copy of each picture that has none yet; those that cannot be read are left out.

    Raises:
        RecipeError: if there is no room for them.
    """
    for digest, picture in {question.picture.digest: question.picture for question in questions}.items():
        path = picture_path(folder, digest)
        if path.is_file():
            continue
        try:
            small = picture.open()
        except ValueError:
            continue  # told where the models are asked
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            small.save(draft, format="JPEG", quality=88, subsampling=0)
            os.replace(draft, path)
        except OSError as error:
            draft.unlink(missing_ok=True)
            raise RecipeError(
                f"{path} cannot be written ({error.strerror or error}); make room and run the command again. All "
                "replies are kept."
            ) from error


def picture_path(folder: Path, digest: str) -> Path:
    """Where the small copy of a picture is."""
    return folder / FOLDER / f"{digest}.jpg"


def picture_uri(folder: Path, digest: str) -> str | None:
    """The small copy as a data URI; None if there is none."""
    try:
        content = picture_path(folder, digest).read_bytes()
    except OSError:
        return None
    return "data:image/jpeg;base64," + base64.b64encode(content).decode("ascii")
