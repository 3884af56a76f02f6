"""`minigpt4 serve`, asked by the client of OpenAI: replies are the model's own, mistakes are told in a sentence."""

import base64
import contextlib
import dataclasses
import io
import json
import logging
import os
import random
import re
import shlex
import signal
import socket
import struct
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import uvicorn
from PIL import Image
from transformers import GenerationConfig

from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.serving import serve
from recipes_minigpt4.serving.server_replies import Ending
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.picture_fetching import FetchLimits


KEY = "a-key-of-many-letters"
PAGE = "https://page.example"
NAME = "shapes"
ASKED = "Describe the image in detail."


class Server:
    """A server in a thread of this process, with a client."""

    def __init__(self, app: Any) -> None:
        self.app, self.loaded = app, app.loaded
        self.front = getattr(app, "app", app)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="info"))
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        self.place = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{self.place}/v1", api_key=KEY, max_retries=0, timeout=60)

    def close(self) -> None:
        self.uvicorn.should_exit = True
        self.thread.join()
        self.client.close()

    def ask(self, chat: list[dict], **options: Any) -> Any:
        return self.client.chat.completions.create(model=NAME, messages=chat, **options)

    def text(self, chat: list[dict], **options: Any) -> str:
        return self.ask(chat, **options).choices[0].message.content

    def streamed(self, chat: list[dict], **options: Any) -> str:
        chunks = [chunk for chunk in self.ask(chat, stream=True, **options) if chunk.choices]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    def refusal(self, chat: Any, **options: Any) -> openai.APIStatusError:
        with pytest.raises(openai.APIStatusError) as told:
            self.ask(chat, **options)
        message = told.value.body["message"]
        assert message[:1].isupper() or message[:1] == "`"
        assert message.endswith(".") and "\n" not in message
        return told.value

    def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, Any]:
        """Status, JSON and headers of a plain request."""
        body = headers.pop("body", None)
        names = {"Authorization": f"Bearer {KEY}", **{name.replace("_", "-"): text for name, text in headers.items()}}
        request = urllib.request.Request(self.place + path, body and body.encode(), names, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers


@pytest.fixture(scope="module")
def server(ours: str) -> Iterator[Server]:
    from recipes_minigpt4.serving.server import build

    arguments = [f"{NAME}={ours}", "--api_key", KEY, "--device", "cpu", "--dtype", "float32", "--allow_origins", PAGE]
    opened = Server(build(serve.parse(arguments)))
    yield opened
    opened.close()


@pytest.fixture
def settings(server: Server, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`settings(field=value)`: other settings of the server for one test."""

    def change(**fields: Any) -> None:
        monkeypatch.setattr(server.front, "settings", dataclasses.replace(server.front.settings, **fields))

    return change


@pytest.fixture
def slowly(server: Server) -> Iterator[list[int]]:
    """Let the model take its time; the list counts its steps."""
    steps: list[int] = []

    def wait(*_: Any) -> None:
        steps.append(1)
        time.sleep(0.05)

    hook = server.loaded.model.register_forward_pre_hook(wait)
    yield steps
    hook.remove()


def data_uri(picture: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def png_of(width: int, height: int) -> bytes:
    """A small PNG file that says it is of another size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    small = base64.b64decode(data_uri(Image.new("RGB", (4, 4))).partition(",")[2])
    return small[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + small[33:]


def user(*parts: Any, role: str = "user") -> dict:
    """A message, as clients send it: pictures, addresses of pictures, and words."""
    content: list[dict] = []
    for part in parts:
        part = data_uri(part) if isinstance(part, Image.Image) else part
        if part.startswith(("data:", "http")):
            content.append({"type": "image_url", "image_url": {"url": part}})
        else:
            content.append({"type": "text", "text": part})
    return {"role": role, "content": content}


def opened(chat: list[dict]) -> list[dict]:
    """A chat of data URIs as the processor takes it."""

    def part(told: dict) -> dict:
        if told["type"] == "text":
            return told
        content = base64.b64decode(told["image_url"]["url"].partition(",")[2])
        return {"type": "image", "image": Image.open(io.BytesIO(content))}

    def parts(content: Any) -> list[dict]:
        return [{"type": "text", "text": content}] if isinstance(content, str) else [part(told) for told in content]

    return [{"role": message["role"], "content": parts(message["content"])} for message in chat]


@torch.inference_mode()
def local(server: Server, chat: list[dict], **options: Any) -> str:
    """What `generate` says to a chat."""
    processor = server.loaded.processor
    inputs = processor.apply_chat_template(
        opened(chat), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    room = 512 - inputs["input_ids"].shape[1]
    ids = server.loaded.model.generate(**inputs, **{"do_sample": False, "max_new_tokens": room, **options})
    return processor.post_process_image_text_to_text(ids[:, inputs["input_ids"].shape[1] :])[0]


# ---- replies --------------------------------------------------------------------------------------------------------


def chats(scenes: list[Image.Image]) -> dict[str, list[dict]]:
    one, two = scenes[:2]
    return {
        "a picture": [user(one, ASKED)],
        "a picture behind the words": [user(ASKED, two)],
        "a JPEG": [user(data_uri(one, "JPEG"), ASKED)],
        "two pictures": [user(one, two, "What is the difference?")],
        "turns": [user(one, ASKED), {"role": "assistant", "content": "A star."}, user(two, "And here?")],
        "turns that end with a separator": [
            user(one, ASKED), {"role": "assistant", "content": "A star.###"}, user("Where?")
        ],
        "a system text": [{"role": "system", "content": "Answer in a word."}, user(one, ASKED)],
        "words alone": [{"role": "user", "content": "The picture shows"}],
        "a typed placeholder": [user("<image> is what I type.", one, "Is <image> seen?")],
        "a typed placeholder alone": [{"role": "user", "content": "<image>"}],
    }  # fmt: skip


@pytest.mark.parametrize("kind", chats([Image.new("RGB", (4, 4))] * 2))
def test_replies_are_those_of_generate_streamed_or_not(kind: str, server: Server, scenes) -> None:
    chat, whole = chats(scenes)[kind], kind in ("a picture", "words alone")
    most: dict = {} if whole else {"max_tokens": 16}
    expected = local(server, chat, **({} if whole else {"max_new_tokens": 16}))
    reply = server.ask(chat, **most)
    assert reply.choices[0].message.content == expected == server.streamed(chat, **most)
    assert expected and "###" not in expected and expected == expected.strip()
    ended = whole or reply.usage.completion_tokens < 16
    assert reply.model == NAME and reply.choices[0].finish_reason == ("stop" if ended else "length")
    assert reply.usage.prompt_tokens > 5 and reply.usage.total_tokens == (
        reply.usage.prompt_tokens + reply.usage.completion_tokens
    )


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage(server: Server, scenes) -> None:
    chunks = list(server.ask([user(scenes[0], ASKED)], stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 10
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage == server.ask([user(scenes[0], ASKED)]).usage
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"temperature": 0, "top_p": 0.5, "stop": None}, {}),
        ({"temperature": 1e-40, "top_p": 0.5, "extra_body": {"top_k": 3}}, {}),
        ({"extra_body": {"num_beams": 3, "length_penalty": 2.0}}, {"num_beams": 3, "length_penalty": 2.0}),
        ({"extra_body": {"num_beams": 2.0}}, {"num_beams": 2}),
        ({"extra_body": {"repetition_penalty": 1.5}}, {"repetition_penalty": 1.5}),
        ({"n": 1, "user": "someone", "logprobs": False, "tools": [], "frequency_penalty": 0}, {}),
    ],
)
def test_numbers_of_a_request_are_those_of_generate(options: dict, expected: dict, server: Server, scenes) -> None:
    chat = [user(scenes[0], ASKED)]
    assert server.text(chat, **{"max_tokens": 12, **options}) == local(server, chat, max_new_tokens=12, **expected)


@pytest.fixture(scope="module")
def whole(server: Server, scenes: list[Image.Image]) -> str:
    """The whole reply about a picture."""
    return server.text([user(scenes[0], ASKED)])


@pytest.mark.parametrize("stop", ["of", [" the", "zebra"], ["###"]])
def test_a_reply_ends_before_a_stop(stop: Any, whole: str, server: Server, scenes) -> None:
    chat = [user(scenes[0], ASKED)]
    places = [whole.find(text) for text in ([stop] if isinstance(stop, str) else stop) if text in whole]
    expected = whole[: min(places, default=len(whole))].rstrip()
    reply = server.ask(chat, stop=stop)
    assert reply.choices[0].message.content == expected == server.streamed(chat, stop=stop)
    assert reply.choices[0].finish_reason == "stop" and "###" not in expected
    assert not places or reply.usage.completion_tokens < len(whole.split())


@pytest.mark.parametrize(
    "asked",
    [
        {"max_tokens": 4},
        {"max_completion_tokens": 4},
        {"max_tokens": 2, "max_completion_tokens": 4},
        {"max_tokens": 2, "extra_body": {"max_new_tokens": 4}},
    ],
)
def test_a_reply_has_at_most_so_many_tokens(asked: dict, server: Server, scenes) -> None:
    chat = [user(scenes[0], ASKED)]
    reply = server.ask(chat, **asked)
    assert reply.usage.completion_tokens == 4 and reply.choices[0].finish_reason == "length"
    assert reply.choices[0].message.content == local(server, chat, max_new_tokens=4)
    last = [chunk.choices[0].finish_reason for chunk in server.ask(chat, stream=True, **asked)][-1]
    assert last == "length"


def test_a_reply_goes_to_the_end_of_the_window_and_no_further(server: Server) -> None:
    from recipes_minigpt4.serving.server_model import configure
    from recipes_minigpt4.serving.server_requests import Exchange

    def most(given: int | None, positions: int | None, own: int = 300) -> int:
        config = GenerationConfig(max_new_tokens=own)
        configure(config, Exchange([], max_tokens=given, prompt_tokens=100), positions)
        return int(config.max_new_tokens)

    assert most(None, 512) == 412 and most(50, 512) == 50 and most(5000, 512) == 412
    assert most(None, 4096) == 1024 and most(None, None) == 1024 and most(None, 4096, own=2000) == 2000
    chat = [{"role": "user", "content": "word " * 120}]
    assert server.loaded.positions == 512
    reply = server.ask(chat, max_tokens=4000)
    assert reply.usage.prompt_tokens > 480 and reply.usage.total_tokens <= 512


def test_the_same_seed_gives_the_same_reply(server: Server, scenes) -> None:
    chat = [user(scenes[0], ASKED)]
    hot: dict = {"temperature": 2.0, "max_tokens": 12}
    drawn = [server.text(chat, seed=seed, **hot) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert server.streamed(chat, seed=1, **hot) == drawn[0]
    assert len({server.text(chat, **hot) for _ in range(3)}) > 1


def test_eight_at_once_get_what_one_by_one_get(server: Server, scenes) -> None:
    asked = [([user(scenes[place % 4], ASKED, f"Number {place}.")], place) for place in range(8)]

    def ask(pair: tuple[list[dict], int]) -> str:
        chat, place = pair
        options: dict = {"temperature": 1.5, "seed": place} if place % 3 == 0 else {}
        return (server.streamed if place % 2 else server.text)(chat, max_tokens=12, **options)

    alone = [ask(pair) for pair in asked]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, asked)) == alone
    assert len(set(alone)) > 4


def steps_in_all(steps: list[int]) -> int:
    """How many steps there are once no more come."""
    seen = -1
    while seen != len(steps):
        seen = len(steps)
        time.sleep(0.3)
    return seen


@pytest.mark.parametrize("streamed", [True, False])
def test_a_reply_for_nobody_ends_and_others_go_on(streamed: bool, server: Server, slowly: list, scenes) -> None:
    chat = [user(scenes[0], ASKED)]
    if streamed:
        stream = server.ask(chat, stream=True)
        for _ in range(4):
            next(stream)
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.3).chat.completions.create(model=NAME, messages=chat)
    assert steps_in_all(slowly) < 30
    assert server.text(chat, max_tokens=3) == local(server, chat, max_new_tokens=3)


