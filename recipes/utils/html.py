"""Reports as HTML: one file with pictures, curves and styles inside, which loads nothing from elsewhere."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image


Curve = Sequence[tuple[int, float]]  # (step, loss)

SHOWN_SIDE = 224  # pixels of a picture's longer side on a page
STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5c6670; --line: #d9dee3; --paper: #ffffff; --card: #f6f7f9;
  --curve: #1f6feb; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #353c44; --paper: #14181c; --card: #1c2126; --curve: #6ea8fe; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
p { max-width: 46rem; } .soft { color: var(--soft); }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
tr.part td { color: var(--soft); font-size: .9rem; } tr.part td:first-child { padding-left: 1.2rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: .5rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke: var(--curve); stroke-width: 1.8; }
svg .dot { fill: var(--curve); }
article { display: grid; grid-template-columns: 9rem 1fr; gap: 1.25rem; padding: 1.25rem 0;
  border-top: 1px solid var(--line); }
article img { width: 9rem; height: 9rem; border-radius: .35rem; border: 1px solid var(--line); }
dl { margin: 0; } dt { font-size: .8rem; color: var(--soft); margin-top: .5rem; } dt:first-child { margin-top: 0; }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
@media (max-width: 36rem) { article { grid-template-columns: 1fr; } }
"""


def render_page(title: str, body: str) -> str:
    """A whole page in the report's style around `body`, which is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
"""


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain texts; a row whose first cell begins with a space is part of the one before."""
    lines = ["<table>", "<tr>" + "".join(f"<th>{escape(title)}</th>" for title in header) + "</tr>"]
    for row in rows:
        kind = ' class="part"' if row[0].startswith(" ") else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{escape(cell.strip())}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])


def draw_curve(curve: Curve, title: str, width: int = 440, height: int = 220) -> str:
    """An inline SVG of `width` × `height` units: loss over steps from zero, with a grid."""
    left, right, top, bottom = 34, width - 14, 8, height - 24
    if not curve:
        return "<p>No loss was logged.</p>"
    last, highest = max(step for step, _ in curve) or 1, max(loss for _, loss in curve)
    rise = nice_step(highest)
    ceiling = rise * max(1, math.ceil(highest / rise))

    def at(step: float, loss: float) -> tuple[str, str]:
        x, y = left + (right - left) * step / last, bottom - (bottom - top) * loss / ceiling
        return f"{x:.1f}", f"{y:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img"><title>{escape(title)}: loss by step</title>']
    for i in range(round(ceiling / rise) + 1):
        _, y = at(0, i * rise)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{i * rise:g}</text>')
    run = nice_step(last)
    for i in range(int(last / run) + 1):
        x, _ = at(i * run, 0)
        parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{i * run:g}</text>')
    points = " ".join(",".join(at(step, loss)) for step, loss in curve)
    parts.append(f'<polyline class="curve" points="{points}"/></svg>')
    return "\n".join(parts)


def nice_step(extent: float, most: int = 5) -> float:
    """The smallest of 1, 2, 5 × 10ⁿ that cuts `extent` into at most `most` steps."""
    if extent <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(extent / most))
    return next((power * digit for digit in (1, 2, 5) if power * digit * most >= extent), power * 10)


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy of at most `SHOWN_SIDE` × `SHOWN_SIDE` pixels."""
    small = picture.copy()
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return small


def data_uri(image: Image.Image) -> str:
    """A picture as a PNG inside a link."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
