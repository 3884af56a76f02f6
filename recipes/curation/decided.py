"""What people decided about rows, as the export reads it: a file of JSON lines with `case`, `answer` and, for an edit,
the new `text`."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from recipes_minigpt4.curation.picking import DROP, EDIT, KEEP, Decision
from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.utils.decision_page import ANSWER, CASE, SKIP, hash_of
from recipes_minigpt4.utils.errors import RecipeError, one_line


TORN = "torn"  # what people who disagree have decided together


def case_of(row: CuratedRow) -> str:
    """What a person decides on, as one word: this picture with this text."""
    return hash_of({"picture": row.picture, "shown": row.text or ""})


def decisions_about(rows: Sequence[CuratedRow], files: Sequence[Path]) -> tuple[dict[str, Decision], int]:
    """
    What people decided about rows. Of one file the last line about a row counts; those who skip say nothing.

    Args:
        rows: as `minigpt4 curate` leaves them.
        files: one for each person.

    Returns:
        Digest of a picture → decision, and how many lines are about texts that are no longer there.

    Raises:
        RecipeError: for what is no such file, and if none of its lines is about these rows.
    """
    cases = {case_of(row): row.picture for row in rows}
    told: dict[str, list[Decision]] = defaultdict(list)
    others = 0
    for path in files:
        decided = _read(path)
        about = {case: decision for case, decision in decided.items() if case in cases}
        if not about:
            raise RecipeError(
                f"None of the {len(decided)} decisions in {path} is about the rows of this folder; name the file that "
                "was saved for them."
            )
        others += len(decided) - len(about)
        for case, decision in about.items():
            if decision.answer != SKIP:
                told[cases[case]].append(decision)
    return {digest: said[0] if len(set(said)) == 1 else Decision(TORN) for digest, said in told.items()}, others


def _read(path: Path) -> dict[str, Decision]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The decisions {path} cannot be read ({one_line(error)}).") from error
    decided: dict[str, Decision] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            case, answer, text = str(row[CASE]), row[ANSWER], row.get("text")
        except (ValueError, KeyError, TypeError, AttributeError):
            case, answer, text = "", None, None
        edits = answer == EDIT and isinstance(text, str) and bool(text.strip())
        if not edits and answer not in (KEEP, DROP, SKIP):
            raise RecipeError(f"Line {number} of {path} is no decision; name the file that the page has saved.")
        decided[case] = Decision(answer, text if edits else None)
    if not decided:
        raise RecipeError(f"{path} holds no decisions; decide some on the page and save them.")
    return decided
