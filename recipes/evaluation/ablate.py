"""Run the paper's variants in miniature, each a few lines of YAML over `tiny_stage1` and `tiny_stage2`; compare them.

    minigpt4 ablate --output_dir ablation-output
    minigpt4 ablate --output_dir ablation-output --variants baseline,three_layers,my_variant.yaml --seeds 0,1

Without `--variants` it runs all that ship with the recipes (`configs/ablations`), every one with three seeds: about an
hour on one core. A run that is finished is never done again, so an interrupted command goes on where it was, and
several at once may share a folder if their seeds differ. Reports hold the variants and seeds of the last command. The
output folder gets

    results.json  every run with every number
    table.md      mean ± standard deviation over the seeds, and what the paper says
    report.html   the same with a chart
    runs/         a folder per run of a stage: its config.yaml, its adapter, its replies

Variants with the same stage 1 share its run. Settings that a variant does not name are the baseline's, not tuned for
it. The seed draws the projection, the order of the samples and their prompts; the samples are always the same.
`--cache_features` keeps the features of frozen vision sides for all runs, whose numbers stay the same.
"""

import argparse
import gc
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.configs import shipped_configs, shipped_variants
from recipes_minigpt4.data.feature_cache import VISION_SIDE
from recipes_minigpt4.evaluation.ablation_report import (
    DIRECTIONS,
    MEASURES,
    print_tables,
    summarize_variants,
    write_reports,
)
from recipes_minigpt4.evaluation.options import build_parser
from recipes_minigpt4.tiny import BACKBONES
from recipes_minigpt4.tiny.demo import THREADS, Shown, adapter_bytes, describe, load_adapter, machine, versions
from recipes_minigpt4.tiny.metrics import repetition_rate, score
from recipes_minigpt4.tiny.scenes import Scene, evaluation_scenes
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import prepare_folder, write_json
from recipes_minigpt4.utils.runs import quiet, reproducible
from recipes_minigpt4.utils.text import heading


STAGES = {1: stage1_pretrain, 2: stage2_finetune}
# Settings of a stage that are this command's, not a variant's.
OWN_SETTINGS = ("config", "output_dir", "seed", "model_name_or_path")
SCENES_SEED = 1  # of scenes that nothing was chosen on; the settings of the stages were chosen on those of seed 0


