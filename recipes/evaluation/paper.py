"""What the paper's tables say of two models, and whether it is the same here. Importing this file is cheap."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from recipes_minigpt4.utils.errors import RecipeError


OURS = "stage2"  # the model of the paper; every other is compared with it
MODELS = {  # name in the paper's comparisons → what it is
    OURS: "MiniGPT-4 after both stages",
    "stage1": "stage 1 alone",
    "blip2": "BLIP-2",
    "blip2_ft": "BLIP-2 fine-tuned",
    "llava": "LLaVA",
    "mplug_owl": "mPLUG-Owl",
    "no_qformer": "without the Q-Former",
    "three_layers": "three projection layers",
    "qformer_tuned": "Q-Former tuned",
    "vqa_lora": "LoRA, tuned on VQA",
}
ALSO = {"ours": OURS}  # other labels that are understood

AGREES, DIFFERS, UNCLEAR = "agrees", "differs", "no clear difference"
NOT_COMPARABLE = "not comparable"
FEWEST = 10  # pictures; with fewer, the interval of the bootstrap says nothing
RULE = (
    "Values are not compared, for the paper's are those of its own models and data. What is compared is which of two "
    "models has the higher number. “Agrees”: the whole 95 % interval of the paired difference has the paper's sign. "
    "“Differs”: the whole interval has the other sign. “No clear difference”: it holds zero. “Not comparable”: one of "
    f"the models was not evaluated, or there are fewer than {FEWEST} pictures."
)


class Claim(NamedTuple):
    """
    Numbers that the paper has of its own model and of another (ICLR text unless the table says otherwise).

    Args:
        table: of the paper.
        suite, measure: which number it is.
        other: name in `MODELS` of the other model.
        ours, theirs: the numbers; None where words say that ours is the better one.
    """

    table: str
    suite: str
    measure: str
    other: str
    ours: float | None
    theirs: float | None

    @property
    def is_ours_higher(self) -> bool:
        return self.ours is None or self.theirs is None or self.ours > self.theirs


def _claims(table: str, suite: str, measure: str, ours: float | None, **others: float | None) -> list[Claim]:
    return [Claim(table, suite, measure, other, ours, theirs) for other, theirs in others.items()]


CLAIMS = [
    *_claims("1", "abilities", "meme", 8 / 25, blip2=0.0),
    *_claims("1", "abilities", "recipe", 18 / 25, blip2=4 / 25),
    *_claims("1", "abilities", "ad", 19 / 25, blip2=1 / 25),
    *_claims("1", "abilities", "poem", 20 / 25, blip2=0.0),
    *_claims("1", "abilities", "total", 0.65, blip2=0.05),
    *_claims("1 in words", "abilities", "total", None, blip2_ft=None),
    *_claims("2", "coverage", "covered", 2.22, blip2=1.96),
    *_claims("2 of v2", "coverage", "first_covered", 0.662, blip2=0.275),
    *_claims("3", "failures", "detailed", 0.02, stage1=0.35),
    *_claims("3", "failures", "poem", 0.01, stage1=0.32),
    *_claims("5", "aokvqa", "likelihood", 0.582, no_qformer=0.569, three_layers=0.497, qformer_tuned=0.521),
    *_claims("5", "gqa", "accuracy", 0.322, no_qformer=0.334, three_layers=0.31, qformer_tuned=0.28),
    *_claims("6", "chair", "chair_i_short", 0.072, blip2=0.013),
    *_claims("6", "chair", "chair_i_long", 0.096, blip2=0.013, mplug_owl=0.302, llava=0.188),
    *_claims("6", "chair", "words_short", 28.8, blip2=6.5),
    *_claims("6", "chair", "words_long", 175, blip2=6.5, mplug_owl=98.5, llava=90.7),
    *_claims("7", "aokvqa", "likelihood", 0.582, blip2=0.802, vqa_lora=0.672),
    *_claims("7", "gqa", "accuracy", 0.322, blip2=0.424, vqa_lora=0.435),
]


# ---- which model is which -------------------------------------------------------------------------------------------


def paper_labels(texts: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """
    Name in the paper's comparisons → label here.

    Args:
        texts: `NAME=LABEL`, as the option has it; models that are labelled as in `MODELS` need none.
        labels: of the models that were evaluated.

    Raises:
        RecipeError: for a name or a label that is not there.
    """
    found: dict[str, str] = {}
    for label in labels:
        name = label.lower().replace("-", "_")
        if (name := ALSO.get(name, name)) in MODELS:
            found.setdefault(name, label)
    for text in texts:
        name, _, label = text.partition("=")
        if (name := ALSO.get(name, name)) not in MODELS:
            raise RecipeError(f"--paper_labels {text} names no model of the paper; it has {', '.join(MODELS)}.")
        if label not in labels:
            raise RecipeError(
                f"--paper_labels {text} names no label of a model here; there are {', '.join(dict.fromkeys(labels))}."
            )
        found[name] = label
    return found


def focus_of(labels: Sequence[str], names: Mapping[str, str]) -> str:
    """The label of the model that a report is about: the paper's own, or else the last one."""
    return names[OURS] if names.get(OURS) in labels else labels[-1]


