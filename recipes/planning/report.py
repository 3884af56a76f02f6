"""A plan, and how people read it."""

from dataclasses import dataclass

import torch

from recipes_minigpt4.planning.data import RowLength, Schedule, Source
from recipes_minigpt4.planning.filling import Filling
from recipes_minigpt4.planning.model import Part
from recipes_minigpt4.planning.parallel import Parallelism
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.utils.text import duration


GB = 1e9
GPU_SIZES = (24, 40, 80)  # GB of common GPUs; their makers count in GiB, so that a little more is there
COMMON_HOURS = (1, 10, 24)


@dataclass
class Plan:
    """
    All that is told.

    Args:
        stage: 1 or 2.
        on_gpu: whether the run is on GPUs.
        precision: of mixed precision, or None.
        parallelism: who holds what.
        parts: parameters.
        memory: name, bytes at the peak, and bytes at most, of every part.
        checkpoint_bytes: of weights and of optimizer state in a checkpoint.
        row: the longest one.
        training: the settings.
        schedule: how long the run is.
        sources: the data.
        hours: wanted, or None.
        notes: what was assumed.
        filling: of the cache of features, or None without one.
    """

    stage: int
    on_gpu: bool
    precision: torch.dtype | None
    parallelism: Parallelism
    parts: list[Part]
    memory: list[tuple[str, int, int]]
    checkpoint_bytes: tuple[int, int]
    row: RowLength
    training: StageArguments
    schedule: Schedule
    sources: list[Source]
    hours: float | None
    notes: list[str]
    filling: Filling | None = None

    @property
    def peak(self) -> int:
        """Bytes that a process needs at once."""
        return sum(size for _, size, _ in self.memory)


def format_plan(plan: Plan) -> str:
    """The whole plan: parameters, memory, steps, data, and what was assumed."""
    precision = str(plan.precision).removeprefix("torch.") if plan.precision else "float32"
    place = "GPU" if plan.on_gpu else "CPU"
    title = f"stage {plan.stage} on {place}, {plan.parallelism.title}, computed in {precision}"
    blocks = [title, _parameters(plan), _memory(plan), _steps(plan), _data(plan)]
    if plan.filling is not None:
        blocks.insert(3, _filling(plan, plan.filling))
    if plan.notes:
        blocks.append("\n".join(f"assumed: {note}" for note in plan.notes))
    return "\n\n".join(blocks)


def _parameters(plan: Plan) -> str:
    lines = [f"{'parameters':<24}{'number':>18}  {'state':<8}{'stored in':<14}{'GB':>8}"]
    for part in plan.parts:
        state = "trains" if part.trains else "frozen"
        lines.append(f"  {part.name:<22}{part.count:>18,}  {state:<8}{part.dtype:<14}{part.nbytes / GB:>8.3f}")
    total, trained = sum(p.count for p in plan.parts), sum(p.count for p in plan.parts if p.trains)
    lines.append(f"  {'total':<22}{total:>18,}  of which {trained:,} train and {total - trained:,} are frozen")
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    unit = "GPU" if plan.on_gpu else "process"
    lines = [f"{f'memory per {unit}, GB':<42}{'at the peak':>12}{'at most':>10}"]
    lines += [f"  {name:<40}{size / GB:>12.3f}{most / GB:>10.3f}" for name, size, most in plan.memory]
    lines.append(f"  {'total':<40}{plan.peak / GB:>12.3f}")
    if plan.on_gpu:
        lines.append(f"  {_fits(plan.peak)}")
    return "\n".join(lines)


