"""People pick: `minigpt4 curate review DIR` writes or serves the page, reads what they decided, and compares them.

minigpt4 curate review curated                                   # curated/review.html
minigpt4 curate review curated --serve                           # decisions go to curated/decisions.jsonl at once
minigpt4 curate review curated --decisions anna.jsonl ben.jsonl  # agreement, and what is to be settled
"""

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from recipes_minigpt4.curation.options import build_review_parser
from recipes_minigpt4.curation.review_page import DROP, EDIT, KEEP, case_of, picture_uri, render_review, shown_of
from recipes_minigpt4.curation.review_server import ReviewServer
from recipes_minigpt4.curation.rows import CuratedRow, read_rows
from recipes_minigpt4.evaluation.judging import agreement
from recipes_minigpt4.utils.decision_page import read_decisions
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import replace_text
from recipes_minigpt4.utils.journal import Journal
from recipes_minigpt4.utils.progress import phase
from recipes_minigpt4.utils.text import format_table, heading


PAGE, CONFLICTS, JOURNAL = "review.html", "conflicts", "decisions.jsonl"
LISTED = 20  # conflicts on the terminal
LARGE = 100 * 2**20  # bytes of a page that browsers open slowly


@dataclass(frozen=True)
class Decision:
    """What a person decided about a row: `keep`, `drop`, or `edit` with the new text."""

    answer: str
    text: str | None = None


def main(arguments: Sequence[str]) -> dict[str, Any] | None:
    """
    Run the command.

    Returns:
        With several files of decisions the agreement of each two and the conflicts; otherwise None.

    Raises:
        RecipeError: for a folder, files and a port that are not as they have to be.
    """
    args = build_review_parser().parse_args(arguments)
    folder = args.folder.expanduser()
    rows = read_rows(folder)
    paths = [path.expanduser() for path in args.decisions]
    if args.serve:
        serve(folder, rows, paths, args.port)
    elif len(paths) > 1:
        return compare(folder, rows, paths)
    else:
        write_page(folder, rows, paths)
    return None


# ---- what comes back ------------------------------------------------------------------------------------------------


def read_review(paths: Sequence[Path], rows: Sequence[CuratedRow]) -> dict[str, Decision]:
    """
    What people decided about rows.

    Where files decide a row differently the last one counts, and how many those are is told, as is how many decisions
    are about texts that the rows do not have any more, which do not count.

    Args:
        paths: files that the page has saved, or journals of `--serve`.
        rows: those of the curation as they are now.

    Returns:
        Digest of a picture → the decision on its row; rows that nobody decided are not in it.

    Raises:
        RecipeError: if a file is none, belongs to another curation, or was changed after it was saved.
    """
    decided: dict[str, Decision] = {}
    overruled = set()
    for of_file in read_files(paths, rows).values():
        overruled |= {picture for picture, one in of_file.items() if decided.get(picture, one) != one}
        decided |= of_file
    if overruled:
        print(
            f"{len(overruled)} rows are decided differently by the files of decisions; the one named last counts.",
            flush=True,
        )
    return decided


def read_files(paths: Sequence[Path], rows: Sequence[CuratedRow]) -> dict[str, dict[str, Decision]]:
    """
    Name of each file → digest of a picture → decision.

    Raises:
        RecipeError: see `read_review`; also if a file is named twice.
    """
    for place, path in enumerate(paths):
        if path.resolve() in {one.resolve() for one in paths[:place]}:
            raise RecipeError(f"--decisions names {path} twice; a second person needs a file of their own.")
    names = [path.name for path in paths]
    called = [path.name if names.count(path.name) == 1 else str(path) for path in paths]
    return {name: _read_file(path, rows) for name, path in zip(called, paths, strict=True)}


