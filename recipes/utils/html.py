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
:root { color-scheme: light dark; --ink: #1c2127; --soft: #57606a; --line: #d9dee3; --paper: #ffffff; --card: #f6f7f9;
  --curve: #0969da; --right: #116329; --wrong: #a40e26; --warm: #953800; --warm-card: #fff1e5; --warm-line: #bc4c00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa4ae; --line: #353c44; --paper: #14181c; --card: #1c2126; --curve: #6ea8fe;
    --right: #56d364; --wrong: #ff9492; --warm: #ffb77c; --warm-card: #2b1d10; --warm-line: #db6d28; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.soft { color: var(--soft); } .right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); }
.note { padding: .6rem 1rem; border-left: .25rem solid var(--warm-line); background: var(--card); }
a { color: var(--curve); }
code, pre { font-family: ui-monospace, monospace; font-size: .875rem; }
pre { margin: .25rem 0 1rem; padding: .6rem .8rem; background: var(--card); border-radius: .35rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.big { font-size: clamp(2.6rem, 9vw, 4.5rem); line-height: 1.1; font-weight: 700; margin: 1rem 0 0;
  font-variant-numeric: tabular-nums; } .big .soft { font-weight: 400; }
.flow { display: flex; gap: 1.75rem; padding: 0; margin: 1rem 0; list-style: none; }
.flow li { position: relative; flex: 1; padding: .75rem; border: 1px solid var(--soft); border-radius: .5rem;
  background: var(--card); text-align: center; }
.flow li.trains { border: 3px solid var(--warm-line); background: var(--warm-card); color: var(--warm); }
.flow li.end { border: 0; background: none; align-self: center; }
.flow li + li::before { content: "→"; position: absolute; left: -1.5rem; top: calc(50% - .8rem); color: var(--soft); }
.flow strong, .flow span { display: block; } .flow span { font-size: .875rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; }
tr.part td { color: var(--soft); font-size: .9rem; } tr.part td:first-child { padding-left: 1.2rem; }
table.texts th, table.texts td { text-align: left; vertical-align: top; white-space: pre-line; min-width: 14rem; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: .5rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); } svg .curve { fill: none; stroke: var(--curve); stroke-width: 1.8; }
svg .dot { fill: var(--curve); }
article { display: grid; grid-template-columns: 9rem 1fr; gap: 1.25rem; padding: 1.25rem 0;
  border-top: 1px solid var(--line); }
article p { margin: .25rem 0 .75rem; }
img { max-width: 100%; height: auto; border-radius: .35rem; border: 1px solid var(--line); }
article img { width: 9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(13rem, 100%), 1fr)); gap: 1rem; margin: 0; }
dl > div { padding: .6rem .8rem; background: var(--card); border-radius: .35rem; }
dt { font-size: .8rem; color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; white-space: pre-line; }
@media (max-width: 40rem) {
  article { grid-template-columns: 1fr; }
  .flow { flex-direction: column; } .flow li.end { align-self: auto; padding: 0; }
  .flow li + li::before { content: "↓"; left: calc(50% - .5rem); top: -1.65rem; }
  table, tbody, tr, td { display: block; } tr.head { display: none; } tr { padding: .5rem 0; }
  th, td, td:first-child, tr.part td:first-child { padding: .1rem 0; border: 0; white-space: normal; }
  tr { border-bottom: 1px solid var(--line); } td:first-child { font-weight: 600; }
  tr.part td:first-child, table.texts td:first-child { font-weight: 400; }
  table:not(.texts) td:not(:first-child) { display: flex; justify-content: space-between; gap: 1rem; }
  td:not(:first-child)::before { content: attr(data-title); color: var(--soft); text-align: left; }
  table.texts td:not(:first-child)::before { display: block; }
}
"""


def render_page(title: str, body: str, style: str = "") -> str:
    """A whole page in the report's style, and in `style` beside it, around `body`, which is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


# ---- tables and texts -----------------------------------------------------------------------------------------------


