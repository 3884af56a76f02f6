"""The results of `minigpt4 evaluate` as cells and sentences, for every form in which they are told."""

from collections.abc import Mapping
from typing import Any

from recipes_minigpt4.evaluation.paper import (
    AGREES,
    DIFFERS,
    MODELS,
    NOT_COMPARABLE,
    UNCLEAR,
    left_out,
)


Table = tuple[list[str], list[list[str]]]  # header and rows
NOTHING = "–"  # where there is nothing to count


# ---- numbers --------------------------------------------------------------------------------------------------------


def shown(number: Mapping[str, float | None], style: str) -> str:
    """`12.3% (10.1%–14.5%)`; a dash where there is nothing to count."""
    if number["value"] is None:
        return NOTHING
    return f"{style.format(number['value'])} ({style.format(number['low'])}–{style.format(number['high'])})"


def shown_difference(number: Mapping[str, float | None] | None, style: str) -> str:
    """`+2.1% (-0.3% to +4.5%)`."""
    if number is None or number["value"] is None:
        return NOTHING
    signed = style.replace("{:", "{:+z")  # z: nothing is minus nought
    return f"{signed.format(number['value'])} ({signed.format(number['low'])} to {signed.format(number['high'])})"


def suite_table(numbers: Mapping[str, Any]) -> Table:
    """A model per row, a measure per column, each with its interval."""
    measures = numbers["measures"]
    rows = [
        [label, *(shown(of_model[name], measure["style"]) for name, measure in measures.items())]
        for label, of_model in numbers["models"].items()
    ]
    return ["", *(measure["title"] for measure in measures.values())], rows


def differences_table(numbers: Mapping[str, Any]) -> Table:
    """Two models per row."""
    measures = numbers["measures"]
    rows = [
        [
            pair.replace(" - ", " − "),
            *(shown_difference(of_pair[name], measure["style"]) for name, measure in measures.items()),
        ]
        for pair, of_pair in numbers["differences"].items()
    ]
    return ["", *(measure["title"] for measure in measures.values())], rows


def suite_line(numbers: Mapping[str, Any]) -> str:
    """How many pictures were counted."""
    left = numbers["left_out"]
    told = f", without {left} that some model could not be shown" if left else ""
    many = "picture" if numbers["pictures"] == 1 else "pictures"
    return f"{numbers['pictures']} {many}{told}. In brackets, the 95 % interval over pictures."


def circumstances(results: Mapping[str, Any]) -> str:
    """Which models, on which data."""
    run = results["run"]
    told = {
        "Models": "; ".join(f"{label}: {model}" for label, model in run["models"].items()),
        "Data": "; ".join(f"{suite}: {place}" for suite, place in run["data"].items()),
        "Judges": "; ".join(run["judges"]),
    }
    sentences = [f"{name}: {text}." for name, text in told.items() if text]
    if run.get("num_samples"):
        sentences.append(f"At most {run['num_samples']} rows of each, drawn with seed {run['seed']}.")
    return " ".join(sentences) or "Which models these are is not known any more."


# ---- judges ---------------------------------------------------------------------------------------------------------


def agreement_table(numbers: Mapping[str, Any]) -> Table:
    """How far each two judges agree."""
    rows = [
        [
            f"{pair['one']}, {pair['other']}",
            str(pair["answers"]),
            NOTHING if pair["same"] is None else f"{pair['same']:.1%}",
            NOTHING if pair["kappa"] is None else f"{pair['kappa']:.2f}",
        ]
        for pair in numbers["judges"]["agreement"]
    ]
    return ["judges", "answers of both", "the same", "κ"], rows


def told_of_judges(numbers: Mapping[str, Any]) -> list[str]:
    """A sentence about each judge, the one whose verdicts the numbers are first."""
    judges = numbers["judges"]
    sentences = [f"The numbers are those of {judges['first']}."] if judges["first"] else []
    sentences += [
        f"{judge}: {count} {'answer' if count == 1 else 'answers'} unread and counted nowhere else."
        for judge, count in judges["unread"].items()
        if count
    ]
    return sentences + [
        f"{judge}, asked several times, says the same in {share:.1%} of pairs of answers."
        for judge, share in judges["repeats"].items()
    ]


# ---- the paper ------------------------------------------------------------------------------------------------------


def paper_table(results: Mapping[str, Any]) -> Table:
    """A claim of the paper per row."""
    return (
        ["", "verdict", "compared with", "in the paper", "here", "difference here"],
        [_paper_row(row, results["suites"][row["suite"]]["measures"][row["measure"]]) for row in results["paper"]],
    )


def _paper_row(row: Mapping[str, Any], measure: Mapping[str, Any]) -> list[str]:
    def pair(values: Any) -> str:
        return " / ".join(NOTHING if value is None else measure["style"].format(value) for value in values)

    told = "better, in words" if row["ours"] is None else pair((row["ours"], row["theirs"]))
    return [
        f"Table {row['table']}, {row['suite']}: {measure['title']}",
        row["verdict"],
        MODELS[row["other"]],
        told,
        pair(row["here"]),
        shown_difference(row["difference"], measure["style"]),
    ]


def told_of_paper(results: Mapping[str, Any]) -> list[str]:
    """How many claims of the paper hold here, and which tables were not tried."""
    rows = results["paper"]
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in (AGREES, DIFFERS, UNCLEAR, NOT_COMPARABLE)
    }
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    sentences = [f"Beside the paper: of {len(rows)} comparisons {told}."] if rows else []
    without = [name for name in MODELS if any(name in row["missing"] for row in rows)]
    if without:
        told = ", ".join(without)
        sentences.append(f"Without numbers here: {told}. A model is known by its label, or by --paper_labels.")
    if missing := left_out(results["suites"]):
        sentences.append(missing)
    return sentences