def _read_file(path: Path, rows: Sequence[CuratedRow]) -> dict[str, Decision]:
    decisions = read_decisions(path)
    pictures = {case_of(row): row.picture for row in rows}
    decided = {case: Decision(answer, decisions.texts.get(case)) for case, answer in decisions.answers.items()}
    odd = [one for one in decided.values() if (one.answer == EDIT) != bool((one.text or "").strip())]
    if changed := decisions.changed + len(odd):
        raise RecipeError(
            f"{changed} of the {decisions.changed + len(decided)} decisions in {path} were changed after they were "
            "saved; take the file as the page has saved it, and change decisions on the page."
        )
    if not {shown.get("picture") for shown in decisions.shown.values()} & set(pictures.values()):
        raise RecipeError(
            f"None of the {len(decided)} decisions in {path} is about a picture of this folder; name the folder that "
            "its page was made of."
        )
    known = {case: one for case, one in decided.items() if case in pictures}
    if len(known) < len(decided):
        print(
            f"{len(decided) - len(known)} of the {len(decided)} decisions in {path} are about texts that the rows "
            "no longer have; they do not count.",
            flush=True,
        )
    return {pictures[case]: one for case, one in known.items() if one.answer in (KEEP, DROP, EDIT)}


def _values(decided: Mapping[str, Decision], rows: Sequence[CuratedRow]) -> dict[str, str]:
    """Decisions as the page has them: case → answer, and the text of an edit."""
    cases = {row.picture: case_of(row) for row in rows}
    return {cases[picture]: f"{one.answer} {one.text or ''}".rstrip() for picture, one in decided.items()}


# ---- the page -------------------------------------------------------------------------------------------------------


def write_page(folder: Path, rows: Sequence[CuratedRow], paths: Sequence[Path] = ()) -> Path:
    """Write `review.html`, which begins with the decisions of a file if one is named."""
    decided = read_review(paths, rows) if paths else {}
    path = folder / PAGE
    size = _write(path, f"Review: {folder.resolve().name}", folder, rows, _file_of(folder), decided)
    if decided:
        print(f"{_counts(decided.values())}, of {len(rows)} rows.")
    print(f"Open {path} in a browser ({len(rows)} rows, {size / 2**20:.1f} MB).")
    if size > LARGE:
        print(
            f"Browsers open so large a page slowly; `minigpt4 curate review {folder} --serve` sends what is looked at."
        )
    print(
        f"The button Save gives {_file_of(folder)}; name it to `minigpt4 curate export {folder} --decisions FILE`.",
        flush=True,
    )
    return path


