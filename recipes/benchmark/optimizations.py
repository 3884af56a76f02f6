"""Every larger optimisation alone: the same work with it and without it, in turns.

    minigpt4 benchmark optimizations
    minigpt4 benchmark optimizations --only growing_cache --measures "long replies"

The package has no switches for them. What an optimisation replaces is put back here for a while, with everything else
as it is, and both have to come to the same result. One that costs more than 50 lines has to save 3 % of something.
"""

import argparse
import inspect
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modeling_minigpt4.generation_minigpt4 as model_generation
import modeling_minigpt4.heads_minigpt4 as model_heads
import modeling_minigpt4.modeling_minigpt4 as model_file
from processing_minigpt4 import MiniGPT4ImageProcessor
from recipes_minigpt4.benchmark import data, generation, memory
from recipes_minigpt4.benchmark.measure import compare, take_turns
from recipes_minigpt4.benchmark.models import SIZES
from recipes_minigpt4.benchmark.options import DATA_BATCH_SIZE, IMAGES, NEW_TOKENS, PICTURES
from recipes_minigpt4.benchmark.report import describe_machine, describe_shapes
from recipes_minigpt4.benchmark.sides import TrainingSide, Workload, build_cached_side, build_data, build_our_side
from recipes_minigpt4.benchmark.training import WARM_UP, check_first_step
from recipes_minigpt4.data import collator
from recipes_minigpt4.training import loss, trainer
from recipes_minigpt4.training.last_layer import LastLayer


ENOUGH = 1.03  # times as long, or as much memory, without it
MEMORY_ROUNDS = 2  # which hardly differ
REPLY, LONG_REPLY = NEW_TOKENS, 128  # tokens
Turns = dict[str, list[float]]  # what each round took "with" and "without"


class Optimization(NamedTuple):
    """
    Something that could be left out.

    Args:
        pieces: the code that it consists of, apart from the lines that call it.
        left_out: puts the plain way in its place.
        measures: keys of `MEASURES` that it could change.
    """

    pieces: tuple[Any, ...]
    left_out: Callable[[], AbstractContextManager[Any]]
    measures: tuple[str, ...]


