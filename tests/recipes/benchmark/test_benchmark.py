"""The benchmarks at a size that takes seconds: what they report, and what they refuse. Speed itself is no test."""

import html
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from modeling_minigpt4 import generation_minigpt4, heads_minigpt4
from recipes_minigpt4 import benchmark, cli
from recipes_minigpt4.benchmark import data, generation, memory, optimizations, training
from recipes_minigpt4.benchmark.measure import compare, count_flops, take_turns
from recipes_minigpt4.benchmark.models import SIZES, build_config, build_ours, build_peer, peer_inputs, peer_name
from recipes_minigpt4.benchmark.optimizations import OPTIMIZATIONS, both_ways
from recipes_minigpt4.benchmark.report import Bar, format_report, judge, write_report
from recipes_minigpt4.benchmark.sides import Workload, build_data, build_our_side
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.sources import open_source
from recipes_minigpt4.training import last_layer, loss, trainer
from recipes_minigpt4.utils.errors import RecipeError


SIDES = ("peer", "ours", "cached")
FAST = {"name": "a fast one", "value": 1.3, "relation": ">=", "bound": 1.2, "met": True}
TINY = ["--size", "tiny", "--rounds", "2"]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of `benchmark train`: its report, what was printed, what was written; memory is made up."""
    path = tmp_path_factory.mktemp("train") / "report.json"
    taken = {
        name: {"peak_bytes": 4 * n * 10**6, "peak_above_start_bytes": n * 10**6} for n, name in enumerate(SIDES, 2)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "measure_sides", lambda *_: taken)
        report = benchmark.main(["train", *TINY, "--output", str(path)])
    return SimpleNamespace(report=report, printed=format_report(report), written=json.loads(path.read_text()))


def test_training_reports_every_side(train) -> None:
    report = train.report
    assert tuple(report["sides"]) == SIDES
    for side in report["sides"].values():
        seconds, *numbers = side["seconds"], *(value for key, value in side.items() if key != "seconds")
        assert len(seconds) == report["rounds"] == 2
        assert all(value > 0 for value in [*seconds, *numbers])
    assert report["matmul"]["flops_per_second"] > 0
    assert report["ratios"].keys() == report["memory_ratios"].keys() == {"ours", "cached"}
    assert report["memory_ratios"]["cached"] == {"process": 2.0, "above_start": 2.0}
    assert "8 rows of 29 tokens, 24 of them the answer" in report["shapes"]["batch"]
    assert not report["bars"]  # which are for another size


def test_a_report_is_a_page_as_well(train, tmp_path) -> None:
    write_report({**train.report, "bars": [FAST]}, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h1>minigpt4 benchmark train, size tiny, medians of 2 rounds</h1>" in page
    told = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html.unescape(page)))
    for line in train.printed.splitlines():
        assert " ".join(line.split()) in told
    assert "a fast one 1.300 ≥ 1.2 met" in told
    assert not re.search(r"https?:|src=|href=|<script|<link", page)


def test_all_sides_train_the_same(train) -> None:
    for key in ("first_loss", "first_gradient_norm"):
        numbers = [side[key] for side in train.report["sides"].values()]
        assert numbers == pytest.approx([numbers[0]] * 3, rel=1e-4)


def test_what_is_written_is_what_is_printed(train) -> None:
    sides = train.written["sides"]
    assert sides["ours"]["first_loss"] == train.report["sides"]["ours"]["first_loss"]
    for line, key, form in (
        ("seconds per step", "seconds_per_step", ".3f"),
        ("images per second", "images_per_second", ".2f"),
        ("loss of the first step", "first_loss", ".5f"),
    ):
        printed = next(text for text in train.printed.splitlines() if text.strip().startswith(line))
        assert printed.split()[-3:] == [f"{sides[name][key]:{form}}" for name in SIDES]
    for name in ("ours", "cached"):
        assert f"{name} against peer: {train.written['ratios'][name]['median']:.3f} times as fast" in train.printed
    for key in ("cpu", "python", "torch", "transformers", "trl"):
        assert str(train.written["machine"][key]) in train.printed


def test_cached_features_save_the_operations_of_the_vision_side(train) -> None:
    model = build_ours(SIZES["tiny"], seed=0)
    side = model.config.vision_config.image_size
    with torch.no_grad():
        vision = count_flops(lambda: model.model.encode_images(torch.zeros(8, 3, side, side)))
    flops = {name: numbers["flops_per_step"] for name, numbers in train.report["sides"].items()}
    assert flops["ours"] - flops["cached"] == pytest.approx(vision, rel=0.01)


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = build_config(SIZES["tiny"])
    ids = torch.arange(3, 32).repeat(8, 1)
    ids[:, 1 : 1 + config.num_image_tokens] = config.image_token_id
    pixels = torch.zeros(8, 3, *config.image_size)
    labels = ids.masked_fill(ids == config.image_token_id, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
    monkeypatch.setattr(memory, "BUILDERS", {"peer": None})
    batches = [peer_inputs({name: tensor.clone() for name, tensor in batch.items()}, config) for _ in range(2)]
    taken = memory.measure_sides(Workload("tiny"), batches, threads=1)
    assert taken.keys() == {"peer"}
    assert taken["peer"]["peak_bytes"] > taken["peer"]["peak_above_start_bytes"] > 0


def test_a_process_that_dies_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RecipeError, match=r"'peer' was not measured.*exit status 1.*\.$"):
        memory.measure_sides(Workload("tiny"), [], threads=1)


def test_generation_reports_both_sides(tmp_path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "report.json"
    report = benchmark.main(["generate", *TINY, "--images", "2", "--new_tokens", "5", "--output", str(path)])
    printed = capsys.readouterr().out
    assert json.loads(path.read_text()) == report
    assert tuple(report["sides"]) == ("peer", "ours")
    for side in report["sides"].values():
        assert side["tokens_per_second"] == pytest.approx(10 / side["seconds_per_batch"])
        assert f"{side['seconds_per_batch']:.3f}" in printed
    assert "2 prompts of" in printed and "5 new tokens each" in printed


def test_pads_are_measured_in_both_orders(tmp_path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "report.json"
    report = benchmark.main(["pads", *TINY, "--batch_size", "2", "--rows", "32", "--output", str(path)])
    printed, sides = capsys.readouterr().out, report["sides"]
    assert json.loads(path.read_text()) == report
    assert tuple(sides) == ("random", "grouped", "random cached", "grouped cached")
    for kind in ("", " cached"):
        any_order, grouped = sides[f"random{kind}"], sides[f"grouped{kind}"]
        assert any_order["share_of_pads"] > 0.1 and grouped["share_of_pads"] < 0.05
        assert any_order["flops_per_step"] > grouped["flops_per_step"] > 0
        ratio = report["ratios"][f"grouped{kind}"]
        assert ratio["median"] > 0 and f"grouped{kind} against random{kind}: {ratio['median']:.3f} times" in printed
        assert f"{100 * grouped['share_of_pads']:.1f} %" in printed
    assert "2 rows, 16 batches" in printed and "10.3 words on average" in printed


# ---- optimisations --------------------------------------------------------------------------------------------------


def test_optimizations_are_measured_with_and_without(tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks, programs = iter(range(100, 200)), []

    def take(workload, batches, threads, sides, program):
        programs.append(program[1:])
        return {side: {"peak_above_start_bytes": next(peaks)} for side in sides}

    monkeypatch.setattr(memory, "measure_sides", take)
    monkeypatch.setattr(optimizations, "PICTURES", 32)
    path = tmp_path / "report.json"
    arguments = ["optimizations", *TINY, "--output", str(path)]
    report = benchmark.main(arguments)
    printed = capsys.readouterr().out
    assert json.loads(path.read_text()) == report
    assert report["optimizations"].keys() == OPTIMIZATIONS.keys()
    for name, found in report["optimizations"].items():
        assert tuple(found["without"]) == OPTIMIZATIONS[name].measures
        for measure, ratio in found["without"].items():
            turns = found["turns"][measure]
            assert ratio == compare(turns["without"], turns["with"]) and len(turns["with"]) == 2
            assert f"{ratio['median']:.3f} times" in printed
        assert found["pays"] == any(ratio["median"] >= 1.03 for ratio in found["without"].values())
        assert f"{name}, {found['lines']} lines: {'pays' if found['pays'] else 'does not pay'}" in printed
    assert programs[:4] == [["last_layer"], [], ["last_layer"], []]
    assert "32 and 128 tokens, greedy" in printed


@pytest.mark.parametrize(
    "name, place, attribute",
    [
        ("last_layer", last_layer.LastLayer, "_gather"),
        ("frozen_head", heads_minigpt4, "score_in_place"),
        ("no_pads", loss, "without_last_column"),
        ("byte_pictures", trainer, "to_pixels"),
        ("growing_cache", generation_minigpt4.GrowingLayer, "_append"),
    ],
)
def test_what_is_left_out_does_not_run(name: str, place, attribute: str, tmp_path, monkeypatch) -> None:
    calls, original = [], getattr(place, attribute)
    monkeypatch.setattr(place, attribute, lambda *args, **kwargs: (calls.append(1), original(*args, **kwargs))[1])
    if name == "growing_cache":
        args = SimpleNamespace(size="tiny", seed=0, new_tokens=3)
        work = generation.build_works(args, generation.build_inputs("tiny", 2))["ours"]
    else:
        workload = Workload("tiny")

        def work() -> None:
            build_our_side(workload, tmp_path, build_data(workload)).step()

    for way, run in both_ways(name, work).items():
        calls.clear()
        run()
        assert bool(calls) == (way == "with")


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZES)
def test_both_models_have_the_same_tensors(name: str) -> None:
    with torch.device("meta"):
        ours, peer = build_ours(SIZES[name], seed=0), build_peer(SIZES[name], seed=0)
    shapes = {peer_name(key): tensor.shape for key, tensor in ours.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in peer.state_dict().items()}
    trained = [
        {key for key, parameter in model.named_parameters() if parameter.requires_grad} for model in (ours, peer)
    ]
    assert {peer_name(key) for key in trained[0]} == trained[1]
    assert ours.model.vision_model.post_layernorm.eps == peer.vision_model.post_layernorm.eps


# ---- measuring ------------------------------------------------------------------------------------------------------


def test_sides_take_turns() -> None:
    order = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2)
    assert order == ["a", "b", "b", "a"]
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2}
    assert compare([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_attention_is_counted_as_its_products_are() -> None:
    query, key = torch.randn(2, 3, 5, 8, requires_grad=True), torch.randn(2, 3, 7, 8)

    def attend() -> torch.Tensor:
        return scaled_dot_product_attention(query, key, key)

    with sdpa_kernel(SDPBackend.MATH):
        products = count_flops(attend)
    assert count_flops(attend) == products == 4 * 2 * 3 * 5 * 7 * 8
    assert count_flops(lambda: attend().sum().backward()) == products * 7 // 2


@pytest.mark.parametrize("relation, met", [(">=", [False, True, True]), ("<=", [True, True, False])])
def test_bars_are_facts(relation: str, met: list[bool]) -> None:
    bars = [Bar("step", ("ratios", "ours", "median"), relation, bound) for bound in (1.3, 1.2, 1.1)]
    verdicts = judge({"ratios": {"ours": {"median": 1.2}}}, bars)
    assert [verdict["met"] for verdict in verdicts] == met
    assert [verdict["bound"] for verdict in verdicts] == [1.3, 1.2, 1.1]


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "results, told",
    [
        ({"peer": (2.0, 1.0), "ours": (2.001, 1.0)}, "the loss of 'ours' is 2.001"),
        ({"peer": (2.0, 1.0), "ours": (2.0, 1.0), "cached": (2.0, 1.01)}, "the gradient norm of 'cached' is 1.01"),
    ],
)
def test_sides_that_train_otherwise_are_refused(results: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        training.check_first_step(results)


def test_sides_that_write_otherwise_are_refused() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    generation.check_replies({"peer": ids, "ours": ids.clone()}, 2)
    with pytest.raises(RecipeError, match="1 of 2 replies differ"):
        generation.check_replies({"peer": ids, "ours": torch.tensor([[1, 2], [3, 5]])}, 2)
    with pytest.raises(RecipeError, match="'peer' wrote 2 tokens instead of 3"):
        generation.check_replies({"peer": ids, "ours": ids}, 3)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "KIND"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--size", "huge"], "invalid choice: 'huge'"),
        (["train", "--rounds", "0"], "'0' is not a whole number from 1 on"),
        (["generate", "--new_tokens", "few"], "'few' is not a whole number from 1 on"),
        (["generate", "--output", "no/such/folder/report.json"], "cannot be written"),
        (["train", *TINY, "--answer_tokens", "1000"], "--answer_tokens is 1000"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, told: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["benchmark", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minigpt4 benchmark: ") and last.endswith(".")
    assert told in last


# ---- data -----------------------------------------------------------------------------------------------------------


def test_data_is_measured_beside_pillow(tmp_path, capsys) -> None:
    path = tmp_path / "data.json"
    arguments = ["data", "--rounds", "1", "--pictures", "16", "--batch_size", "4", "--output", str(path)]
    assert cli.main(["benchmark", *arguments]) == 0
    printed, report = capsys.readouterr().out, json.loads(path.read_text())
    assert set(report["sides"]) == {"pillow", "ours"} and report["machine"]["threads"] == 1
    rates = {name: side["images_per_second"] for name, side in report["sides"].items()}
    assert all(rate > 0 for rate in rates.values())
    assert report["ratios"]["ours"]["median"] == pytest.approx(rates["ours"] / rates["pillow"])
    assert f"ours against pillow: {report['ratios']['ours']['median']:.3f}" in printed
    assert "16 JPEG of 512 × 384" in printed and not report["bars"]  # which are for another number


def test_the_pictures_of_the_data_benchmark_are_those_that_stage_1_reads(tmp_path) -> None:
    pictures = data.build_pictures(3, seed=0)
    assert pictures == data.build_pictures(3, seed=0) != data.build_pictures(3, seed=1)
    data.write_tars(tmp_path, pictures, 5)
    pairs = list(open_source(str(tmp_path), DataArguments(dataset_name=str(tmp_path)), stage=1))
    assert [pair["image"]["bytes"] for pair in pairs] == [pictures[number % 3] for number in range(5)]
    assert all(f"number {number}" in pair["text"] for number, pair in enumerate(pairs))