def _write(
    path: Path,
    title: str,
    folder: Path,
    rows: Sequence[CuratedRow],
    file: str,
    decided: Mapping[str, Decision],
    notes: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Write a page with its pictures; returns its size in bytes."""
    pictures = {}
    with phase("Look at pictures", len(rows)) as line:
        for place, row in enumerate(rows, 1):
            pictures[row.picture] = picture_uri(folder / row.file)
            line.reach(place)
    if missing := sum(uri is None for uri in pictures.values()):
        print(f"{missing} of {len(rows)} pictures are not in {folder / 'picture'} any more; the page says so.")
    _replace(path, render_review(title, rows, pictures, file, kept=_values(decided, rows), notes=notes))
    return path.stat().st_size


def _replace(path: Path, text: str) -> None:
    try:
        replace_text(path, text)
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be written ({error.strerror or error}); make room, or mend the folder."
        ) from error


def _file_of(folder: Path) -> str:
    """What the page saves: the browser keeps the decisions of each such name apart."""
    return f"decisions-{folder.resolve().name}.jsonl"


def _counts(decisions: Any) -> str:
    counts = Counter(one.answer for one in decisions)
    return f"{counts[KEEP]} kept, {counts[DROP]} dropped, {counts[EDIT]} edited"


# ---- served ---------------------------------------------------------------------------------------------------------


def serve(folder: Path, rows: Sequence[CuratedRow], paths: Sequence[Path] = (), port: int = 0) -> None:
    """
    Serve the page until Ctrl-C; every decision is a line of a journal at once.

    Args:
        folder: of the curation.
        rows: its rows.
        paths: the journal, if it is not `decisions.jsonl` in the folder.
        port: 0 for a free one.

    Raises:
        RecipeError: if the journal is of another curation or cannot be written, or the port cannot be used.
    """
    if len(paths) > 1:
        raise RecipeError(
            "--serve writes into one file; name one with --decisions, and start it again for another person."
        )
    path = paths[0] if paths else folder / JOURNAL
    pictures = {row.picture: f"picture/{row.picture}" for row in rows}

    def page() -> str:
        decided = read_review([path], rows) if journal.lines else {}
        title = f"Review: {folder.resolve().name}"
        return render_review(title, rows, pictures, _file_of(folder), kept=_values(decided, rows), served=True)

    with Journal(path) as journal:
        page()  # so that a file that is none is told now
        with ReviewServer(folder, rows, journal, page, port) as server:
            print(
                f"Open {server.address}\nThe address works on this machine alone. Decisions are written into {path}. "
                "Ctrl-C ends.",
                flush=True,
            )
            with contextlib.suppress(KeyboardInterrupt):
                server.serve_forever()
    if not journal.lines:
        path.unlink()
        print("\nNothing was decided.", flush=True)
        return
    decided = read_review([path], rows)
    print(
        f"\n{_counts(decided.values())}, of {len(rows)} rows; {len(rows) - len(decided)} are left. The same command "
        f"goes on, and `minigpt4 curate export {folder} --decisions {path}` uses them.",
        flush=True,
    )


# ---- two people -----------------------------------------------------------------------------------------------------


def compare(folder: Path, rows: Sequence[CuratedRow], paths: Sequence[Path]) -> dict[str, Any]:
    """
    Tell how far people agree, and write what they have to settle: `conflicts.jsonl`, and a page of these rows.

    Returns:
        `agreement` of each two; and `conflicts`, the lines of the file.
    """
    files = read_files(paths, rows)
    pairs = []
    for one, other in combinations(files, 2):
        said = [[(decided[row.picture].answer if row.picture in decided else None,) for row in rows] for decided in
                (files[one], files[other])]  # fmt: skip
        pairs.append({"one": one, "other": other, **agreement(*said)})
    heading("Agreement\n")
    table = [
        [
            f"{pair['one']}, {pair['other']}",
            str(pair["answers"]),
            _number(pair["same"], "{:.0%}"),
            _number(pair["kappa"]),
        ]
        for pair in pairs
    ]
    print(format_table(["", "rows of both", "same", "κ"], table))
    conflicts = find_conflicts(rows, files)
    _tell_conflicts(folder, rows, conflicts)
    return {"agreement": pairs, "conflicts": conflicts}


def find_conflicts(rows: Sequence[CuratedRow], files: Mapping[str, Mapping[str, Decision]]) -> list[dict[str, Any]]:
    """The rows that people decide differently, two texts of one row among them, with what each decided."""
    conflicts = []
    for row in rows:
        told = {name: decided[row.picture] for name, decided in files.items() if row.picture in decided}
        if len(set(told.values())) > 1:
            said = {
                name: {"answer": one.answer, **({"text": one.text} if one.text else {})} for name, one in told.items()
            }
            conflicts.append({"case": case_of(row), **shown_of(row), "file": row.file, "decisions": said})
    return conflicts


def _tell_conflicts(folder: Path, rows: Sequence[CuratedRow], conflicts: Sequence[Mapping[str, Any]]) -> None:
    file, page = folder / f"{CONFLICTS}.jsonl", folder / f"{CONFLICTS}.html"
    if not conflicts:
        for path in (file, page):  # of an earlier comparison
            path.unlink(missing_ok=True)
        print("\nThey decide every row alike that both have decided.", flush=True)
        return
    _replace(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in conflicts))
    heading(f"{len(conflicts)} rows that they decide differently\n")
    for line in conflicts[:LISTED]:
        print(f"{_short(line['shown'], 70)}\n" + "".join(f"    {told}\n" for told in _said(line)), end="")
    if len(conflicts) > LISTED:
        print(f"and {len(conflicts) - LISTED} more in {file}")
    notes = {line["case"]: _said(line) for line in conflicts}
    left = [row for row in rows if case_of(row) in notes]
    settled = f"settled-{folder.resolve().name}.jsonl"
    _write(page, f"Settle: {folder.resolve().name}", folder, left, settled, {}, notes)
    print(
        f"\nAll are in {file}. Settle them on {page}, save {settled}, and name it last to `minigpt4 curate export "
        f"{folder} --decisions FILES`: the last file counts.",
        flush=True,
    )


def _said(conflict: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {one['answer']}" + (f" – {_short(one['text'], 300)}" if "text" in one else "")
        for name, one in conflict["decisions"].items()
    ]


def _short(text: str, length: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def _number(value: float | None, how: str = "{:.2f}") -> str:
    return "–" if value is None else how.format(value)
