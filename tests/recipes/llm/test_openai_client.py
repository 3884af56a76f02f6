"""The client against a real server on this machine that throttles, fails, hangs and talks nonsense."""

import email.utils
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, completion

from recipes_minigpt4.llm import sending
from recipes_minigpt4.llm.client import Answer, BudgetError, ClientOptions, Failure, Request, open_client
from recipes_minigpt4.llm.limits import Clock
from recipes_minigpt4.llm.sending import SendingClient
from recipes_minigpt4.utils.errors import RecipeError


pytest.importorskip("openai")

KEY = "plain-words-that-look-like-nothing"
NOW = 1_800_000_000.0
DATE = email.utils.formatdate(NOW + 40, usegmt=True)


class TestClock(Clock):
    """Time that passes when somebody waits for it; notes how long."""

    __test__ = False

    def __init__(self) -> None:
        self.seconds, self.pauses, self._lock = 0.0, [], threading.Lock()

    def now(self) -> float:
        return self.seconds

    def today(self) -> float:
        return NOW + self.seconds

    def wait(self, seconds: float, stop: threading.Event) -> None:
        with self._lock:
            self.seconds += seconds
            self.pauses.append(seconds)


@pytest.fixture(autouse=True)
def no_proxy_and_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OPENAI_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with ChatServer() as server:
        yield server


@pytest.fixture
def clock() -> TestClock:
    return TestClock()


@pytest.fixture
def connect(server: ChatServer, clock: TestClock) -> Callable[..., SendingClient]:
    """`connect(**options)`: a client of the server that waits in no time."""

    def build(model: str = "judge", **options: Any) -> SendingClient:
        client = open_client(f"openai:{model}", ClientOptions(**{"base_url": server.url, "concurrency": 1, **options}))
        assert isinstance(client, SendingClient)
        client.clock = client.pace.clock = client.sender._clock = clock  # type: ignore[attr-defined]
        return client

    return build


def ask(text: str, **sampling: Any) -> Request:
    return Request(({"role": "system", "content": "Say it."}, {"role": "user", "content": text}), **sampling)


def answers(client: SendingClient, *texts: str, **sampling: Any) -> list[Any]:
    """What comes back for each request, in the order of the requests."""
    return [outcome for _, outcome in sorted(client.ask([ask(text, **sampling) for text in texts]))]


# ---- what is sent and what comes back -------------------------------------------------------------------------------


def test_a_request_arrives_whole_and_its_answer_too(server: ChatServer, connect: Callable) -> None:
    prices = {"price_per_million_prompt_tokens": 2.0, "price_per_million_completion_tokens": 10.0}
    client = connect(**prices)
    (answer,) = answers(client, "a red square", temperature=0.7, max_tokens=200, seed=5)
    assert answer == Answer("A RED SQUARE", 5, 3, pytest.approx((5 * 2 + 3 * 10) / 1e6), finish_reason="stop")
    (sent,) = server.seen
    assert sent["messages"] == [{"role": "system", "content": "Say it."}, {"role": "user", "content": "a red square"}]
    assert (sent["model"], sent["temperature"], sent["max_tokens"], sent["seed"]) == ("judge", 0.7, 200, 5)
    assert client.name == f"openai:judge at {server.url}"


def test_a_server_can_stand_in_the_name(server: ChatServer, connect: Callable) -> None:
    client = connect(f"{server.url}#other", base_url=None)
    assert answers(client, "hi")[0].text == "HI"
    assert client.name == f"openai:other at {server.url}" and server.seen[0]["model"] == "other"


def test_pictures_are_sent_as_they_are(server: ChatServer, connect: Callable) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 400}}
    parts = [{"type": "text", "text": "What is this?"}, picture]
    ((_, answer),) = connect().ask([Request(({"role": "user", "content": parts},))])
    assert isinstance(answer, Answer) and server.seen[0]["messages"] == [{"role": "user", "content": parts}]


def test_a_name_has_no_path_of_a_machine(server: ChatServer, connect: Callable) -> None:
    """vLLM and `transformers serve` call a model in a folder by its path."""
    names = [connect(f"/home/you/{folder}/chat").name for folder in ("a", "b")]
    assert names[0] != names[1] and all(re.search(r"^openai:chat@[0-9a-f]{8} at http", name) for name in names)
    answers(connect("/home/you/a/chat"), "a")
    assert server.seen[0]["model"] == "/home/you/a/chat"


