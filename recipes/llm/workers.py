"""Work in several threads at a time, whose results come in the order in which they end."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from recipes_minigpt4.llm.limits import StoppedError


Job = TypeVar("Job")
Result = TypeVar("Result")
GRACE = 5.0  # seconds that work under way may take to end after a mistake that ends all


def in_threads(
    jobs: Sequence[Job], work: Callable[[Job, threading.Event], Result], threads: int
) -> Iterator[tuple[int, Result]]:
    """
    Do jobs, and give each result with the number of its job.

    The first error ends all and is raised. Whoever stops to iterate, by Ctrl-C too, does not wait for what is under
    way: the threads are daemons.

    Args:
        work: does a job; it is told when nobody waits for it any more.
    """
    stop = threading.Event()
    todo = iter(enumerate(jobs))
    one_at_a_time = threading.Lock()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        while not stop.is_set():
            with one_at_a_time:
                number, job = next(todo, (-1, None))
            if number < 0:
                return
            try:
                done.put((number, work(job, stop), None))  # type: ignore[arg-type]
            except StoppedError:
                return
            except BaseException as error:
                done.put((number, None, error))
                return

    workers = [threading.Thread(target=run, daemon=True, name="llm") for _ in range(min(threads, len(jobs)))]
    try:
        for worker in workers:
            worker.start()
        for _ in jobs:
            number, result, error = done.get()
            if error is not None:
                stop.set()
                _let_end(workers)
                raise error
            yield number, result
    finally:
        stop.set()


def _let_end(workers: Sequence[threading.Thread]) -> None:
    """Give work that is under way, and may be paid for, some seconds."""
    end = time.monotonic() + GRACE
    for worker in workers:
        with contextlib.suppress(RuntimeError):
            worker.join(max(0.0, end - time.monotonic()))