# ---- variants -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """
    What a YAML file says.

    Args:
        name: of the file, without its ending.
        title: what tables call it.
        stage1: fields that differ from `tiny_stage1`; null stands for a field's default.
        stage2: fields that differ from `tiny_stage2`; None ends the variant after stage 1.
        paper: what the paper has found, with its source.
        note: what else to know when reading its numbers.
        expect: measure → how it is in the paper against the baseline: `lower`, `same` or `higher`.
    """

    name: str
    title: str
    stage1: dict[str, Any]
    stage2: dict[str, Any] | None
    paper: str = ""
    note: str = ""
    expect: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageRun:
    """One stage with all its settings and a seed; stage 2 goes on from `parent`."""

    stage: int
    settings: Mapping[str, Any]
    seed: int
    parent: "StageRun | None" = None

    @cached_property
    def name(self) -> str:
        """Name of its folder: the same for the same settings, seed, parent, backbones and versions."""
        known = [
            self.stage,
            self.settings,
            self.seed,
            self.parent and self.parent.name,
            backbones_digest(),
            versions(),
        ]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode()).hexdigest()
        return f"stage{self.stage}-seed{self.seed}-{digest[:12]}"


@cache
def backbones_digest() -> str:
    """Digest of the embedded world's frozen weights."""
    files = sorted(BACKBONES.rglob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def stage_runs(variant: Variant, seed: int) -> list[StageRun]:
    """The one or two stages of a variant, in order."""
    first = StageRun(1, merge("tiny_stage1", variant.stage1), seed)
    if variant.stage2 is None:
        return [first]
    return [first, StageRun(2, merge("tiny_stage2", variant.stage2), seed, first)]


def merge(config: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a shipped configuration with some of them changed, or left out where null."""
    base = yaml.safe_load(shipped_configs()[config].read_text(encoding="utf-8"))
    merged = {**base, "disable_tqdm": True, **changes}
    return {name: value for name, value in merged.items() if value is not None and name not in OWN_SETTINGS}


def find_variants(names: Sequence[str]) -> list[Variant]:
    """
    Read variants by the name of a shipped one, the path of a YAML file or that of a folder with some.

    Raises:
        RecipeError: for one that is not there, not understood or there twice.
    """
    paths: list[Path] = []
    for name in names or list(shipped_variants()):
        if Path(name).is_dir() and (inside := sorted(Path(name).glob("*.yaml"))):
            paths += inside
        elif Path(name).is_file():
            paths.append(Path(name))
        elif name in shipped_variants():
            paths.append(shipped_variants()[name])
        else:
            raise RecipeError(
                f"There is no variant {name!r}: give a YAML file, a folder with some, or names out of "
                f"{', '.join(shipped_variants())}."
            )
    variants = [read_variant(path) for path in paths]
    known = [variant.name for variant in variants]
    if twice := sorted({name for name in known if known.count(name) > 1}):
        raise RecipeError(f"There are two variants {twice[0]!r}; rename or leave out one.")
    return variants


def read_variant(path: Path) -> Variant:
    """
    Read a variant and check every field, those of the stages with the stages' own parsers.

    Raises:
        RecipeError: with the name of the file and the field.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path} cannot be read as YAML ({one_line(error)}); fix the file.") from error
    kinds = {"title": str, "paper": str, "note": str, "expect": dict, "stage1": dict, "stage2": (dict, type(None))}
    if not isinstance(content, dict):
        raise RecipeError(f"{path} holds no variant; it needs the fields title, stage1 and stage2.")
    for name, value in content.items():
        if name not in kinds:
            raise RecipeError(f"{path} has a field {name!r} that no variant knows; known are {', '.join(kinds)}.")
        if not isinstance(value, kinds[name]):  # type: ignore[arg-type]
            wanted = "a text" if kinds[name] is str else "a mapping, {} if empty"
            raise RecipeError(f"{path}: {name} has to be {wanted}, not {value!r}.")
    if missing := [name for name in ("title", "stage1", "stage2") if name not in content]:
        raise RecipeError(f"{path} lacks {', '.join(missing)}; a variant has title, stage1 and stage2.")
    for measure, direction in content.get("expect", {}).items():
        if measure not in MEASURES or direction not in DIRECTIONS:
            raise RecipeError(
                f"{path}: expect has {measure}: {direction}; measures are {', '.join(MEASURES)}, each of them "
                f"{', '.join(DIRECTIONS)}."
            )
    variant = Variant(name=path.stem, **content)
    _check_stages(variant, path)
    return variant


def _check_stages(variant: Variant, path: Path) -> None:
    for stage, changes in ((1, variant.stage1), (2, variant.stage2)):
        if own := set(changes or {}) & set(OWN_SETTINGS):
            raise RecipeError(f"{path}: stage{stage} sets {sorted(own)[0]}, which is the command's; leave it out.")
    with tempfile.TemporaryDirectory() as folder:
        for run in stage_runs(variant, seed=0):
            place = Path(folder, f"{run.stage}.yaml")
            place.write_text(yaml.safe_dump({**run.settings, "output_dir": folder}), encoding="utf-8")
            try:
                STAGES[run.stage].parse(["--config", str(place)])
            except RecipeError as error:
                raise RecipeError(f"{path}, stage{run.stage}: {error}") from error


# ---- runs -----------------------------------------------------------------------------------------------------------


def train(folder: Path, run: StageRun, features: Path | None = None) -> Path:
    """
    Train a stage, unless that has been done; returns its folder, in which `trained.json` is written last.

    Args:
        folder: the command's output folder.
        run: the stage.
        features: folder of stored features, for stages whose vision side is frozen; they change no number.
    """
    place = folder / "runs" / run.name
    if (place / "trained.json").is_file():
        return place
    settings = {**run.settings, "seed": run.seed, "output_dir": str(place / "adapter")}
    if run.parent is not None:
        settings["model_name_or_path"] = str(train(folder, run.parent, features) / "adapter")
    if features is not None and not set(VISION_SIDE) & set(run.settings.get("train_parts", ())):
        settings["cache_features"] = str(features)
    shutil.rmtree(place, ignore_errors=True)  # what an interrupted run has left
    place.mkdir(parents=True)
    (place / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    heading(f"Training {run.name}")
    trainer = STAGES[run.stage].main(["--config", str(place / "config.yaml")])
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    logs = trainer.state.log_history
    told = {
        "trained_parameters": sum(parameter.numel() for parameter in parameters),
        "adapter_bytes": adapter_bytes(place / "adapter"),
        "steps": trainer.state.global_step,
        "seconds": next(entry["train_runtime"] for entry in reversed(logs) if "train_runtime" in entry),
        "loss": next((entry["loss"] for entry in reversed(logs) if "loss" in entry), None),
    }
    write_json(place / "trained.json", told)
    return place


def evaluate(place: Path, shown: Shown) -> dict[str, dict[str, float]]:
    """Let a saved adapter, loaded as a user loads it, describe the pictures, unless that has been done; score it."""
    path = place / f"replies-{len(shown)}.json"
    if not path.is_file():
        write_json(path, describe(*load_adapter(place / "adapter"), [image for image, _ in shown]))
    told = list(zip(json.loads(path.read_text(encoding="utf-8")), [scene for _, scene in shown], strict=True))
    held_out = [(reply, scene) for reply, scene in told if scene.has_held_out_pair]
    return {"scores": measure(told), "held_out": measure(held_out)}


def measure(told: Sequence[tuple[str, Scene]]) -> dict[str, float]:
    """Every one of `MEASURES` of replies and the scenes that they are about."""
    replies, scenes = [reply for reply, _ in told], [scene for _, scene in told]
    return {**score(replies, scenes), "repetition_rate": repetition_rate(replies)}


def run_variant(
    folder: Path, variant: Variant, seed: int, shown: Shown, features: Path | None = None
) -> dict[str, Any]:
    """
    Train and evaluate a variant with a seed; what is finished is only read.

    Raises:
        RecipeError: with the variant's name, if a stage refuses its settings.
    """
    try:
        places = [train(folder, run, features) for run in stage_runs(variant, seed)]
        scores = evaluate(places[-1], shown)
    except RecipeError as error:
        raise RecipeError(f"Variant {variant.name}: {error}") from error
    except OSError as error:  # of a run that was finished and damaged since
        raise RecipeError(
            f"Variant {variant.name}: {one_line(error)}; delete that folder of runs/ to train it again."
        ) from error
    trained = [json.loads((place / "trained.json").read_text(encoding="utf-8")) for place in places]
    last = {name: trained[-1][name] for name in ("trained_parameters", "adapter_bytes", "loss")}
    seconds = round(sum(stage["seconds"] for stage in trained), 1)
    folders = [place.name for place in places]
    return {"seed": seed, **scores, **last, "seconds": seconds, "runs": folders}


# ---- the command ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """
    Run the variants, all with the first seed, then all with the next; the reports are written after every run.

    Raises:
        RecipeError: for arguments and variants that are not understood, and a folder that cannot be written.
    """
    args = parse(arguments)
    with quiet():
        variants = find_variants(args.variants)
    folder = prepare_folder(args.output_dir, parts=("runs",))
    shown = evaluation_scenes(args.scenes, args.scenes // 3, seed=SCENES_SEED)
    results: dict[str, Any] = {
        "versions": versions(),
        "machine": machine(THREADS),
        "scenes": {"all": len(shown), "held_out": sum(scene.has_held_out_pair for _, scene in shown)},
        "seeds": args.seeds,
        "variants": {variant.name: {**vars(variant), "runs": []} for variant in variants},
    }
    tasks = [(seed, variant) for seed in args.seeds for variant in variants]
    with reproducible(THREADS), quiet():
        for number, (seed, variant) in enumerate(tasks, start=1):
            heading(f"{number} of {len(tasks)}: {variant.title}, seed {seed}")
            run = run_variant(folder, variant, seed, shown, args.cache_features)
            results["variants"][variant.name]["runs"].append(run)
            print(", ".join(f"{title} {style.format(run['scores'][key])}" for key, (title, style) in MEASURES.items()))
            summarize_variants(results["variants"])
            write_json(folder / "results.json", results)
            write_reports(folder, results)
            gc.collect()  # trainer and model refer to each other
    print_tables(results)
    print(f"\nThe chart, and every number: {folder / 'report.html'}, {folder / 'results.json'}")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments of the command."""
    return build_parser("ablate").parse_args(arguments)
