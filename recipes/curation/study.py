"""What curation is worth, measured where truth is known: in the embedded world.

    minigpt4 demo                                     # writes demo-output/
    python -m recipes_minigpt4.curation.study         # about 6 minutes on a free core; goes on where it was stopped

For each seed, `tiny_curate` makes rows out of other scenes. Then it is counted how many sentences are false after
each step and what each rule found, and stage 2 is trained on several choices of the rows, all with as many steps. The
output folder gets `results.json`, `tables.md`, and a folder per seed.
"""

import random
import shutil
import statistics
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recipes_minigpt4 import stage2_finetune
from recipes_minigpt4.curation import curate
from recipes_minigpt4.curation.export_formats import WRITERS
from recipes_minigpt4.curation.mend import Mending
from recipes_minigpt4.curation.picking import Picks, pick
from recipes_minigpt4.curation.provenance import ExportedRow, read_makers
from recipes_minigpt4.curation.rows import CuratedRow, read_rows
from recipes_minigpt4.curation.rules import RULES
from recipes_minigpt4.curation.scripted_mender import mend
from recipes_minigpt4.curation.source import scenes_of
from recipes_minigpt4.curation.store import fingerprint
from recipes_minigpt4.curation.truth import defects, false_share, is_flawless
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.tiny.demo import describe, load_adapter, stage_arguments
from recipes_minigpt4.tiny.metrics import score
from recipes_minigpt4.tiny.scenes import Scene, draw_scene, evaluation_scenes
from recipes_minigpt4.tiny.scenes import describe as true_description
from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import prepare_folder, replace_text, write_json
from recipes_minigpt4.utils.journal import Journal
from recipes_minigpt4.utils.ranges import COUNT, SEED, in_range
from recipes_minigpt4.utils.runs import quiet, reproducible
from recipes_minigpt4.utils.text import markdown_table


SCORES = ("match_min", "match_mean")  # of which the first picks
SHARES = (0.05, 0.2)  # of the rows that no rule refuses, beside all of them
TOLD = {  # measure → its title, and the format of its values
    "object_f1": ("object F1", "{:.3f}"),
    "failure_rate": ("failure rate", "{:.3f}"),
    "position_accuracy": ("position accuracy", "{:.3f}"),
    "false_share": ("false sentences", "{:.3f}"),
    "mean_words": ("words", "{:.1f}"),
}
INVENTED = "invents a thing; no rule is there for it"


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """
    Run the study; returns what `results.json` holds.

    Raises:
        RecipeError: if there is no model, or the folder cannot be written.
    """
    args = parse(arguments)
    if not (args.model / "config.json").is_file():
        raise RecipeError(f"There is no model in {args.model}; run `minigpt4 demo`, or name another with --model.")
    folder = prepare_folder(args.output_dir, parts=())
    shown = evaluation_scenes(args.num_scenes, 0)
    found: list[dict[str, Any]] = []
    with reproducible(1), quiet(), Journal(folder / "runs.jsonl") as runs:
        for seed in args.seeds:
            curation = Curation(args, folder / f"seed-{seed}", seed)
            trained = {name: trained_on(curation, name, args, runs, shown) for name in curation.choices}
            found.append({"stages": stages(curation), "rules": rules(curation), "trained": trained})
        stage1 = untrained(args, runs, shown)
    results = summary(found) | {"stage1": stage1, "settings": {name: str(value) for name, value in vars(args).items()}}
    write_json(folder / "results.json", results)
    replace_text(folder / "tables.md", tables(results))
    print((folder / "tables.md").read_text(encoding="utf-8"), flush=True)
    return results


def parse(arguments: Sequence[str]) -> Namespace:
    """
    Read the arguments.

    Raises:
        RecipeError: if they are not understood.
    """
    return build_parser().parse_args(arguments)


def build_parser() -> CommandParser:
    """The parser of the command."""
    about = "Measure in the embedded world what each step of a curation is worth."
    parser = CommandParser(prog="python -m recipes_minigpt4.curation.study", description=about)
    add = parser.add_argument
    add("--model", type=Path, default=Path("demo-output/stage1"), help="of stage 1; default: %(default)s")
    add("--output_dir", type=Path, default=Path("tiny-curation-study"), help="default: %(default)s")
    add("--seeds", type=in_range(SEED), nargs="+", default=[0, 1, 2], help="of scenes and training; default: 0 1 2")
    add("--num_samples", type=in_range(COUNT), default=200, help="scenes that are curated; default: %(default)s")
    add("--rows", type=in_range(COUNT), default=80, help="that each choice trains on; default: %(default)s")
    add("--max_steps", type=in_range(COUNT), default=60, help="of stage 2; default: %(default)s")
    add("--batch_size", type=in_range(COUNT), default=8, help="rows of a step; default: %(default)s")
    add("--num_scenes", type=in_range(COUNT), default=100, help="that are described then; default: %(default)s")
    return parser


