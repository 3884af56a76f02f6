"""The page as a Space: what is written, what is pushed, and that the written program serves the models it names."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import TOKEN, HubServer
from PIL import Image

from recipes_minigpt4 import cli
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE


pytest.importorskip("gradio", reason="Gradio is not installed: the extra [app]")

ID = "you/shapes"
HUB = {"vision": "owner/eyes", "qformer": "owner/eyes", "language_model": "owner/words"}
OPTIONS = ["--temperature", "0", "--max_new_tokens", "12", "--device", "cpu"]


@pytest.fixture(scope="module")
def adapter(ours: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose backbones are in repositories."""
    folder = Path(shutil.copytree(ours, tmp_path_factory.mktemp("space") / "adapter"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part, source in config["backbones"].items():
        source.update(name_or_path=HUB[part], revision="main")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stocked(hub: HubServer, adapter: Path) -> HubServer:
    """A Hub with the adapter and its backbones."""
    hub.add_repo("owner/eyes", content_of(VISION_BACKBONE))
    hub.add_repo("owner/words", content_of(LANGUAGE_BACKBONE))
    hub.add_repo("you/adapter", content_of(adapter))
    return hub


def space(*options: str) -> int:
    return cli.main(["app", *options, *OPTIONS])


def arguments_of(program: bytes) -> list[str]:
    """What the written program gives to the command."""
    (found,) = [
        node.value
        for node in ast.parse(program).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "ARGUMENTS"
    ]
    return ast.literal_eval(found)


# ---- what is pushed -------------------------------------------------------------------------------------------------


def test_a_page_becomes_a_space_in_one_commit(
    stocked: HubServer, adapter: Path, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    exif = Image.Exif()
    exif[0x010F] = "a camera of mine"
    Image.new("RGB", (1600, 900), "red").save(pictures / "red.jpg", exif=exif)
    options = [f"small={adapter}", "stage2=you/adapter", "--examples", str(pictures), "--space", ID, "--private"]
    assert space(*options) == 0
    files = stocked.files(ID, kind="space")
    assert stocked.messages(ID, "space") == ["Show models with minigpt4 app"]
    assert stocked.repos["space", ID].private
    assert arguments_of(files["app.py"]) == [
        "small=models/small", "stage2=you/adapter", "--examples", "examples", "--device", "cpu",
        "--temperature", "0.0", "--max_new_tokens", "12",
    ]  # fmt: skip
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    import gradio

    assert (front["sdk"], front["sdk_version"], front["app_file"]) == ("gradio", gradio.__version__, "app.py")
    assert front["models"] == ["owner/eyes", "owner/words", "you/adapter"]
    assert "- stage2: you/adapter" in files["README.md"].decode()
    assert f"torch=={torch.__version__.partition('+')[0]}\n" in files["requirements.txt"].decode()
    assert "models/small/model.safetensors" in files and "recipes_minigpt4/serving/app.py" in files
    assert "processing_minigpt4/chat_templates/vicuna_v0.jinja" in files
    assert not any(name.startswith("recipes_minigpt4/tiny/backbones") or "__pycache__" in name for name in files)
    assert b"a camera of mine" not in files["examples/red.webp"]
    assert TOKEN.encode() not in b"".join(files.values()) and str(adapter).encode() not in b"".join(files.values())
    told = capsys.readouterr().out
    assert (
        re.search(rf"Pushed {len(files)} files, \d+\.\d MiB to http\S+/spaces/{ID}", told) and "HF_TOKEN" not in told
    )
    # Weights that are a folder here may be a repository there.
    moved = ["--vision", "owner/eyes", "--qformer", "owner/eyes", "--language_model", "owner/words"]
    assert space(ours, *moved, "--space_dir", str(tmp_path / "moved")) == 0
    assert arguments_of((tmp_path / "moved" / "app.py").read_bytes())[1:7] == moved
    # The next version has no files of this one that it does not need.
    stocked.repos["model", "you/adapter"].private = True
    assert space("stage2=you/adapter", "--space", ID) == 0
    after = stocked.files(ID, kind="space")
    assert {name for name in files if name not in after} == {
        name for name in files if name.startswith(("models/", "examples/"))
    }
    assert "Give it a token in its settings, as the secret HF_TOKEN: you/adapter" in capsys.readouterr().out


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a Space with an adapter of its own."""
    folder = tmp_path_factory.mktemp("written") / "space"
    assert space(f"a dog={adapter}", "--space_dir", str(folder)) == 0
    return folder


@pytest.fixture
def running(written: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the written program, which finds the Hub's repositories and no code of ours but its own."""
    with HubServer() as server:
        server.add_repo("owner/eyes", content_of(VISION_BACKBONE))
        server.add_repo("owner/words", content_of(LANGUAGE_BACKBONE))
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
        libraries = [path for path in sys.path if path and not (Path(path) / "modeling_minigpt4").exists()]
        env |= {**server.environment(tmp_path / "home"), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": "0"}
        env["PYTHONPATH"] = os.pathsep.join([str(written), *libraries])
        program = subprocess.Popen(
            [sys.executable, "app.py"],
            cwd=written,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            lines = []
            for line in program.stdout or ():
                lines.append(line)
                if found := re.search(r"Open (http://127\.0\.0\.1:\d+/)", line):
                    yield found[1]
                    break
            else:
                pytest.fail("".join(lines))
        finally:
            program.kill()
            program.communicate(timeout=60)


def test_the_written_program_serves_the_model(
    running: str, written: Path, talkers: dict[str, Talker], scenes: list[Any], tmp_path: Path
) -> None:
    from app_server import message, said
    from gradio_client import Client

    scenes[0].save(tmp_path / "scene.png")
    client = Client(running, verbose=False, download_files=str(tmp_path / "told"))
    try:
        log = client.predict(message("What is this?", tmp_path / "scene.png"), "a dog", api_name="/ask")[1]
    finally:
        client.close()
    settings = ReplySettings(temperature=0, max_new_tokens=12)
    assert said(log) == ["What is this?", "".join(Talk(talkers["ours"]).ask("What is this?", [scenes[0]], settings))]
    assert arguments_of((written / "app.py").read_bytes())[0] == "a dog=models/a_dog"


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_a_space_cannot_show_is_not_pushed(
    stocked: HubServer, adapter: Path, ours: str, tmp_path: Path, capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "full").mkdir()
    leaking = Path(shutil.copytree(adapter, tmp_path / "leaking"))
    (leaking / "README.md").write_text(f"---\nlicense: mit\n---\nMy token is {TOKEN}.\n", encoding="utf-8")
    for options, told in (
        ([ours, "--space", ID], "takes its language_model from"),
        ([str(leaking), "--space", ID], "models/leaking/README.md holds a token or a password"),
        (["you/nothing", "--space", ID], "There is no model at you/nothing"),
        (["you/adapter", "--space", "shapes"], "--space shapes has no owner; write you/shapes"),
        (["you/adapter", "--space", "you/a b"], "--space you/a b is no name of a Space, such as you/your-space"),
        (["you/adapter", "--space_dir", str(leaking)], "is there already; name a folder that is new or empty"),
        (["you/adapter", "--space", ID, "--examples", "nowhere"], "--examples nowhere is no folder"),
        ([str(tmp_path / "full"), "--space", ID], "holds no model"),
    ):
        assert space(*options) == 2, options
        assert told in capsys.readouterr().err
    monkeypatch.setattr("recipes_minigpt4.serving.space.MOST_BYTES", 1000)
    assert space(str(adapter), "--space", ID) == 2
    assert re.search(r"too much for a Space; push it with `minigpt4 push \S+ OWNER/NAME`", capsys.readouterr().err)
    stocked.fail("POST", "/commit/", times=1, status=403, message="no")
    assert space("you/adapter", "--space", ID) == 2
    assert "The Space you/shapes was not pushed: your token may not write there (403)" in capsys.readouterr().err
    assert stocked.messages(ID, "space") == []
