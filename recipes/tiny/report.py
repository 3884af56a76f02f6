"""The demo's report, one HTML file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from recipes_minigpt4.tiny.metrics import MEANING
from recipes_minigpt4.utils.html import Curve, data_uri, draw_curve, render_page, render_table


@dataclass(frozen=True)
class Example:
    """A picture and what was said about it."""

    image: Image.Image
    truth: str
    held_out: bool  # whether it shows a colour–shape pair of no training stage
    replies: Mapping[str, str]  # title of a stage → reply


def render_report(
    results: Mapping[str, Any],
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    curves: Mapping[str, Curve],
    examples: Iterable[Example],
) -> str:
    """
    The report as HTML.

    Args:
        results: what `results.json` holds: `seed`, `seconds` and `adapter_bytes` are shown.
        header: titles of the table's columns.
        rows: the table's cells; a row whose first cell begins with a space is part of the one before.
        curves: title → loss by step.
        examples: pictures and replies.
    """
    body = f"""<h1>MiniGPT-4 in miniature</h1>
<p>A small vision encoder with a Q-Former looks at the picture, and a small language model that has never seen one
answers. Both are frozen. Only one linear layer between them was trained: {results["adapter_bytes"]:,} bytes. Stage 1
learned from short, noisy captions, stage 2 from a few careful descriptions in the chat template.</p>
<p class="soft">Seed {escape(str(results["seed"]))}, {results["seconds"]:.0f} seconds on the CPU.</p>
<h2>Results on scenes never shown</h2>
<div class="wide">
{render_table(header, rows)}
</div>
<p class="soft">{MEANING} Held-out pairs: scenes with a combination of colour and shape that no picture of either
stage showed.</p>
<h2>Loss while training</h2>
<div class="row">
{"".join(_figure(title, curve) for title, curve in curves.items())}
</div>
<h2>Before and after</h2>
{"".join(map(_article, examples))}"""
    return render_page("MiniGPT-4 in miniature", body)


def _figure(title: str, curve: Curve) -> str:
    return f"<figure>\n<figcaption>{escape(title)}</figcaption>\n{draw_curve(curve, title)}\n</figure>\n"


def _article(example: Example) -> str:
    told = [("truth", example.truth), *example.replies.items()]
    terms = "".join(f"<dt>{escape(title)}</dt><dd>{escape(text) or '(nothing)'}</dd>\n" for title, text in told)
    note = '<p class="soft">held-out pair</p>' if example.held_out else ""
    picture = f'<img src="{data_uri(example.image)}" alt="{escape(example.truth)}">'
    return f"<article>\n<div>{picture}{note}</div>\n<dl>\n{terms}</dl>\n</article>\n"