# ---- curating -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curation:
    """
    The rows of a seed, and what is true about them.

    Args:
        args: what the command takes.
        folder: of the seed.
        seed: of scenes and training.
    """

    args: Namespace
    folder: Path
    seed: int

    @cached_property
    def rows(self) -> list[CuratedRow]:
        """The rows as `minigpt4 curate --config tiny_curate` makes them."""
        options = {
            "model": self.args.model, "match": self.args.model, "num_samples": self.args.num_samples,
            "seed": self.seed, "output_dir": self.folder / "curated",
        }  # fmt: skip
        told = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        curate.main(["--config", "tiny_curate", *told])
        return read_rows(self.folder / "curated")

    @cached_property
    def truth(self) -> dict[str, Scene]:
        """Digest of a picture → what it shows."""
        drawn = scenes_of(self.seed, self.args.num_samples)
        return {Picture("", draw_scene(scene)).digest: scene for scene in drawn}

    @cached_property
    def manners(self) -> dict[str, str]:
        """Digest of a picture → what the mender did with its draft."""
        prompt = curate.read_prompt("mend", None)
        return {row.picture: mend(Mending(prompt).request(row.draft)).manner for row in self.rows}

    @cached_property
    def choices(self) -> dict[str, list[CuratedRow]]:
        """Name → rows that stage 2 is trained on."""
        count, chance = self.args.rows, random.Random(self.seed)
        true = [replace(row, text=true_description(self.truth[row.picture], chance)) for row in self.rows]
        choices = {
            "drafts": self._pick(text="draft", rules=(), keep=count),
            "mended": self._pick(text="mended", rules=(), keep=count),
            "filtered": self._pick(keep=count),
            "best by score": self._pick(keep=count, by="score"),
            "true descriptions": pick(true, Picks(rules=(), keep=count, seed=self.seed), _no_features)[0],
        }
        for share in SHARES:
            for by in ("score", "random"):
                choices[f"{share:.0%} by {by}"] = self._pick(keep_share=share, by=by)
        return {**choices, "100%": self._pick()}

    def _pick(self, **wanted: Any) -> list[CuratedRow]:
        return pick(self.rows, Picks(seed=self.seed, score=SCORES[0], **wanted), _no_features)[0]

    def scenes(self, rows: Sequence[CuratedRow]) -> list[Scene]:
        """What the pictures of rows show."""
        return [self.truth[row.picture] for row in rows]


def _no_features(rows: Sequence[CuratedRow]) -> Any:
    raise AssertionError("nothing is picked by how different it is")


# ---- counting -------------------------------------------------------------------------------------------------------


