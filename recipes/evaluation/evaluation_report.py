"""What `minigpt4 evaluate` prints, and its files of numbers: `results.json`, `table.md`, `report.html`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.evaluation_page import render_html
from recipes_minigpt4.evaluation.evaluation_tables import (
    agreement_table,
    circumstances,
    differences_table,
    paper_table,
    suite_line,
    suite_table,
    told_of_judges,
    told_of_paper,
)
from recipes_minigpt4.evaluation.paper import RULE
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.utils.files import replace_text, write_json
from recipes_minigpt4.utils.text import format_table, heading, markdown_table


def write_reports(folder: Path, results: Mapping[str, Any], told: Mapping[str, Mapping[str, Sequence[Reply]]]) -> None:
    """Write the files, and print the numbers."""
    write_json(folder / "results.json", results)
    replace_text(folder / "table.md", render_markdown(results))
    replace_text(folder / "report.html", render_html(folder, results, told))
    print_numbers(results)
    print(f"\nThe report, with replies and pictures: {folder / 'report.html'}")


def print_numbers(results: Mapping[str, Any]) -> None:
    for name, numbers in results["suites"].items():
        heading(f"{name}: {numbers['title']}, {numbers['pictures']} pictures\n")
        print(format_table(*suite_table(numbers)))
    for name, reason in results["skipped"].items():
        print(f"\n{name}: no numbers, because {reason}.")
    for name, page in results["to_judge"].items():
        if name not in results["skipped"]:
            print(f"\n{name}: people judge on {page}.")
    if results["paper"]:
        print()
    for sentence in told_of_paper(results):
        print(sentence)


def render_markdown(results: Mapping[str, Any]) -> str:
    """All tables, to paste."""
    parts = ["# Evaluation", circumstances(results)]
    for name, numbers in results["suites"].items():
        parts += [f"## {name}: {numbers['title']}", suite_line(numbers), markdown_table(*suite_table(numbers))]
        parts += ["Paired differences on the same pictures:", markdown_table(*differences_table(numbers))] * bool(
            numbers["differences"]
        )
        parts += [" ".join(told_of_judges(numbers)), markdown_table(*agreement_table(numbers))] * bool(
            numbers["judges"]["agreement"]
        ) or told_of_judges(numbers)
    if results["skipped"]:
        parts += ["## Without numbers", "\n".join(f"- {name}: {why}." for name, why in results["skipped"].items())]
    if results["paper"]:
        parts += ["## The paper's tables", markdown_table(*paper_table(results))]
        parts += ["\n".join(f"- {sentence}" for sentence in told_of_paper(results)), RULE]
    return "\n\n".join(parts) + "\n"
