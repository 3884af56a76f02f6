"""Versions of what is installed, read from files: nothing is imported."""

import ast
import importlib.util
from importlib import metadata
from pathlib import Path


PACKAGES = ("minigpt4-transformers", "transformers", "trl", "torch")


def installed_versions() -> dict[str, str]:
    """Name → version of this package and those that it builds on; "CUDA" is the release that torch was built with."""
    return {**{name: _version(name) for name in PACKAGES}, "CUDA": _cuda()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    """What torch's own `version.py` says."""
    spec = importlib.util.find_spec("torch")
    place = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if place is None or not place.is_file():
        return "unknown"
    for line in ast.parse(place.read_text(encoding="utf-8")).body:
        target = line.target if isinstance(line, ast.AnnAssign) else getattr(line, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(line, (ast.Assign, ast.AnnAssign)):
            value = ast.literal_eval(line.value) if line.value is not None else None
            return str(value) if value else "none: torch is built for CPUs"
    return "unknown"
