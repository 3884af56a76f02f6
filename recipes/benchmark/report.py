"""Reports of benchmarks: what they were measured on, whether bars are met, and how it is all told."""

import json
import operator
import os
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from recipes_minigpt4.benchmark.machine import surroundings
from recipes_minigpt4.benchmark.models import Size
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.html import render_page, render_table


MB, GB = 1e6, 1e9
HOLDS = {">=": operator.ge, "<=": operator.le}
LEGEND = {
    "peer": "transformers' Blip2ForConditionalGeneration; training, its frozen Q-Former keeps its dropout of 0.1",
    "ours": "MiniGPT4ForConditionalGeneration",
    "cached": "ours, from stored features of the frozen vision side (--cache_features)",
}
# How numbers of a side are told: name in the report → name in the table, divisor, format.
ROWS = {
    "share_of_pads": ("share of pads", 0.01, ".1f"),
    "seconds_per_step": ("seconds per step", 1, ".3f"),
    "seconds_per_batch": ("seconds per batch", 1, ".3f"),
    "fastest_seconds": ("the fastest one", 1, ".3f"),
    "tokens_per_second": ("tokens per second", 1, ".1f"),
    "images_per_second": ("images per second", 1, ".2f"),
    "flops_per_step": ("GFLOP per step", 1e9, ".2f"),
    "flops_per_second": ("GFLOP/s", 1e9, ".1f"),
    "share_of_matmul_rate": ("share of the matmul rate", 0.01, ".1f"),
    "first_loss": ("loss of the first step", 1, ".5f"),
    "first_gradient_norm": ("gradient norm of the first step", 1, ".5f"),
    "peak_bytes": ("peak memory, whole process, MB", MB, ".1f"),
    "peak_above_start_bytes": ("peak memory above start, MB", MB, ".1f"),
}


class Bar(NamedTuple):
    """
    A number that the package sets itself.

    Args:
        name: what is measured, in times of the reference's.
        place: keys that lead to the number in a report.
        relation: `">="` or `"<="`.
        bound: what the number is held against.
    """

    name: str
    place: tuple[str, ...]
    relation: str
    bound: float


