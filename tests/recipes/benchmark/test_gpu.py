"""The benchmark for a GPU at tiny size on a CPU, so that it is known to start, and what it does with what it finds."""

import json
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4 import cli
from recipes_minigpt4.benchmark import gpu, gpu_plans, measure
from recipes_minigpt4.benchmark.gpu_plans import Plans, planned_bytes
from recipes_minigpt4.benchmark.models import SIZES, build_config, build_ours, build_peer, made_as, peer_name, size_of


PLAN = """
memory per GPU, GB                         at the peak   at most
  weights                                       15.672    15.672
  buffers for gradients, master copies           0.013     0.013
  CUDA context and workspaces (assumed)          1.500     1.500
  total                                         17.185
  fits into 24 GB yes, 40 GB yes, 80 GB yes
"""


class Planned:
    """Stands for the process of a plan."""

    returncode = 0

    def __init__(self, command: list[str], **options: object) -> None:
        assert command[1:4] == ["-m", "recipes_minigpt4.cli", "plan"]

    def communicate(self) -> tuple[str, None]:
        return PLAN, None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of steps and replies: its report, what was written and printed; plans are made up."""
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    options = ["--size", "tiny", "--only", "steps", "generation", "--rows", "2", "3", "--rounds", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # which trainers in bfloat16 change
        patch.setattr(gpu_plans.subprocess, "Popen", Planned)
        report = gpu.run(gpu.parse([*options, "--new_tokens", "3", "--output", str(path)]))
    AcceleratorState._reset_state(reset_partial_state=True)
    return SimpleNamespace(report=report, written=json.loads(path.read_text()), printed=gpu.format_report(report))


def test_steps_of_all_sides_are_measured(run) -> None:
    report = run.report
    assert run.written == report and report["notes"] == []
    places = [(one["rows"], one["side"]) for one in report["steps"]]
    assert places == [(rows, side) for rows in (2, 3) for side in ("pixels", "cached", "peer")]
    for one in report["steps"]:
        assert len(one["seconds"]) == 2 and one["length"] == 1 + 4 + 32 and one["flops_per_step"] > 0
        assert one["tokens_per_second"] == pytest.approx(one["rows"] * 37 / one["seconds_per_step"])
        rate = report["matmul"]["flops_per_second"]
        assert one["share_of_matmul_rate"] == pytest.approx(one["flops_per_second"] / rate)
        assert one["planned_bytes"] == (None if one["side"] == "peer" else 15_685_000_000)
    for first, second, third in zip(*[iter(report["steps"])] * 3, strict=True):  # pixels, cached, peer
        assert first["flops_per_step"] > second["flops_per_step"]
        for other in (second, third):  # bfloat16, and the peer's dropout
            assert other["first_loss"] == pytest.approx(first["first_loss"], rel=0.02)
    assert "bfloat16, medians of 2 rounds" in run.printed and "steps of stage 1, rows of 37 tokens" in run.printed
    assert re.search(r"^cached +sdpa +3 .* – +15\.6[89] +– ", run.printed, re.MULTILINE)


def test_replies_of_both_sides_are_measured(run) -> None:
    peer, ours = run.report["generation"]
    assert (peer["side"], ours["side"]) == ("peer", "ours")
    for one in (peer, ours):
        assert one["tokens_per_second"] == pytest.approx(8 * 3 / one["seconds_per_batch"])
    assert ours["same_tokens"] > 0.5
    assert re.search(r"^ours +sdpa +8 +3 ", run.printed, re.MULTILINE)


# ---- models ---------------------------------------------------------------------------------------------------------


def test_the_full_size_is_that_of_the_released_model() -> None:
    with torch.device("meta"):
        ours, released = (MiniGPT4ForConditionalGeneration(config) for config in
                          (build_config(size_of("vicuna-7b")), PRESETS["vicuna-7b"].config()))  # fmt: skip
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (ours, released)]
    assert shapes[0] == shapes[1]


def test_models_are_made_in_half_precision_and_share_what_is_frozen() -> None:
    with made_as(torch.device("cpu"), torch.bfloat16):
        ours = build_ours(SIZES["tiny"], seed=0)
        peer = build_peer(SIZES["tiny"], seed=0, ours=ours, share=True)
    assert torch.get_default_dtype() == torch.float32
    theirs = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        is_trained = "language_projection" in name
        other = theirs[peer_name(name)]
        assert parameter.dtype == other.dtype == (torch.float32 if is_trained else torch.bfloat16), name
        assert (parameter.data_ptr() == other.data_ptr()) is not is_trained, name
        assert parameter.requires_grad == other.requires_grad == is_trained
    rotary = ours.language_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32 and torch.equal(rotary, peer.language_model.model.rotary_emb.inv_freq)


def test_an_attention_is_that_of_both_models() -> None:
    bench = gpu.Bench(gpu.parse(["--size", "tiny"]), [], None, Path(), {})
    for attention in ("eager", "sdpa"):
        bench.use(attention)
        parts = [
            part for model in (bench.ours.model, bench.peer) for part in (model.vision_model, model.language_model)
        ]
        assert [part.config._attn_implementation for part in parts] == [attention] * 4


# ---- plans and tests ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", gpu_plans.PLANNED)
def test_steps_are_planned(side: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plans = Plans("tiny", [2], 32, torch.bfloat16, tmp_path)
    assert cli.main(plans.command(2, side)) == 0
    printed = capsys.readouterr().out
    assert "37 tokens: 1 prompt, 4 picture, 32 answer" in printed and "computed in bfloat16" in printed
    with made_as(torch.device("cpu"), torch.bfloat16):
        weights = gpu.weights_of(build_ours(SIZES["tiny"], seed=0))
    assert planned_bytes(printed) > weights
    assert planned_bytes(PLAN) == 15_685_000_000 and planned_bytes("Killed") is None


def test_the_tests_for_a_gpu_are_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.run_tests(tmp_path)["passed"] is None
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    text = "import pytest\n\n@pytest.mark.gpu\ndef test_one():\n    assert {}\n\ndef test_other():\n    assert False\n"
    (tmp_path / "test_it.py").write_text(text.format(True))
    found = gpu.run_tests(tmp_path)
    assert found["passed"] is True and found["told"].startswith("1 passed, 1 deselected")
    (tmp_path / "test_it.py").write_text(text.format(False))
    found = gpu.run_tests(tmp_path)
    (line,) = found["failed"]
    assert found["passed"] is False and line.split()[1].endswith("test_it.py::test_one")
    marked = [path.name for path in gpu.TESTS.rglob("test_*.py") if "pytest.mark.gpu\n" in path.read_text("utf-8")]
    assert {"test_steps.py", "test_front_doors.py"} <= set(marked)


# ---- what a CPU cannot show -----------------------------------------------------------------------------------------


def test_waits_and_memory_are_counted_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.count_waits(lambda: None) is None and measure.most_allocated(lambda: None) is None
    modes, order = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)

    def work() -> None:
        for text in (
            "called a synchronizing CUDA operation",
            "another",
            "called a synchronizing CUDA operation",
        ):
            warnings.warn(text, stacklevel=1)

    assert measure.count_waits(work) == 2 and modes == ["warn", "default"]
    order.clear()
    assert measure.most_allocated(lambda: order.append("work")) == 7
    assert order == ["wait", "reset", "work", "wait"]


@pytest.mark.parametrize(
    "error, told",
    [(torch.cuda.OutOfMemoryError("2 GiB"), "out of memory"), (ValueError("no kernel\nfor it"), "no kernel")],
)
def test_what_cannot_be_measured_is_told_and_the_rest_goes_on(error: Exception, told: str) -> None:
    bench = gpu.Bench(gpu.parse(["--size", "tiny"]), ["sdpa"], None, Path(), {"notes": []})

    def fail() -> None:
        raise error

    assert bench.attempt("steps of 64 rows with sdpa", fail) is None
    (note,) = bench.report["notes"]
    assert note.startswith("steps of 64 rows with sdpa: not measured (") and told in note


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")
@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "There is no CUDA device here; --size tiny tries the command on a CPU."),
        (["--size", "tiny", "--attention", "flash_attention_2"], "needs the package flash-attn"),
        (["--only", "everything"], "invalid choice: 'everything'"),
        (["--rows", "0"], "'0' is not a whole number from 1 on"),
        (["--output", "no/such/folder/gpu.json"], "cannot be written"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, told: str, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("gpu: ") and told in said and said.endswith(".")