def stages(curation: Curation) -> dict[str, dict[str, float]]:
    """After each step: how many rows there are, and what is true of their texts."""
    rows = curation.rows
    texts = {
        "drafts": [replace(row, text=row.draft) for row in rows],
        "mended": [replace(row, text=row.mended) for row in rows if row.mended],
        "filtered": [row for row in rows if not row.verdicts],
    }
    for name in SCORES:
        left = sorted(texts["filtered"], key=lambda row: -row.scores[name])
        texts |= {f"best half by {name}": left[: len(left) // 2], f"worst half by {name}": left[len(left) // 2 :]}
    return {name: {"rows": len(of_step), **measures(curation, of_step)} for name, of_step in texts.items()}


def measures(curation: Curation, rows: Sequence[CuratedRow]) -> dict[str, float]:
    """The measures of the texts of rows."""
    return measures_of([row.text or "" for row in rows], curation.scenes(rows))


def measures_of(texts: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    return {**score(texts, scenes), "false_share": false_share(texts, scenes)}


def rules(curation: Curation) -> dict[str, dict[str, int]]:
    """For each rule: how many texts it refuses, have its defect, both, and are refused without any fault."""
    counts = {name: Counter[str]() for name in (*RULES, "all", INVENTED)}
    for row in curation.rows:
        manner = curation.manners[row.picture]
        wanted = defects(row, manner)
        flawless = is_flawless(row, manner, curation.truth[row.picture])
        for name, count in counts.items():
            refused = name in row.verdicts if name in RULES else bool(row.verdicts)
            has = name in wanted if name in RULES else bool(wanted)
            if name == INVENTED:
                refused, has = refused and manner == "invented", manner == "invented"
            told = {"refused": refused, "defect": has, "caught": refused and has, "flawless": refused and flawless}
            count.update({key: int(value) for key, value in told.items()})
    return {name: dict(count) for name, count in counts.items()}


# ---- training -------------------------------------------------------------------------------------------------------


def trained_on(
    curation: Curation, name: str, args: Namespace, runs: Journal, shown: Sequence[Any]
) -> dict[str, float]:
    """What stage 2 does on scenes never shown, trained on one of the choices; read if it was measured before."""
    rows = curation.choices[name]
    texts = [(row.picture, row.text) for row in rows]
    made = {
        "seed": curation.seed, "choice": name, "model": str(args.model), "steps": args.max_steps,
        "batch": args.batch_size, "scenes": args.num_scenes, "texts": fingerprint(texts=texts),
    }  # fmt: skip
    for line in runs.lines:
        if line["made"] == made:
            return dict(line["measures"])
    target = curation.folder / "stage2"
    shutil.rmtree(target, ignore_errors=True)
    data = target / "data"
    data.mkdir(parents=True)
    exported = [ExportedRow(number, row) for number, row in enumerate(rows)]
    WRITERS["cc_sbu_align"](data, curation.folder / "curated", exported, read_makers(curation.folder / "curated"))
    options = {"model_name_or_path": args.model, "dataset_name": data, "num_samples": len(rows)}
    options |= {"max_steps": args.max_steps, "warmup_steps": max(1, args.max_steps // 10)}
    options |= {"per_device_train_batch_size": args.batch_size}
    with (curation.folder / "training.log").open("a", encoding="utf-8") as log, redirect_stdout(log):
        trainer = stage2_finetune.main(stage_arguments("tiny_stage2", target / "model", curation.seed, **options))
    replies = describe(trainer.model, trainer.processing_class, [image for image, _ in shown])
    told = {"rows": float(len(rows)), **measures_of(replies, [scene for _, scene in shown])}
    runs.append({"made": made, "measures": told, "replies": replies[:3]})
    print(f"seed {curation.seed}, {name}: object F1 {told['object_f1']:.3f}", flush=True)
    shutil.rmtree(target)
    return told


def untrained(args: Namespace, runs: Journal, shown: Sequence[Any]) -> dict[str, float]:
    """What the model of stage 1 does without a second one; read if it was measured before."""
    made = {"choice": None, "model": str(args.model), "scenes": args.num_scenes}
    for line in runs.lines:
        if line["made"] == made:
            return dict(line["measures"])
    replies = describe(*load_adapter(args.model), [image for image, _ in shown])
    told = measures_of(replies, [scene for _, scene in shown])
    runs.append({"made": made, "measures": told, "replies": replies[:3]})
    return told


# ---- what comes out -------------------------------------------------------------------------------------------------


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds; what rules found is summed up."""
    counted: dict[str, Counter[str]] = {}
    for of_seed in found:
        for name, counts in of_seed["rules"].items():
            counted.setdefault(name, Counter()).update(counts)
    averaged = {
        part: {
            name: {key: _spread([of_seed[part][name][key] for of_seed in found]) for key in told}
            for name, told in found[0][part].items()
        }
        for part in ("stages", "trained")
    }
    return {**averaged, "rules": {name: dict(counts) for name, counts in counted.items()}}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def tables(results: Mapping[str, Any]) -> str:
    """The three tables."""
    header = ["", "rows", *(title for title, _ in TOLD.values())]
    alone = ["stage 1 alone", "", *(style.format(results["stage1"][key]) for key, (_, style) in TOLD.items())]
    parts = [
        ("The texts after each step", header, [_row(name, told) for name, told in results["stages"].items()]),
        (
            "What rules found",
            ["rule", "refused", "have its defect", "precision", "recall", "flawless, refused"],
            [_rule_row(name, counts) for name, counts in results["rules"].items()],
        ),
        ("Stage 2", header, [alone, *(_row(name, told) for name, told in results["trained"].items())]),
    ]
    return "\n\n".join(f"### {title}\n\n{markdown_table(names, rows)}" for title, names, rows in parts) + "\n"


def _row(name: str, told: Mapping[str, Mapping[str, float]]) -> list[str]:
    cells = (
        f"{style.format(told[key]['mean'])} ± {style.format(told[key]['std'])}" for key, (_, style) in TOLD.items()
    )
    return [name, f"{told['rows']['mean']:.0f}", *cells]


def _rule_row(name: str, counts: Mapping[str, int]) -> list[str]:
    refused, wanted, caught = (counts[key] for key in ("refused", "defect", "caught"))
    shares = [f"{caught / whole:.2f}" if whole else "–" for whole in (refused, wanted)]
    shares = ["–", *shares[1:]] if name == INVENTED else shares
    return [name, str(refused), str(wanted), *shares, str(counts["flawless"])]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RecipeError as error:
        raise SystemExit(f"{error}") from None
