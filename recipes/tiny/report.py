"""The demo's report, one HTML file."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from PIL import Image

from recipes_minigpt4.tiny.corpus import one_sentence
from recipes_minigpt4.tiny.metrics import MEANING, mark, unnamed_objects
from recipes_minigpt4.tiny.scenes import Scene
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.html import (
    Curve,
    data_uri,
    draw_curves,
    render_commands,
    render_flow,
    render_marked,
    render_page,
    render_table,
)
from recipes_minigpt4.utils.text import duration


STAGES = {"untrained": "untrained projection", "stage1": "after stage 1", "stage2": "after stage 2"}
LINKS = {
    "The paper": "https://arxiv.org/abs/2304.10592",
    "Its code and weights": "https://github.com/Vision-CAIR/MiniGPT-4",
    "TRL, which trains": "https://huggingface.co/docs/trl",
}
PAGES = "The pages of this package: README.md, and one in every folder; recipes/tiny/README.md explains these numbers."


@dataclass(frozen=True)
class Example:
    """A picture and what was said about it."""

    image: Image.Image
    scene: Scene
    replies: Mapping[str, str]  # title of a stage → reply


def render_report(
    results: Mapping[str, Any],
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    curves: Mapping[str, Curve],
    examples: Iterable[Example],
    steps: Iterable[tuple[str, str]],
) -> str:
    """
    The report as HTML.

    Args:
        results: what `results.json` holds.
        header: titles of the table's columns.
        rows: the table's cells; a row whose first cell begins with a space is part of the one before.
        curves: title → loss by step.
        examples: pictures and replies.
        steps: what to do next, and the command for it.
    """
    notes = "".join(f'<p class="note">{escape(sentence)}</p>\n' for sentence in told_of_stage1(results))
    body = f"""<h1>MiniGPT-4 in miniature</h1>
{_headline(results)}
<h2>What is frozen, and what trains</h2>
{_architecture(results)}
<p>A language model that has never seen a picture learns to describe one. Only the projection was trained. Stage 1
showed it many short, noisy captions, stage 2 a few careful descriptions in the chat template.</p>
<h2>Before and after</h2>
<p>The same question to the same frozen parts. <span class="right">Green</span>: objects and places that are right.
<s class="wrong">Struck</s>: objects that are not in the picture, and wrong places. None of these pictures was trained
on.</p>
{"".join(map(_article, examples))}
<h2>Results on scenes never shown</h2>
<div class="wide">
{render_table(header, rows)}
</div>
{notes}<p class="soft">{MEANING} Held-out pairs: scenes with a combination of colour and shape that no picture of
either stage showed.</p>
<h2>Loss while training</h2>
<p class="soft">Mean loss per answer token. Both stages have the same scales; what they learn to say differs, so
compare the curves' shapes and not their heights.</p>
{draw_curves(dict(curves))}
<h2>What next</h2>
{render_commands(steps)}
<h2>How this was made</h2>
{_circumstances(results)}"""
    return render_page("MiniGPT-4 in miniature", body)


def told_of_stage1(results: Mapping[str, Any]) -> list[str]:
    """Why replies fail more often after stage 1 than before, if they do."""
    before, after = (results["stages"][stage]["failure_rate"] for stage in ("untrained", "stage1"))
    if after <= before:
        return []
    return [
        f"Why is the failure rate {after:.0%} after stage 1? Its captions have no full stop, so its replies have "
        "none, and a reply without one counts as unfinished. Stage 2 teaches whole sentences."
    ]


def _headline(results: Mapping[str, Any]) -> str:
    before, after = (results["stages"][stage]["object_f1"] for stage in ("untrained", "stage2"))
    parts = results["parameters"]
    return f"""<p class="big"><span class="soft">{before:.2f} →</span> {after:.2f}</p>
<p>Object F1 on {results["scenes"]["all"]} pictures never shown, by training
<strong>{parts["language_projection"]:,}</strong> of {sum(parts.values()):,} numbers. The whole demo took
{duration(results["seconds"])} on a CPU. 1 would be every object named with its colour and shape, and no other.</p>"""


def _architecture(results: Mapping[str, Any]) -> str:
    parts = results["parameters"]

    def frozen(name: str, *tensors: str) -> tuple[str, str, str]:
        return name, f"frozen, {sum(parts.get(tensor, 0) for tensor in tensors):,} numbers", "frozen"

    return render_flow(
        [
            ("Picture", "96 × 96 pixels", "end"),
            frozen("Vision encoder", "vision_model"),
            frozen("Q-Former", "qformer", "query_tokens"),
            ("Projection", f"trains, {parts['language_projection']:,} numbers", "trains"),
            frozen("Language model", "language_model", "lm_head"),
            ("Text", "its description", "end"),
        ]
    )


def _article(example: Example) -> str:
    truth = one_sentence(example.scene)
    told = "".join(_reply(title, text, example.scene) for title, text in example.replies.items())
    note = ' <span class="soft">(held-out pair)</span>' if example.scene.has_held_out_pair else ""
    picture = f'<img src="{data_uri(example.image)}" alt="{escape(truth)}">'
    return f"""<article>
<div>{picture}</div>
<div>
<p>{escape(truth)}{note}</p>
<dl>
{told}</dl>
</div>
</article>
"""


def _reply(title: str, text: str, scene: Scene) -> str:
    missing = unnamed_objects(text, scene)
    note = f'<p class="soft">Not named: {escape(", ".join(missing))}.</p>' if missing else ""
    said = render_marked(text, mark(text, scene)) or "(nothing)"
    return f"<div><dt>{escape(title)}</dt><dd>{said}</dd>{note}</div>\n"


def _circumstances(results: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    links = "".join(f'<li><a href="{escape(link)}">{escape(title)}</a></li>\n' for title, link in LINKS.items())
    model = results.get("language_model", TINY)
    named = "" if model == TINY else f" --language_model {model}"
    return f"""<pre>minigpt4 demo --seed {escape(str(results["seed"]) + named)}</pre>
<p>{duration(results["seconds"])} on the CPU ({escape(results["machine"])}), seed {escape(str(results["seed"]))}.
{escape(versions)}. The adapter has {results["adapter_bytes"]:,} bytes.</p>
<ul>
{links}<li>{escape(PAGES)}</li>
</ul>"""
