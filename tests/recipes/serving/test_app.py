"""The page's chat, through Gradio's own client: replies, several people, stops, errors, and what nobody may read."""

import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL.ExifTags
import pytest
from app_server import OPTIONS, Served, alone, arguments, message, person, said, serve, slow, wait_until
from gradio_client import Client
from httpx import Client as Web
from PIL import Image, ImageChops, ImageStat

from recipes_minigpt4 import cli
from recipes_minigpt4.serving import app, uploads
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.page_chat import MOST_CHATS, PageChats
from recipes_minigpt4.utils.errors import RecipeError


FIRST, SECOND = "Describe the image in detail.", "Is there a star?"


@pytest.fixture(scope="module")
def served(talkers: dict[str, Talker]) -> Iterator[Served]:
    """A page with two models."""
    with serve({"ours": talkers["ours"], "llava": talkers["llava"]}) as page:
        yield page


@pytest.fixture(scope="module")
def visitor(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A program that looks at the page."""
    with person(served, tmp_path_factory.mktemp("downloads")) as client:
        yield client


@pytest.fixture
def client(visitor: Client) -> Client:
    """Somebody who looks at the page for the first time."""
    visitor.reset_session()
    return visitor


@pytest.fixture(scope="module")
def web(served: Served) -> Iterator[Web]:
    """What asks the page without Gradio's client."""
    with Web(base_url=served.url, timeout=30) as web:
        yield web


@pytest.fixture(scope="module")
def files(scenes: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The scenes as files."""
    folder = tmp_path_factory.mktemp("scenes")
    for number, scene in enumerate(scenes):
        scene.save(folder / f"{number}.png")
    return [folder / f"{number}.png" for number in range(len(scenes))]


def ask(client: Client, text: str, *pictures: Path, **settings: Any) -> list[str]:
    """The texts of the chat once a question is answered."""
    return said(client.predict(message(text, *pictures), **settings, api_name="/ask")[1])


# ---- a chat ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["ours", "llava"])
def test_replies_grow_and_are_those_of_the_model(label: str, served: Served, client: Client, files, scenes) -> None:
    expected = alone(served.talkers[label], (FIRST, scenes[:2]), (SECOND, ()), ("And here?", [scenes[2]]))
    with slow(served.talkers[label]):
        job = client.submit(message(FIRST, *files[:2]), label, api_name="/ask")
        shown = [said(log)[-1] for _, log in job]
    assert shown[0] == "" and shown[-1] == expected[1] and len(set(shown)) > 3
    assert all(shown[-1].startswith(text) for text in shown)
    assert ask(client, SECOND, model=label) == expected[:4]
    assert ask(client, "And here?", files[2], model=label) == expected
    (first, *_) = served.chat(client).talk.conversation.messages
    assert [part["type"] for part in first["content"]] == ["image", "image", "text"]


def test_settings_reach_the_model(served: Served, client: Client, files, scenes) -> None:
    drawn = {"temperature": 1.5, "top_p": 1.0, "seed": 5, "max_new_tokens": 6}
    first = ask(client, FIRST, files[0], **drawn)
    client.predict(api_name="/restart")
    assert ask(client, FIRST, files[0], **drawn) == first
    assert ask(client, FIRST, files[0], **{**drawn, "seed": 6})[3] != first[1]
    client.predict(api_name="/restart")
    with slow(served.talkers["ours"], 0.01):  # beams come in one piece
        job = client.submit(message(FIRST, files[0]), num_beams=3, api_name="/ask")
        assert len({said(log)[-1] for _, log in job}) == 2
    assert served.chat(client).talk.conversation.turns[0].new_tokens <= 12


def test_retry_undo_and_restart(served: Served, client: Client, files, scenes) -> None:
    expected = alone(served.talkers["ours"], (FIRST, [scenes[0]]), (SECOND, ()))
    ask(client, FIRST, files[0])
    ask(client, SECOND)
    drawn = {"temperature": 2, "top_p": 1, "seed": 1}
    _, log = client.predict(*(1, 2, 1, 1, 1, 12, 1), api_name="/retry")
    assert said(log)[:3] == expected[:3] and said(log)[3] != expected[3], drawn
    assert said(client.predict(api_name="/retry")[1]) == expected
    box, log = client.predict(api_name="/undo")
    assert said(log) == expected[:2] and box["text"] == SECOND
    box, log = client.predict(api_name="/undo")
    assert said(log) == [] and box["text"] == FIRST
    (file,) = box["files"]
    assert Image.open(file).tobytes() == scenes[0].tobytes()
    assert ask(client, FIRST, files[0]) == expected[:2]
    client.predict(api_name="/restart")
    assert ask(client, FIRST, files[1])[1:] == alone(served.talkers["ours"], (FIRST, [scenes[1]]))[1:]


def test_another_model_begins_a_new_chat(served: Served, client: Client, files, scenes) -> None:
    ask(client, FIRST, files[0])
    expected = alone(served.talkers["llava"], (SECOND, [scenes[1]]))
    assert ask(client, SECOND, files[1], model="llava") == expected


# ---- several people -------------------------------------------------------------------------------------------------


def test_people_at_once_get_right_answers(served: Served, files, scenes, tmp_path: Path) -> None:
    ours = served.talkers["ours"]
    expected = [alone(ours, (FIRST, [scene]), (SECOND, ())) for scene in scenes[:3]]
    assert len({told[1] for told in expected}) > 1

    def chat(number: int) -> list[str]:
        with person(served, tmp_path / str(number)) as client:
            ask(client, FIRST, files[number])
            return ask(client, SECOND)

    with slow(ours, 0.01), ThreadPoolExecutor(3) as pool:
        assert list(pool.map(chat, range(3))) == expected


def test_who_leaves_is_forgotten_and_the_reply_ends(served: Served, files, tmp_path: Path) -> None:
    calls: list[int] = []
    count = served.talkers["ours"].speaker.model.register_forward_pre_hook(lambda *_: calls.append(1))
    with slow(served.talkers["ours"], 0.2), person(served, tmp_path) as client:
        job = client.submit(message(FIRST, files[0]), max_new_tokens=200, api_name="/ask")
        wait_until(lambda: len(calls) > 2)
        chat = served.chat(client)
        job.cancel()
        client.close()
        wait_until(lambda: chat.turn and not chat.is_busy)
    made = len(calls)
    assert made < 30
    wait_until(lambda: client.session_hash not in served.page.chats)
    assert len(calls) == made
    count.remove()


def test_chats_that_rest_longest_make_room() -> None:
    chats = PageChats()
    first = chats.of("first")
    for number in range(MOST_CHATS - 1):
        chats.of(str(number))
    assert chats.of("first") is first  # looked at again
    chats.of("one more")
    assert len(chats) == MOST_CHATS and "0" not in chats and chats.of("first") is first


# ---- stops and errors -----------------------------------------------------------------------------------------------


def test_stop_keeps_what_was_said(served: Served, client: Client, files, scenes) -> None:
    (_, whole) = alone(served.talkers["ours"], (FIRST, [scenes[0]]))
    with slow(served.talkers["ours"], 0.3):
        job = client.submit(message(FIRST, files[0]), api_name="/ask")
        wait_until(lambda: job.outputs() and said(job.outputs()[-1][1])[-1])
        with pytest.raises(Exception, match="still under way"):
            client.predict(message(SECOND), api_name="/ask")
        client.predict(api_name="/stop")
        stopped = said(job.result()[1])[-1]
    assert stopped and stopped != whole and whole.startswith(stopped)
    assert ask(client, SECOND)[:3] == [FIRST, stopped, SECOND]
    assert said(client.predict(api_name="/undo")[1]) == [FIRST, stopped]


def test_restart_ends_a_reply(served: Served, client: Client, files) -> None:
    with slow(served.talkers["ours"], 0.2):
        job = client.submit(message(FIRST, files[0]), max_new_tokens=200, api_name="/ask")
        wait_until(job.outputs)
        assert said(client.predict(api_name="/restart")[1]) == []
        job.result()
    assert served.chat(client).exchanges() == []
    assert len(ask(client, SECOND, files[1])) == 2


def test_an_error_is_one_sentence_and_loses_nothing(served: Served, client: Client, files) -> None:
    before = ask(client, FIRST, files[0])
    long = "word " * 2000
    job = client.submit(message(long, files[1]), api_name="/ask")
    with pytest.raises(Exception, match=r"^[^\n]*tokens[^\n]*\.$"):
        job.result()
    box, log = job.outputs()[-1]
    assert said(log) == before
    assert box["value"]["text"] == long and len(box["value"]["files"]) == 1 and box["submit_btn"]
    assert len(ask(client, SECOND)) == 4
    with pytest.raises(Exception, match="There is no question"):
        ask(client, "")


def test_nothing_to_take_back_is_told(client: Client) -> None:
    for name in ("/undo", "/retry"):
        with pytest.raises(Exception, match=r"There is no(thing to take back| question yet; ask one)\."):
            client.predict(api_name=name)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_a_picture_is_seen_upright(served: Served, client: Client, scenes, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[PIL.ExifTags.Base.Orientation] = 6  # to be turned clockwise
    scenes[0].transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    log = client.predict(message(FIRST, tmp_path / "turned.png"), api_name="/ask")[1]
    (seen,) = (part["image"] for part in served.chat(client).talk.conversation.messages[0]["content"][:1])
    assert seen.tobytes() == scenes[0].tobytes()
    shown = Image.open(log[0]["content"][0]["file"])
    assert shown.size == scenes[0].size and not shown.getexif()
    assert max(ImageStat.Stat(ImageChops.difference(shown.convert("RGB"), scenes[0])).mean) < 5


@pytest.mark.parametrize(
    "kind, told",
    [
        ("text", "in no format that is known here"),
        ("cut", "is damaged"),
        ("large", "pixels; 0.001 million is the most"),
        ("bomb", "far too many pixels; 50 million is the most"),
        ("many", "these are 11"),
    ],
)
def test_what_is_no_picture_is_refused(kind, told, client: Client, files, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "upload.png"
    if kind == "text":
        path.write_text("<svg onload=alert(1)>")
    elif kind == "cut":
        path.write_bytes(files[0].read_bytes()[:-200])
    elif kind == "large":
        monkeypatch.setattr(uploads, "MEGAPIXELS", 0.001)
        path = files[0]
    elif kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        path = files[0]
    sent = files[:1] * 11 if kind == "many" else [path]
    with pytest.raises(Exception, match=rf"^[^\n]*{told}[^\n]*\.$"):
        ask(client, FIRST, *sent)


def test_what_is_transparent_is_seen_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "logo.png")
    assert uploads.open_picture(tmp_path / "logo.png").getpixel((0, 0)) == (255, 255, 255)


def test_an_upload_has_a_largest_size(served: Served, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.page, "max_file_size", 1000)
    answer = web.post("gradio_api/upload", files={"files": ("large.png", b"0" * 2000)})
    assert answer.status_code == 413


def test_examples_are_pictures_of_a_folder(files, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(RecipeError, match="no picture"):
        app.copy_examples(tmp_path / "in", tmp_path / "out")
    with pytest.raises(RecipeError, match="no folder"):
        app.copy_examples(tmp_path / "none", tmp_path / "out")
    (tmp_path / "in" / "A star.png").write_bytes(files[0].read_bytes())
    (tmp_path / "in" / "broken.png").write_text("no")
    (tmp_path / "in" / "notes.txt").write_text("no")
    assert app.copy_examples(tmp_path / "in", tmp_path / "out") == [tmp_path / "out" / "examples" / "A star.png"]
    assert capsys.readouterr().err.count("broken.png") == 1


# ---- what nobody may read or fetch ----------------------------------------------------------------------------------


META = {"meta": {"_type": "gradio.FileData"}}


def call(web: Web, file: dict[str, Any]) -> str:
    """What the page answers to a question whose picture is named in this way, without Gradio's client."""
    data = [{"text": FIRST, "files": [file]}, "ours", 1, 0, 1, 1, 1, 12, -1]
    begun = web.post("gradio_api/call/ask", json={"data": data})
    if begun.status_code != 200:
        return f"{begun.status_code} {begun.text}"
    return web.get(f"gradio_api/call/ask/{begun.json()['event_id']}").text


def test_no_file_but_an_upload_is_a_picture(web: Web, ours: str, files) -> None:
    (uploaded,) = web.post("gradio_api/upload", files={"files": files[0].open("rb")}).json()
    assert "event: complete" in call(web, {"path": uploaded, **META})
    outside = os.path.relpath(files[0], Path(uploaded).parent)
    for path in ("/etc/passwd", f"{ours}/config.json", str(files[0]), f"{Path(uploaded).parent}/{outside}"):
        for meta in (META, {}):
            answer = call(web, {"path": path, **meta})
            assert "event: error" in answer and "complete" not in answer, path
    with pytest.raises(RecipeError, match=r"0\.png was not uploaded"):  # whatever Gradio lets through
        uploads.open_uploads([str(files[0])], Path(uploaded).parent)


def test_no_file_but_an_upload_is_sent(web: Web, ours: str, files) -> None:
    (uploaded,) = web.post("gradio_api/upload", files={"files": files[0].open("rb")}).json()
    assert web.get(f"gradio_api/file={uploaded}").content == files[0].read_bytes()
    here, up = str(Path(__file__).resolve()), "..%2f" * 4
    for path in ("/etc/passwd", f"{ours}/config.json", str(files[0]), here, f"{Path(uploaded).parent}/{up}etc/passwd"):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            answer = web.get(f"{route}{path}")
            assert answer.status_code in (403, 404) and b"root:" not in answer.content, path


def test_no_address_is_fetched(web: Web) -> None:
    with socket.create_server(("127.0.0.1", 0)) as secret:
        secret.settimeout(0.5)
        address = f"127.0.0.1:{secret.getsockname()[1]}/secret.png"
        for path in (f"http://{address}", f"HTTP://{address}", f"https://{address}", "https://example.org/a.png"):
            answer = call(web, {"path": path, **META})
            assert answer.startswith("400") and "fetches no addresses" in answer
            for route in ("gradio_api/file=", "gradio_api/file/", "gradio_api/proxy="):
                answer = web.get(f"{route}{path}")
                assert answer.status_code in (403, 404), path
        answer = call(web, {"path": "x.png", "url": f"http://{address}", **META})
        assert "event: error" in answer
        both = [("content-type", "application/json"), ("content-type", "multipart/form-data")]
        body = json.dumps({"data": [{"path": f"http://{address}", **META}]}).encode()
        assert web.post("gradio_api/call/ask", content=body, headers=both).status_code == 400
        with pytest.raises(TimeoutError):
            secret.accept()


def test_a_request_has_a_largest_size(web: Web) -> None:
    answer = web.post("gradio_api/call/ask", content=b"[" * (2 << 20))
    assert answer.status_code == 413


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_serves_offline_until_ctrl_c(ours: str, files, ctrl_c, monkeypatch, capsys, tmp_path) -> None:
    reached: list[Any] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def watched_connect(self: socket.socket, address: Any) -> None:
        reached.append(address)
        connect(self, address)

    def watched_resolve(host: Any, *args: Any, **options: Any) -> Any:
        reached.append((host,))
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", watched_connect)
    monkeypatch.setattr(socket, "getaddrinfo", watched_resolve)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept: list[Path] = []
    chats: list[list[str]] = []

    def visit() -> None:
        printed = ""
        try:
            while "Open http" not in printed:
                time.sleep(0.05)
                printed += capsys.readouterr().out
            url = next(word for word in printed.split() if word.startswith("http"))
            with person(Served(None, url, {}), tmp_path) as client:
                chats.append(ask(client, FIRST, files[0]))
            kept.extend(path for path in tmp_path.glob("minigpt4-app-*/*/*") if path.is_file())
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    visitor = threading.Thread(target=visit)
    visitor.start()
    before = os.environ.get("GRADIO_TEMP_DIR")
    assert cli.main(["app", f"mine={ours}", *OPTIONS, "--device", "cpu"]) == 0
    visitor.join()
    assert chats[0][0] == FIRST and chats[0][1]
    assert {address[0] for address in reached if isinstance(address, tuple)} <= {"127.0.0.1", "localhost", None}
    assert kept and not list(tmp_path.glob("minigpt4-app-*"))
    assert os.environ.get("GRADIO_TEMP_DIR") == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("options, told", [(["--host", "192.0.2.1"], "192.0.2.1"), ([], "port")])
def test_an_address_that_cannot_be_used_is_told(options, told, talkers) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RecipeError, match=told):
        port = str(taken.getsockname()[1])
        with serve({"ours": talkers["ours"]}, "--port", port, *options):
            pass


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    find = cli.importlib.util.find_spec
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None if name == "gradio" else find(name))
    assert cli.main(["app", "model"]) == 2
    told = capsys.readouterr().err
    assert 'pip install "minigpt4-transformers[app]"' in told and told.count("\n") == 1


def test_options_are_what_the_controls_show_at_first(served: Served) -> None:
    args = arguments()
    assert (args.host, args.share, args.examples) == ("127.0.0.1", False, None)
    shown = {block.label: block.value for block in served.page.blocks.values() if hasattr(block, "value")}
    assert (shown["Temperature"], shown["Longest reply"], shown["Seed"]) == (0, 12, -1)
    assert not served.page.analytics_enabled and not served.page.share
    assert "googleapis" not in json.dumps(served.page.config, default=str)
