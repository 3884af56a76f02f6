"""A page on this machine for tests, and people who look at it."""

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest


pytest.importorskip("gradio", reason="Gradio is not installed: the extra [app]")

import gradio
from gradio_client import Client, handle_file

from recipes_minigpt4.serving import app
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.options import build_parser
from recipes_minigpt4.serving.page_chat import PageChat
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.serving.uploads import upload_folder


GREEDY = ReplySettings(temperature=0, repetition_penalty=1.0, max_new_tokens=12)
OPTIONS = ("--temperature", "0", "--repetition_penalty", "1", "--max_new_tokens", "12", "--port", "0")


class Served(NamedTuple):
    """A page that is served: itself, its address, and its models by label."""

    page: Any
    url: str
    talkers: Mapping[str, Talker]

    def chat(self, client: Client) -> PageChat:
        """What the page knows of somebody's chat."""
        return self.page.chats.of(client.session_hash)


def arguments(*options: str) -> argparse.Namespace:
    """The command line, with short greedy replies and a free port."""
    return build_parser("app").parse_args(["model", *OPTIONS, *options])


@contextlib.contextmanager
def serve(talkers: Mapping[str, Talker], *options: str) -> Iterator[Served]:
    """Serve a page to this machine."""
    args = arguments(*options)
    with pytest.MonkeyPatch.context() as patch, upload_folder():
        for name, value in app.ENVIRONMENT.items():
            patch.setenv(name, value)  # and undone at the end
        patch.setattr(gradio.utils, "get_heartbeat_rate", lambda: 0.3)  # seconds, to see soon that somebody has left
        page = app.build(args, talkers)
        try:
            app.launch(page, args)
            yield Served(page, page.local_url, talkers)
        finally:
            page.chats.close_all()
            page.close(verbose=False)


@contextlib.contextmanager
def person(served: Served, downloads: Path) -> Iterator[Client]:
    """Somebody who looks at the page, and leaves at the end."""
    client = Client(served.url, verbose=False, download_files=str(downloads))
    yield client
    client.close()


def message(text: str, *pictures: Path) -> dict[str, Any]:
    """What the text box sends."""
    return {"text": text, "files": [handle_file(str(path)) for path in pictures]}


def said(log: Sequence[Mapping[str, Any]]) -> list[str]:
    """The texts of a chat on the page, without its pictures."""
    return [part["text"] for one in log for part in one["content"] if "text" in part]


def alone(talker: Talker, *questions: tuple[str, Sequence[Any]], settings: ReplySettings = GREEDY) -> list[str]:
    """Questions, each with its pictures, and the replies of a chat that has the model to itself."""
    talk = Talk(talker)
    return [told for text, images in questions for told in (text, "".join(talk.ask(text, images, settings)))]


@contextlib.contextmanager
def slow(talker: Talker, seconds: float = 0.05) -> Iterator[None]:
    """Have a model think about every word."""
    handle = talker.speaker.model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    yield
    handle.remove()


def wait_until(holds: Callable[[], Any], seconds: float = 30.0) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.02)
