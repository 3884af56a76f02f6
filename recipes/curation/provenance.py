"""Where every exported row comes from, as others may see it: no folder, no server and no secret of this machine."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.hub.card import is_local, last_name
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import redact


MADE, FUNNEL = "made.json", "funnel.json"


@dataclass(frozen=True)
class ExportedRow:
    """
    A row that is exported.

    Args:
        number: its place among all rows, which stays the same from export to export.
        row: the row, with the text that is exported.
        decision: what people said about it; None if they did not.
    """

    number: int
    row: CuratedRow
    decision: str | None = None


@dataclass(frozen=True)
class Makers:
    """
    What made the rows, as others may see it.

    Args:
        model, revision: who described.
        mender: who mended.
        match, judge: who scored; None if nobody did.
        prompts: name → words.
        settings: name → value, of describing and mending.
        dataset: where the pictures come from.
    """

    model: str
    revision: str
    mender: str
    match: str | None
    judge: str | None
    prompts: Mapping[str, str]
    settings: Mapping[str, Any]
    dataset: str

    @property
    def hashes(self) -> dict[str, str]:
        """Of the prompts: name → the beginning of their SHA-256."""
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in self.prompts.items()}


def read_made(folder: Path, name: str = MADE) -> dict[str, Any]:
    """
    A JSON file that `minigpt4 curate` has left.

    Raises:
        RecipeError: if it is not there or is none.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{folder / name} cannot be read ({one_line(error)}); run `minigpt4 curate --output_dir {folder}` again, "
            "which makes nothing anew."
        ) from error
    return content


def read_makers(folder: Path) -> Makers:
    """
    What made the rows of a folder.

    Raises:
        RecipeError: see `read_made`.
    """
    made = read_made(folder)
    names, scores = made.get("names", {}), made.get("scores", {})
    match, judge = scores.get("match"), scores.get("judge")
    prompts = {name: str(text) for name, text in made.get("prompts", {}).items()}
    return Makers(
        model=public_model(str(names.get("model", ""))),
        revision=str(made.get("model", "")),
        mender=public_client(str(made.get("mender", ""))),
        match=f"{public_model(match['name'])}, {match['revision'][:12]}" if match else None,
        judge=public_client(judge["name"]) if judge else None,
        prompts=prompts | ({"score": str(judge["prompt"])} if judge else {}),
        settings={
            **made.get("sampling", {}),
            "continued_up_to": made.get("continue_up_to"),
            **dict(zip(("mend_temperature", "mend_max_tokens"), made.get("mending", ()), strict=False)),
        },
        dataset=str(names.get("dataset", "")),
    )


def public_model(name: str) -> str:
    """A repository by its name; a folder by its last name."""
    return last_name(name) if is_local(name.partition("@")[0]) else name


def public_client(name: str) -> str:
    """Whoever mended or judged: without the address of a server, and without folders."""
    known, _, server = name.partition(" at ")
    kind, _, model = known.partition(":")
    model = last_name(model) if os.path.isabs(model) or "\\" in model else model
    return redact(f"{kind}:{model}" + (", a server of its own" if server else ""))


def public_source(name: str) -> str:
    """What a picture was called where it came from: of paths of this machine and of addresses the last name alone."""
    if re.match(r"^([a-z]:[\\/]|[\\/~]|\w+://)", name, re.I) or ".." in name:
        return last_name(name)
    return redact(name)


def provenance(one: ExportedRow, makers: Makers) -> dict[str, Any]:
    """Where a row comes from, as columns. Verdicts and prompts' hashes are JSON texts, so that types are equal."""
    row = one.row
    return {
        "id": str(one.number),
        "draft": row.draft,
        "continued": row.continued,
        "mended": row.mended,
        "decision": one.decision,
        "verdicts": json.dumps(row.verdicts, ensure_ascii=False),
        **{f"score_{name}": value for name, value in row.scores.items()},
        "picture_sha256": row.picture,
        "source": public_source(row.name),
        "dataset": makers.dataset if makers.dataset == TINY or not is_local(makers.dataset) else None,
        "model": makers.model,
        "model_revision": makers.revision,
        "mender": makers.mender,
        "match_model": makers.match,
        "judge": makers.judge,
        "prompt_hashes": json.dumps(makers.hashes),
    }
