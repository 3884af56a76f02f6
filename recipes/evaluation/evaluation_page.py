"""`report.html`: the tables of an evaluation, and the worst and the best replies with their pictures."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.evaluation_tables import (
    Table,
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
from recipes_minigpt4.evaluation.pictures import picture_uri
from recipes_minigpt4.evaluation.replies import Reply
from recipes_minigpt4.utils.html import render_page, render_table


Told = Mapping[str, Mapping[str, Sequence[Reply]]]  # suite → label → replies
STYLE = """body { max-width: 80rem; }
@media (min-width: 40.01rem) { .wide table { font-size: .9rem; } .wide td { white-space: pre; } }
"""
LONGEST = 600  # characters of what is true about a picture


def render_html(folder: Path, results: Mapping[str, Any], told: Told) -> str:
    """The report as a page that loads nothing from elsewhere."""
    suites = "\n".join(_suite(folder, name, numbers, told[name]) for name, numbers in results["suites"].items())
    body = f"""<h1>Evaluation</h1>
<p class="soft">{escape(circumstances(results))}</p>
{_paper(results)}
{_skipped(results)}
{suites}"""
    return render_page("Evaluation", body, STYLE)


def _paragraphs(sentences: Sequence[str]) -> str:
    return "\n".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)


def _wide(table: Table) -> str:
    """A table whose intervals stand below their numbers, where there is room for columns."""
    header, rows = table
    broken = [[cell.replace(" (", "\n(") for cell in row] for row in rows]
    return f'<div class="wide">\n{render_table(header, broken)}\n</div>'


def _paper(results: Mapping[str, Any]) -> str:
    if not results["paper"]:
        return _paragraphs(told_of_paper(results))
    return f"""<h2>Beside the paper</h2>
{_paragraphs(told_of_paper(results))}
{_wide(paper_table(results))}
<p class="soft">{escape(RULE)} Pairs of numbers are those of MiniGPT-4 after both stages and of the other model.</p>"""


def _skipped(results: Mapping[str, Any]) -> str:
    lines = [f"<li>{escape(name)}: {escape(reason)}.</li>" for name, reason in results["skipped"].items()]
    return "\n".join(["<h2>Without numbers</h2>\n<ul>", *lines, "</ul>"]) if lines else ""


def _suite(folder: Path, name: str, numbers: Mapping[str, Any], replies: Mapping[str, Sequence[Reply]]) -> str:
    meanings = " ".join(
        f"{measure['title'][:1].upper()}{measure['title'][1:]}: {measure['meaning']}"
        for measure in numbers["measures"].values()
        if measure["meaning"]
    )
    parts = [
        f"<h2>{escape(name)}: {escape(numbers['title'])}</h2>",
        f"<p>{escape(suite_line(numbers))}</p>",
        _wide(suite_table(numbers)),
    ]
    if numbers["differences"]:
        parts += ["<p>Paired differences on the same pictures:</p>", _wide(differences_table(numbers))]
    parts += [f'<p class="soft">{escape(meanings)}</p>', _paragraphs(told_of_judges(numbers))]
    if numbers["judges"]["agreement"]:
        parts.append(_wide(agreement_table(numbers)))
    return "\n".join([*parts, _examples(folder, numbers, replies)])


# ---- replies --------------------------------------------------------------------------------------------------------


def _examples(folder: Path, numbers: Mapping[str, Any], replies: Mapping[str, Sequence[Reply]]) -> str:
    """The worst and the best replies of the model that the report is about, and what others said there."""
    by_key = {label: {reply.key: reply for reply in said} for label, said in replies.items()}
    chosen = numbers["examples"]
    parts = []
    for title, examples in (("Worst", chosen["worst"]), ("Best", chosen["best"])):
        if examples:
            parts.append(f"<h3>{title} replies of {escape(chosen['label'])}</h3>")
        for example in examples:
            said = {label: told[example["key"]] for label, told in by_key.items() if example["key"] in told}
            parts.append(_article(folder, example, numbers["measures"][example["measure"]], said))
    return "\n".join(parts)


def _article(folder: Path, example: Mapping[str, Any], measure: Mapping[str, Any], said: Mapping[str, Reply]) -> str:
    one = next(iter(said.values()))
    uri = picture_uri(folder, one.digest)
    picture = f'<img src="{uri}" alt="{escape(one.picture)}">' if uri else f'<p class="soft">{escape(one.picture)}</p>'
    scores = example["scores"]
    replies = "\n".join(
        f"<div><dt>{escape(label)}{_score(scores.get(label), measure)}</dt>"
        f"<dd>{escape(reply.text) or '(nothing)'}</dd></div>"
        for label, reply in said.items()
    )
    return f"""<article>
<div>{picture}</div>
<div>
<p><strong>{escape(one.prompt)}</strong></p>
{_facts(one.facts)}
<dl>
{replies}
</dl>
</div>
</article>"""


def _score(value: float | None, measure: Mapping[str, Any]) -> str:
    return "" if value is None else f" · {escape(measure['title'])} {measure['style'].format(value)}"


def _facts(facts: Mapping[str, Any]) -> str:
    """What is true about a picture, where that is a text or several."""
    lines = []
    for name, fact in facts.items():
        texts = [fact] if isinstance(fact, str) else fact
        if (
            name != "kind"
            and isinstance(texts, (list, tuple))
            and texts
            and all(isinstance(one, str) for one in texts)
        ):
            told = " · ".join(texts)
            shown = told if len(told) <= LONGEST else told[: LONGEST - 1] + "…"
            lines.append(f'<p class="soft">{escape(name.replace("_", " ").capitalize())}: {escape(shown)}</p>')
    return "\n".join(lines)