def test_a_request_that_nobody_waits_for_is_not_begun(server: Server, slowly: list, scenes) -> None:
    chat = [user(scenes[0], ASKED)]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.text, chat, max_tokens=12)
        while not slowly and not first.done():
            time.sleep(0.01)
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.1).chat.completions.create(model=NAME, messages=chat)
        assert first.result() == local(server, chat, max_new_tokens=12)
    assert steps_in_all(slowly) <= 2 * 12 + 1  # both of ours, and no step of the other


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, field",
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"seed": "seven"}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"extra_body": {"num_beams": 10_000}}, "num_beams"),
        ({"extra_body": {"length_penalty": 1e9}}, "length_penalty"),
        ({"extra_body": {"generation_config": "{}"}}, "generation_config"),
        ({"extra_body": {"num_beams": 2}, "stream": True}, "num_beams"),
    ],
)
def test_what_the_server_cannot_do_is_refused(options: dict, field: str, server: Server) -> None:
    refused = server.refusal([{"role": "user", "content": "A star."}], **options)
    assert refused.status_code == 400 and refused.body["param"] == field and f"`{field}`" in refused.body["message"]
    if field in ("tools", "response_format"):  # no half of a list
        assert refused.body["message"] == f"`{field}` cannot be given here; leave it out."


