"""Clocks and counters: rounds in which sides take turns, operations of a step, and the rate of the machine."""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def device() -> torch.device:
    """Where everything runs: on the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of a call, what it left to the GPU included."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(works: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Call each in turn, `rounds` times, another one first every time; returns its seconds in every round."""
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(works[name]))
    return times


def compare(reference: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest of how many times faster than the reference the other was, round by round."""
    ratios = [theirs / ours for theirs, ours in zip(reference, other, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def matmul(size: int, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], Tensor], int]:
    """A product of two square matrices, and the operations that it takes."""
    left, right = (torch.randn(size, size, device=device()).to(dtype) for _ in range(2))
    return lambda: torch.mm(left, right), 2 * size**3


def count_waits(work: Callable[[], Any]) -> int | None:
    """How often a call lets this process wait for its GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in told)


def most_allocated(work: Callable[[], Any]) -> int | None:
    """Bytes of tensors that are on the GPU at most during a call, what is there before included; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def count_flops(work: Callable[[], Any]) -> int:
    """
    Floating-point operations of a call: matrix products, convolutions and attention, forward and backward.

    torch has no formula for its attention on the CPU, which is one kernel for two products forward and five backward.
    """
    ops = torch.ops.aten
    formulas = {
        ops._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        work()
    return int(counter.get_total_flops())


def _attention_flops(query: Sequence[int], key: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, length, channels = query
    return 4 * batch * heads * length * key[2] * channels


def _attention_backward_flops(_: Sequence[int], query: Sequence[int], key: Sequence[int], *__: Any, **___: Any) -> int:
    return _attention_flops(query, key) * 5 // 2