def judge(report: Mapping[str, Any], bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """Tell for every bar the number that was measured and whether the bar is met."""
    verdicts = []
    for bar in bars:
        value: Any = report
        for key in bar.place:
            value = value[key]
        met = bool(HOLDS[bar.relation](value, bar.bound))
        verdicts.append({"name": bar.name, "value": value, "relation": bar.relation, "bound": bar.bound, "met": met})
    return verdicts


# ---- what it was measured on ----------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Processor, cores, threads, memory and versions."""
    machine = {**surroundings(), "cores": os.cpu_count(), "trl": _version("trl")}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def describe_shapes(size: Size) -> dict[str, str]:
    """Layers and widths of the parts."""
    vision, qformer, text = (
        f"{part['num_hidden_layers']} × {part['hidden_size']}" for part in (size.vision, size.qformer, size.text)
    )
    return {
        "vision": f"{vision} at {size.vision['image_size']} px",
        "qformer": f"{qformer}, {size.num_query_tokens} queries",
        "language_model": f"{text}, vocabulary of {size.text['vocab_size']:,}",
    }


# ---- telling --------------------------------------------------------------------------------------------------------


def format_report(report: Mapping[str, Any]) -> str:
    """The report as text: surroundings, a column for every side, ratios, and bars if there are any."""
    size = f"size {report['size']}, " if "size" in report else ""
    parts = [
        f"minigpt4 benchmark {report['benchmark']}, {size}medians of {report['rounds']} rounds",
        _format_surroundings(report),
    ]
    if "optimizations" in report:
        parts += [_format_optimization(name, found) for name, found in report["optimizations"].items()]
    else:
        parts += [_format_sides(report["sides"]), _format_ratios(report)]
    if report["bars"]:
        parts.append(_format_bars(report))
    return "\n\n".join(parts)


def _surroundings(report: Mapping[str, Any]) -> dict[str, str]:
    """What was measured on what, name by name."""
    machine, shapes = report["machine"], report["shapes"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers", "trl"))
    lines = {
        "machine": f"{machine['cpu']}, {machine['cores']} cores, {machine['machine_memory_bytes'] / GB:.1f} GB",
        "threads": f"{machine['threads']} of torch",
        "versions": versions,
        **{name.replace("_", " "): text for name, text in shapes.items()},
        **{name: {**LEGEND, **report.get("legend", {})}[name] for name in report.get("sides", ())},
    }
    if "gpu" in machine:
        lines["gpu"] = machine["gpu"]
    if "matmul" in report:
        matmul = report["matmul"]
        rate = matmul["flops_per_second"] / 1e9
        lines["matmul rate"] = f"{rate:.1f} GFLOP/s, float32, {matmul['size']} × {matmul['size']}"
    return lines


def _format_surroundings(report: Mapping[str, Any]) -> str:
    return "\n".join(f"  {name:<16}{text}" for name, text in _surroundings(report).items())


def _side_rows(sides: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A title and a number of every side, for all that every side has."""
    rows = []
    for key, (title, divisor, form) in ROWS.items():
        if all(key in numbers for numbers in sides.values()):
            unit = " %" if divisor == 0.01 else ""
            rows.append([title, *(f"{numbers[key] / divisor:{form}}{unit}" for numbers in sides.values())])
    return rows


def _format_sides(sides: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [["", *sides], *_side_rows(sides)]
    return "\n".join(f"  {title:<34}" + "".join(f"{cell:>12}" for cell in cells) for title, *cells in rows)


def _format_ratios(report: Mapping[str, Any]) -> str:
    lines, reference = [], report.get("reference", "peer")
    for name, ratio in report["ratios"].items():
        spread = f"({ratio['min']:.3f}–{ratio['max']:.3f} over the rounds)"
        against = ratio.get("against", reference)
        lines.append(f"  {name} against {against}: {ratio['median']:.3f} times as fast {spread}")
    for name, ratio in report.get("memory_ratios", {}).items():
        lines.append(
            f"  {name} against {reference}: {ratio['above_start']:.3f} times the peak memory above start, "
            f"{ratio['process']:.3f} times that of the whole process"
        )
    if "memory_ratios" in report:
        lines.append("  start: the interpreter, its libraries and the rows, right before the model is built")
    return "\n".join(lines)


def _format_optimization(name: str, found: Mapping[str, Any]) -> str:
    lines = [f"  {name}, {found['lines']} lines: {'pays' if found['pays'] else 'does not pay'}"]
    for measure, ratio in found["without"].items():
        spread = f"({ratio['min']:.3f}–{ratio['max']:.3f} over the rounds)"
        lines.append(f"    {measure + ' without it':<28}{ratio['median']:.3f} times {spread}")
    return "\n".join(lines)


def _format_bars(report: Mapping[str, Any]) -> str:
    lines = [f"  Bars for two CPU cores, in times of {report.get('reference', 'peer')}:"]
    signs = {">=": "≥", "<=": "≤"}
    for bar in report["bars"]:
        verdict = "met" if bar["met"] else "missed"
        lines.append(f"    {bar['name']:<34}{bar['value']:.3f}  {signs[bar['relation']]} {bar['bound']:<6g}{verdict}")
    return "\n".join(lines)


def render_report(report: Mapping[str, Any]) -> str:
    """The same as a page that loads nothing from elsewhere."""
    title = format_report(report).partition("\n")[0]
    facts = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>\n" for name, text in _surroundings(report).items()
    )
    if "optimizations" in report:
        told = "\n".join(_format_optimization(name, found) for name, found in report["optimizations"].items())
        body = f"<pre>{escape(told)}</pre>"
    else:
        table = render_table(["", *report["sides"]], _side_rows(report["sides"]))
        items = "".join(f"<li>{escape(line.strip())}</li>\n" for line in _format_ratios(report).splitlines())
        body = f'<div class="wide">\n{table}\n</div>\n<ul>\n{items}</ul>'
    if report["bars"]:
        body += f"\n<pre>{escape(_format_bars(report))}</pre>"
    return render_page(title, f"<h1>{escape(title)}</h1>\n{body}\n<h2>On what</h2>\n<dl>\n{facts}</dl>")


def write_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as a page if the file is called `.html`, else as JSON."""
    text = render_report(report) if path.suffix.lower() == ".html" else json.dumps(report, indent=2) + "\n"
    try:
        path.write_text(text, encoding="utf-8")  # in place: it may be a device
    except OSError as error:
        raise RecipeError(f"{path} cannot be written ({error.strerror}); name another file with --output.") from error