def render_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """
    An HTML table of plain texts; a row whose first cell begins with a space is part of the one before.

    On a narrow screen every row is a list, and each of its cells has the title of its column beside it.
    """
    lines = []
    for row in rows:
        kind = ' class="part"' if row[0].startswith(" ") else ""
        lines.append(f"<tr{kind}>{_cells(header, [escape(cell.strip()) for cell in row])}</tr>")
    return "\n".join([f"<table>\n{_head(header)}", *lines, "</table>"])


def render_texts(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose cells are HTML and hold sentences or pictures, narrow screens included."""
    lines = [f"<tr>{_cells(header, row)}</tr>" for row in rows]
    return "\n".join([f'<table class="texts">\n{_head(header)}', *lines, "</table>"])


def _head(header: Sequence[str]) -> str:
    return '<tr class="head">' + "".join(f"<th>{escape(title)}</th>" for title in header) + "</tr>"


def _cells(header: Sequence[str], row: Sequence[str]) -> str:
    titled = zip(header, row, strict=True)
    return "".join(f'<td data-title="{escape(title)}">{cell}</td>' for title, cell in titled)


def render_marked(text: str, marks: Iterable[tuple[int, int, bool]]) -> str:
    """A text as HTML, with what is right in green and what is wrong struck; marks (start, end, right) are in order."""
    parts, place = [], 0
    for start, end, right in marks:
        tag, kind = ("span", "right") if right else ("s", "wrong")
        parts += [escape(text[place:start]), f'<{tag} class="{kind}">{escape(text[start:end])}</{tag}>']
        place = end
    return "".join([*parts, escape(text[place:])])


def render_flow(parts: Iterable[tuple[str, str, str]]) -> str:
    """Boxes with arrows between them, from (name, what is said of it, `"trains"`, `"frozen"` or `"end"`)."""
    items = [
        f'<li class="{kind}"><strong>{escape(name)}</strong><span>{escape(said)}</span></li>'
        for name, said, kind in parts
    ]
    return "\n".join(['<ol class="flow">', *items, "</ol>"])


def render_commands(steps: Iterable[tuple[str, str]]) -> str:
    """What to type: (what it does, command)."""
    return "\n".join(f"<p>{escape(title)}</p>\n<pre>{escape(command)}</pre>" for title, command in steps)


# ---- curves ---------------------------------------------------------------------------------------------------------


def draw_curves(curves: dict[str, Curve]) -> str:
    """Figures with a title each, side by side, all with the same scales."""
    points = [point for curve in curves.values() for point in curve]
    extent = (max((step for step, _ in points), default=1), max((loss for _, loss in points), default=1.0))
    figures = [
        f"<figure>\n<figcaption>{escape(title)}</figcaption>\n{draw_curve(curve, title, extent)}\n</figure>"
        for title, curve in curves.items()
    ]
    return "\n".join(['<div class="row">', *figures, "</div>"])


def draw_curve(
    curve: Curve, title: str, extent: tuple[int, float] | None = None, width: int = 440, height: int = 240
) -> str:
    """
    An inline SVG of `width` × `height` units: loss over steps from zero, with a grid and named axes.

    Args:
        curve: its points.
        title: what it shows, for who cannot see it.
        extent: highest step and highest loss of the axes; default: those of the curve.
        width: of the drawing.
        height: of the drawing.
    """
    left, right, top, bottom = 34, width - 14, 26, height - 40
    if not curve:
        return "<p>No loss was logged.</p>"
    last, highest = extent or (max(step for step, _ in curve), max(loss for _, loss in curve))
    last = last or 1
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
        parts.append(f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{i * run:g}</text>')
    parts.append('<text x="2" y="14">loss per token</text>')
    parts.append(f'<text x="{(left + right) / 2:g}" y="{height - 6}" text-anchor="middle">step</text>')
    points = " ".join(",".join(at(step, loss)) for step, loss in curve)
    parts.append(f'<polyline class="curve" points="{points}"/></svg>')
    return "\n".join(parts)


def nice_step(extent: float, most: int = 5) -> float:
    """The smallest of 1, 2, 5 × 10ⁿ that cuts `extent` into at most `most` steps."""
    if extent <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(extent / most))
    return next((power * digit for digit in (1, 2, 5) if power * digit * most >= extent), power * 10)


# ---- pictures -------------------------------------------------------------------------------------------------------


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
