"""Peak memory of training, a process for each side: it builds that side alone and takes a few steps.

    python -m recipes_minigpt4.benchmark.memory JSON

Memory is the kernel's count of resident pages (VmHWM), on a GPU the most that torch had allocated there. glibc keeps
freed blocks for later, by chance more or less of them; here it gives those of 1 MiB and more back at once.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from recipes_minigpt4.benchmark.machine import read_status
from recipes_minigpt4.benchmark.sides import BUILDERS, Batch, Workload, build_data
from recipes_minigpt4.utils.errors import RecipeError


STEPS = 3


def measure_sides(
    workload: Workload,
    peer_batches: Sequence[Batch],
    threads: int,
    sides: Sequence[str] | None = None,
    program: Sequence[str] = ("recipes_minigpt4.benchmark.memory",),
) -> dict[str, dict[str, int]]:
    """
    Peak memory of every side.

    Args:
        workload: what to train.
        peer_batches: the peer's batches; our sides make theirs.
        threads: of torch.
        sides: keys of `BUILDERS`; all of them if left out.
        program: the module that measures a side, and what it takes before the JSON.

    Returns:
        For every side `peak_bytes`, that of the process, and `peak_above_start_bytes`, what came on top of
        what the process had before the model was built: the interpreter, its libraries and the rows.

    Raises:
        RecipeError: if a process failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "batches.safetensors")
        tensors = {f"{n} {name}": tensor for n, batch in enumerate(peer_batches) for name, tensor in batch.items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        task = {"workload": asdict(workload), "threads": threads, "batches": str(path)}
        return {side: _in_new_process(program, {**task, "side": side}) for side in sides or BUILDERS}


def _in_new_process(program: Sequence[str], task: dict[str, object]) -> dict[str, int]:
    command = [sys.executable, "-m", *program, json.dumps(task)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["nothing was said, so perhaps the memory did not suffice"])[-1]
        raise RecipeError(
            f"The memory of the side {task['side']!r} was not measured, for its process failed with exit status "
            f"{done.returncode} ({reason.rstrip('.')})."
        )
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure_here(side: str, workload: Workload, batches: Path) -> dict[str, int]:
    """Peak memory of this process, which has to be a fresh one, in bytes."""
    data = build_data(workload)
    data.peer_batches = [{} for _ in range(workload.num_batches)]
    for key, tensor in load_file(batches).items():
        number, name = key.split()
        data.peer_batches[int(number)][name] = tensor
    gpu = torch.cuda.is_available()
    start = torch.cuda.memory_allocated() if gpu else read_status()["VmRSS"]
    with tempfile.TemporaryDirectory() as folder:
        trained = BUILDERS[side](workload, Path(folder), data)
        for _ in range(STEPS):
            trained.step()
    peak = torch.cuda.max_memory_allocated() if gpu else read_status()["VmHWM"]
    return {"peak_bytes": peak, "peak_above_start_bytes": peak - start}


def main(arguments: Sequence[str]) -> None:
    """Measure what the JSON tells, and print the result as JSON on the last line."""
    task = json.loads(arguments[0])
    torch.set_num_threads(task["threads"])
    with redirect_stdout(sys.stderr):
        result = measure_here(task["side"], Workload(**task["workload"]), Path(task["batches"]))
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
