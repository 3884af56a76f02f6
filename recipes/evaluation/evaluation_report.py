"""What `minigpt4 evaluate` writes and prints."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.files import write_json
from recipes_minigpt4.utils.text import format_table, heading


def write_reports(folder: Path, results: Mapping[str, Any], told: Mapping[str, Any]) -> None:
    """Write `results.json`, and print the numbers."""
    write_json(folder / "results.json", results)
    for name, numbers in results["suites"].items():
        heading(f"{name}: {numbers['title']}, {numbers['pictures']} pictures\n")
        print(format_table(*suite_table(numbers)))
    for name, reason in results["skipped"].items():
        print(f"\n{name}: no numbers, because {reason}.")
    for name, page in results["to_judge"].items():
        if name not in results["skipped"]:
            print(f"\n{name}: people judge on {page}.")


def suite_table(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a model per row, a measure per column, each with its interval."""
    measures = numbers["measures"]
    rows = [
        [label, *(shown(of_model[name], measure["style"]) for name, measure in measures.items())]
        for label, of_model in numbers["models"].items()
    ]
    return ["", *(measure["title"] for measure in measures.values())], rows


def shown(number: Mapping[str, float | None], style: str) -> str:
    """`12.3% (10.1%–14.5%)`; a dash where there is nothing to count."""
    if number["value"] is None:
        return "–"
    return f"{style.format(number['value'])} ({style.format(number['low'])}–{style.format(number['high'])})"
