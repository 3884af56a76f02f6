"""What each step of a curation has made, on disk: a growing file per step, keyed by picture and by how it was made.

    pictures.jsonl    which pictures were drawn, and why others were left out
    picture/          the pictures that are curated, DIGEST.jpg or as they came
    drafts.jsonl      what the model said about each
    mended.jsonl      what a language model made of it
    scores.jsonl      numbers about what came out
    decisions.jsonl   what people decided

Another prompt, model or sampling is another fingerprint: that step is done again, and those before it are not.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.journal import Journal


Record = Mapping[str, Any]


def fingerprint(**made: Any) -> str:
    """How something was made, as one word."""
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Step:
    """
    The records of a step.

    Args:
        folder: of the curation.
        name: of the step's file, without ending.

    Raises:
        RecipeError: see `Journal`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._journal = Journal(folder / f"{name}.jsonl")
        self._known = {(line["digest"], line["made"]): line for line in self._journal.lines}

    def get(self, digest: str, made: str) -> Record | None:
        """What was made of a picture in this way; None if nothing was yet."""
        return self._known.get((digest, made))

    def put(self, digest: str, made: str, **record: Any) -> Record:
        """Write down what was made of a picture."""
        line = {"digest": digest, "made": made, **record}
        self._journal.append(line)
        self._known[digest, made] = line
        return line

    def made_otherwise(self, made: str) -> int:
        """How many pictures have a record of another way and none of this one."""
        done = {digest for digest, how in self._known if how == made}
        return len({digest for digest, _ in self._known} - done)

    def records(self) -> list[Record]:
        """All records, in the order in which they were made; of equal keys the last."""
        return list(self._known.values())

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
