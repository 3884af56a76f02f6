"""Training steps on rows in any order, and in batches of like length, with captions as long as those of the web."""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from recipes_minigpt4.benchmark.measure import compare, count_flops, take_turns
from recipes_minigpt4.benchmark.models import build_config, build_pairs, build_processor
from recipes_minigpt4.benchmark.report import describe_machine, describe_shapes
from recipes_minigpt4.benchmark.sides import Data, TrainingSide, Workload, build_our_side
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import COUNTS
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.data.grouping import Grouping
from recipes_minigpt4.training.options import GROUPED
from recipes_minigpt4.utils.errors import RecipeError


# Words of a caption, log-normal as those of CC3M and SBU about are, and tokens that LLaMA makes of an English word.
MEDIAN_WORDS, SPREAD, MOST_WORDS, TOKENS_PER_WORD = 9.2, 0.48, 50, 1.35
LONGEST = 32  # tokens, as in stage 1
PAIRS = {"grouped": "random", "grouped cached": "random cached"}  # side → what it is held against
LEGEND = {
    "random": "batches of rows in any order, from pixels",
    "grouped": f"batches of rows of like length, from pixels (--train_sampling_strategy {GROUPED})",
    "random cached": "batches of rows in any order, from cached features",
    "grouped cached": "batches of rows of like length, from cached features",
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure the time for all rows, in both orders.

    Returns:
        The report: for every side seconds and FLOPs of a step, and its share of pads; ratios of the times.

    Raises:
        RecipeError: if the sides do not train the same rows.
    """
    torch.set_num_threads(args.threads)
    workload = Workload(args.size, args.batch_size, 1, args.seed, max(1, args.rows // args.batch_size))
    data = build_rows(workload)
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        for more in ({}, {"cache_features": str(Path(folder, "features"))}):  # one after the other, to spare memory
            sides |= measure_orders(workload, Path(folder), data, args.rounds, more)
    words = draw_words(20_000, args.seed)
    return {
        "benchmark": "pads",
        "size": args.size,
        "rounds": args.rounds,
        "machine": describe_machine(),
        "shapes": {
            **describe_shapes(workload.size),
            "batch": f"{workload.batch_size} rows, {workload.num_batches} batches",
            "captions": f"{words.mean():.1f} words on average, 1 % of {np.quantile(words, 0.99):.0f} and more, "
            f"{TOKENS_PER_WORD} tokens each, at most {LONGEST} tokens",
        },
        "sides": sides,
        "legend": LEGEND,
        "ratios": {
            name: {**compare(sides[against]["seconds"], sides[name]["seconds"]), "against": against}
            for name, against in PAIRS.items()
        },
        "bars": [],
    }


def draw_words(count: int, seed: int) -> np.ndarray:
    """Numbers of words of captions."""
    random = np.random.default_rng(seed)
    return np.exp(random.normal(np.log(MEDIAN_WORDS), SPREAD, count)).round().clip(1, MOST_WORDS)


def build_rows(workload: Workload) -> Data:
    """Rows of stage 1 whose captions have as many tokens as are drawn, with their lengths."""
    processor = build_processor(build_config(workload.size))
    pairs = build_pairs(workload.batch_size * workload.num_batches)
    tokens = (draw_words(len(pairs), workload.seed) * TOKENS_PER_WORD).round().astype(int)
    texts = [" ".join(["red"] * int(number)) for number in tokens]  # a token each
    pairs = Dataset.from_dict({"image": pairs["image"][:], "text": texts}, features=pairs.features)
    grouping = Grouping(workload.batch_size, 1, workload.seed)
    return Data(processor, stage1_rows(pairs, processor, DataArguments(max_txt_len=LONGEST), grouping=grouping))


def measure_orders(
    workload: Workload, folder: Path, data: Data, rounds: int, more: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Both orders from pixels, or with `more` settings from features; name of the side → its numbers."""
    kind = " cached" if more else ""
    build = partial(build_our_side, workload, folder, data, **more)
    sides = {f"random{kind}": build(), f"grouped{kind}": build(train_sampling_strategy=GROUPED)}
    answers = {sum(int((batch["labels"] != -100).sum()) for batch in side.batches) for side in sides.values()}
    if len(answers) > 1:
        raise RecipeError("The sides do not train the same rows, so times say nothing.")
    flops = {name: count_flops(partial(take_all, side)) for name, side in sides.items()}  # which is the warm-up too
    works = {name: side.step for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):  # each of as many steps as there are batches
        for name, taken in take_turns(works, workload.num_batches).items():
            times[name].append(sum(taken))
    found = {}
    for name, side in sides.items():
        counts = [batch[COUNTS] for batch in side.batches]
        median = statistics.median(times[name]) / len(counts)
        found[name] = {
            "share_of_pads": 1 - sum(one["tokens"] for one in counts) / sum(one["places"] for one in counts),
            "seconds_per_step": median,
            "images_per_second": workload.batch_size / median,
            "flops_per_step": flops[name] / len(counts),
            "seconds": times[name],
        }
    return found


def take_all(side: TrainingSide) -> None:
    """A step with every batch."""
    for _ in side.batches:
        side.step()
