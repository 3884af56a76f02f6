"""Which room may import which: nobody imports upwards, in a circle, or another file's private names."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "modeling_minigpt4": "modeling_minigpt4",
    "processing_minigpt4": "processing",
    "recipes_minigpt4": "recipes",
}
NOTHING, UTILS, CORE = frozenset[str](), frozenset({"utils"}), frozenset({"modeling", "processing"})
STAGES = {"stage1_pretrain", "stage2_finetune"}
TRAINING = CORE | UTILS | {"configs", "data", "hub"}
ABOVE_STAGES = TRAINING | STAGES | {"training", "llm"}
LAYERS = {  # room → the rooms it may import
    **dict.fromkeys(("processing", "utils", "configs", "accelerate"), NOTHING),
    "modeling": {"processing"},
    **dict.fromkeys(("cli", "llm", "recipes"), UTILS),  # commands know the rooms by name; `recipes`: __init__.py
    **dict.fromkeys(("data", "hub"), CORE | UTILS),
    "training": TRAINING,
    **dict.fromkeys(STAGES, TRAINING | {"training", "cli"}),
    **dict.fromkeys(("planning", "tiny"), ABOVE_STAGES),  # what trains for real knows `tiny` by name only
    **dict.fromkeys(("evaluation", "benchmark", "examples"), ABOVE_STAGES | {"tiny"}),
    **dict.fromkeys(("curation", "serving"), ABOVE_STAGES | {"tiny", "evaluation"}),  # which ask the same models
}
MODULES = {
    ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts)).removesuffix(".__init__"): path
    for package, folder in PACKAGES.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(module: str) -> Iterator[tuple[str, str]]:
    """The modules of ours that one imports, wherever in it, and the names it takes from them."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            base = [package] * getattr(node, "level", 0) + [getattr(node, "module", None) or ""]
            for name in (alias.name for alias in node.names):
                places = (".".join(filter(None, (*base, name))), ".".join(filter(None, base)))
                yield from ((place, name) for place in [one for one in places if one in MODULES][:1])


def room(module: str) -> str:
    package, *rest = module.split(".")
    return rest[0] if package == "recipes_minigpt4" and rest else package.removesuffix("_minigpt4")


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_what_is_below_it_and_no_private_names(module: str) -> None:
    for imported, name in imports(module):
        assert room(imported) in LAYERS[room(module)] | {room(module)}, f"{module} imports {imported}"
        assert not name.startswith("_") or name == "__version__", f"{module} imports {name} of {imported}"


def test_there_is_no_circle() -> None:
    TopologicalSorter({module: {imported for imported, _ in imports(module)} for module in MODULES}).prepare()
