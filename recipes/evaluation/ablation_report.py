"""What the runs of `minigpt4 ablate` say together: means and deviations, agreement with the paper, a chart."""

import math
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from recipes_minigpt4.tiny.metrics import MEANING, SCORES
from recipes_minigpt4.utils.html import render_page, render_table
from recipes_minigpt4.utils.text import format_table, heading, markdown_table


MEASURES = {**SCORES, "repetition_rate": ("repetition rate", "{:.1%}")}
NOTES = (
    " ".join(MEANING.split())
    + " Repetition rate: replies that are empty or repeat something, finished or not; what is "
    "left of the failures then."
)
BASELINE = "baseline"  # name of the variant that the others are compared with
DIRECTIONS = ("lower", "same", "higher")
AGREES, DISAGREES, UNCLEAR, UNJUDGED = "agrees", "does not agree", "no clear difference", "not judged"
CLEAR = 2.0  # times the pooled standard deviation
SAME = 0.05  # of the baseline's mean; where the paper sees no difference, its own numbers differ by up to 0.04
RULE = (
    f"A difference is clear if it exceeds {CLEAR:g} times the pooled standard deviation over the seeds. Where the "
    "paper has a difference, the miniature agrees if its own is clear and points the same way, and does not agree if "
    "it is clear and points the other way; where the paper has none, it agrees if its own is at most "
    f"{SAME:.0%} of the baseline's mean, and does not agree if it is larger and clear. All else is unclear."
)
SETTINGS = (
    "Every variant has the settings of the baseline, chosen for the baseline alone, so it may be at a disadvantage. A "
    "seed draws the projection, the order of the samples and their prompts; backbones and samples are always the "
    "same. A share of stage 1 means that share of its pairs, of its steps and of its warm-up. Training seconds are "
    "wall-clock time, stage 1 included, and comparable only if nothing else ran."
)
CHARTED = ("object_f1", "position_accuracy", "failure_rate")


class Spread(NamedTuple):
    """Mean and sample standard deviation, which one value alone does not have."""

    mean: float
    std: float | None


# ---- numbers --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def judge(expected: str, found: Spread, baseline: Spread) -> str:
    """Whether a difference is what the paper has, by `RULE`."""
    if found.std is None or baseline.std is None:
        return UNJUDGED
    difference = found.mean - baseline.mean
    clear = abs(difference) > CLEAR * math.sqrt((found.std**2 + baseline.std**2) / 2)
    if expected == "same":
        if abs(difference) <= SAME * abs(baseline.mean):
            return AGREES
        return DISAGREES if clear else UNCLEAR
    if not clear:
        return UNCLEAR
    return AGREES if (difference > 0) == (expected == "higher") else DISAGREES


def summarize_variants(variants: Mapping[str, dict[str, Any]]) -> None:
    """Add `summary` (measure → mean and std) and `verdicts` (measure → text) to every variant that has runs."""
    done = {name: variant for name, variant in variants.items() if variant["runs"]}
    for variant in done.values():
        scores = [run["scores"] for run in variant["runs"]]
        variant["summary"] = {measure: spread([score[measure] for score in scores])._asdict() for measure in MEASURES}
    if BASELINE not in done:
        return
    baseline = done[BASELINE]["summary"]
    for variant in done.values():
        variant["verdicts"] = {
            measure: judge(expected, Spread(**variant["summary"][measure]), Spread(**baseline[measure]))
            for measure, expected in variant["expect"].items()
        }


# ---- tables ---------------------------------------------------------------------------------------------------------


def format_spread(measure: str, found: Mapping[str, float | None]) -> str:
    """`0.912 ± 0.011`, or the mean alone."""
    style = MEASURES[measure][1]
    return " ± ".join(style.format(number) for number in found.values() if number is not None)


def scores_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row per variant: mean ± standard deviation, and what it costs."""
    rows = []
    for variant in results["variants"].values():
        if not (runs := variant["runs"]):
            continue
        scores = [format_spread(measure, variant["summary"][measure]) for measure in MEASURES]
        costs = [f"{runs[0][name]:,}" for name in ("trained_parameters", "adapter_bytes")]
        seconds = statistics.fmean(run["seconds"] for run in runs)
        rows.append([variant["title"], str(len(runs)), *scores, *costs, f"{seconds:.0f}"])
    titles = [title for title, _ in MEASURES.values()]
    return ["", "seeds", *titles, "trained parameters", "adapter bytes", "training seconds"], rows


def paper_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and a row per comparison with the paper."""
    variants = results["variants"]
    rows = []
    for variant in variants.values():
        for measure, verdict in variant.get("verdicts", {}).items():
            found, base = (format_spread(measure, of["summary"][measure]) for of in (variant, variants[BASELINE]))
            expected = variant["expect"][measure]
            rows.append([variant["title"], MEASURES[measure][0], expected, found, base, verdict, variant["paper"]])
    return ["", "measure", "in the paper", "here", "baseline", "verdict", "source"], rows


def untold(results: Mapping[str, Any]) -> list[str]:
    """Titles of the variants that the paper says nothing about."""
    variants = results["variants"].items()
    return [variant["title"] for name, variant in variants if name != BASELINE and not variant["expect"]]