# ---- verdicts -------------------------------------------------------------------------------------------------------


def compare(suites: Mapping[str, Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """
    A row per claim of the paper about a suite that was run.

    Args:
        suites: name → its numbers, as `suite_numbers` tells them.
        names: as `paper_labels` tells them.

    Returns:
        Rows, those that can be compared first: the claim, the numbers `here`, their `difference` (ours minus theirs),
        the `verdict`, and the `missing` models, as the paper calls them.
    """
    rows = [
        _compared(claim, suites[claim.suite], names)
        for claim in CLAIMS
        if claim.suite in suites and claim.measure in suites[claim.suite]["measures"]
    ]
    return sorted(rows, key=lambda row: row["verdict"] == NOT_COMPARABLE)


def _compared(claim: Claim, numbers: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    models = numbers["models"]
    labels = [names.get(name) for name in (OURS, claim.other)]
    here = [models[label][claim.measure]["value"] if label in models else None for label in labels]
    missing = [name for name, value in zip((OURS, claim.other), here, strict=True) if value is None]
    row = {**claim._asdict(), "labels": labels, "here": here, "difference": None, "missing": missing}
    if missing:
        return {**row, "verdict": NOT_COMPARABLE}
    row["difference"] = difference = difference_of(numbers, labels[0], labels[1], claim.measure)
    if numbers["pictures"] < FEWEST:
        return {**row, "verdict": NOT_COMPARABLE}
    low, high = difference["low"], difference["high"]
    if low <= 0 <= high:
        return {**row, "verdict": UNCLEAR}
    return {**row, "verdict": AGREES if (low > 0) == claim.is_ours_higher else DIFFERS}


def difference_of(numbers: Mapping[str, Any], one: str | None, other: str | None, measure: str) -> dict[str, Any]:
    """The difference of two models, one minus the other, whichever way round it was computed."""
    told = numbers["differences"]
    if (name := f"{one} - {other}") in told:
        return dict(told[name][measure])
    turned = told[f"{other} - {one}"][measure]
    return {"value": -turned["value"], "low": -turned["high"], "high": -turned["low"]}


def left_out(suites: Mapping[str, Any]) -> str | None:
    """A sentence about the tables of the paper whose suites were not run."""
    missing: dict[str, list[str]] = {}
    for claim in CLAIMS:
        if claim.suite not in suites:
            missing.setdefault(claim.suite, []).append(claim.table.split()[0])
    if not missing:
        return None
    told = [f"{', '.join(dict.fromkeys(tables))} ({suite})" for suite, tables in missing.items()]
    return f"Tables of the paper whose suites have no numbers here: {'; '.join(told)}."
