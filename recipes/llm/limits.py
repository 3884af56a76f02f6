"""How fast and for how much a server is asked: requests and tokens per minute, pauses, a budget."""

import email.utils
import math
import random
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from recipes_minigpt4.llm.exchange import BudgetError, Request, pictures_of, text_of
from recipes_minigpt4.llm.options import ClientOptions
from recipes_minigpt4.utils.errors import RecipeError


MINUTE = 60.0
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts
A_MOMENT = 1e-3  # seconds: the shortest wait, and how exact the clock has to be
WORDS_AROUND = 32  # most tokens that a chat template puts around a message
MILLION = 1_000_000


class StoppedError(Exception):
    """Whoever waited is not needed any more."""


class Clock:
    """The time, and waiting for it; tests bring their own."""

    def now(self) -> float:
        """Seconds since some moment."""
        return time.monotonic()

    def today(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def wait(self, seconds: float, stop: threading.Event) -> None:
        """Wait, unless it is told to stop."""
        stop.wait(seconds)


def pause_asked_for(headers: Mapping[str, str], today: float) -> float | None:
    """The seconds that an answer with `Retry-After` asks to wait, as a number or as a date; None if it does not."""
    text = headers.get("retry-after") or ""
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - today
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def random_pause(failed: int, chance: random.Random) -> float:
    """Seconds to wait after so many failed attempts: between a second and a limit that doubles up to a minute."""
    return chance.uniform(FIRST_PAUSE, min(LONGEST_PAUSE, 2.0 ** min(failed, 10)))


def most_tokens(request: Request, options: ClientOptions) -> tuple[int, int]:
    """The most tokens that prompt and answer of a request can have: no token is shorter than a byte."""
    texts = [text_of(message.get("content")) for message in request.messages]
    prompt = sum(len(text.encode(errors="replace")) + WORDS_AROUND for text in texts) + WORDS_AROUND
    return prompt + pictures_of(request) * options.tokens_per_picture, request.max_tokens


@dataclass
class Sent:
    """A request of the last minute."""

    at: float
    tokens: int


class Pace:
    """
    Lets at most so many requests and tokens start in any minute, and none while the server asked to wait.

    A request with more tokens than a minute may have starts alone.
    """

    def __init__(self, requests: int | None, tokens: int | None, clock: Clock) -> None:
        self.requests, self.tokens, self.clock = requests, tokens, clock
        self._sent: deque[Sent] = deque()
        self._free_from = -math.inf
        self._lock = threading.Lock()

    def enter(self, tokens: int, stop: threading.Event) -> Sent:
        """
        Wait for one's turn.

        Args:
            tokens: the most that the request can have; `Sent.tokens` may be corrected when the answer is there.
            stop: ends the wait with `StoppedError`.
        """
        while not stop.is_set():
            with self._lock:
                pause = self._pause(now := self.clock.now(), tokens)
                if pause < A_MOMENT:
                    self._sent.append(sent := Sent(now, tokens))
                    return sent
            self.clock.wait(pause, stop)
        raise StoppedError

    def hold(self, seconds: float) -> None:
        """Let nobody start for some time."""
        with self._lock:
            self._free_from = max(self._free_from, self.clock.now() + seconds)

    def _pause(self, now: float, tokens: int) -> float:
        while self._sent and now - self._sent[0].at > MINUTE - A_MOMENT:
            self._sent.popleft()
        free_from = self._free_from
        if self.requests and len(self._sent) >= self.requests:
            free_from = max(free_from, self._sent[-self.requests].at + MINUTE)
        if self.tokens:
            left = self.tokens - tokens - sum(sent.tokens for sent in self._sent)
            for sent in self._sent:
                if left >= 0:
                    break
                free_from, left = max(free_from, sent.at + MINUTE), left + sent.tokens
        return free_from - now


class Budget:
    """
    Lets a request start only if it cannot exceed the budget together with what was spent and what is under way.

    Raises:
        RecipeError: if there is a budget and no prices.
    """

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.limit = math.inf if options.max_cost is None else options.max_cost
        prices = options.price_per_million_prompt_tokens, options.price_per_million_completion_tokens
        if options.max_cost is not None and None in prices:
            flags = [options.flag(f"price_per_million_{kind}_tokens") for kind in ("prompt", "completion")]
            raise RecipeError(f"{options.flag('max_cost')} needs prices; give {' and '.join(flags)}.")
        self._prices = [(price or 0.0) / MILLION for price in prices]
        self.spent = 0.0
        self._under_way: list[float] = []
        self._changed = threading.Condition()

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]

    def spend(self, cost: float) -> None:
        """Count what was paid without a reservation, such as in an earlier start."""
        with self._changed:
            self.spent += cost

    def reserve(self, worst: float, stop: threading.Event) -> None:
        """
        Set aside what a request costs at worst, once there is enough.

        Raises:
            BudgetError: if there will not be enough, whatever those under way cost.
        """
        with self._changed:
            while self.spent + sum(self._under_way) + worst > self.limit * (1 + 1e-9):
                if stop.is_set():
                    raise StoppedError
                if not self._under_way:
                    raise BudgetError(
                        f"{self.options.flag('max_cost')} {self.limit:g} does not suffice: {self.spent:.4g} is spent, "
                        f"and the next request could cost {worst:.2g}; raise it to go on where this run stopped."
                    )
                self._changed.wait(0.5)
            self._under_way.append(worst)

    def settle(self, worst: float, cost: float) -> None:
        """Replace what was set aside by what it did cost."""
        with self._changed:
            self._under_way.remove(worst)
            self.spent += cost
            self._changed.notify_all()