def score_with_autograd(states: Tensor, answers: Tensor, head: nn.Module, _: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`score_answers` for a head whose logits need no adjusting, as those of the benchmark's Llama."""
    log_probs = head(states).float().log_softmax(-1)
    with torch.no_grad():
        entropy, is_top1 = -(log_probs.exp() * log_probs).sum(-1), (log_probs.argmax(-1) == answers).float()
    return -F.nll_loss(log_probs, answers, reduction="none"), entropy, is_top1


TRAINING = ("step", "cached step", "memory", "cached memory")
OPTIMIZATIONS = {
    "last_layer": Optimization(
        (LastLayer,), lambda: mock.patch.object(LastLayer, "__enter__", lambda layer: layer), TRAINING
    ),
    "frozen_head": Optimization(
        (model_heads.FrozenHeadScores, model_heads.score_in_place),
        lambda: mock.patch.object(model_file, "score_answers", score_with_autograd),
        TRAINING,
    ),
    "no_pads": Optimization(
        (loss.is_causal_decoder, loss.without_last_column),
        lambda: mock.patch.object(trainer, "is_causal_decoder", lambda decoder: False),
        TRAINING,
    ),
    "byte_pictures": Optimization(
        (collator.BytePictures, collator.to_pixels, MiniGPT4ImageProcessor.pixel_table),
        lambda: mock.patch.object(collator, "BytePictures", lambda image_processor: image_processor),
        ("step", "memory", "tar to batch"),
    ),
    "growing_cache": Optimization(
        (model_generation.GrowingLayer, model_generation.with_growing_layers),
        lambda: mock.patch.object(model_generation, "with_growing_layers", lambda cache: None),
        ("replies", "long replies"),
    ),
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure with and without each optimisation.

    Returns:
        The report: for every optimisation its lines, and for everything that it could change how many times as long,
        or as much memory, it takes without it.

    Raises:
        RecipeError: if the results are not the same without it.
    """
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.only:
        optimization = OPTIMIZATIONS[name]
        turns = {one: MEASURES[one](name, args) for one in optimization.measures if one in args.measures}
        ratios = {one: compare(taken["without"], taken["with"]) for one, taken in turns.items()}
        found[name] = {
            "lines": sum(len(inspect.getsourcelines(piece)[0]) for piece in optimization.pieces),
            "without": ratios,
            "pays": any(ratio["median"] >= ENOUGH for ratio in ratios.values()),
            "turns": turns,
        }
    shapes = {**describe_shapes(SIZES[args.size]), "replies": f"{REPLY} and {LONG_REPLY} tokens, greedy"}
    about = {"benchmark": "optimizations", "size": args.size, "rounds": args.rounds, "bars": []}
    return {**about, "machine": describe_machine(), "shapes": shapes, "optimizations": found}


# ---- what is measured -----------------------------------------------------------------------------------------------


def both_ways(name: str, work: Callable[[], Any], other: Callable[[], Any] | None = None) -> dict[str, Any]:
    """`work` as it is, and without the optimisation: that or `other`, for what has to be built without it."""

    def without() -> Any:
        with OPTIMIZATIONS[name].left_out():
            return (other or work)()

    return {"without": without, "with": work}


def measure_steps(build: Callable[..., TrainingSide], name: str, args: argparse.Namespace) -> Turns:
    """Seconds of a training step."""
    workload = Workload(args.size, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        builds = both_ways(name, lambda: build(workload, Path(folder), build_data(workload)))
        sides = {way: make() for way, make in builds.items()}
        works = both_ways(name, sides["with"].step, sides["without"].step)
        check_first_step({way: work() for way, work in works.items()}, reference="without")
        take_turns(works, WARM_UP - 1)
        return take_turns(works, args.rounds)


def measure_memory(side: str, name: str, args: argparse.Namespace) -> Turns:
    """Peak memory of training above start, in bytes, each in a process of its own."""
    workload = Workload(args.size, seed=args.seed)
    taken: Turns = {"without": [], "with": []}
    for _ in range(min(args.rounds, MEMORY_ROUNDS)):
        for way, peaks in taken.items():
            program = ["recipes_minigpt4.benchmark.optimizations", *[name] * (way == "without")]
            found = memory.measure_sides(workload, [], args.threads, [side], program)
            peaks.append(found[side]["peak_above_start_bytes"])
    return taken


def measure_replies(new_tokens: int, name: str, args: argparse.Namespace) -> Turns:
    """Seconds until all pictures have their replies."""
    args = argparse.Namespace(**{**vars(args), "new_tokens": new_tokens})
    inputs = generation.build_inputs(args.size, IMAGES)
    works = both_ways(name, generation.build_works(args, inputs)["ours"])
    generation.check_replies({way: work() for way, work in works.items()}, args.new_tokens)
    return take_turns(works, args.rounds)


def measure_data(name: str, args: argparse.Namespace) -> Turns:
    """Seconds of a picture on its way from a tar file into a batch."""
    seconds: Turns = {"without": [], "with": []}
    task = argparse.Namespace(pictures=PICTURES, batch_size=DATA_BATCH_SIZE, seed=args.seed)
    with tempfile.TemporaryDirectory() as folder, data.worker_apart() as (core, _):
        data.write_tars(Path(folder), data.build_pictures(data.DIFFERENT, args.seed), task.pictures)
        works = both_ways(name, lambda: data.stream(Path(folder), task, core))

        def read(way: str) -> None:  # a rate, which does not count the start of the worker
            seconds[way].append(1 / works[way]())

        take_turns({way: partial(read, way) for way in works}, args.rounds)
    return seconds


MEASURES: dict[str, Callable[[str, argparse.Namespace], Turns]] = {
    "step": partial(measure_steps, build_our_side),
    "cached step": partial(measure_steps, build_cached_side),
    "memory": partial(measure_memory, "ours"),
    "cached memory": partial(measure_memory, "cached"),
    "replies": partial(measure_replies, REPLY),
    "long replies": partial(measure_replies, LONG_REPLY),
    "tar to batch": measure_data,
}


if __name__ == "__main__":  # the process of `measure_memory`
    *names, task = sys.argv[1:]
    with OPTIMIZATIONS[names[0]].left_out() if names else nullcontext():
        memory.main([task])
