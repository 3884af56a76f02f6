"""What each step of a curation has made, on disk: a growing file per step, keyed by picture and by how it was made.

    pictures.jsonl    which pictures were drawn, and what they look like
    picture/          a copy of each, DIGEST.jpg or as it came
    drafts.jsonl      what the model said about each
    mended.jsonl      what a language model made of it
    answers/          every raw answer of that language model
    scores.jsonl      numbers about what came out
    decisions.jsonl   what people decided

Another prompt, model or sampling is another fingerprint: that step is done again, and those before it are not.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal


Record = Mapping[str, Any]


def fingerprint(**made: Any) -> str:
    """How something was made, as one word."""
    return hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode()).hexdigest()[:16]


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """
    Keep other processes from curating in the same folder.

    Raises:
        RecipeError: if one does.
    """
    lock = FileLock(folder / ".curate.lock", timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise RecipeError(
            f"Another process curates in {folder}; wait until it has ended, or name another folder with --output_dir."
        ) from None
    except OSError as error:
        raise RecipeError(
            f"--output_dir {folder} cannot be locked ({error.strerror}); name a folder on another disk."
        ) from error
    try:
        yield
    finally:
        lock.release()


class Step:
    """
    The records of a step.

    Args:
        folder: of the curation.
        name: of the step's file, without ending.

    Raises:
        RecipeError: see `Journal`; also for a file of something else.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._journal = Journal(folder / f"{name}.jsonl")
        try:
            self._known = {(line["digest"], line["made"]): line for line in self._journal.lines}
        except KeyError as error:
            self._journal.close()
            raise RecipeError(
                f"{folder / name}.jsonl has lines without {error}, so another program or version wrote it; name "
                "another folder with --output_dir."
            ) from None

    def get(self, digest: str, made: str) -> Record | None:
        """What was made of a picture in this way; None if nothing was yet."""
        return self._known.get((digest, made))

    def put(self, digest: str, made: str, **record: Any) -> Record:
        """Write down what was made of a picture."""
        line = {"digest": digest, "made": made, **record}
        self._journal.append(line)
        self._known[digest, made] = line
        return line

    def made_otherwise(self, digests: Collection[str], made: str) -> int:
        """How many of these pictures have a record of another way."""
        return len({digest for digest, how in self._known if how != made and digest in digests})

    def records(self) -> list[Record]:
        """All records, in the order in which they were first made; of equal keys the last."""
        return list(self._known.values())

    def close(self) -> None:
        self._journal.close()

    def __enter__(self) -> "Step":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