def conclusions(results: Mapping[str, Any]) -> list[str]:
    """A sentence per verdict, which comparisons came out so, and what to know about single variants."""
    _, rows = paper_table(results)
    sentences = []
    for verdict in (AGREES, DISAGREES, UNCLEAR, UNJUDGED):
        if found := [f"{row[0]} ({row[1]})" for row in rows if row[5] == verdict]:
            sentences.append(f"{verdict.capitalize()}, {len(found)} of {len(rows)}: {', '.join(found)}.")
    if rows and (others := untold(results)):
        sentences.append(f"Not in the paper: {', '.join(others)}.")
    sentences += [f"{of['title']}: {of['note']}" for of in results["variants"].values() if of["runs"] and of["note"]]
    return sentences or [f"There is no {BASELINE!r} among the variants, so nothing is compared."]


def circumstances(results: Mapping[str, Any]) -> str:
    """On what, with what and how often it was measured."""
    scenes, seeds = results["scenes"], results["seeds"]
    libraries = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return (
        f"{scenes['all']} scenes never shown, {scenes['held_out']} of them with a held-out colour–shape pair; greedy "
        f"decoding; seeds {', '.join(map(str, seeds))}. {libraries}; {results['machine']}."
    )


# ---- output ---------------------------------------------------------------------------------------------------------


def write_reports(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `table.md` and `report.html`."""
    (folder / "table.md").write_text(render_markdown(results), encoding="utf-8")
    (folder / "report.html").write_text(render_html(results), encoding="utf-8")


def render_markdown(results: Mapping[str, Any]) -> str:
    """The tables and what they mean, as Markdown."""
    parts = [
        "# The paper's variants in miniature",
        circumstances(results),
        markdown_table(*scores_table(results)),
        f"Mean ± standard deviation over the seeds. {NOTES}",
        "## Agreement with the paper",
        "\n".join(f"- {sentence}" for sentence in conclusions(results)),
        markdown_table(*paper_table(results)),
        RULE,
        SETTINGS,
    ]
    return "\n\n".join(parts) + "\n"


def render_html(results: Mapping[str, Any]) -> str:
    """The same with a chart, as a page that loads nothing from elsewhere."""
    charts = "".join(
        f"<figure>\n<figcaption>{escape(MEASURES[measure][0])}</figcaption>\n{draw_chart(results, measure)}\n"
        "</figure>\n"
        for measure in CHARTED
    )
    body = f"""<h1>The paper's variants in miniature</h1>
<p class="soft">{escape(circumstances(results))}</p>
<div class="row">
{charts}</div>
<p class="soft">Mean and standard deviation over the seeds; dashed, the baseline. {escape(NOTES)}</p>
<div class="wide">
{render_table(*scores_table(results))}
</div>
<h2>Agreement with the paper</h2>
<ul>
{"".join(f"<li>{escape(sentence)}</li>" for sentence in conclusions(results))}
</ul>
<div class="wide">
{render_table(*paper_table(results))}
</div>
<p class="soft">{escape(RULE)}</p>
<p class="soft">{escape(SETTINGS)}</p>"""
    return render_page("The paper's variants in miniature", body)


def draw_chart(results: Mapping[str, Any], measure: str, width: int = 440, line: int = 24) -> str:
    """An inline SVG of a share, 0–1: a dot at the mean of each variant, a bar of one standard deviation either way."""
    variants = {name: of for name, of in results["variants"].items() if of["runs"]}
    left, right, top, bottom = 175, width - 16, 8, 8 + line * len(variants)

    def at(share: float) -> str:
        return f"{left + (right - left) * min(max(share, 0.0), 1.0):.1f}"

    title = f"{MEASURES[measure][0]} by variant"
    parts = [f'<svg viewBox="0 0 {width} {bottom + 24}" role="img"><title>{escape(title)}</title>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = at(share)
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{share:g}</text>')
    if BASELINE in variants:
        x = at(variants[BASELINE]["summary"][measure]["mean"])
        parts.append(f'<line class="curve" stroke-dasharray="4 4" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
    for number, variant in enumerate(variants.values()):
        y = top + line * (number + 0.5)
        mean, std = variant["summary"][measure].values()
        low, high = at(mean - (std or 0.0)), at(mean + (std or 0.0))
        parts.append(f'<text x="{left - 8}" y="{y + 4:g}" text-anchor="end">{escape(variant["title"])}</text>')
        parts.append(f'<line class="curve" x1="{low}" x2="{high}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<circle class="dot" cx="{at(mean)}" cy="{y:g}" r="4"/>')
    return "\n".join([*parts, "</svg>"])


def print_tables(results: Mapping[str, Any]) -> None:
    """Both tables and what they mean, in plain text."""
    heading(f"Mean ± standard deviation on {results['scenes']['all']} scenes never shown\n")
    print(format_table(*scores_table(results)))
    header, rows = paper_table(results)
    if rows:
        heading("Agreement with the paper\n")
        print(format_table(header[:-1], [row[:-1] for row in rows]))
    print()
    for sentence in conclusions(results):
        print(sentence)
