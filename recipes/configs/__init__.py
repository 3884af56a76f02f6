"""One commented YAML file per run, found by its bare name: `minigpt4 stage1 --config tiny_stage1`."""

from pathlib import Path


CONFIGS = Path(__file__).parent


def shipped_configs() -> dict[str, Path]:
    """Name → path of every YAML file that ships with the recipes."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}


def shipped_variants() -> dict[str, Path]:
    """Name → path of every variant that `minigpt4 ablate` runs if it is told none."""
    return {path.stem: path for path in sorted((CONFIGS / "ablations").glob("*.yaml"))}
