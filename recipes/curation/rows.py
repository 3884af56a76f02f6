"""Rows with their whole history, as `rows.jsonl` has them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import replace_bytes
from recipes_minigpt4.utils.journal import read_journal


ROWS = "rows.jsonl"


@dataclass(frozen=True)
class CuratedRow:
    """
    A picture and all that was made of it.

    Args:
        picture: its SHA-256.
        name: what it was called where it came from.
        file: its path in the folder.
        draft: what the model said; `continued` tells whether it was asked to go on.
        mended: what the mender made of it; None if it gave no answer.
        text: what the row goes on with.
        verdicts: rule → why it says that the text is no good.
        scores: name → number; higher is better.
    """

    picture: str
    name: str
    file: str
    draft: str
    continued: bool
    mended: str | None
    text: str | None
    verdicts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def write_rows(folder: Path, rows: Sequence[CuratedRow]) -> None:
    """Write `rows.jsonl` anew."""
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    replace_bytes(folder / ROWS, text.encode("utf-8", "backslashreplace"))  # see Journal.append


def read_rows(folder: Path) -> list[CuratedRow]:
    """
    The rows of a folder.

    Raises:
        RecipeError: if it has none.
    """
    if not (folder / ROWS).is_file():
        raise RecipeError(f"{folder} has no {ROWS}; run `minigpt4 curate --output_dir {folder}` first.")
    try:
        return [CuratedRow(**line) for line in read_journal(folder / ROWS)]
    except TypeError as error:
        raise RecipeError(f"{folder / ROWS} is of another version; run `minigpt4 curate` again.") from error
