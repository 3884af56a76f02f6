"""Work in several threads at a time, whose results come in the order in which they end."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from recipes_minigpt4.llm.limits import StoppedError


Job = TypeVar("Job")
Result = TypeVar("Result")
GRACE = 5.0  # seconds that work under way may take to end after a mistake that ends all


class Workers(Generic[Job, Result]):
    """
    Threads that do jobs.

    Args:
        work: does a job; it is told when nobody waits for it any more.
        threads: how many at a time.
    """

    def __init__(self, work: Callable[[Job, threading.Event], Result], threads: int) -> None:
        self._work, self._number = work, threads
        self._left_alone: list[threading.Thread] = []  # whose results nobody waits for any more

    def wait(self) -> None:
        """Wait for what was under way when somebody stopped to iterate: it may be asked for again."""
        _join(self._left_alone)
        self._left_alone.clear()

    def results(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Result]]:
        """
        The result of each job with its number.

        The first error ends all and is raised. Whoever stops to iterate, by Ctrl-C too, does not wait for what is
        under way: it ends by itself, or with the process.
        """
        stop = threading.Event()
        todo = iter(enumerate(jobs))
        one_at_a_time = threading.Lock()
        done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

        def run() -> None:
            while not stop.is_set():
                with one_at_a_time:
                    place = next(todo, None)
                if place is None:
                    return
                try:
                    done.put((place[0], self._work(place[1], stop), None))
                except StoppedError:
                    return
                except BaseException as error:
                    done.put((place[0], None, error))
                    return

        number = min(self._number, len(jobs))
        threads = [threading.Thread(target=run, daemon=True, name=f"llm-{place}") for place in range(number)]
        try:
            for thread in threads:
                thread.start()
            for _ in jobs:
                place, result, error = done.get()
                if error is not None:
                    stop.set()
                    _join(threads, GRACE)  # what is under way may be paid for
                    raise error
                yield place, result
        finally:
            stop.set()
            self._left_alone += [thread for thread in threads if thread.is_alive()]


def _join(threads: Sequence[threading.Thread], seconds: float | None = None) -> None:
    """Wait until threads have ended, or for some time."""
    end = None if seconds is None else time.monotonic() + seconds
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.join(None if end is None else max(0.0, end - time.monotonic()))