def _filling(plan: Plan, filling: Filling) -> str:
    """What happens before the first step of a run from cached features, of pictures that are not stored yet."""
    unit = "GPU" if plan.on_gpu else "process"
    parts = ", ".join(f"{name} {size / GB:.3f}" for name, size in filling.memory)
    beside = f", and {filling.buffer / GB:.3f} of main memory" if plan.on_gpu else ""
    lines = [
        f"filling the cache       {filling.peak / GB:.3f} GB per {unit} at the peak, before the first step{beside}",
        f"  made of               {parts}",
    ]
    each = f"{_size(filling.stored)} and {filling.flops / 1e9:,.3g} GFLOP each"
    if filling.pictures is None:
        return "\n".join([*lines, f"  pictures              number unknown, {each}"])
    seconds = filling.pictures * filling.flops / filling.rate
    source = "as measured here with matrices" if filling.measured else "assumed"
    return "\n".join(
        [
            *lines,
            f"  pictures              {filling.pictures:,}, equal ones once: "
            f"{_size(filling.pictures * filling.stored)} on disk, {each}",
            f"  time                  {duration(seconds)} of computing, at {filling.rate / 1e12:.3g} TFLOP/s "
            f"({source}); reading comes beside",
        ]
    )


def _fits(peak: int) -> str:
    told = ", ".join(f"{size} GB {'yes' if peak <= size * GB else 'NO'}" for size in GPU_SIZES)
    remedy = ""
    if peak > GPU_SIZES[-1] * GB:
        remedy = (
            "; share the weights (FSDP2, ZeRO-3), quantize them, use gradient_checkpointing, or lower "
            "per_device_train_batch_size"
        )
    return f"fits into {told}{remedy}"


def _steps(plan: Plan) -> str:
    training, row, schedule = plan.training, plan.row, plan.schedule
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    processes, unit = plan.parallelism.processes, "GPU" if plan.on_gpu else "process"
    lines = [
        f"steps                   {schedule.steps:,} of {schedule.global_batch:,} pictures ({processes} × {batch} rows"
        f" × {accumulation} accumulated): {schedule.samples:,} pictures",
        f"  longest row           {row.total} tokens: {row.prompt} prompt, {row.image} picture, {row.answer} answer",
        "  pads                  none are counted, as all rows are the longest; `minigpt4 inspect` tells their share",
    ]
    for hours in (plan.hours,) if plan.hours else COMMON_HOURS:
        rate = schedule.samples / (hours * 3600)
        lines.append(
            f"  in {f'{hours:g} h':<19}{rate:,.1f} images/s, {rate / processes:,.1f} of each {unit}, "
            f"{hours * 3600 / schedule.steps:,.3g} s a step"
        )
    weights, state = plan.checkpoint_bytes
    size = _size(weights + (0 if training.save_only_model else state))
    held = f"{schedule.checkpoints} on disk at the end, {size} each, and " if schedule.checkpoints else ""
    lines.append(f"  checkpoints           {held}the result of {_size(weights)}; processor and tokenizer beside")
    return "\n".join(lines)


def _data(plan: Plan) -> str:
    lines = ["data"]
    lines += [f"  {source.name:<22}{_source(source)}" for source in plan.sources]
    if plan.schedule.epochs is not None:
        lines.append(f"  {'passes over it':<22}{plan.schedule.epochs:,.2f}")
    if rate := _reading_rate(plan):
        lines.append(f"  {'read per second':<22}{rate}")
    return "\n".join(lines)


def _source(source: Source) -> str:
    told = [
        "number of samples unknown" if source.samples is None else f"{source.samples:,} samples",
        f"{source.files:,} tar files" if source.files is not None else "",
        _size(source.nbytes) if source.nbytes is not None else "",
        "streamed without end" if source.streams else "",
        source.note,
    ]
    return ", ".join(text for text in told if text)


def _reading_rate(plan: Plan) -> str:
    """Bytes a second in the wanted time, where files and samples are known."""
    known = [(s.samples, s.nbytes) for s in plan.sources if s.samples and s.nbytes and "elsewhere" not in s.note]
    if not plan.hours or len(known) < len(plan.sources):
        return ""
    samples, nbytes = (sum(values) for values in zip(*known, strict=True))
    return f"{_size(round(plan.schedule.samples / (plan.hours * 3600) * nbytes / samples))} for {plan.hours:g} h"


def _size(nbytes: int) -> str:
    """Bytes in a unit that shows three digits."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.3g} {unit}"
    return f"{nbytes} bytes"
