"""Write what stage 2 reads, and its card; nothing is filtered before.

minigpt4 curate export curated --to parquet --rules -drifted --keep 3500 --by score
minigpt4 curate export curated --to cc_sbu_align --push_to_hub you/your-data --private
"""

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.utils import HFValidationError, validate_repo_id

from recipes_minigpt4.curation.data_card import Told, render_data_card
from recipes_minigpt4.curation.decided import decisions_about
from recipes_minigpt4.curation.export_formats import WRITERS
from recipes_minigpt4.curation.features import read_features
from recipes_minigpt4.curation.options import build_export_parser
from recipes_minigpt4.curation.picking import Picks, pick, rules_of
from recipes_minigpt4.curation.provenance import FUNNEL, ExportedRow, Makers, read_made, read_makers
from recipes_minigpt4.curation.rows import read_rows
from recipes_minigpt4.hub.publish import check_secrets, explain, make_repository, upload
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import write_json
from recipes_minigpt4.utils.redaction import holds_secret
from recipes_minigpt4.utils.text import format_table, heading


MARK = ".curation-export.json"  # in a folder that an export has written, and may write anew
DECISIONS = "decisions.jsonl"  # of the folder: what `minigpt4 curate review --serve` writes
PUBLISHED = ("README.md", "filter_cap.json", "metadata.jsonl", "image/*", "data/*")


def main(arguments: Sequence[str]) -> Path:
    """
    Export, and push if asked to; returns the folder.

    Raises:
        RecipeError: if there is nothing to export, the folder is something else's, or it cannot be pushed.
    """
    return export(parse(arguments))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the arguments.

    Raises:
        RecipeError: if they are not understood, or contradict each other.
    """
    args = build_export_parser().parse_args(arguments)
    args.rules = rules_of(args.rules)
    if args.private and not args.push_to_hub:
        raise RecipeError("--private is about a repository; name it with --push_to_hub.")
    if args.push_to_hub:
        try:
            validate_repo_id(args.push_to_hub)
        except HFValidationError as error:
            raise RecipeError(
                f"--push_to_hub {args.push_to_hub} is no name of a repository, such as you/your-data: "
                f"{one_line(error)}."
            ) from error
    return args


def export(args: argparse.Namespace) -> Path:
    """Choose rows, write them and their card, and push."""
    folder = args.folder.expanduser()
    rows = read_rows(folder)
    files = args.decisions or [path for path in (folder / DECISIONS,) if path.is_file()]
    decisions, others = decisions_about(rows, files) if files else ({}, 0)
    if others:
        print(f"{others} decisions are about texts that are no longer there; they do not count.", flush=True)
    picks = Picks(
        rules=args.rules, decisions=decisions, text=args.text, keep=args.keep, keep_share=args.keep_share,
        by=args.by, score=args.score, min_score=args.min_score, seed=args.seed,
    )  # fmt: skip
    picked, reasons = pick(rows, picks, lambda left: read_features(folder, left))
    numbers = {row.picture: number for number, row in enumerate(rows)}
    said = {digest: decision.answer for digest, decision in decisions.items()}
    exported = [ExportedRow(numbers[row.picture], row, said.get(row.picture)) for row in picked]
    target = (args.output_dir or folder / "export" / args.to).expanduser()
    makers = read_makers(folder)
    told = Told(
        exported, len(rows), reasons, makers, read_made(folder, FUNNEL), args.to, _told_picks(args, picks), folder,
        licence=args.license, language=args.language, repo_id=args.push_to_hub, decided=len(decisions),
    )  # fmt: skip
    write_export(target, args.to, folder, exported, makers, render_data_card(told))
    _tell(target, len(rows), reasons, len(exported))
    if args.push_to_hub:
        print(push_export(target, args.push_to_hub, args.private or None, len(exported)), flush=True)
    return target


def _told_picks(args: argparse.Namespace, picks: Picks) -> dict[str, Any]:
    wanted = {name: value for name, value in asdict(picks).items() if name not in ("decisions", "rules")}
    return {"rules": list(picks.rules), **{name: value for name, value in wanted.items() if value is not None}}


def _tell(target: Path, count: int, reasons: dict[str, int], left: int) -> None:
    heading(f"{count:,} → {left:,}\n")
    rows = [["rows", f"{count:,}"], *([f"  {reason}", f"{number:,}"] for reason, number in reasons.items())]
    print(format_table(["", "rows"], [*rows, ["exported", f"{left:,}"]]))
    print(f"\nTrain on them with: minigpt4 stage2 --dataset_name {target}", flush=True)


# ---- the folder -----------------------------------------------------------------------------------------------------


def write_export(
    target: Path, form: str, folder: Path, rows: Sequence[ExportedRow], makers: Makers, card: str
) -> None:
    """
    Write an export beside its place, and put it there when it is whole.

    Args:
        target: its place.
        form: one of `WRITERS`.
        folder: of the curation.
        rows, makers: what is written.
        card: its README.md.

    Raises:
        RecipeError: if the place is something else's, cannot be written, or a file would hold a secret.
    """
    if target.exists() and not (target / MARK).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} is there already and no export; name another folder with --output_dir.")
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        WRITERS[form](draft, folder, rows, makers)
        (draft / "README.md").write_text(card, encoding="utf-8")
        write_json(draft / MARK, {"format": form, "rows": len(rows)})
        check_secrets(files_of(draft))
        if any(holds_secret(f"{one.row.text} {one.row.draft} {one.row.mended}") for one in rows):
            raise RecipeError("A text holds a token or a password; drop that row on the page before it is exported.")
        if target.exists():
            shutil.rmtree(target)
        os.replace(draft, target)
    except OSError as error:
        raise RecipeError(
            f"{target} cannot be written ({error.strerror or error}); make room, or name another folder with "
            "--output_dir."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def files_of(folder: Path) -> dict[str, Path]:
    """The files of an export that are published: path in the repository → path here."""
    found = sorted(path for pattern in PUBLISHED for path in folder.glob(pattern) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in found}


def push_export(folder: Path, repo_id: str, private: bool | None, count: int) -> str:
    """
    Publish an export in one commit; files of an earlier one that are not in it go.

    Raises:
        RecipeError: that tells why it is not there, and that the folder is whole.
    """
    try:
        repo = make_repository(repo_id, private, kind="dataset")
        message = f"Upload {count:,} curated descriptions"
        upload(repo.repo_id, files_of(folder), message, kind="dataset", stale=PUBLISHED[1:])
    except Exception as error:  # whatever huggingface_hub and the network say
        raise RecipeError(
            f"{folder} is whole but not on the Hub: {explain(error)}; then run the same command again."
        ) from error
    return f"Uploaded to {repo}"
