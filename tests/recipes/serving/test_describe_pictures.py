"""`minigpt4 describe`: places of all kinds, one line per picture, runs that go on, and where the text goes."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from recipes_minigpt4 import cli
from recipes_minigpt4.evaluation.questions import Picture, Question, Sampling
from recipes_minigpt4.serving import describe
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.picture_places import Place, find_pictures


PROMPT = "Describe this image in detail."
SHORT = ("--max_new_tokens", "6")


@pytest.fixture
def album(tmp_path: Path, scenes: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of pictures with odd names, which is the current one."""
    for name, scene in zip(("a.png", "b[1].PNG", "more/c d.webp", ".hidden/no.png"), scenes, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        scene.save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(ours: str, talkers: dict[str, Talker], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`run(*arguments)`: the command, with a model that is loaded already; the sizes of the batches that it asks."""
    speaker = talkers["ours"].speaker

    def build(*arguments: str) -> list[int]:
        sizes: list[int] = []

        class Counting:
            def answer(self, questions, pictures):
                sizes.append(len(pictures))
                return speaker.answer(questions, pictures)

        talker = Talker("ours", ours, Counting())
        monkeypatch.setattr(Talker, "about", "ours, loaded")
        monkeypatch.setattr(describe, "open_talker", lambda name, options: talker)
        describe.main([*arguments, "--model", ours, *SHORT])
        return sizes

    return build


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(talker: Talker, *scenes: Image.Image, **sampling: Any) -> list[str]:
    """What the model says, one picture at a time."""
    chosen = Sampling(6, **sampling)
    return [talker.speaker.answer([Question(Picture("", scene), PROMPT, chosen)], [scene])[0].text for scene in scenes]


# ---- places ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "named, found",
    [
        (["a.png"], ["a.png"]),
        (["."], ["./a.png", "./b[1].PNG", "./more/c d.webp"]),
        (["more", "a.png"], ["more/c d.webp", "a.png"]),
        (["*.png"], ["a.png"]),
        (["**/*d.webp"], ["more/c d.webp"]),
        (["m*"], ["more/c d.webp"]),
        (["b[1].PNG"], ["b[1].PNG"]),  # what exists is no pattern
        (["HTTPS://example.org/a[1].png"], ["HTTPS://example.org/a[1].png"]),
        (["-", "a.png"], ["b[1].PNG", "more/c d.webp", "a.png"]),
    ],
    ids=str,
)
@pytest.mark.usefixtures("album")
def test_pictures_are_found_by_all_kinds_of_names(named: list[str], found: list[str]) -> None:
    lines = io.StringIO("b[1].PNG\n\n  more \n-\n")
    assert list(find_pictures(named, lines)) == [Place(name) for name in found]


@pytest.mark.usefixtures("album")
def test_what_is_not_there_is_told_for_each_place(monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir("empty")
    told = {place.name: place.error for place in find_pictures(["no.png", "*.tiff", "empty", "more"])}
    assert told == {
        "no.png": "there is no such file", "*.tiff": "nothing is called like that",
        "empty": "there are no pictures in this folder (jpg, jpeg, png, webp, bmp, gif, tif, tiff)",
        "more/c d.webp": None,
    }  # fmt: skip
    monkeypatch.setenv("HOME", os.getcwd())
    assert list(find_pictures(["~/more"])) == [Place(f"{os.getcwd()}/more/c d.webp")]


def test_a_big_folder_is_walked_one_picture_at_a_time(album: Path, talkers, monkeypatch, run) -> None:
    """No more pictures are open than are asked about at once."""
    for number in range(9):
        shutil.copy("a.png", f"more/{number}.png")
        Image.new("RGB", (20 + number, 20)).save(f"more/{number}.png")
    opened: list[str] = []
    open_picture = Picture.open
    monkeypatch.setattr(Picture, "open", lambda picture: opened.append(picture.name) or open_picture(picture))
    most: list[int] = []
    answer = talkers["ours"].speaker.answer

    def count(questions, pictures):
        most.append(len(opened))
        opened.clear()
        return answer(questions, pictures)

    monkeypatch.setattr(talkers["ours"].speaker, "answer", count)
    run("more", "--output", "out.jsonl", "--batch_size", "4")
    assert most == [4, 4, 2]


# ---- where text goes ------------------------------------------------------------------------------------------------


def test_one_picture_gives_its_text_alone(album: Path, run, talkers, scenes, capsys) -> None:
    run("a.png")
    printed = capsys.readouterr()
    assert printed.out == expected(talkers["ours"], scenes[0])[0] + "\n"
    assert "ours, loaded" in printed.err and "Describing" in printed.err


def test_several_give_a_line_each_in_batches_that_change_nothing(album, run, talkers, scenes, capsys) -> None:
    assert run("a.png", "b[1].PNG", "more", "--batch_size", "2") == [2, 1]
    texts = expected(talkers["ours"], *scenes[:3])
    names = ("a.png", "b[1].PNG", "more/c d.webp")
    assert capsys.readouterr().out == "".join(
        f"{name}: {' '.join(text.split())}\n" for name, text in zip(names, texts, strict=True)
    )
    run("a.png", "--output", "-", "--num_beams", "2", "--prompt", "What?")
    (told,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (told["picture"], told["prompt"]) == ("a.png", "What?") and told["text"]


def test_a_file_gets_a_line_for_every_picture(album, run, ours, talkers, scenes, capsys) -> None:
    run("a.png", "more", "--output", "out.jsonl")
    first, second = lines_of(Path("out.jsonl"))
    texts = expected(talkers["ours"], scenes[0], scenes[2])
    assert [first["text"], second["text"]] == texts and second["picture"] == "more/c d.webp"
    assert first.keys() == {"picture", "prompt", "text", "finished", "model", "revision", "key"}
    assert (first["prompt"], first["model"], first["finished"]) == (PROMPT, ours, False)
    assert first["revision"] == talkers["ours"].speaker.revision
    assert capsys.readouterr().out == ""


def test_names_may_be_any_bytes(album, run, monkeypatch, capsys) -> None:
    shutil.copy("a.png", name := os.fsdecode(b"caf\xe9.png"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9.png\n"), encoding="utf-8"))
    run("-", "--output", "out.jsonl")
    assert lines_of(Path("out.jsonl"))[0]["picture"] == name
    run(name, "more")
    assert capsys.readouterr().out.startswith("caf\\udce9.png: ")
    assert run(name, "--output", "out.jsonl") == []


def test_whoever_reads_may_stop(album, run, monkeypatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        run("a.png", "more")  # raises nothing, and nor does Python when it closes the file
        assert os.fstat(write).st_rdev == os.stat(os.devnull).st_rdev


# ---- bad pictures ---------------------------------------------------------------------------------------------------


def test_a_bad_picture_costs_a_line(album, run, capsys) -> None:
    Path("more/bad.jpg").write_text("no picture")
    assert run("more", "no.png", "a.png", "--output", "out.jsonl") == [2]
    good, bad, missing, last = sorted(lines_of(Path("out.jsonl")), key=lambda line: list(ORDER).index(line["picture"]))
    assert bad["error"] == "No image could be read from 'more/bad.jpg' (it is in no format that Pillow knows)"
    assert missing["error"] == "there is no such file" and "text" not in bad and good["text"] and last["text"]
    told = capsys.readouterr().err.splitlines()
    assert (
        told[-1] == "minigpt4 describe: 2 pictures of 4 could not be read." and "no.png: there is no such file" in told
    )
    shutil.copy("a.png", "no.png")  # what was bad is tried again, and what is bad still gets no second line
    assert run("more", "no.png", "a.png", "--output", "out.jsonl") == []
    assert [line["picture"] for line in lines_of(Path("out.jsonl"))[4:]] == ["no.png"]


ORDER = ("more/c d.webp", "more/bad.jpg", "no.png", "a.png")


@pytest.mark.parametrize("named, told", [(["no.png", "*.gif"], "nor at the 1 others"), (["bad.jpg"], "None of")])
def test_if_all_are_bad_the_command_fails(named, told, album, ours, capsys, monkeypatch, talkers) -> None:
    Path("bad.jpg").write_text("no picture")
    monkeypatch.setattr(describe, "open_talker", lambda name, options: pytest.fail("a model was loaded for nothing"))
    assert cli.main(["describe", *named, "--model", ours]) == 2
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def address(album: Path) -> Iterator[str]:
    """The album on a server of this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Tell nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(album)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched(address: str, run, talkers, scenes) -> None:
    run(f"{address}/a.png", f"{address}/no.png", "a.png", "--output", "out.jsonl")
    told = {line["picture"]: line for line in lines_of(Path("out.jsonl"))}
    assert told[f"{address}/a.png"]["text"] == expected(talkers["ours"], scenes[0])[0]
    assert told["a.png"]["key"] == told[f"{address}/a.png"]["key"]  # the same file
    assert "404" in told[f"{address}/no.png"]["error"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["a.png"], "required: --model"),
        (["a.png", "--model", "nowhere"], "There is no model at nowhere"),
        (["a.png", "--model", "OURS", "--output", "b[1].PNG"], "has to end in .jsonl"),
        (["a.png", "--model", "OURS", "--batch_size", "0"], "a whole number from 1 on"),
        (["a.png", "--model", "OURS", "--quantization", "int3"], "invalid choice: 'int3'"),
        (["a.png", "--model", "OURS", "--language_model", "./no"], "backbone ./no cannot be opened"),
        (
            ["a.png", "--model", "openai:http://127.0.0.1:1/v1#x"],
            "(it is a server, and this command loads the model itself); name a folder",
        ),
    ],
    ids=str,
)
def test_mistakes_are_told_in_one_sentence(arguments, told, album, ours, capsys) -> None:
    before = Path("b[1].PNG").read_bytes()
    assert cli.main(["describe", *(ours if text == "OURS" else text for text in arguments)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minigpt4 describe: ") and told in last
    assert Path("b[1].PNG").read_bytes() == before


# ---- going on -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from recipes_minigpt4.utils.quiet import silence_libraries
silence_libraries([])
from recipes_minigpt4.evaluation.replies import Said
from recipes_minigpt4.serving import describe, models

class Dying:
    batches = 0
    def answer(self, questions, pictures):
        self.batches += 1
        if self.batches == 3:
            print(sorted({"trl", "datasets", "pandas"} & set(sys.modules)), file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return [Said("It is a picture.", True) for _ in questions]

models.Talker.about = "loaded"
describe.open_talker = lambda name, options: models.Talker("ours", name, Dying())
describe.main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_asks_nothing_twice(album: Path, run, ours: str) -> None:
    for number in range(7):
        Image.new("RGB", (20 + number, 20)).save(f"more/{number}.png")
    shutil.copy("a.png", "more/z.png")  # the same picture by another name
    arguments = ["a.png", "more", "--output", "out/out.jsonl", "--batch_size", "2"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments, "--model", ours, *SHORT], capture_output=True)
    path = Path("out/out.jsonl")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stderr.endswith(b"[]\n")  # it imports no training library
    assert len(lines_of(path)) == 4
    with path.open("a", encoding="utf-8") as file:
        file.write('{"picture": "half a li')
    assert run(*arguments) == [2, 2, 1]  # of nine pictures
    told = {line["picture"]: line["text"] for line in lines_of(path)}
    assert len(lines_of(path)) == len(told) == 10 and told["more/z.png"] == "It is a picture." == told["a.png"]
    assert run(*arguments) == []
    assert run(*arguments, "--prompt", "What?") == [2] * 4 + [1]  # another question
    assert run(*arguments, "--num_beams", "2") == [2] * 4 + [1]
    assert len(lines_of(path)) == 30


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_tells_how_to_go_on(album, ours, monkeypatch, capsys) -> None:
    class Interrupted:
        def answer(self, questions, pictures):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Talker, "about", "loaded")
    monkeypatch.setattr(describe, "open_talker", lambda name, options: Talker("ours", name, Interrupted()))
    assert cli.main(["describe", "a.png", "--model", ours, "--output", "out.jsonl"]) == 130
    assert "Interrupted; with --output, the same command goes on where it was." in capsys.readouterr().err
