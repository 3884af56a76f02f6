"""
Several ranks of one run, on this machine: real processes over gloo, which start in a fraction of a second.

They are forked from a server that has imported the recipes once. They find each other as those of `torchrun` do, at a
store that the test holds, so that no port is taken twice and any of them may be killed.
"""

import multiprocessing
import os
import signal as signals
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver
from pathlib import Path

import torch.distributed as dist


# What the server imports: all that a stage on the tiny parts needs. It must not compute, or threads are lost in forks.
PRELOADED = [
    "recipes_minigpt4.cli",
    "recipes_minigpt4.stage1_pretrain",
    "recipes_minigpt4.stage2_finetune",
    "transformers.models.blip_2.modeling_blip_2",
    "transformers.models.blip_2.image_processing_blip_2",
    "transformers.models.llama.modeling_llama",
]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
# How long the others may take to notice that a rank has failed, before they are ended as `torchrun` would.
GRACE = 20.0


class Ranks:
    """
    Ranks that run; use it in a `with`, which leaves none behind.

    Args:
        processes: one per rank.
        logs: what each has printed, on both streams.
        store: where they find each other.
    """

    def __init__(self, processes: list, logs: list[Path], store: dist.TCPStore) -> None:
        self.processes, self.logs, self.store = processes, logs, store

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def output(self, rank: int = 0) -> str:
        """What a rank has printed so far, on standard output and standard error."""
        return self.logs[rank].read_text(encoding="utf-8", errors="replace")

    def kill(self, signal: int = signals.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all; to workers of its data loader only through it."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal)

    def wait(self, timeout: float = 120.0) -> list[int]:
        """
        Wait until all have ended.

        Returns:
            Exit codes in the order of ranks, negative for a signal. Ranks that are left when another has failed are
            killed after a while, as `torchrun` does.

        Raises:
            TimeoutError: with what they have printed last, after all are killed.
        """
        end, left = time.monotonic() + timeout, list(self.processes)
        failed = False
        while left:
            connection.wait([process.sentinel for process in left], max(0.0, end - time.monotonic()))
            left = [process for process in left if process.exitcode is None]
            if left and time.monotonic() >= end:
                self.close()
                if failed:
                    break
                raise TimeoutError(f"Ranks ran longer than {timeout} s.\n{self._tails()}")
            if not failed and any(process.exitcode for process in self.processes):
                failed, end = True, min(end, time.monotonic() + GRACE)
        return [process.exitcode for process in self.processes]

    def close(self) -> None:
        """Kill what still runs, with the workers of data loaders."""
        for process in self.processes:
            if process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signals.SIGKILL)
        for process in self.processes:
            process.join()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tails(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.output(rank)[-3000:]}" for rank in range(len(self.logs)))


def start(
    arguments: Sequence[object],
    ranks: int = 2,
    environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
    before: Callable[[], None] | None = None,
) -> Ranks:
    """
    Start the ranks of a command, each as `torchrun` would.

    Args:
        arguments: those of `minigpt4`, such as `["stage1", "--config", "tiny_stage1", "--use_cpu", "true"]`.
        ranks: how many; one is a process group of one.
        environment: variables of all ranks, beside this process's own.
        folder: where their output is kept. Default: a new temporary folder.
        before: a function of a module that every rank calls first.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _environment({**os.environ, **ONE_THREAD}):
        forkserver.ensure_running()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ, **ONE_THREAD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **(environment or {}),
    }  # fmt: skip
    folder = folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    logs, processes = [folder / f"rank_{rank}.txt" for rank in range(ranks)], []
    for rank, log in enumerate(logs):
        log.write_bytes(b"")
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_run, args=([str(part) for part in arguments], variables, log, before))
        process.start()
        processes.append(process)
    return Ranks(processes, logs, store)


def _run(
    arguments: Sequence[str], environment: Mapping[str, str], log: Path, before: Callable[[], None] | None
) -> None:
    """One rank, in its own process."""
    os.setsid()  # a group of its own, with the workers of its data loader
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    import torch

    from recipes_minigpt4 import cli

    torch.set_num_threads(1)
    # Workers of data loaders are forked, as ever; what a forked server starts would not notice that a rank is killed.
    multiprocessing.set_start_method("fork", force=True)
    if before is not None:
        before()
    code = cli.main(arguments)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def _end_with_parent() -> None:
    """Leave no rank behind when the tests themselves are killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(os.getpid(), signals.SIGKILL)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
