"""The card of an exported data set: what was done, with what, what it cost, and what it is not."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from recipes_minigpt4.curation.provenance import ExportedRow, Makers
from recipes_minigpt4.evaluation.words import words_of
from recipes_minigpt4.hub.card import find_licence, last_name, public_dataset, public_text
from recipes_minigpt4.utils.journal import read_journal
from recipes_minigpt4.utils.redaction import redact


EXAMPLES, BINS, BAR = 10, 8, 30
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
USAGE = {
    "cc_sbu_align": "The layout is that of the original's stage 2: `filter_cap.json` with an `image_id` and a "
    "`caption` for every picture `image/ID.jpg`.",
    "imagefolder": "The layout is the `imagefolder` of `datasets`: pictures in `image/`, texts and where each comes "
    "from in `metadata.jsonl`.",
    "parquet": "Every row has its picture, its text, and where it comes from: the draft, the mended text, what every "
    "rule said, the scores, the models and the hashes of the prompts.",
    "messages": "Every row has `images` and `messages`, as TRL's trainers take them.",
}


@dataclass(frozen=True)
class Told:
    """
    What a card tells.

    Args:
        exported: the rows.
        count: how many there were to choose from.
        reasons: reason → how many of these were left out for it.
        makers: what made them.
        funnel: what `minigpt4 curate` has counted.
        form: in which they are exported.
        picks: how they were chosen.
        folder: of the curation, whose journals tell what was paid.
        licence, language: of the data.
        repo_id: where it is published.
        decided: rows that people have decided about.
    """

    exported: Sequence[ExportedRow]
    count: int
    reasons: Mapping[str, int]
    makers: Makers
    funnel: Mapping[str, Any]
    form: str
    picks: Mapping[str, Any]
    folder: Path
    licence: str
    language: str
    repo_id: str | None
    decided: int


def render_data_card(told: Told) -> str:
    """The card in Markdown, with its metadata in front; no path, no address and no secret of this machine."""
    makers = told.makers
    data = DatasetCardData(
        language=public_text(told.language),
        license=public_text(told.licence),
        task_categories=["image-to-text"],
        tags=["minigpt-4", "image-captioning", "synthetic"],
        size_categories=next((name for most, name in SIZES if len(told.exported) < most), "n>1M"),
        source_datasets=[makers.dataset] if "](" in public_dataset(makers.dataset) else None,
        # No `configs`: the names of the files tell the split, and with them `datasets` would keep what it has read of
        # another export in a folder of the same name.
    )
    numbers = _numbers(told.exported)
    card = DatasetCard.from_template(
        data,
        template_str=resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8"),
        title=last_name(told.repo_id) if told.repo_id else "Curated descriptions",
        rows=f"{len(told.exported):,}",
        decided=told.decided,
        scored=bool(makers.match or makers.judge),
        usage=USAGE[told.form],
        dataset=public_dataset(makers.dataset),
        model=_model(told),
        mender=public_text(makers.mender),
        match=makers.match and public_text(makers.match),
        judge=makers.judge and public_text(makers.judge),
        settings={_plain(name): public_text(value) for name, value in _settings(told).items() if value is not None},
        cost=_cost(told.folder),
        rules=", ".join(told.picks["rules"]),
        prompts={name: redact(text).replace("```", "'''") for name, text in makers.prompts.items()},
        funnel=[(_plain(name), f"{count:,}") for name, count in _funnel(told)],
        refused={_plain(name): f"{count:,}" for name, count in told.funnel.get("rules", {}).items()},
        histograms={name: histogram(values) for name, values in numbers.items() if values},
        examples=[
            {"id": one.number, "draft": public_text(one.row.draft), "text": public_text(one.row.text)}
            for one in _spread(told.exported)
        ],
        licence=public_text(told.licence),
    )
    return str(card)


def _model(told: Told) -> str:
    makers, made = told.makers, public_text(told.makers.model) or "a model whose name was not kept"
    licence = find_licence(makers.model) if "/" in makers.model else None
    revision = f", revision `{makers.revision[:12]}`" if makers.revision else ""
    return f"{made}{revision}" + (f", licence {public_text(licence)}" if licence else "")


def _settings(told: Told) -> dict[str, Any]:
    picks = {name: value for name, value in told.picks.items() if name not in ("rules", "text", "by", "seed")}
    if set(picks) & {"keep", "keep_share"}:
        picks["by"] = told.picks["by"]
    return {
        **told.makers.settings,
        **picks,
        **({"text": told.picks["text"]} if told.picks["text"] != "picked" else {}),
    }


def _plain(name: str) -> str:
    return public_text(name).replace("_", " ")


def _funnel(told: Told) -> Iterable[tuple[str, int]]:
    """What is known of each step, in order."""
    funnel = told.funnel
    yield "drawn", int(funnel.get("drawn", told.count))
    for reason, count in funnel.get("left_out", {}).items():
        yield f"left out: {reason}", count
    yield "described", int(funnel.get("described", told.count))
    if "continued" in funnel:
        yield "of these asked to go on", funnel["continued"]
    if "mended" in funnel:
        yield "mended", funnel["mended"]
    for reason, count in told.reasons.items():
        yield f"not here: {reason}", count
    yield "here", len(told.exported)


def _cost(folder: Path) -> str:
    """What all answers cost that the folder keeps."""
    records = [
        line
        for name in ("mended", "scores")
        if (folder / f"{name}.jsonl").is_file()
        for line in read_journal(folder / f"{name}.jsonl")
    ]
    tokens = sum((line.get("prompt_tokens") or 0) + (line.get("completion_tokens") or 0) for line in records)
    cost = sum(line.get("cost") or 0.0 for line in records)
    if not cost:
        return f"{tokens:,} tokens; no prices were told"
    return f"{cost:.2f}, in the currency of the prices that were told, for {tokens:,} tokens"


# ---- numbers --------------------------------------------------------------------------------------------------------


def _numbers(exported: Sequence[ExportedRow]) -> dict[str, list[float]]:
    """Words of the texts, and every other score that rows have."""
    numbers: dict[str, list[float]] = {"words": [len(words_of(one.row.text or "")) for one in exported]}
    for one in exported:
        for name, value in one.row.scores.items():
            if name != "length":
                numbers.setdefault(name, []).append(value)
    return numbers


def histogram(values: Sequence[float]) -> str:
    """How often values fall into each of eight equal steps, as lines of text; whole numbers get whole steps."""
    low, high = min(values), max(values)
    if low == high:
        return f"{low:g}: {len(values):,}"
    whole = all(value == int(value) for value in values)
    width = (high - low) / BINS
    width = math.ceil((high - low + 1) / BINS) if whole else width
    counts = [0] * BINS
    for value in values:
        counts[min(BINS - 1, int((value - low) / width))] += 1
    counts = counts[: 1 + max(place for place, count in enumerate(counts) if count)]
    ends = [(low + place * width, low + (place + 1) * width) for place in range(len(counts))]
    if whole and width == 1:
        labels = [f"{start:g}" for start, _ in ends]
    elif whole:
        labels = [f"{start:g}–{min(end - 1, high):g}" for start, end in ends]
    else:
        labels = [f"{start:.3f}–{end:.3f}" for start, end in ends]
    wide = max(map(len, labels))
    most = len(f"{max(counts):,}")
    return "\n".join(
        f"{label:>{wide}}  {count:>{most},}  {'█' * round(BAR * count / max(counts))}".rstrip()
        for label, count in zip(labels, counts, strict=True)
    )


def _spread(exported: Sequence[ExportedRow]) -> list[ExportedRow]:
    """Ten rows from all over."""
    count = min(EXAMPLES, len(exported))
    return [exported[place * len(exported) // count] for place in range(count)]