@pytest.mark.parametrize(
    "chat, told",
    [
        ([], "at least one message"),
        ("A star.", "at least one message"),
        ([{"role": "tool", "content": "A star.", "tool_call_id": "1"}], "role of system, developer, user, assistant"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}], "'input_audio'"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "without an address"),
        ([{"role": "user", "content": []}], "neither a text nor a list"),
        ([user("A"), {"role": "assistant", "content": "B"}], "ends with the assistant's words"),
        ([user(*["http://127.0.0.1/a.png"] * 17)], "17 pictures; 16 is the most"),
        ([{"role": "user", "content": "a" * 1_000_001}], "1,000,001 characters"),
        ([{"role": "user", "content": "word " * 600}], "512 positions, a reply included"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_that_cannot_be_answered_is_told(chat: Any, told: str, stream: bool, server: Server) -> None:
    refused = server.refusal(chat, stream=stream)
    assert refused.status_code == 400 and told in refused.body["message"] and refused.body["param"] == "messages"


@pytest.mark.parametrize(
    "address, told",
    [
        ("data:image/png;base64,AAAA", "in no format that is known here"),
        ("data:image/png;base64,A?", "damaged"),
        ("BROKEN", "is damaged"),
        ("LARGE", "64 x 64 pixels; 0.003 million is the most"),
        ("BOMB", "far too many pixels"),
        ("HEAVY", "larger than 0.01 MB"),
        ("http://127.0.0.1:9/a.png", "private network"),
        ("http://metadata.invalid/a.png", "host is unknown"),
        ("file:///etc/passwd", "not from files"),
        ("/etc/passwd", "not from files"),
        ("POSTSCRIPT", "in no format that is known here"),
    ],
)
def test_a_picture_that_is_not_to_be_had_is_told(address, told, server: Server, scenes, settings) -> None:
    settings(limits=FetchLimits(megabytes=0.01), megapixels=0.003)
    small, noise = Image.new("RGB", (64, 64)), Image.frombytes("RGB", (90, 90), random.Random(0).randbytes(24300))
    whole = data_uri(small.crop((0, 0, 40, 40)), "BMP")
    file = io.BytesIO()
    small.crop((0, 0, 9, 9)).save(file, "EPS")
    others = {
        "BROKEN": whole[: len(whole) // 2 // 4 * 4],
        "LARGE": data_uri(small),
        "BOMB": "data:image/png;base64," + base64.b64encode(png_of(60_000, 60_000)).decode(),
        "HEAVY": data_uri(noise),
        "POSTSCRIPT": "data:image/eps;base64," + base64.b64encode(file.getvalue()).decode(),
    }
    part = {"type": "image_url", "image_url": {"url": others.get(address, address)}}
    refused = server.refusal([{"role": "user", "content": [part]}], stream=address == "BROKEN")
    assert refused.status_code == 400 and told in refused.body["message"]
    assert refused.body["code"] == "invalid_image_url" and "base64," not in refused.body["message"]


def test_pictures_are_fetched_from_this_machine_if_that_is_allowed(server: Server, scenes, settings, tmp_path) -> None:
    import functools
    import http.server

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    scenes[1].save(tmp_path / "scene.png")
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as pictures:
        threading.Thread(target=pictures.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        address = f"http://127.0.0.1:{pictures.server_port}"
        settings(limits=FetchLimits(allow_private=True))
        expected = local(server, [user(scenes[1], ASKED)], max_new_tokens=12)
        assert server.text([user(f"{address}/scene.png", ASKED)], max_tokens=12) == expected
        refused = server.refusal([user(f"{address}/other.png?token=abc", ASKED)])
        assert "answers 404" in refused.body["message"] and "abc" not in refused.body["message"]
        pictures.shutdown()


def test_a_chat_that_the_template_does_not_take_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = "{% for m in messages %}{{ raise_exception('No system, please') if m.role == 'system' }}{% endfor %}"
    monkeypatch.setattr(server.loaded.processor, "chat_template", refusing)
    refused = server.refusal([user("Be brief.", role="system"), user("A star.")])
    assert refused.status_code == 400 and "No system, please" in refused.body["message"]


def test_half_a_character_is_no_error(server: Server) -> None:
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": "\ud800 star"}], "max_tokens": 2})
    status, told, _ = server.get("/v1/chat/completions", "POST", body=body, Content_Type="application/json")
    assert status == 200 and told["choices"][0]["finish_reason"] == "length"


def test_an_error_of_the_model_is_told_without_its_details(server: Server, caplog) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("something inside")

    hook = server.loaded.model.register_forward_pre_hook(fail)
    refused = server.refusal([user("A star.")])
    assert refused.status_code == 500 and "log" in refused.body["message"] and "something inside" in caplog.text
    with pytest.raises(openai.APIError, match="its log tells why"):
        server.streamed([user("A star.")])
    hook.remove()
    assert server.text([user("A star.")], max_tokens=2)


# ---- the server -----------------------------------------------------------------------------------------------------


def test_the_server_has_one_model_of_a_readable_name(server: Server) -> None:
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).id == NAME
    for ask in (
        lambda: server.client.models.retrieve("gpt-4o"),
        lambda: server.client.chat.completions.create(model="gpt-4o", messages=[user("A star.")]),
    ):
        with pytest.raises(openai.NotFoundError, match="There is no model 'gpt-4o' here") as told:
            ask()
        assert told.value.body["code"] == "model_not_found" and f"'{NAME}'" in told.value.body["message"]


def test_a_key_is_asked_for_and_never_logged(server: Server, caplog: pytest.LogCaptureFixture, capfd) -> None:
    caplog.set_level(logging.DEBUG)
    for key in ("wrong-key-of-letters", KEY[:-1], f"{KEY}x"):
        client = openai.OpenAI(base_url=f"{server.place}/v1", api_key=key, max_retries=0)
        with client, pytest.raises(openai.AuthenticationError, match="key is missing or wrong"):
            client.models.list()
    status, told, headers = server.get("/v1/models", Authorization="")
    assert status == 401 and told["error"]["code"] == "invalid_api_key" and headers["WWW-Authenticate"] == "Bearer"
    assert server.get("/health", Authorization="")[:2] == (200, {"status": "ok"})
    assert server.text([user("A star.")], max_tokens=2)
    logged = caplog.text + "".join(capfd.readouterr())
    assert "127.0.0.1" in logged and KEY not in logged and "wrong-key-of-letters" not in logged


@pytest.mark.parametrize(
    "path, method, status",
    [
        ("/reset", "POST", 404),
        ("/load_model", "POST", 404),
        ("/v1/responses", "POST", 404),
        ("/v1/completions", "POST", 404),
        ("/docs", "GET", 404),
        ("/openapi.json", "GET", 404),
        ("/v1/chat/completions", "GET", 405),
        ("/v1/models", "DELETE", 405),
    ],
)
def test_other_routes_are_closed(path: str, method: str, status: int, server: Server) -> None:
    found, told, _ = server.get(path, method)
    assert found == status and path in told["error"]["message"]


@pytest.mark.parametrize(
    "body, kind, status, told",
    [
        ("{", "application/json", 400, "no JSON"),
        ("[" * 100_000, "application/json", 400, "no JSON"),
        ("[]", "application/json", 400, "no JSON object"),
        ("{}", "text/plain", 415, "Content-Type: application/json"),
        (" " * 200_000, "application/json", 413, "larger than"),
    ],
)
def test_a_body_that_is_no_request_is_told(body, kind, status, told, server: Server, monkeypatch) -> None:
    monkeypatch.setattr(server.front, "most", 150_000)
    found, answer, _ = server.get("/v1/chat/completions", "POST", body=body, Content_Type=kind)
    assert found == status and told in answer["error"]["message"]


def test_more_requests_than_can_wait_are_told_to_come_again(server: Server, monkeypatch) -> None:
    monkeypatch.setattr(server.front, "waiting", 64)
    refused = server.refusal([user("A star.")])
    assert refused.status_code == 429 and "64 requests waiting" in refused.body["message"]


def test_pages_of_others_may_not_ask(server: Server) -> None:
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    allowed = "Access-Control-Allow-Origin"
    assert server.get("/v1/models", Origin=PAGE)[2][allowed] == PAGE
    assert server.get("/v1/models", Origin="https://evil.example")[2][allowed] is None
    request = urllib.request.Request(
        f"{server.place}/v1/models",
        method="OPTIONS",
        headers={"Origin": PAGE, **{name.replace("_", "-"): text for name, text in asked.items()}},
    )
    with urllib.request.urlopen(request) as answer:  # which browsers ask without a key
        assert answer.status == 200 and answer.headers[allowed] == PAGE
    assert serve.parse([NAME]).allow_origins == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_replies_end_and_then_the_server(number, server, slowly, scenes, monkeypatch, capsys) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    from recipes_minigpt4.serving import server as module

    monkeypatch.setattr(module, "build", lambda args: server.app)
    monkeypatch.setenv("MINIGPT4_API_KEY", KEY)
    chat, place = [user(scenes[0], ASKED)], f"http://127.0.0.1:{port}"
    expected = local(server, chat, max_new_tokens=12)
    slowly.clear()
    told: list[str] = []

    def client() -> None:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{place}/health"):
                break
            time.sleep(0.02)
        with openai.OpenAI(base_url=f"{place}/v1", api_key=KEY, max_retries=0) as opened:
            stream = opened.chat.completions.create(model=NAME, messages=chat, max_tokens=12, stream=True)
            for chunk in stream:
                told.append(chunk.choices[0].delta.content or "")
                if len(told) == 3:
                    os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    assert serve.main([NAME, "--port", str(port)]) == 0
    thread.join(10)
    assert "".join(told) == expected and len(slowly) == 12
    assert signal.getsignal(number) is before
    assert f"{NAME} answers at {place}/v1" in capsys.readouterr().out
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{place}/health")


def test_evaluate_gets_the_replies_of_the_model(ours: str, server: Server, settings, scenes, tmp_path: Path) -> None:
    settings(api_key=None)
    (tmp_path / "pictures").mkdir()
    for place, picture in enumerate(scenes[:2]):
        picture.save(tmp_path / "pictures" / f"{place}.png")
    models = [f"here={ours}", f"there=openai:{server.place}/v1#{NAME}"]
    arguments = ["--suites", "failures", "--data", tmp_path / "pictures", "--output_dir", tmp_path / "out"]
    evaluate.main([str(text) for text in ["--models", *models, *arguments, "--device", "cpu"]])

    def replies(label: str) -> list[tuple]:
        lines = (tmp_path / "out" / label / "failures" / "replies.jsonl").read_text().splitlines()
        return sorted((told["key"], told["text"], told["finished"]) for told in map(json.loads, lines))

    assert replies("here") == replies("there") and len(replies("there")) >= 2


def test_the_client_code_of_the_page_runs(
    server: Server, settings, scenes, tmp_path: Path, monkeypatch, capsys
) -> None:
    settings(api_key=None)
    (tmp_path / "demo-output").mkdir()
    scenes[0].save(tmp_path / "demo-output" / "scene.png")
    monkeypatch.chdir(tmp_path)
    page = (Path(serve.__file__).parent / "README.md").read_text(encoding="utf-8")
    page = page.partition("\n## Serve\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"^```py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (curl,) = re.findall(r"^```sh\n(curl.*?)^```$", page, re.MULTILINE | re.DOTALL)
    there = {"http://127.0.0.1:8000": server.place, '"adapter"': f'"{NAME}"'}
    for text, other in there.items():
        assert text in code and text in curl
        code, curl = code.replace(text, other), curl.replace(text, other)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == local(server, [user(scenes[0], "Describe this image in detail.")])
    _, address, _, header, _, body = shlex.split(curl)
    status, told, _ = server.get(address.removeprefix(server.place), "POST", body=body, **dict([header.split(": ")]))
    assert status == 200 and told["choices"][0]["message"]["content"]


# ---- beginning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["no/such/model"], "no/such/model"),
        (["openai:gpt-4o"], "no chat model that can be loaded here"),
        (["BLIP2"], "no chat model that can be loaded here"),
        ([NAME, "--", "--max-model-len", "512"], "is for --engine vllm"),
        ([NAME, "--port", "99999"], "0 to 65535"),
        ([NAME, "--host", "no-such-host.invalid"], "cannot be used"),
    ],
)
def test_what_cannot_be_served_is_told(arguments, told, blip2: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [blip2 if text == "BLIP2" else text for text in arguments]
    port = [] if "--port" in arguments or "--" in arguments else ["--port", "0"]
    assert run_command(["serve", *arguments, *port]) == 2
    *_, error = capsys.readouterr().err.splitlines()  # behind the bar of what is loaded
    assert told in error and error.startswith("minigpt4 serve: ")


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(server: Server) -> None:
    port = server.place.rpartition(":")[2]
    with pytest.raises(RecipeError, match=f"Port {port} of 127.0.0.1 cannot be used"):
        serve.main(["no/such/model", "--port", port])


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"fastapi and uvicorn and openai not found.*minigpt4-transformers\[serve\]"):
        serve.main([NAME])


# ---- the end of a reply ---------------------------------------------------------------------------------------------


def test_a_reply_in_pieces_ends_as_the_whole_does() -> None:
    chance, stops = random.Random(0), ["###", "END", "\n\n"]
    for _ in range(500):
        text = "".join(
            chance.choice(["#", "##", "a", " ", "\n", "EN", "D", "é"]) for _ in range(chance.randint(0, 12))
        )
        cuts = sorted(chance.choices(range(len(text) + 1), k=3))
        ending, shown = Ending(stops), ""
        for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
            piece = ending.feed(text[start:end])
            assert piece == piece.rstrip()  # white space waits for what follows it
            shown += piece
        shown += ending.end()
        begun = text.lstrip()
        first = min((place for stop in stops if (place := begun.find(stop)) >= 0), default=len(begun))
        assert shown == begun[:first].strip()
