"""From tar files to batches, as stage 1 streams them, beside nothing but decoding and resizing the same pictures."""

import argparse
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipes_minigpt4.benchmark.models import SIZES, build_config, build_processor
from recipes_minigpt4.benchmark.options import DATA_BATCH_SIZE, PICTURES
from recipes_minigpt4.benchmark.report import Bar, describe_machine, judge
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import StageCollator
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.data.sources import load_pairs


PER_TAR = 128
DIFFERENT = 64  # pictures; the tars hold each of them several times
WARM_UP = 4  # batches, until the worker has started and its buffers are full
SIZE = (512, 384)  # width and height of a picture, as data sets of the web are often stored
BARS = (Bar("tar to batch", ("ratios", "ours", "median"), ">=", 0.7),)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure pictures per second of one worker of the data loader, and of Pillow alone on the same core.

    Returns:
        The report.
    """
    pictures = build_pictures(DIFFERENT, args.seed)
    rates: dict[str, list[float]] = {"pillow": [], "ours": []}
    with tempfile.TemporaryDirectory() as folder, worker_apart() as (core, others):
        write_tars(Path(folder), pictures, args.pictures)
        for _ in range(args.rounds + 1):  # the first is not counted
            pin(core)
            rates["pillow"].append(decode_and_resize(pictures, args.pictures))
            pin(others)
            rates["ours"].append(stream(Path(folder), args, core))
    counted = {name: of[1:] for name, of in rates.items()}
    ratios = [ours / bare for ours, bare in zip(counted["ours"], counted["pillow"], strict=True)]
    report = {
        "benchmark": "data",
        "rounds": args.rounds,
        "machine": {**describe_machine(), "threads": 1},
        "shapes": {
            "pictures": f"{args.pictures} JPEG of {SIZE[0]} × {SIZE[1]}, "
            f"{statistics.mean(map(len, pictures)) / 1000:.0f} KB each, to 224 × 224",
            "batch": f"{args.batch_size} rows of stage 1, shuffled among {DataArguments().shuffle_buffer}",
        },
        "sides": {name: {"images_per_second": statistics.median(of), "rates": of} for name, of in counted.items()},
        "reference": "pillow",
        "legend": {
            "pillow": "Pillow alone on the same core: decode to RGB and resize, from memory",
            "ours": "one worker: tar, decode, resize, caption, tokens, batch",
        },
        "ratios": {"ours": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}},
    }
    usual = (args.pictures, args.batch_size) == (PICTURES, DATA_BATCH_SIZE)
    return {**report, "bars": judge(report, BARS) if usual else []}


def pin(cores: list[int]) -> None:
    """Let this process run on these processors only; on any if none is named or the system does not know how."""
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


@contextmanager
def worker_apart() -> Iterator[tuple[list[int], list[int]]]:
    """The processor of a worker, and those that are left for this process, which is let run on all of them behind."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pin(cores[1:])
    try:
        yield cores[:1], cores[1:]
    finally:
        pin(cores)


def start_worker(cores: list[int], _: int) -> None:
    """What the data loader's worker does first."""
    pin(cores)
    torch.set_num_threads(1)


# ---- data -----------------------------------------------------------------------------------------------------------


def build_pictures(count: int, seed: int) -> list[bytes]:
    """JPEGs with soft shapes and grain, so that they cost about what photographs do."""
    random = np.random.default_rng(seed)
    files = []
    for _ in range(count):
        shapes = PIL.Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        soft = np.asarray(shapes.resize(SIZE, PIL.Image.Resampling.BICUBIC)).astype(np.int16)
        grainy = (soft + random.integers(-12, 13, (*soft.shape[:2], 1))).clip(0, 255).astype(np.uint8)
        file = io.BytesIO()
        PIL.Image.fromarray(grainy).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def write_tars(folder: Path, pictures: list[bytes], count: int) -> None:
    """Write `count` samples in the layout of webdataset, a picture and a .json each."""
    for start in range(0, count, PER_TAR):
        with tarfile.open(folder / f"{start // PER_TAR:05d}.tar", "w") as tar:
            for number in range(start, min(start + PER_TAR, count)):
                text = {"caption": f"a picture of a red square, number {number}, with a blue star below it"}
                content = {"jpg": pictures[number % len(pictures)], "json": json.dumps(text).encode()}
                for ending, data in content.items():
                    info = tarfile.TarInfo(f"{number:08d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


# ---- sides ----------------------------------------------------------------------------------------------------------


def decode_and_resize(pictures: list[bytes], count: int) -> float:
    """Pictures per second of Pillow alone: decode to RGB, bicubic to 224 × 224, from memory."""
    start = time.perf_counter()
    for number in range(count):
        picture = PIL.Image.open(io.BytesIO(pictures[number % len(pictures)])).convert("RGB")
        picture.resize((224, 224), PIL.Image.Resampling.BICUBIC)
    return count / (time.perf_counter() - start)


def stream(folder: Path, args: argparse.Namespace, cores: list[int]) -> float:
    """Pictures per second of a worker, once it is under way: tar, decoding, resizing, tokens, batch."""
    processor = build_processor(build_config(SIZES["mid"]))
    settings = DataArguments(dataset_name=[str(folder)])
    rows = stage1_rows(load_pairs(settings, stage=1, seed=args.seed), processor, settings)
    plain = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    loader = StatefulDataLoader(  # as the trainer makes it for streams
        rows,
        batch_size=args.batch_size,
        collate_fn=StageCollator.like(plain),
        num_workers=1,
        worker_init_fn=partial(start_worker, cores),
    )
    batches: Iterator[dict[str, Any]] = iter(loader)
    for _ in range(WARM_UP):
        next(batches)
    number = max(1, args.pictures // args.batch_size)
    start = time.perf_counter()
    for _ in range(number):
        next(batches)
    return number * args.batch_size / (time.perf_counter() - start)
