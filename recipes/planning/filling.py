"""What filling the cache of features takes, before a run that trains from them: memory, disk and time."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.backbones import part_of
from recipes_minigpt4.data.feature_cache import SHARD_BYTES, VISION_SIDE
from recipes_minigpt4.planning.data import Source
from recipes_minigpt4.planning.memory import BATCH, VISION, Step, trace_encoding
from recipes_minigpt4.planning.parallel import CONTEXT_BYTES, Holding, Parallelism


# Assumed, not measured: operations a second of a GPU like an A100, in 16 bits and in float32.
GPU_RATES = {True: 100e12, False: 15e12}
SIDE = 1024  # of the square matrices that a CPU is timed with


@dataclass(frozen=True)
class Filling:
    """
    Args:
        pictures: that there are, or None if nobody knows.
        stored: bytes of a picture's features.
        memory: name and bytes of what a process holds at the peak.
        buffer: bytes of main memory for features until they are written, on GPUs beside `memory`.
        flops: operations of a picture.
        rate: operations a second of all processes.
        measured: whether the rate was measured here rather than assumed.
    """

    pictures: int | None
    stored: int
    memory: list[tuple[str, int]]
    buffer: int
    flops: int
    rate: float
    measured: bool

    @property
    def peak(self) -> int:
        """Bytes that a process needs at once."""
        return sum(size for _, size in self.memory)


def plan_filling(
    model: MiniGPT4ForConditionalGeneration,
    step: Step,
    holding: Holding,
    parallelism: Parallelism,
    sources: Sequence[Source],
) -> Filling:
    """
    What the cache takes.

    Args:
        model: a skeleton, which is used up.
        step: of the training, whose batches the pictures go through in.
        holding: of the training; copies of their own are there before it, and shared weights are not.
        parallelism: who shares the pictures out.
        sources: the data.
    """
    weights = holding.weights
    if step.gpu and parallelism.kind not in ("single", "ddp", "zero0"):
        sides = (tensor for name, tensor in model.state_dict().items() if part_of(name) in VISION_SIDE)
        weights = sum(tensor.nbytes for tensor in sides)
    encoding = trace_encoding(model, step)
    pictures = None if any(one.samples is None for one in sources) else sum(one.samples or 0 for one in sources)
    stored = math.prod(encoding.shape) * (step.features or torch.float32).itemsize
    # Features and the bytes that they are written as.
    buffer = 2 * min(SHARD_BYTES, stored * (SHARD_BYTES if pictures is None else pictures))
    memory = [("weights", weights), ("batch", encoding.peak[BATCH]), ("vision side", encoding.peak[VISION])]
    memory.append(("CUDA context (assumed)", CONTEXT_BYTES) if step.gpu else ("features", buffer))
    rate = GPU_RATES[step.autocast is not None] if step.gpu else measure_rate(step.autocast or torch.float32)
    return Filling(
        pictures, stored, memory, buffer, encoding.flops, rate * parallelism.processes, measured=not step.gpu
    )


def measure_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of matrices on this machine's CPU, the best of three."""
    matrix = torch.ones(SIDE, SIDE, dtype=dtype)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    return float(2 * SIDE**3 / min(seconds))
