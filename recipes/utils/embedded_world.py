"""The embedded world under its name, `tiny`, which stands where repositories and data sets are named.

What trains for real knows only this name; the world itself (`recipes_minigpt4.tiny`) is imported when it is asked for.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any


TINY = "tiny"
WORLD = "recipes_minigpt4.tiny"


def backbone_folder(part: str) -> str:
    """The shipped folder of a frozen part: `"vision"`, `"qformer"` or `"language_model"`."""
    world = import_module(WORLD)
    return str(world.LANGUAGE_BACKBONE if part == "language_model" else world.VISION_BACKBONE)


def stage_examples(stage: int) -> Callable[..., list[dict[str, Any]]]:
    """What draws the training pairs of a stage, 1 or 2; it takes their number, and has a default for it."""
    scenes = import_module(f"{WORLD}.scenes")
    examples: Callable[..., list[dict[str, Any]]] = scenes.stage1_examples if stage == 1 else scenes.stage2_examples
    return examples


def is_shipped(name: str) -> bool:
    """Whether a backbone is one of those that ship with this package, found without importing the world."""
    spec = find_spec(WORLD)
    homes = [] if spec is None else spec.submodule_search_locations or []
    return any(Path(name).is_relative_to(Path(home).resolve()) for home in homes)
