"""Requests that are sent one by one: many at a time, tried again after trouble, within limits and a budget."""

import logging
import random
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from recipes_minigpt4.llm.cache import AnswerCache, Reply, ask_what_is_new
from recipes_minigpt4.llm.exchange import Answer, Failure, Request
from recipes_minigpt4.llm.limits import Budget, Clock, Pace, StoppedError, most_tokens, random_pause
from recipes_minigpt4.llm.options import ClientOptions
from recipes_minigpt4.llm.workers import Workers
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.redaction import redact
from recipes_minigpt4.utils.text import duration


logger = logging.getLogger(__name__)

LONGEST_WAIT = 15 * 60.0  # seconds that a server may ask to wait
WORTH_TELLING = 10.0  # seconds of a pause
IN_A_ROW = 5  # requests at least that fail before a server counts as down


class NoAnswerError(Exception):
    """
    An attempt without an answer that can be used.

    Args:
        reason: why, without a full stop.
        again: whether another attempt may help.
        alone: whether it says nothing about other requests.
        pause: seconds that the server asks to wait.
        paid: what it cost, as far as the server tells: tokens of prompt and answer. "unknown" if it may have answered
            and nobody heard it.
        raw: what came instead.
    """

    def __init__(
        self,
        reason: str,
        again: bool = True,
        alone: bool = False,
        pause: float | None = None,
        paid: tuple[int, int] | str | None = None,
        raw: str | None = None,
    ) -> None:
        super().__init__(redact(reason))
        self.reason, self.again, self.alone, self.pause, self.paid = redact(reason), again, alone, pause, paid
        self.raw = None if raw is None else redact(raw)


class Sender(Protocol):
    """Sends a request once."""

    @property
    def name(self) -> str: ...

    def send(self, request: Request) -> Reply:
        """
        Raises:
            NoAnswerError: if this attempt brought nothing.
            RecipeError: if no other request can do better.
        """
        ...


class SendingClient:
    """A `Client` around a `Sender`."""

    def __init__(self, sender: Sender, options: ClientOptions, clock: Clock | None = None, seed: int | None = None):
        self.sender, self.options, self.clock = sender, options, clock or Clock()
        self.cache = AnswerCache(options.cache, sender.name, options.flag("cache"))
        self.budget = Budget(options)
        self.pace = Pace(options.requests_per_minute, options.tokens_per_minute, self.clock)
        self._workers = Workers(self._ask_one, self.options.concurrency)
        self._chance = random.Random(seed)
        self._counted: set[str] = set()  # requests whose earlier costs are in the budget
        self._failed_in_a_row = 0
        self._heard = False  # any answer
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.sender.name

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        return ask_what_is_new(self.cache, requests, self._ask_new, self._count)

    def _count(self, keys: Sequence[str]) -> None:
        """What was paid for these requests in earlier starts belongs to the budget of this run."""
        for key in set(keys) - self._counted:
            self.budget.spend(self.cache.cost(key))
        self._counted.update(keys)

    def _ask_new(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer | Failure]]:
        return self._workers.results(requests)

    def _ask_one(self, request: Request, stop: threading.Event) -> Answer | Failure:
        key = request.key(self.name)
        for attempt in range(1, self.options.attempts + 1):
            try:
                answer = self._attempt(request, key, attempt, stop)
            except NoAnswerError as trouble:
                last = trouble
            else:
                self._failed_in_a_row, self._heard = 0, True
                return answer
            if last.pause is not None:
                self._hold(last.pause, last.reason)
            if not last.again or attempt == self.options.attempts:
                break
            self._wait(last, attempt, stop)
        # What a server does not like about a request may be what it dislikes about all, such as a model's name.
        if not last.alone and (last.again or not self._heard):
            self._count_failure(last.reason)
        return Failure(last.reason, attempt, self.cache.cost(key))

    def _attempt(self, request: Request, key: str, attempt: int, stop: threading.Event) -> Answer:
        prompt, completion = most_tokens(request, self.options)
        worst = self.budget.price(prompt, completion)
        self.budget.reserve(worst, stop)
        cost = 0.0  # of an attempt that is stopped before it is sent
        try:
            sent = self.pace.enter(prompt + completion, stop)
            try:
                reply = self.sender.send(request)
            except NoAnswerError as trouble:
                cost = worst if trouble.paid == "unknown" else self._price(trouble.paid, (0, 0))
                if trouble.raw is not None:
                    self.cache.keep_failure(key, trouble.reason, cost, trouble.raw)
                raise
            tokens = reply.prompt_tokens, reply.completion_tokens
            cost = self._price(tokens, (prompt, completion))
            if None not in tokens:
                sent.tokens = sum(filter(None, tokens))
            return self.cache.keep(key, reply, cost, attempt)
        finally:
            self.budget.settle(worst, cost)

    def _price(self, tokens: Any, most: tuple[int, int]) -> float:
        """What tokens cost; where their number is not told, what the most would."""
        counts = zip(tokens or most, most, strict=True)
        return self.budget.price(*(limit if count is None else count for count, limit in counts))

    def _wait(self, trouble: NoAnswerError, attempt: int, stop: threading.Event) -> None:
        seconds = random_pause(attempt, self._chance)
        if trouble.pause is not None:
            seconds = trouble.pause + self._chance.random()  # not all at the same moment
        told = logger.warning if seconds >= WORTH_TELLING else logger.info
        told("%s: %s; attempt %d follows in %s.", self.name, trouble.reason, attempt + 1, duration(seconds))
        self.clock.wait(seconds, stop)
        if stop.is_set():
            raise StoppedError

    def _hold(self, seconds: float, reason: str) -> None:
        """Let no request start while the server asks to wait."""
        if seconds > LONGEST_WAIT:
            raise RecipeError(f"{self.name} asks to wait {duration(seconds)} ({reason}); start again then.")
        self.pace.hold(seconds)

    def _count_failure(self, reason: str) -> None:
        with self._lock:
            self._failed_in_a_row += 1
            if self._failed_in_a_row >= max(IN_A_ROW, self.options.concurrency):
                raise RecipeError(
                    f"{self.name} has answered none of the last {self._failed_in_a_row} requests ({reason}); look "
                    "after it, and start again: what it answered before is kept."
                )
