"""Numbers of an evaluation in the card of the model that was evaluated, as `model-index`, which the Hub shows."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from recipes_minigpt4.evaluation.evaluation_tables import shown
from recipes_minigpt4.evaluation.replies import Replies
from recipes_minigpt4.evaluation.speakers import revision_of
from recipes_minigpt4.hub.card import NO_RESULTS, hub_dataset, last_name
from recipes_minigpt4.hub.push import read_config, write_card
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.text import markdown_table


TASK = "image-text-to-text"
BEGIN, END = "<!-- minigpt4 evaluate -->", "<!-- end of minigpt4 evaluate -->"
DIGITS = 6  # of values


def card_folders(labels: Sequence[str], models: Mapping[str, str]) -> dict[str, Path]:
    """
    Label → folder of the model whose card is to be written.

    Args:
        labels: that are named.
        models: label → what was, or will be, asked.

    Raises:
        RecipeError: if a label is none, or its model is no folder.
    """
    folders = {}
    for label in labels:
        if label not in models:
            known = f"there are {', '.join(models)}" if models else "name its folder with --models"
            raise RecipeError(f"--write_card {label} is no label of a model; {known}.")
        folder = Path(models[label]).expanduser()
        if not folder.is_dir():
            raise RecipeError(
                f"--write_card {label} writes into the README.md of a folder, and {models[label]} is none; copy the "
                "model into a folder, or leave the option out."
            )
        folders[label] = folder
    return folders


def write_results(folder: Path, label: str, results: Mapping[str, Any], told: Mapping[str, Replies]) -> str:
    """
    Put the numbers of a model into its card, in the place of those that an earlier run put there about the same data.

    All else in the card stays. A folder without a card gets one.

    Args:
        folder: of the model.
        label: what the results call it.
        results: see `main`.
        told: suite → label → replies, those of this very model.

    Returns:
        A sentence about what was done.

    Raises:
        RecipeError: if the replies are those of other weights, or the card cannot be read or written.
    """
    path = folder / "README.md"
    new = eval_results(label, results)
    if not new:
        return f"There are no numbers of {label}, so its card stays as it is."
    asked = {reply.revision for replies in told.values() for reply in replies.get(label, ())}
    if asked != {revision_of(str(folder), None)}:
        raise RecipeError(
            f"The replies of {label} are not those of the weights that are in {folder} now, so its card stays as it "
            "is; run the command without --from_replies."
        )
    try:
        if not path.is_file():
            _write_first_card(folder, path)
        card = ModelCard.load(path)
        names = {_name(result) for result in new}
        card.data.eval_results = [one for one in card.data.eval_results or () if _name(one) not in names] + new
        card.data.model_name = card.data.model_name or last_name(str(folder.absolute()))
        card.text = _with_table(card.text, _table(label, results))
        card.save(path)
    except (OSError, ValueError, KeyError, TypeError) as error:  # what YAML and huggingface_hub say of odd cards
        raise RecipeError(f"The card {path} cannot be changed ({one_line(error)}); mend it, or remove it.") from error
    return f"The numbers of {label} are in its card: {path}"


def eval_results(label: str, results: Mapping[str, Any]) -> list[EvalResult]:
    """The numbers of a model as the Hub has them: a result per suite, a metric per measure, with its interval."""
    found = []
    for suite, numbers in results["suites"].items():
        kind, name = _public_data(results["run"]["data"].get(suite, ""))
        about = {"pictures": numbers["pictures"], "judge": numbers["judges"]["first"]}
        for measure, number in numbers["models"].get(label, {}).items():
            if number["value"] is None:
                continue
            found.append(
                EvalResult(
                    task_type=TASK,
                    dataset_type=kind,
                    dataset_name=f"{name}: {numbers['title']}",
                    dataset_config=suite,
                    dataset_args={key: value for key, value in about.items() if value is not None},
                    metric_type=measure,
                    metric_name=numbers["measures"][measure]["title"],
                    metric_value=round(number["value"], DIGITS),
                    metric_args={end: round(number[end], DIGITS) for end in ("low", "high")},
                )
            )
    return found


def _name(result: EvalResult) -> tuple[Any, ...]:
    return (result.task_type, result.dataset_type, result.dataset_config, result.metric_type)


def _public_data(place: str) -> tuple[str, str]:
    """Type and name of data as a card may show them: no path of this machine."""
    if place == TINY:
        return "embedded-world", "the embedded world"
    names = [name for name in place.split(",") if name]
    if len(names) == 1 and (dataset := hub_dataset(names[0])) is not None:
        return dataset, dataset
    told = ", ".join(map(last_name, names)) or "unknown data"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", told), told


def _write_first_card(folder: Path, path: Path) -> None:
    """A card of ours for a model of ours, and a bare one for another."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind == "minigpt4":
        write_card(folder, read_config(folder))
    else:
        text = f"---\nlibrary_name: transformers\npipeline_tag: {TASK}\n---\n\n# {last_name(str(folder.absolute()))}\n"
        path.write_text(text, encoding="utf-8")


def _table(label: str, results: Mapping[str, Any]) -> str:
    rows = [
        [f"{suite}: {numbers['measures'][measure]['title']}", shown(number, numbers["measures"][measure]["style"])]
        for suite, numbers in results["suites"].items()
        for measure, number in numbers["models"].get(label, {}).items()
        if number["value"] is not None
    ]
    told = [
        f"{suite}: {numbers['pictures']} pictures of {_public_data(results['run']['data'].get(suite, ''))[1]}"
        for suite, numbers in results["suites"].items()
    ]
    return (
        f"By `minigpt4 evaluate`, with 95 % intervals; {'; '.join(told)}.\n\n"
        f"{markdown_table(['measure', 'value'], rows)}"
    )


def _with_table(text: str, table: str) -> str:
    """The text of a card with the table in it: where it was, or where results are told, or at the end."""
    block = f"{BEGIN}\n{table}\n{END}"
    if BEGIN in text and END in text:
        return text[: text.index(BEGIN)] + block + text[text.index(END) + len(END) :]
    if NO_RESULTS in text:
        before, _, after = text.partition(NO_RESULTS)
        return f"{before}{block}\n\n{after.lstrip()}"
    section = re.search(r"^## Results\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        return f"{text.rstrip()}\n\n## Results\n\n{block}\n"
    return f"{text[: section.end()].rstrip()}\n\n{block}\n\n{text[section.end() :]}"
