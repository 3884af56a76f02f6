"""Speed and memory on a CUDA device at Vicuna-7B's size, with random weights, beside transformers' BLIP-2.

    python -m recipes_minigpt4.benchmark.gpu
    python -m recipes_minigpt4.benchmark.gpu --only steps --rows 16 --output steps.json
    python -m recipes_minigpt4.benchmark.gpu --size tiny    # on any machine: whether it works at all

Runs the tests that need a GPU, then measures, in bfloat16 and with every attention there is: a step of stage 1 from
pixels and from cached features, and replies. Prints tables and writes what was measured, after every part, as JSON.
The weights are made on the device, 16 GB that both models share; nothing is fetched, and little is needed of the host.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers.utils import is_flash_attn_2_available

from recipes_minigpt4.benchmark import generation
from recipes_minigpt4.benchmark.gpu_plans import Plans
from recipes_minigpt4.benchmark.measure import (
    compare,
    count_flops,
    count_waits,
    device,
    matmul,
    most_allocated,
    seconds,
    take_turns,
)
from recipes_minigpt4.benchmark.models import FULL_SIZES, build_ours, build_peer, made_as, peer_inputs, size_of
from recipes_minigpt4.benchmark.options import IMAGES, check_output
from recipes_minigpt4.benchmark.report import describe_machine, describe_shapes
from recipes_minigpt4.benchmark.sides import TrainingSide, Workload, build_data, build_our_side, build_peer_side
from recipes_minigpt4.benchmark.training import WARM_UP, describe_step
from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import write_json
from recipes_minigpt4.utils.ranges import COUNT, SEED, in_range
from recipes_minigpt4.utils.text import duration, format_table


PARTS = ("tests", "steps", "generation")
SIZES = (*FULL_SIZES, "tiny")
ATTENTIONS = ("sdpa", "flash_attention_2")
DTYPE = torch.bfloat16
ROWS, NEW_TOKENS, ROUNDS = (16, 64), 64, 10
ANSWER_TOKENS = 32  # the longest of stage 1, as a plan has them
REPLY_ROUNDS = 3
PRODUCTS = 20  # of matrices, one after the other
TESTS = Path(__file__).resolve().parents[2] / "tests"
TESTS_TIME = 180  # seconds
GB, TFLOP = 1e9, 1e12


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(prog="gpu", description="Speed and memory on a CUDA device, beside transformers' BLIP-2.")
    told = "default: %(default)s"
    count: dict[str, Any] = {"type": in_range(COUNT), "metavar": "N"}
    parser.add_argument("--size", choices=SIZES, default=SIZES[0], help=f"of the models; {told}")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts; default: all")
    parser.add_argument("--rows", nargs="+", **count, default=list(ROWS), help=f"of a step; {told}")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, help="default: those there are")
    parser.add_argument("--new_tokens", **count, default=NEW_TOKENS, help=f"of each of {IMAGES} replies; {told}")
    parser.add_argument("--rounds", **count, default=ROUNDS, help=f"of steps; {told}")
    parser.add_argument("--seed", type=in_range(SEED), default=0, metavar="N", help=f"of weights and rows; {told}")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), metavar="FILE", help=f"as JSON; {told}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 after a mistake, which is told on standard error in one sentence."""
    try:
        args = parse(arguments)
        check_output(args.output)
        run(args)
    except RecipeError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure the parts that are asked for; what one of them cannot do is told, and the others go on.

    Returns:
        The report, which is written after every part.

    Raises:
        RecipeError: if there is no CUDA device, or an attention that is asked for is not there.
    """
    if device().type != "cuda" and args.size != "tiny":
        raise RecipeError("There is no CUDA device here; --size tiny tries the command on a CPU.")
    attentions = choose_attentions(args.attention)
    size = size_of(args.size)
    report: dict[str, Any] = {
        "benchmark": "gpu", "size": args.size, "dtype": str(DTYPE).removeprefix("torch."),
        "machine": describe_device(), "shapes": describe_shapes(size), "rounds": args.rounds, "notes": [],
    }  # fmt: skip
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        plans = Plans(args.size, args.rows if "steps" in args.only else (), ANSWER_TOKENS, DTYPE, Path(folder))
        with plans:  # they take processors while the tests run
            bench = Bench(args, attentions, plans, Path(folder), report)
            for part in [part for part in PARTS if part in args.only]:
                print(f"{part} …", flush=True)
                bench.parts[part]()
                report["seconds"] = time.perf_counter() - start
                write_json(args.output, report)
    print(format_report(report), flush=True)
    return report


def choose_attentions(wanted: Sequence[str] | None) -> list[str]:
    """The attentions to measure, all there are unless they are named."""
    flash = device().type == "cuda" and is_flash_attn_2_available()
    known = [name for name in ATTENTIONS if name == "sdpa" or flash]
    for name in wanted or ():
        if name not in known:
            raise RecipeError(f"--attention {name} needs the package flash-attn and a CUDA device; leave it out.")
    return list(wanted or known)


def describe_device() -> dict[str, Any]:
    """The machine, its card and what drives it."""
    machine = {**describe_machine(), "cuda": torch.version.cuda, "device": str(device())}
    if device().type == "cuda":
        card = torch.cuda.get_device_properties(0)
        machine |= {"device_memory_bytes": card.total_memory, "cudnn": torch.backends.cudnn.version()}
    return machine


# ---- tests ----------------------------------------------------------------------------------------------------------


def run_tests(folder: Path = TESTS) -> dict[str, Any]:
    """Run the tests marked `gpu` in a process of their own; what pytest says last, and whether none failed."""
    files = [str(path) for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    if not files:
        return {"passed": None, "told": "not run, as the tests are not beside the package"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(
            command, cwd=folder.parent, capture_output=True, text=True, encoding="utf-8", timeout=TESTS_TIME
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "told": f"not done after {duration(TESTS_TIME)}"}
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return {"passed": done.returncode == 0, "told": said[-1] if said else "nothing", "failed": failed}


# ---- what is measured -----------------------------------------------------------------------------------------------


class Bench:
    """
    Both models, made when they are needed, and what is measured of them.

    Args:
        args: the command line.
        attentions: names in `ATTENTIONS`.
        plans: what `minigpt4 plan` says.
        folder: for what trainers write.
        report: what is filled in.
    """

    def __init__(
        self, args: argparse.Namespace, attentions: Sequence[str], plans: Plans, folder: Path, report: dict[str, Any]
    ) -> None:
        self.args, self.attentions, self.plans, self.folder, self.report = args, attentions, plans, folder, report
        self.size = size_of(args.size)
        self.parts: dict[str, Callable[[], None]] = {
            "tests": self.measure_tests, "steps": self.measure_steps, "generation": self.measure_generation
        }  # fmt: skip

    @cached_property
    def ours(self) -> Any:
        with made_as(device(), DTYPE):
            return build_ours(self.size, self.args.seed)

    @cached_property
    def peer(self) -> Any:
        with made_as(device(), DTYPE):
            return build_peer(self.size, self.args.seed, ours=self.ours, share=True)

    @cached_property
    def rate(self) -> float:
        """Operations per second of a product of large matrices."""
        product, flops = matmul(self.size.matmul, DTYPE)

        def products() -> None:
            for _ in range(PRODUCTS):
                product()

        products()
        rate = PRODUCTS * flops / statistics.median(seconds(products) for _ in range(5))
        self.report["matmul"] = {"size": self.size.matmul, "flops_per_second": rate}
        return rate

    def attempt(self, what: str, work: Callable[[], Any]) -> Any:
        """What a measurement returns; None if the memory does not suffice or an attention cannot be used."""
        try:
            return work()
        except (ImportError, ValueError, RuntimeError) as error:
            reason = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else one_line(error)[:200]
            self.report["notes"].append(f"{what}: not measured ({reason})")
        free_memory()
        return None

    def use(self, attention: str) -> None:
        """Set the attention of encoders and language models; a Q-Former may have one only."""
        for model in (self.ours.model, self.peer):
            model.vision_model.set_attn_implementation(attention)
            model.language_model.set_attn_implementation(attention)

    def measure_tests(self) -> None:
        self.report["tests"] = run_tests()

    # ---- steps ----------------------------------------------------------------------------------------------------

    def measure_steps(self) -> None:
        """Steps of all sides, for every attention and number of rows."""
        self.plans.wait()  # so that nothing else is at work
        self.report["steps"] = []
        for attention in self.attentions:
            for rows in self.args.rows:
                what = f"steps of {rows} rows with {attention}"
                self.report["steps"] += self.attempt(what, partial(self.steps_of, attention, rows)) or []
                free_memory()
        for model in (self.ours, self.peer):
            extract_model_from_parallel(model, keep_fp32_wrapper=False)  # replies are written without autocast

    def steps_of(self, attention: str, rows: int) -> list[dict[str, Any]]:
        """A line of the table for each side."""
        self.use(attention)
        sides, found = {}, {}
        for name, build in self.builders(rows).items():
            before = allocated()
            sides[name] = side = build()
            loss, norm = side.step()  # makes the optimizer's state
            most, own = most_allocated(side.advance), before - weights_of(self.ours)
            found[name] = {
                "attention": attention, "rows": rows, "side": name, "first_loss": loss, "first_gradient_norm": norm,
                "waits": count_waits(side.advance), "peak_bytes": None if most is None else most - own,
                "planned_bytes": self.plans.bytes_of(rows, name),
            }  # fmt: skip
        works = {name: side.advance for name, side in sides.items()}
        length = sides["pixels"].batches[0]["input_ids"].shape[1]
        flops = {name: count_flops(work) for name, work in works.items()}
        take_turns(works, WARM_UP)
        times = take_turns(works, self.args.rounds)
        for name, numbers in found.items():
            numbers |= describe_step(times[name], flops[name], self.rate, rows)
            numbers |= {"length": length, "tokens_per_second": numbers["images_per_second"] * length}
            numbers["against_peer"] = compare(times["peer"], times[name])
        return list(found.values())

    def builders(self, rows: int) -> dict[str, Callable[[], TrainingSide]]:
        """Side → what builds it; the peer gets the batches of the first."""
        workload = Workload(self.args.size, rows, ANSWER_TOKENS, self.args.seed)
        data = build_data(workload)
        half: dict[str, Any] = {"bf16": True}

        def pixels() -> TrainingSide:
            side = build_our_side(workload, self.folder, data, self.ours, **half)
            prepared = [side.trainer._prepare_inputs(dict(batch)) for batch in side.batches]
            data.peer_batches = [peer_inputs(batch, self.ours.config) for batch in prepared]
            return side

        features = str(self.folder / "features")
        return {
            "pixels": pixels,
            "cached": partial(build_our_side, workload, self.folder, data, self.ours, cache_features=features, **half),
            "peer": partial(build_peer_side, workload, self.folder, data, model=self.peer, **half),
        }

    # ---- replies --------------------------------------------------------------------------------------------------

    def measure_generation(self) -> None:
        """Replies of both sides, for every attention."""
        inputs = generation.build_inputs(self.args.size, IMAGES)
        self.report["generation"] = []
        self.peer.language_projection.to(DTYPE)  # which autocast did for it in training
        for attention in self.attentions:
            work = partial(self.replies_of, attention, inputs)
            self.report["generation"] += self.attempt(f"replies with {attention}", work) or []

    def replies_of(self, attention: str, inputs: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        self.use(attention)
        works = generation.replies_of(self.ours, self.peer, inputs, self.args.new_tokens)
        written = {name: work() for name, work in works.items()}  # which is the warm-up too
        for name, ids in written.items():
            if ids.shape[1] != self.args.new_tokens:
                raise RecipeError(f"{name!r} wrote {ids.shape[1]} tokens instead of {self.args.new_tokens}.")
        alike = float((written["ours"] == written["peer"]).float().mean())  # roundings of half precision part them
        peaks = {name: most_allocated(work) for name, work in works.items()}
        times = take_turns(works, REPLY_ROUNDS)
        found = []
        for name in works:
            median = statistics.median(times[name])
            found.append({
                "attention": attention, "side": name, "replies": IMAGES, "new_tokens": self.args.new_tokens,
                "prompt_tokens": inputs["input_ids"].shape[1], "seconds_per_batch": median, "seconds": times[name],
                "tokens_per_second": IMAGES * self.args.new_tokens / median, "peak_bytes": peaks[name],
                "same_tokens": alike, "against_peer": compare(times["peer"], times[name]),
            })  # fmt: skip
        return found


def allocated() -> int:
    return torch.cuda.memory_allocated() if device().type == "cuda" else 0


def weights_of(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def free_memory() -> None:
    gc.collect()
    if device().type == "cuda":
        torch.cuda.empty_cache()


# ---- telling --------------------------------------------------------------------------------------------------------


def format_report(report: dict[str, Any]) -> str:
    """The report as text: the machine, then a table for every part."""
    machine = report["machine"]
    memory = f", {machine['device_memory_bytes'] / GB:.0f} GB" if "device_memory_bytes" in machine else ""
    versions = [f"{name} {machine[name]}" for name in ("torch", "cuda", "transformers", "trl") if machine[name]]
    lines = [
        f"{machine.get('gpu', machine['cpu'])}{memory}; {', '.join(versions)}; size {report['size']}, "
        f"{report['dtype']}, medians of {report['rounds']} rounds, {duration(report['seconds'])} in all"
    ]
    if "tests" in report:
        tests = report["tests"]
        lines += [f"tests marked gpu: {tests['told']}", *tests.get("failed", ())]
    if "matmul" in report:
        product = report["matmul"]
        rate = product["flops_per_second"] / TFLOP
        lines.append(f"matmul: {rate:,.1f} TFLOP/s, {report['dtype']}, {product['size']} × {product['size']}")
    if report.get("steps"):
        length = report["steps"][0]["length"]
        header = ["step", "attention", "rows", "seconds", "images/s", "tokens/s", "of matmul", "peak GB", "planned GB"]
        rows = [_step_row(one) for one in report["steps"]]
        lines += ["", f"steps of stage 1, rows of {length} tokens", format_table([*header, "waits", "× peer"], rows)]
    if report.get("generation"):
        header = ["replies", "attention", "rows", "tokens", "seconds", "tokens/s", "peak GB", "× peer"]
        lines += ["", format_table(header, [_reply_row(one) for one in report["generation"]])]
    return "\n".join([*lines, *(f"note: {note}" for note in report["notes"])])


def _step_row(one: dict[str, Any]) -> list[str]:
    return [
        one["side"], one["attention"], f"{one['rows']}", f"{one['seconds_per_step']:.4f}",
        f"{one['images_per_second']:,.1f}", f"{one['tokens_per_second']:,.0f}",
        f"{one['share_of_matmul_rate']:.1%}", _gb(one["peak_bytes"]), _gb(one["planned_bytes"]),
        "–" if one["waits"] is None else f"{one['waits']}", f"{one['against_peer']['median']:.2f}",
    ]  # fmt: skip


def _reply_row(one: dict[str, Any]) -> list[str]:
    return [
        one["side"], one["attention"], f"{one['replies']}", f"{one['new_tokens']}",
        f"{one['seconds_per_batch']:.3f}", f"{one['tokens_per_second']:,.1f}", _gb(one["peak_bytes"]),
        f"{one['against_peer']['median']:.2f}",
    ]  # fmt: skip


def _gb(size: int | None) -> str:
    return "–" if size is None else f"{size / GB:.2f}"


if __name__ == "__main__":
    raise SystemExit(main())
