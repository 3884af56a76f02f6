"""`minigpt4 ablate`: variants as configuration, runs that are never done twice, and verdicts computed from numbers."""

import html
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from recipes_minigpt4 import stage1_pretrain, stage2_finetune
from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.configs import shipped_configs, shipped_variants
from recipes_minigpt4.evaluation import ablate, ablation_report
from recipes_minigpt4.tiny import demo, metrics, scenes
from recipes_minigpt4.utils.errors import RecipeError


SHORT = {"num_samples": 12, "max_steps": 2, "warmup_steps": 1, "per_device_train_batch_size": 4, "logging_steps": 1}
VARIANTS = {
    "baseline": {"title": "short baseline", "stage1": SHORT, "stage2": SHORT},
    "first_only": {
        "title": "only <one> stage", "paper": "Table 3", "note": "Short & raw.", "expect": {"failure_rate": "higher"},
        "stage1": SHORT, "stage2": None,
    },
    "three": {
        "title": "three layers", "paper": "Table 5", "expect": {"object_f1": "lower", "mean_words": "same"},
        "stage1": {**SHORT, "projector_num_layers": 3}, "stage2": SHORT,
    },
}  # fmt: skip


SCENES = [scene for _, scene in scenes.evaluation_scenes(6, 2, seed=1)]  # as --scenes 6 has them, held-out pairs last
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}
IA3 = {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def write_variants(folder: Path, variants: dict[str, dict]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in variants.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return folder


@contextmanager
def counted(stop_at: int | None = None) -> Iterator[list[str]]:
    """Collect the folders that stages are trained into; the one of number `stop_at` is interrupted in its middle."""
    trained: list[str] = []

    def watch(main: Callable) -> Callable:
        def wrapped(arguments):
            config = Path(arguments[arguments.index("--config") + 1])
            trained.append(config.parent.name)
            if len(trained) == stop_at:
                (config.parent / "adapter").mkdir()
                (config.parent / "adapter" / "half").write_text("written")
                raise KeyboardInterrupt
            return main(arguments)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "MAX_NEW_TOKENS", 12)
        for module in (stage1_pretrain, stage2_finetune):
            patch.setattr(module, "main", watch(module.main))
        yield trained


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Three variants with two seeds: interrupted in the sixth of eight runs, resumed, and called once more."""
    root = tmp_path_factory.mktemp("ablation")
    variants = write_variants(root / "variants", VARIANTS)
    out = root / "out"
    command = ["ablate", "--variants", str(variants), "--seeds", "0,1", "--scenes", "6", "--output_dir", str(out)]
    with counted(stop_at=6) as interrupted:
        assert run_command(command) == 130
    partial = json.loads((out / "results.json").read_text())
    with counted() as resumed:
        assert run_command(command) == 0
    results = json.loads((out / "results.json").read_text())
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    with counted() as repeated:
        assert run_command(command) == 0
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    again = json.loads((out / "results.json").read_text())
    table, page = ((out / name).read_text() for name in ("table.md", "report.html"))
    return SimpleNamespace(**locals())


# ---- runs -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_command_goes_on_and_a_finished_one_trains_nothing(ablation: SimpleNamespace) -> None:
    assert len(ablation.interrupted) == 6
    assert ablation.resumed[0] == ablation.interrupted[-1]  # which is done anew
    assert len(ablation.resumed) == 3
    assert not set(ablation.resumed[1:]) & set(ablation.interrupted)
    assert not list(ablation.out.rglob("half"))
    assert ablation.repeated == []
    assert ablation.after == ablation.before
    assert ablation.again == ablation.results


def test_reports_of_an_interrupted_command_hold_what_is_finished(ablation: SimpleNamespace) -> None:
    done = {name: [run["seed"] for run in of["runs"]] for name, of in ablation.partial["variants"].items()}
    assert done == {"baseline": [0], "first_only": [0], "three": [0]}
    for name, of in ablation.partial["variants"].items():
        assert of["runs"][0] == ablation.results["variants"][name]["runs"][0]


def test_variants_with_the_same_stage_1_share_its_run(ablation: SimpleNamespace) -> None:
    everything = ablation.interrupted[:-1] + ablation.resumed
    assert Counter(name.split("-")[0] for name in everything) == {"stage1": 4, "stage2": 4}
    assert len(set(everything)) == 8
    runs = {name: of["runs"] for name, of in ablation.results["variants"].items()}
    for place in range(2):
        shared = runs["baseline"][place]["runs"][0]
        assert runs["first_only"][place]["runs"] == [shared]
        assert runs["three"][place]["runs"][0] != shared
        assert f"seed{runs['baseline'][place]['seed']}" in shared


def test_every_run_is_told_with_its_numbers_and_its_configuration(ablation: SimpleNamespace) -> None:
    runs = {name: of["runs"] for name, of in ablation.results["variants"].items()}
    assert {name: [run["seed"] for run in of] for name, of in runs.items()} == {name: [0, 1] for name in VARIANTS}
    width, out = 96, 128  # of the embedded Q-Former and language model
    one, further = width * out + out, out * out + out
    assert {run["trained_parameters"] for run in runs["baseline"]} == {one}
    assert {run["trained_parameters"] for run in runs["three"]} == {one + 2 * further}
    for run in [run for of in runs.values() for run in of]:
        folder = ablation.out / "runs" / run["runs"][-1]
        assert run["adapter_bytes"] == (folder / "adapter" / "model.safetensors").stat().st_size
        assert run["scores"].keys() == run["held_out"].keys() == ablation_report.MEASURES.keys()
        replies = json.loads((folder / "replies-6.json").read_text())
        assert run["scores"].items() >= metrics.score(replies, SCENES).items()
        assert run["scores"]["repetition_rate"] == metrics.repetition_rate(replies)
        assert run["held_out"].items() >= metrics.score(replies[4:], SCENES[4:]).items()
        told = yaml.safe_load((folder / "config.yaml").read_text())
        assert (told["seed"], told["max_steps"]) == (run["seed"], 2)
    assert ablation.results["scenes"] == {"all": 6, "held_out": 2}


def test_another_folder_and_order_give_the_same_weights(ablation: SimpleNamespace, tmp_path: Path) -> None:
    command = ["ablate", "--variants", str(ablation.variants / "baseline.yaml"), "--seeds", "1", "--scenes", "6"]
    with counted() as trained:
        assert run_command([*command, "--output_dir", str(tmp_path)]) == 0
    assert trained == ablation.results["variants"]["baseline"]["runs"][1]["runs"]
    for name in trained:
        ours, theirs = (
            load_file(out / "runs" / name / "adapter" / "model.safetensors") for out in (tmp_path, ablation.out)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())


def test_cached_features_change_no_number(ablation: SimpleNamespace, tmp_path: Path) -> None:
    tuned = {"title": "tuned", "stage1": {**SHORT, "train_parts": ["qformer"]}, "stage2": None}
    variants = write_variants(tmp_path / "variants", {"baseline": VARIANTS["baseline"], "tuned": tuned})
    command = ["ablate", "--variants", str(variants), "--seeds", "1", "--scenes", "6", "--output_dir", str(tmp_path)]
    with counted():
        assert run_command([*command, "--cache_features", str(tmp_path / "features")]) == 0
    (run,) = json.loads((tmp_path / "results.json").read_text())["variants"]["baseline"]["runs"]
    plain = ablation.results["variants"]["baseline"]["runs"][1]
    assert {**run, "seconds": 0} == {**plain, "seconds": 0}
    for name in run["runs"]:
        ours, theirs = (
            load_file(out / "runs" / name / "adapter" / "model.safetensors") for out in (tmp_path, ablation.out)
        )
        assert all(torch.equal(ours[key], theirs[key]) for key in ours.keys() | theirs.keys())
    shards = list((tmp_path / "features").rglob("*.safetensors"))
    assert len(shards) == 2  # one per stage, none for the Q-Former that trains
    assert sum(len(load_file(path)["digests"]) for path in shards) == 2 * SHORT["num_samples"]


def test_a_run_is_known_by_all_that_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def names(seed: int = 0, stage1: dict | None = None, stage2: dict | None = None) -> list[str]:
        return [run.name for run in ablate.stage_runs(ablate.Variant("x", "X", stage1 or {}, stage2 or {}), seed)]

    first, second = names()
    assert names() == [first, second]
    assert names(stage2={"max_steps": 9})[0] == first
    assert names(stage2={"max_steps": 9})[1] != second
    for changed in (names(seed=1), names(stage1={"max_steps": 9})):
        assert changed[0] != first and changed[1] != second  # stage 2 depends on stage 1
    monkeypatch.setattr(ablate, "versions", lambda: {"torch": "another"})
    assert not {first, second} & set(names())


@pytest.mark.parametrize("adapter", [LORA, IA3], ids=["lora", "ia3"])
def test_adapters_of_the_language_model_go_on_from_the_baseline_s_stage_1(
    adapter: dict, ablation: SimpleNamespace, tmp_path: Path
) -> None:
    content = {"title": "adapter", "stage1": SHORT, "stage2": {**SHORT, "peft_config": adapter}}
    folder = write_variants(tmp_path, {"adapter": content})
    with counted() as trained:
        assert run_command(["ablate", "--variants", str(folder / "adapter.yaml"), "--seeds", "0", "--scenes", "3",
                            "--output_dir", str(ablation.out)]) == 0  # fmt: skip
    (run,) = json.loads((ablation.out / "results.json").read_text())["variants"]["adapter"]["runs"]
    baseline = ablation.results["variants"]["baseline"]["runs"][0]
    assert run["runs"] == [baseline["runs"][0], *trained]
    saved = ablation.out / "runs" / trained[0] / "adapter"
    files = [saved / "model.safetensors", saved / "peft" / "adapter_model.safetensors"]
    assert run["adapter_bytes"] == sum(path.stat().st_size for path in files)
    counts = [sum(tensor.numel() for tensor in load_file(path).values()) for path in files]
    assert counts[0] == baseline["trained_parameters"]
    assert run["trained_parameters"] == sum(counts)


# ---- tables, chart and verdicts -------------------------------------------------------------------------------------


def test_mean_and_deviation_over_the_seeds(ablation: SimpleNamespace) -> None:
    for of in ablation.results["variants"].values():
        for measure in ablation_report.MEASURES:
            one, two = (run["scores"][measure] for run in of["runs"])
            assert of["summary"][measure]["mean"] == pytest.approx((one + two) / 2)
            assert of["summary"][measure]["std"] == pytest.approx(abs(one - two) / math.sqrt(2))
    assert ablation_report.spread([1.0, 2.0, 3.0, 6.0]) == (3.0, pytest.approx(math.sqrt(14 / 3)))
    assert ablation_report.spread([0.5]) == (0.5, None)


@pytest.mark.parametrize(
    "expected, found, baseline, verdict",
    [
        ("lower", (0.70, 0.02), (0.90, 0.02), "agrees"),
        ("higher", (0.70, 0.02), (0.90, 0.02), "does not agree"),
        ("higher", (0.95, 0.02), (0.90, 0.02), "agrees"),
        ("lower", (0.95, 0.02), (0.90, 0.02), "does not agree"),
        ("lower", (0.87, 0.02), (0.90, 0.02), "no clear difference"),
        ("lower", (0.70, 0.30), (0.90, 0.01), "no clear difference"),  # pooled 0.21
        ("higher", (0.90, 0.0), (0.90, 0.0), "no clear difference"),
        ("lower", (0.89, 0.0), (0.90, 0.0), "agrees"),
        ("same", (0.87, 0.001), (0.90, 0.001), "agrees"),  # clear, but 3 %
        ("same", (0.93, 0.02), (0.90, 0.02), "agrees"),
        ("same", (0.80, 0.02), (0.90, 0.02), "does not agree"),
        ("same", (1.00, 0.02), (0.90, 0.02), "does not agree"),
        ("same", (0.80, 0.09), (0.90, 0.02), "no clear difference"),
        ("lower", (0.10, None), (0.90, 0.02), "not judged"),
        ("same", (0.90, 0.02), (0.90, None), "not judged"),
    ],
)
def test_the_verdict_follows_from_the_numbers(expected, found, baseline, verdict) -> None:
    spread = ablation_report.Spread
    assert ablation_report.judge(expected, spread(*found), spread(*baseline)) == verdict


def synthetic(**scores: list[float]) -> dict:
    """Results of variants that differ in their object F1 by seed; all but the baseline expect a lower one."""
    variants = {}
    for name, values in scores.items():
        runs = [
            {
                "seed": seed, "seconds": 10.0 + seed, "trained_parameters": 12416, "adapter_bytes": 49888,
                "scores": {"object_f1": value, "position_accuracy": 0.5, "failure_rate": 0.25, "mean_words": 30.0,
                           "repetition_rate": 0.125},
            }
            for seed, value in enumerate(values)
        ]  # fmt: skip
        expect = {} if name == "baseline" else {"object_f1": "lower"}
        variants[name] = {
            "title": f"the {name} <one>",
            "paper": "Table | 5",
            "note": "",
            "expect": expect,
            "runs": runs,
        }
    ablation_report.summarize_variants(variants)
    seeds = list(range(max(map(len, scores.values()))))
    machine = {"versions": {"torch": "2.0"}, "machine": "a machine", "scenes": {"all": 240, "held_out": 80}}
    return {**machine, "seeds": seeds, "variants": variants}


def test_the_tables_tell_deviations_costs_and_verdicts() -> None:
    text = ablation_report.render_markdown(synthetic(baseline=[0.9, 0.92], worse=[0.5, 0.52], unrun=[]))
    cells = "0.510 ± 0.014 | 0.500 ± 0.000 | 25.0% ± 0.0% | 30.0 ± 0.0 | 12.5% ± 0.0% | 12,416 | 49,888 | 10 |"
    assert f"| the worse <one> | 2 | {cells}" in text
    assert "| the worse <one> | object F1 | lower | 0.510 ± 0.014 | 0.910 ± 0.014 | agrees | Table \\| 5 |" in text
    assert "- Agrees, 1 of 1: the worse <one> (object F1)." in text
    assert (
        "240 scenes never shown, 80 of them with a held-out" in text and "seeds 0, 1" in text and "torch 2.0" in text
    )
    assert "unrun" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {8, 11}


def test_without_a_baseline_nothing_is_compared() -> None:
    text = ablation_report.render_markdown(synthetic(worse=[0.5, 0.52]))
    assert "no 'baseline' among the variants" in text and "agrees |" not in text


def test_the_page_draws_deviations_and_loads_nothing() -> None:
    results = synthetic(baseline=[0.9, 0.9], worse=[0.4, 0.6], single=[0.3])
    page = ablation_report.render_html(results)
    assert not re.search(r"https?:|src=|href=|@import|url\(|<script|<link", page)
    assert page.count("<svg") == page.count("</svg>") == 3
    assert "<one>" not in page and "the worse &lt;one&gt;" in page
    chart = ablation_report.draw_chart(results, "object_f1")
    dots = [float(x) for x in re.findall(r'<circle[^>]* cx="([\d.]+)"', chart)]
    bars = re.findall(r'<line class="curve" x1="([\d.]+)" x2="([\d.]+)"', chart)
    (dashed,) = re.findall(r'stroke-dasharray="4 4" x1="([\d.]+)"', chart)
    left, right = 175, 424  # where the axis has 0 and 1
    for dot, bar, (mean, std) in zip(dots, bars, [(0.9, 0.0), (0.5, math.sqrt(0.02)), (0.3, 0.0)], strict=True):
        assert (dot - left) / (right - left) == pytest.approx(mean, abs=1e-3)
        low, high = ((float(x) - left) / (right - left) for x in bar)
        assert (low, high) == (pytest.approx(mean - std, abs=1e-3), pytest.approx(mean + std, abs=1e-3))
    assert float(dashed) == dots[0]


def test_the_files_hold_what_was_measured(ablation: SimpleNamespace, capsys: pytest.CaptureFixture) -> None:
    assert ablation.table == ablation_report.render_markdown(ablation.results)
    assert ablation.page == ablation_report.render_html(ablation.results)
    verdicts = {name: set(of.get("verdicts", {})) for name, of in ablation.results["variants"].items()}
    assert verdicts == {"baseline": set(), "first_only": {"failure_rate"}, "three": {"object_f1", "mean_words"}}
    ablation_report.print_tables(ablation.results)
    printed = capsys.readouterr().out
    assert "only <one> stage" in printed and "on 6 scenes" in printed
    for text in (printed, ablation.table, html.unescape(ablation.page)):
        assert "only <one> stage: Short & raw." in text


# ---- variants that ship ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped_variants())
def test_shipped_variants_change_what_they_say(name: str, tmp_path: Path) -> None:
    (variant,) = ablate.find_variants([name])
    assert bool(variant.expect) == bool(variant.paper)
    assert shipped_variants()[name].read_text(encoding="utf-8").startswith("# ")
    modules = {1: stage1_pretrain, 2: stage2_finetune}
    for run in ablate.stage_runs(variant, seed=0):
        base = yaml.safe_load(shipped_configs()[f"tiny_stage{run.stage}"].read_text(encoding="utf-8"))
        changes = (variant.stage1 if run.stage == 1 else variant.stage2) or {}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(dict(run.settings)))
        parsed = modules[run.stage].parse(["--config", str(tmp_path / "own.yaml")])
        for field, value in changes.items():
            assert value != base.get(field), f"{field} is the baseline's own"
            (owner,) = [part for part in parsed if hasattr(part, field)]
            assert getattr(owner, field) == value


def test_the_paper_s_variants_ship() -> None:
    assert set(shipped_variants()) == {
        "baseline", "three_layers", "no_qformer", "qformer_tuned", "stage1_only", "lora", "ia3",
        "data_10", "data_30", "data_50",
    }  # fmt: skip


@pytest.mark.parametrize("percent", [10, 30, 50])
def test_a_share_of_stage_1_is_one_of_pairs_steps_and_warm_up(percent: int) -> None:
    base = yaml.safe_load(shipped_configs()["tiny_stage1"].read_text(encoding="utf-8"))
    (variant,) = ablate.find_variants([f"data_{percent}"])
    assert set(variant.stage1) == {"num_samples", "max_steps", "warmup_steps"}
    for field, value in variant.stage1.items():
        assert 100 * value == percent * base[field]


# ---- mistakes -------------------------------------------------------------------------------------------------------


def variant(**changes) -> dict:
    return {**VARIANTS["baseline"], **changes}


# What a variant's file holds, and what the sentence has to name.
FILES = {
    "no such field": (variant(stage3={}), ("own.yaml", "stage3", "stage2")),
    "no such field of a stage": (variant(stage1={"learning_rat": 1}), ("own.yaml, stage1", "learning_rate")),
    "no such field of stage 2": (variant(stage2={"xyzzy": 1}), ("own.yaml, stage2", "xyzzy")),
    "wrong number": (variant(stage1={"max_steps": "many"}), ("own.yaml, stage1", "max_steps", "many")),
    "a seed of its own": (variant(stage2={"seed": 3}), ("own.yaml", "stage2", "seed", "leave it out")),
    "another adapter": (variant(stage2={"model_name_or_path": "x"}), ("model_name_or_path",)),
    "no mapping": (variant(stage1=None), ("own.yaml", "stage1", "mapping")),
    "title is no text": (variant(title=10), ("own.yaml", "title", "text")),
    "nothing": ({}, ("own.yaml", "title, stage1 and stage2")),
    "no such measure": (variant(expect={"beauty": "lower"}), ("own.yaml", "beauty", "object_f1")),
    "no such direction": (variant(expect={"object_f1": "worse"}), ("own.yaml", "worse", "lower")),
}


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The sentence on standard error, after nothing has been trained."""
    with counted() as trained:
        assert run_command(["ablate", *arguments]) == 2
    assert trained == []
    told = capsys.readouterr().err
    assert told.startswith("minigpt4 ablate: ") and told.endswith(".\n") and told.count("\n") == 1, told
    return told


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_a_variant_are_told_in_one_sentence(name: str, tmp_path: Path, capsys) -> None:
    content, named = FILES[name]
    folder = write_variants(tmp_path / "variants", {"own": content})
    told = refused(["--variants", str(folder / "own.yaml"), "--output_dir", str(tmp_path / "out")], capsys)
    assert not [word for word in named if word not in told], told
    assert not (tmp_path / "out").exists()


def test_a_variant_that_is_no_yaml(tmp_path: Path, capsys) -> None:
    (tmp_path / "own.yaml").write_text("title: [1\n")
    told = refused(["--variants", str(tmp_path / "own.yaml")], capsys)
    assert "own.yaml" in told and "YAML" in told


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--variants", "four_layers"], ("four_layers", "three_layers")),
        (["--variants", "lora,ia3,lora"], ("two variants", "lora")),
        (["--variants", ","], ("--variants",)),
        (["--seeds", "0,one"], ("--seeds", "'one'")),
        (["--seeds", "1,1"], ("--seeds", "twice")),
        (["--seeds", ""], ("--seeds",)),
        (["--seeds", str(2**32)], ("--seeds", "4294967295")),
        (["--scenes", "2"], ("--scenes", "from 3 on")),
        (["--jobs", "2"], ("--jobs",)),
    ],
)
def test_mistakes_in_the_arguments_are_told_in_one_sentence(arguments, named, tmp_path: Path, capsys) -> None:
    told = refused([*arguments, "--output_dir", str(tmp_path / "out")], capsys)
    assert not [word for word in named if word not in told], told


def test_a_folder_where_a_file_is_in_the_way(tmp_path: Path, capsys) -> None:
    (tmp_path / "runs").write_text("precious")
    told = refused(["--variants", "baseline", "--output_dir", str(tmp_path)], capsys)
    assert "--output_dir" in told and "cannot be used" in told
    assert (tmp_path / "runs").read_text() == "precious"


def test_a_stage_that_refuses_its_settings_names_the_variant(ablation: SimpleNamespace) -> None:
    (three,) = ablate.find_variants([str(ablation.variants / "baseline.yaml")])
    deeper = ablate.Variant("deeper", "deeper", three.stage1, {**three.stage2, "projector_num_layers": 3})
    with (
        counted(),
        pytest.raises(RecipeError, match=r"Variant deeper: projector_num_layers is 3, but .* has 1; leave"),
    ):
        ablate.run_variant(ablation.out, deeper, 0, [])


def test_help_names_the_options(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        run_command(["ablate", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--variants", "--seeds", "--scenes", "--output_dir"))