def test_answers_come_in_the_order_in_which_they_end_with_their_numbers(server: ChatServer, connect: Callable) -> None:
    late = threading.Event()
    server.next(call=late.wait)  # whichever comes first is answered last
    got = []
    for number, answer in connect(concurrency=3).ask([ask(text) for text in "abc"]):
        got.append((number, answer.text))
        if len(got) == 2:
            late.set()
    assert sorted(got) == [(0, "A"), (1, "B"), (2, "C")]
    assert got[2][1].lower() == server.seen[0]["messages"][1]["content"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_as_many_requests_are_under_way_as_allowed(server: ChatServer, connect: Callable, concurrency: int) -> None:
    server.together = concurrency  # nobody is answered before all of them are there
    answers(connect(concurrency=concurrency), *"abcdefgh")
    assert server.most_at_once == concurrency


def test_a_model_that_wants_another_name_for_the_longest_answer_gets_it(server: ChatServer, connect: Callable) -> None:
    error = {"message": "Unsupported parameter: use 'max_completion_tokens' instead.", "param": "max_tokens"}
    server.next(status=400, body={"error": error})
    assert [answer.attempts for answer in answers(connect(), "a", "b", max_tokens=9)] == [1, 1]
    assert [sent.get("max_completion_tokens") for sent in server.seen] == [None, 9, 9]


# ---- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, seconds", [("7", 7), (DATE, 40), ("0", 0), ("soon", None)])
def test_a_server_that_throttles_is_left_alone_as_long_as_it_asks(
    server: ChatServer, connect: Callable, clock: TestClock, asked: str, seconds: float | None
) -> None:
    server.next(times=2, status=429, headers={"Retry-After": asked}, body={"error": {"message": "slow down"}})
    (answer,) = answers(connect(), "a")
    assert (answer.text, answer.attempts) == ("A", 3)
    if seconds is None:  # a text that says nothing: up to 2 s, then up to 4
        assert 1 <= clock.pauses[0] <= 2 and 1 <= clock.pauses[1] <= 4
    elif asked == DATE:  # by the second attempt the moment is over
        assert 40 <= clock.pauses[0] <= 41 and clock.pauses[1] <= 1
    else:
        assert all(seconds <= pause <= seconds + 1 for pause in clock.pauses)


def test_who_has_not_been_throttled_waits_too(server: ChatServer, connect: Callable, clock: TestClock) -> None:
    server.next(status=429, headers={"Retry-After": "30"})
    client = connect(attempts=1)
    first, second = answers(client, "a", "b")
    assert isinstance(first, Failure) and second.text == "B" and clock.pauses == [30]


def test_a_server_that_asks_to_wait_for_hours_ends_the_run(server: ChatServer, connect: Callable) -> None:
    server.next(status=429, headers={"Retry-After": "10000"}, body={"error": {"message": "daily limit"}})
    with pytest.raises(RecipeError, match=r"asks to wait 2 h 47 min \(429: daily limit\); start again then"):
        answers(connect(), "a", "b")
    assert len(server.seen) == 1


NOBODY: dict[str, Any] = {"model": "m", "messages": []}  # what was asked does not matter
TROUBLE: dict[str, tuple[dict[str, Any], str]] = {
    "500": ({"status": 500, "body": {"error": {"message": "oh"}}}, "500: oh"),
    "503 as plain text": ({"status": 503, "body": b"busy", "kind": "text/plain"}, "503: busy"),
    "closed": ({"close": True}, "the connection broke (Server disconnected without sending a response)"),
    "HTML": (
        {"body": b"<html>Log in</html>", "kind": "text/html"},
        "it answered, but not in JSON (text/html: <html>Log in</html>)",
    ),
    "nothing": ({"body": b""}, "it answered, but not in JSON (nothing)"),
    "nonsense": ({"body": b'{"choices": ['}, 'it answered, but not in JSON (application/json: {"choices": [)'),
    "no object": ({"body": b"[1, 2]"}, "it answered, but not in JSON (application/json: [1, 2])"),
    "no choice": ({"body": {"choices": []}}, 'there is no choice in what it answered ({"choices": []})'),
    "odd choices": ({"body": {"choices": "yes"}}, 'there is no choice in what it answered ({"choices": "yes"})'),
    "no content": ({"body": completion(NOBODY, None)}, "the answer is empty"),
    "blank": ({"body": completion(NOBODY, " \n")}, "the answer is empty"),
}  # fmt: skip


@pytest.mark.parametrize("plan, reason", TROUBLE.values(), ids=TROUBLE)
def test_trouble_is_tried_again_and_told_in_the_end(
    server: ChatServer, connect: Callable, clock: TestClock, plan: dict, reason: str
) -> None:
    server.next(times=2, **plan)
    assert answers(connect(attempts=3), "a") == [Answer("A", 3, 1, attempts=3, finish_reason="stop")]
    server.next(times=2, **plan)
    assert answers(connect(attempts=2), "a") == [Failure(reason, 2)]
    assert 1 <= clock.pauses[0] <= 2 and 1 <= clock.pauses[1] <= 4 and len(clock.pauses) == 3


def test_a_server_that_hangs_is_waited_for_as_long_as_allowed(
    server: ChatServer, connect: Callable, tmp_path: Path
) -> None:
    server.next(times=2, hang=True)
    client = connect(attempts=2, timeout=0.2, cache=tmp_path)
    assert answers(client, "a") == [Failure("no answer within 0.2 s", 2)]
    assert answers(connect(cache=tmp_path), "a")[0].text == "A"  # a failure is not kept


FINAL: dict[str, tuple[dict[str, Any], str]] = {
    "too long": ({"status": 400, "body": {"error": {"message": "too many tokens"}}}, "400: too many tokens"),
    "as vLLM says it": ({"status": 422, "body": {"detail": "no pictures"}}, "422: no pictures"),
    "refusal": (
        {"body": completion(NOBODY, None, refusal="I will not.")},
        "the model refuses (I will not)",
    ),
    "filter": (
        {"body": completion(NOBODY, "x", "content_filter")},
        "the server's content filter took the answer",
    ),
    "thought too long": (
        {"body": completion(NOBODY, "", "length")},
        "the model had no token left for an answer; allow more",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plan, reason", FINAL.values(), ids=FINAL)
def test_what_no_attempt_can_better_is_asked_once(
    server: ChatServer, connect: Callable, plan: dict, reason: str
) -> None:
    server.next(**plan)
    first, second = answers(connect(), "a", "b")
    assert first == Failure(reason, 1) and second.text == "B" and len(server.seen) == 2


def test_a_server_that_likes_no_request_ends_the_run(server: ChatServer, connect: Callable) -> None:
    server.next(times=4, status=400, body={"error": {"message": "pinned to another model"}})
    server.next()
    server.next(times=6, status=400, body={"error": {"message": "pinned to another model"}})
    failed = [isinstance(outcome, Failure) for outcome in answers(connect(), *"abcdefghijk")]
    assert failed == [True] * 4 + [False] + [True] * 6  # after an answer each fails alone
    server.next(times=9, status=400, body={"error": {"message": "pinned to another model"}})
    with pytest.raises(
        RecipeError, match=r"has answered none of the last 5 requests \(400: pinned to another model\);"
    ):
        answers(connect(), *"abcdefgh")


def test_an_answer_that_was_cut_says_so(server: ChatServer, connect: Callable) -> None:
    server.next(body=completion(NOBODY, "The square is", "length"))
    (answer,) = answers(connect(), "a")
    assert (answer.text, answer.finish_reason) == ("The square is", "length")


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "401": (
        {"status": 401, "body": {"error": {"message": "bad key"}}},
        r"refuses a request without a key \(bad key\); name .* with --judge_api_key_env\.",
    ),
    "403": ({"status": 403, "body": b"no"}, r"serves this account nothing \(403: no\); look after the account"),
    "no money": (
        {"status": 429, "body": {"error": {"message": "quota", "code": "insufficient_quota"}}},
        r"serves this account nothing \(429: quota\)",
    ),
    "404": (
        {"status": 404, "body": {"error": {"message": "no such model"}}},
        r"There is no judge at http://127.0.0.1:\d+/v1 \(no such model\); correct .*--judge_base_url",
    ),
    "temperature": (
        {"status": 400, "body": {"error": {"message": "only 1", "param": "temperature"}}},
        r"does not take this temperature \(only 1\); choose another one, or model\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("plan, told", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_that_all_requests_share_ends_the_run(
    server: ChatServer, connect: Callable, plan: dict, told: str
) -> None:
    server.next(times=9, **plan)
    with pytest.raises(RecipeError, match=told):
        answers(connect(prefix="judge_"), "a", "b", "c")
    assert len(server.seen) == 1


def test_a_server_that_is_down_is_named(connect: Callable) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(RecipeError, match=rf"^Nobody answers at {url} \(.*refused.*\); start the server"):
            answers(connect(base_url=url), "a")


def test_an_address_without_its_end_is_told(server: ChatServer, connect: Callable) -> None:
    told = r"^There is no judge at http://\S+ \(there is no /chat/completions\); .*which often ends in /v1\.$"
    with pytest.raises(RecipeError, match=told):
        answers(connect(base_url=server.url.removesuffix("/v1")), "a")


def test_a_server_that_went_away_is_waited_for_some_time(server: ChatServer, connect: Callable, clock) -> None:
    server.next(headers={"Connection": "close"})
    client = connect(attempts=2)
    assert answers(client, "a")[0].text == "A"
    server.__exit__()
    with pytest.raises(RecipeError, match=r"none of the last 5 requests \(nobody answers at http.*refused"):
        answers(client, *"bcdefghi")
    assert len(clock.pauses) == 5


def test_a_server_that_fails_all_the_time_ends_the_run(server: ChatServer, connect: Callable) -> None:
    server.next(times=3, status=500)
    server.next()
    server.next(times=10, status=500)
    with pytest.raises(RecipeError, match=r"has answered none of the last 5 requests \(500: .*\); look after it"):
        answers(connect(attempts=1), *"abcdefghijkl")
    assert len(server.seen) == 3 + 1 + 5


# ---- limits ---------------------------------------------------------------------------------------------------------


PRICES = {"price_per_million_prompt_tokens": 0.0, "price_per_million_completion_tokens": 1e6}  # a word costs 1


def test_the_budget_is_never_exceeded(server: ChatServer, connect: Callable) -> None:
    client = connect(max_cost=10.5, concurrency=4, **PRICES)
    got = []
    with pytest.raises(BudgetError, match=r"^--max_cost 10\.5 does not suffice: 8 is spent, .* cost 3; raise"):
        got.extend(client.ask([ask(f"say {number}", max_tokens=3) for number in range(20)]))
    paid = sum(answer.cost for _, answer in got)
    assert paid == 2 * len(server.seen) == 8


def test_the_budget_counts_what_an_earlier_start_paid(server: ChatServer, connect: Callable, tmp_path: Path) -> None:
    requests = [ask(text, max_tokens=2) for text in "abcdefgh"]
    for start in range(3):
        got = []
        with pytest.raises(BudgetError, match=r"5 is spent"):
            got.extend(connect(max_cost=6, cache=tmp_path, **PRICES).ask(requests))
        assert len(server.seen) == len(got) == 5 and all(answer.cached == bool(start) for _, answer in got)
    assert len(list(connect(max_cost=9.5, cache=tmp_path, **PRICES).ask(requests))) == 8


def test_answers_that_cannot_be_used_and_lost_ones_are_paid_too(server: ChatServer, connect: Callable) -> None:
    server.next(body=completion(NOBODY, " "))  # nothing said, nothing paid
    server.next(body={"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
    client = connect(**PRICES)
    (answer,) = answers(client, "a b", max_tokens=3)
    assert (answer.attempts, answer.cost, client.budget.spent) == (3, 4, 4)
    server.next(close=True)  # it may have been answered
    (answer,) = answers(client, "c", max_tokens=3)
    assert (answer.cost, client.budget.spent) == (1, 4 + 3 + 1)


def test_a_budget_needs_prices(connect: Callable) -> None:
    with pytest.raises(RecipeError, match=r"^--max_cost needs prices; give --price_per_million_prompt_tokens and"):
        connect(max_cost=1.0, price_per_million_prompt_tokens=1.0)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def test_nothing_that_was_answered_is_asked_again(server: ChatServer, connect: Callable, tmp_path: Path) -> None:
    first = answers(connect(cache=tmp_path), "a", "b", "a")
    assert [answer.cached for answer in first] == [False, False, True] and len(server.seen) == 2
    second = answers(connect(cache=tmp_path), "b", "c", "a")
    assert [(answer.text, answer.cached) for answer in second] == [("B", True), ("C", False), ("A", True)]
    assert len(server.seen) == 3
    answers(connect(cache=tmp_path), "a", seed=1)  # another request,
    answers(connect("other", cache=tmp_path), "a")  # another judge
    assert len(server.seen) == 5


def test_every_raw_answer_is_kept(server: ChatServer, connect: Callable, tmp_path: Path) -> None:
    server.next(body=b"<html>", kind="text/html")
    answers(connect(cache=tmp_path), "a")
    (file,) = tmp_path.glob("*.jsonl")
    useless, useful = map(json.loads, file.read_text().splitlines())
    assert useless["raw"] == "<html>" and useless["failure"].startswith("it answered, but not in JSON")
    assert useful["raw"] == completion(server.seen[0], "A") and useful["key"] == useless["key"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_at_once_and_loses_nothing(server: ChatServer, connect: Callable, tmp_path: Path) -> None:
    server.next(times=5)
    server.next(call=lambda: os.kill(os.getpid(), signal.SIGINT), hang=True)
    server.next(times=20, hang=True)
    requests = [ask(text) for text in "abcdefghij"]
    client = connect(cache=tmp_path, timeout=60)
    with pytest.raises(KeyboardInterrupt):
        list(client.ask(requests))
    assert len(server.seen) == 6
    server._plans.clear()
    again = list(connect(cache=tmp_path).ask(requests))
    assert sum(answer.cached for _, answer in again) == 5 and len(server.seen) == 11


def test_whoever_stops_to_listen_can_go_on(server: ChatServer, connect: Callable, tmp_path: Path) -> None:
    client = connect(cache=tmp_path)
    for _, answer in client.ask([ask(text) for text in "abc"]):
        assert answer.text == "A"
        break
    assert [answer.text for answer in answers(client, "a", "d")] == ["A", "D"]


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_a_key_goes_to_the_server_and_nowhere_else(
    server: ChatServer, connect: Callable, tmp_path: Path, monkeypatch, caplog
) -> None:
    monkeypatch.setenv("THE_JUDGE", f"{KEY}\n")
    caplog.set_level(logging.DEBUG)
    server.answer = lambda asked: server.headers["authorization"]  # a server that tells all it knows
    client = connect(api_key_env="THE_JUDGE", cache=tmp_path, attempts=2)
    (answer,) = answers(client, "a")
    assert server.headers["authorization"] == f"Bearer {KEY}" and answer.text == "Bearer …"
    server.next(times=2, status=500, body={"error": {"message": f"key {KEY} is odd"}})
    (failure,) = answers(client, "b")
    assert failure.reason == "500: key … is odd"
    server.next(status=401, body={"error": {"message": f"Incorrect key {KEY}"}})
    with pytest.raises(RecipeError, match=r"refuses the key \(Incorrect key …\)") as error:
        answers(client, "c")
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "Bearer …" in written and "key … is odd" in written
    assert KEY not in written + caplog.text + str(error.value) + client.name


def test_the_key_of_openai_is_not_sent_to_other_servers(server: ChatServer, connect: Callable, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    answers(connect(), "a")
    assert KEY not in str(server.headers)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)  # unless the environment names the server as well
    client = connect(base_url=None)
    answers(client, "a")
    assert server.headers["authorization"] == f"Bearer {KEY}" and client.name.endswith(server.url)


def test_a_password_in_an_address_stays_there(server: ChatServer, connect: Callable, tmp_path: Path) -> None:
    url = server.url.replace("http://", "http://somebody:pass-word-1@") + "?token=pass-word-2"
    client = connect(base_url=url, cache=tmp_path)
    answers(client, "a")
    assert server.headers["authorization"].startswith("Basic ")
    assert server.query == "token=pass-word-2"
    assert client.name == f"openai:judge at {server.url}"
    server.next(status=404, body=b"http://somebody:pass-word-1@here")
    with pytest.raises(RecipeError) as error:
        answers(client, "b")
    written = "".join(path.name + path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "pass-word" not in written + str(error.value)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"base_url": None}, r"^The environment variable OPENAI_API_KEY is empty, and openai:judge wants a key"),
        ({"api_key_env": "NOT_THERE"}, r"variable NOT_THERE is empty, .* name another variable with --api_key_env\."),
        ({"api_key_env": "ODD"}, r"^What stands in the environment variable ODD is no key; set it anew\.$"),
        ({"base_url": "localhost:8000/v1"}, r"^--base_url localhost:8000/v1 is no address; write something like"),
        ({"base_url": "http://host:port/v1"}, r"is no address"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_asked(
    connect: Callable, monkeypatch, options: dict, told: str
) -> None:
    monkeypatch.setenv("ODD", "two words")
    with pytest.raises(RecipeError, match=told):
        connect(**options)


def test_the_package_is_asked_for_when_it_is_missing(connect: Callable, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(RecipeError, match=r"^openai not found; run `pip install \"minigpt4-transformers\[llm\]\"`"):
        connect()


def test_long_pauses_are_told(server: ChatServer, connect: Callable, caplog) -> None:
    server.next(status=429, headers={"Retry-After": "20"}, body={"error": {"message": "slow down"}})
    answers(connect(), "a")
    (line,) = [record.getMessage() for record in caplog.records if record.name == sending.logger.name]
    assert line.startswith(f"openai:judge at {server.url}: 429: slow down; attempt 2 follows in 2")
