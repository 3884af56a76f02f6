"""A training step, as it is taken with a recipe: from pixels, and from cached features of the frozen vision side."""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import nn

from recipes_minigpt4.benchmark.measure import compare, count_flops, matmul, take_turns
from recipes_minigpt4.benchmark.memory import measure_sides
from recipes_minigpt4.benchmark.report import Bar, describe_machine, describe_shapes, judge
from recipes_minigpt4.benchmark.sides import Batch, Workload, build_sides
from recipes_minigpt4.utils.errors import RecipeError


WARM_UP = 2  # steps of every side that are not timed
TOLERANCE = 1e-4  # relative, of the first loss and the first norm of the gradient

# Set for two CPU cores, the size `mid`, and what a `Workload` has unless told otherwise.
BARS = (
    Bar("step, ours", ("ratios", "ours", "median"), ">=", 1.15),
    Bar("step, cached", ("ratios", "cached", "median"), ">=", 1.8),
    Bar("peak memory above start, ours", ("memory_ratios", "ours", "above_start"), "<=", 0.9),
    Bar("peak memory above start, cached", ("memory_ratios", "cached", "above_start"), "<=", 0.9),
)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure training.

    Returns:
        The report: for every side seconds, images per second, FLOPs and peak memory of a step; ratios to the peer.

    Raises:
        RecipeError: if the sides do not train the same, or a side cannot be run.
    """
    workload = Workload(args.size, args.batch_size, args.answer_tokens, args.seed)
    size = workload.size
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        sides = build_sides(workload, Path(folder))
        with kept_in_eval_mode(sides["peer"].trainer.model.qformer):
            first = check_first_step({name: side.step() for name, side in sides.items()})
        product, product_flops = matmul(size.matmul)
        works = {**{name: side.step for name, side in sides.items()}, "matmul": product}
        take_turns(works, WARM_UP - 1)
        times = take_turns(works, args.rounds)
        flops = {name: count_flops(side.step) for name, side in sides.items()}
        batches = sides["peer"].batches
        del sides, works  # the processes that follow need the memory
        memory = measure_sides(workload, batches, args.threads)
    rate = product_flops / statistics.median(times.pop("matmul"))
    report = {
        "benchmark": "train",
        "size": args.size,
        "rounds": args.rounds,
        "machine": describe_machine(),
        "shapes": {**describe_shapes(size), **describe_rows(batches[0])},
        "matmul": {"size": size.matmul, "flops_per_second": rate},
        "sides": {
            name: first[name] | describe_step(times[name], flops[name], rate, workload.batch_size) | memory[name]
            for name in times
        },
        "ratios": {name: compare(times["peer"], times[name]) for name in times if name != "peer"},
        "memory_ratios": {name: compare_memory(memory["peer"], memory[name]) for name in memory if name != "peer"},
    }
    usual = workload == Workload("mid", seed=args.seed)
    return {**report, "bars": judge(report, BARS) if usual else []}


@contextmanager
def kept_in_eval_mode(module: nn.Module) -> Iterator[None]:
    """
    Keep a part without dropout while a Trainer puts its model into training mode.

    The frozen Q-Former of BLIP-2 has a dropout of 0.1 when it is trained the ordinary way; ours has none, as in the
    original. Without it both come to the same loss.
    """
    train = module.train
    module.train = lambda mode=True: train(False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.train


def check_first_step(
    results: Mapping[str, tuple[float, float]], reference: str = "peer"
) -> dict[str, dict[str, float]]:
    """
    Make sure that all sides came to the same loss and gradient.

    Args:
        results: side → loss and norm of the gradient in its first step.
        reference: the side that the others are held against.

    Returns:
        The same by name.

    Raises:
        RecipeError: if they differ.
    """
    for name, numbers in results.items():
        for what, number, expected in zip(("loss", "gradient norm"), numbers, results[reference], strict=True):
            if not math.isclose(number, expected, rel_tol=TOLERANCE):
                raise RecipeError(
                    f"The sides do not do the same work, so times say nothing: in the first step the {what} of "
                    f"{name!r} is {number:.6f}, and that of {reference!r} is {expected:.6f}."
                )
    return {name: {"first_loss": loss, "first_gradient_norm": norm} for name, (loss, norm) in results.items()}


def describe_rows(batch: Batch) -> dict[str, Any]:
    rows, length = batch["input_ids"].shape
    answer = int((batch["labels"][0] != -100).sum())
    return {"batch": f"{rows} rows of {length} tokens, {answer} of them the answer", "dtype": "float32"}


def describe_step(times: Sequence[float], flops: int, rate: float, batch_size: int) -> dict[str, Any]:
    """Median of the seconds of a step, and what follows from it."""
    median = statistics.median(times)
    return {
        "seconds_per_step": median,
        "fastest_seconds": min(times),
        "images_per_second": batch_size / median,
        "flops_per_step": flops,
        "flops_per_second": flops / median,
        "share_of_matmul_rate": flops / median / rate,
        "seconds": list(times),
    }


def compare_memory(peer: Mapping[str, int], other: Mapping[str, int]) -> dict[str, float]:
    """Peak memory in times of the peer's: of the whole process, and above what it had before models were built."""
    return {
        "process": other["peak_bytes"] / peer["peak_bytes"],
        "above_start": other["peak_above_start_bytes"] / peer["peak_above_start_bytes"],
    }
