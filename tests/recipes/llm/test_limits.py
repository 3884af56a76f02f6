"""Limits, told by a clock that passes when somebody waits."""

import random
import threading

import pytest

from recipes_minigpt4.llm.client import BudgetError, ClientOptions, Request
from recipes_minigpt4.llm.limits import (
    Budget,
    Clock,
    Pace,
    StoppedError,
    most_tokens,
    pause_asked_for,
    random_pause,
)


RUNNING = threading.Event()  # nobody stops
MIDNIGHT = 1_799_971_200.0  # 15 January 2027, 08:00 of Greenwich, in fact


class Waiting(Clock):
    def __init__(self) -> None:
        self.seconds = 1000.3

    def now(self) -> float:
        return self.seconds

    def wait(self, seconds: float, stop: threading.Event) -> None:
        self.seconds += seconds


def starts(pace: Pace, tokens: list[int]) -> list[float]:
    """When each request may start, in seconds from now."""
    begin = pace.clock.now()
    return [round(pace.enter(count, RUNNING).at - begin, 2) for count in tokens]


def test_no_minute_has_more_requests_than_allowed() -> None:
    pace = Pace(3, None, Waiting())
    assert starts(pace, [1] * 8) == [0, 0, 0, 60, 60, 60, 120, 120]
    pace.clock.wait(30, RUNNING)
    assert starts(pace, [1] * 3) == [0, 30, 30]


def test_no_minute_has_more_tokens_than_allowed() -> None:
    pace = Pace(None, 100, Waiting())
    assert starts(pace, [60, 40, 10, 50, 41]) == [0, 0, 60, 60, 120]
    assert starts(pace, [1000, 1]) == [60, 120]  # one that is too long has a minute of its own


def test_tokens_are_corrected_when_the_answer_is_there() -> None:
    pace = Pace(None, 100, Waiting())
    pace.enter(90, RUNNING).tokens = 20
    assert starts(pace, [80, 1]) == [0, 60]


def test_nobody_starts_while_the_server_asks_to_wait() -> None:
    pace = Pace(None, None, Waiting())
    pace.hold(30)
    pace.hold(10)  # is over before
    assert starts(pace, [1, 1]) == [30, 30]


def test_whoever_waits_can_be_stopped() -> None:
    pace, stop = Pace(1, None, Waiting()), threading.Event()
    pace.enter(1, stop)
    stop.set()
    with pytest.raises(StoppedError):
        pace.enter(1, stop)


def test_pauses_grow_up_to_a_minute_and_hang_on_chance() -> None:
    chance = random.Random(0)
    for failed, limit in [(1, 2), (2, 4), (5, 32), (6, 60), (2000, 60)]:
        pauses = [random_pause(failed, chance) for _ in range(500)]
        assert 1 <= min(pauses) < 1.25 * limit**0.5 and 0.9 * limit < max(pauses) <= limit


@pytest.mark.parametrize(
    "text, seconds",
    [
        ("12", 12),
        ("0.5", 0.5),
        ("-3", 0),
        ("Fri, 15 Jan 2027 08:00:30 GMT", 30),
        ("Fri, 15 Jan 2027 07:00:00 GMT", 0),
        ("later", None),
        ("inf", None),
        ("", None),
    ],
)
def test_what_a_server_asks_to_wait_is_understood(text: str, seconds: float | None) -> None:
    assert pause_asked_for({"retry-after": text}, MIDNIGHT + 28800) == seconds
    assert pause_asked_for({}, MIDNIGHT) is None


def test_no_request_has_more_tokens_than_are_counted_on() -> None:
    text = "Löwe 🦁"
    request = Request(({"role": "user", "content": text},), max_tokens=7)
    prompt, answer = most_tokens(request, ClientOptions())
    assert prompt >= len(text.encode()) and answer == 7
    seen = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "data:" + "A" * 99999}}]
    with_picture, _ = most_tokens(Request(({"role": "user", "content": seen},)), ClientOptions(tokens_per_picture=500))
    assert with_picture == prompt + 500


def test_a_budget_waits_for_what_is_under_way() -> None:
    prices = {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 2.0}
    budget = Budget(ClientOptions(max_cost=10, **prices))
    assert budget.price(1_000_000, 500_000) == pytest.approx(2.0)
    budget.reserve(6, RUNNING)
    later = threading.Thread(target=budget.reserve, args=(5, RUNNING))
    later.start()
    later.join(0.1)
    assert later.is_alive()  # 6 and 5 are more than 10
    budget.settle(6, 1)
    later.join(10)
    assert not later.is_alive() and budget.spent == 1
    budget.settle(5, 5)
    with pytest.raises(BudgetError, match=r"^--max_cost 10 does not suffice: 6 is spent, and the next .* cost 4\.1;"):
        budget.reserve(4.1, RUNNING)
    budget.reserve(4, RUNNING)  # to the last penny
