"""`minigpt4 serve --engine vllm` without vLLM: the folder that is written, what is refused, and what vLLM is told."""

import asyncio
import json
import os
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.serving import serve_vllm, vllm_folder, vllm_front, vllm_plugin
from recipes_minigpt4.serving.serve import main, parse
from recipes_minigpt4.serving.vllm_folder import whole_folder
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE
from recipes_minigpt4.utils.errors import RecipeError


Environment = dict[str, str]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str = "0.32.0") -> None:
    """A package of vLLM's name that has a version and nothing else."""
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").touch()
    (folder / "vllm" / "_version.py").write_text(f"__version__ = version = {version!r}\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[str], Environment]]:
    """`begun(*arguments)`: the command and the environment that would take the place of this process."""
    install(tmp_path, monkeypatch)
    monkeypatch.setattr(vllm_folder, "HF_HOME", str(tmp_path / "home"))
    found: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *given: found.append(given))

    def begun(*arguments: str) -> tuple[list[str], Environment]:
        serve_vllm.serve(parse(["--engine", "vllm", *arguments]))
        program, command, environment = found.pop()
        assert program == sys.executable
        return command, environment

    return begun


def value(command: list[str], option: str) -> str:
    """The last word that a command has for an option, which is the one that counts."""
    return command[len(command) - command[::-1].index(option)]


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_an_adapter_is_written_whole_once_and_loads_without_its_backbones(
    ours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = whole_folder(ours, cache=tmp_path)
    assert (whole.separator, whole.dtype, whole.revision) == ("###", "float32", None)
    config = json.loads((Path(whole.name) / "config.json").read_text())
    assert config["backbones"] == {}
    expected = MiniGPT4ForConditionalGeneration.from_pretrained(ours).state_dict()
    written = MiniGPT4ForConditionalGeneration.from_pretrained(whole.name).state_dict()
    assert expected.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in expected.items())
    assert MiniGPT4Processor.from_pretrained(whole.name).separator == "###"
    assert "Writing all weights to" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix != ".lock"}
    assert whole_folder(ours, cache=tmp_path) == whole
    assert whole_folder(whole.name, cache=tmp_path).name == whole.name  # which is whole already
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.suffix != ".lock"} == before
    assert capsys.readouterr().out == ""


def test_an_adapter_that_has_trained_on_is_written_anew(ours: str, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(ours, adapter)
    first = whole_folder(str(adapter), cache=tmp_path / "cache")
    (adapter / "trainer_state.json").write_text("{}")  # says nothing about the weights
    assert whole_folder(str(adapter), cache=tmp_path / "cache") == first
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter)
    with torch.no_grad():
        model.model.language_projection.bias += 1
    model.save_pretrained(adapter)
    second = whole_folder(str(adapter), cache=tmp_path / "cache")
    assert second.name != first.name
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(second.name)
    assert torch.equal(loaded.model.language_projection.bias, model.model.language_projection.bias)


def test_a_repository_is_written_once_per_commit(ours: str, tmp_path: Path, hub: HubServer) -> None:
    files = {path.name: path.read_bytes() for path in Path(ours).iterdir()}
    hub.add_repo("you/eyes", files)
    first, commit = whole_folder("you/eyes", cache=tmp_path), hub.head("you/eyes")
    assert whole_folder(f"you/eyes@{commit}", cache=tmp_path) == first
    assert Path(first.name).name.startswith("eyes-")
    repo = hub.repos["model", "you/eyes"]
    repo.commit("main", repo.commits[commit], "more about it")
    assert whole_folder("you/eyes", cache=tmp_path).name != first.name
    assert whole_folder(f"you/eyes@{commit}", cache=tmp_path) == first
    hub.add_repo("you/whole", {path.name: path.read_bytes() for path in Path(first.name).iterdir()})
    whole = whole_folder("you/whole", cache=tmp_path)
    assert (whole.name, whole.revision) == ("you/whole", hub.head("you/whole"))


def test_an_adapter_of_peft_is_merged(ours: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(ours)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    MiniGPT4Processor.from_pretrained(ours).save_pretrained(tmp_path / "adapter")
    whole = whole_folder(str(tmp_path / "adapter"), cache=tmp_path / "cache")
    merged = MiniGPT4ForConditionalGeneration.from_pretrained(whole.name).eval()
    assert not merged.has_adapter
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected, found = (each(input_ids=ids).logits for each in (model.eval(), merged))
        model.disable_adapters()
        without = model(input_ids=ids).logits
    assert (found - expected).abs().max() < 1e-4 < (without - expected).abs().max() / 100


def test_a_full_disk_and_a_folder_that_is_no_model_are_told(
    ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="cannot be served by vLLM"):
        whole_folder(str(tmp_path / "empty"), cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1, 1, 1000))
        with pytest.raises(RecipeError, match=r"in one folder, 7\.\d MB, and .* has room for 0\.0 MB; .* HF_HOME"):
            whole_folder(ours, cache=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(MiniGPT4Processor, "save_pretrained", _no_space)
        with pytest.raises(RecipeError, match=r"cannot be written .*No space left.* HF_HOME"):
            whole_folder(ours, cache=tmp_path)
    assert not [path for path in tmp_path.glob("*ours*") if path.is_dir()]
    assert not list(tmp_path.rglob("*.safetensors"))
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match="cannot be written"):
        whole_folder(ours, cache=tmp_path / "file" / "cache")


def _no_space(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_vllm_is_asked_for_in_a_sentence(ours: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(RecipeError, match=r"needs vLLM, which is not installed; .*pip install vllm minigpt4"):
        main([ours, "--engine", "vllm"])
    install(tmp_path, monkeypatch, "0.19.1")
    with pytest.raises(RecipeError, match=r"needs vLLM 0\.32 or newer, and 0\.19\.1 is installed"):
        main([ours, "--engine", "vllm"])


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--device", "cuda"], "--device is not for --engine vllm"),
        (["--quantization", "bnb-nf4"], "--quantization is not for --engine vllm"),
    ],
)
def test_options_that_vllm_does_not_take_are_refused(ours: str, arguments: list[str], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        main([ours, "--engine", "vllm", *arguments])


def test_what_is_for_vllm_is_refused_by_the_other_engine_word_by_word() -> None:
    args = parse(["m", "--engine", "vllm", "--", "--max-model-len", "512", "--x=a-b", "--", "y"])
    assert args.engine_arguments == ["--max-model-len", "512", "--x=a-b", "--", "y"]
    with pytest.raises(RecipeError, match="Unrecognized arguments: --max_model_len"):
        parse(["m", "--engine", "vllm", "--max-model-len", "512"])


# ---- what vLLM is told ----------------------------------------------------------------------------------------------


def test_vllm_takes_the_place_of_the_command(ours: str, begun: Callable[..., Any], tmp_path: Path) -> None:
    command, environment = begun(
        f"eyes={ours}", "--host", "127.0.0.1", "--port", "8123", "--api_key", "secret", "--max_megapixels", "2",
        "--fetch_seconds", "3", "--allow_origins", "https://a.example", "--", "--max-model-len", "512",
        "--dtype", "bfloat16",
    )  # fmt: skip
    assert command[1:3] == ["-m", serve_vllm.SERVER]
    folder = Path(value(command, "--model"))
    assert folder.parent == tmp_path / "home" / "minigpt4" / "whole"
    assert (folder / "model.safetensors").is_file()
    assert value(command, "--served-model-name") == "eyes"
    assert (value(command, "--host"), value(command, "--port")) == ("127.0.0.1", "8123")
    assert json.loads(value(command, "--allowed-origins")) == ["https://a.example"]
    assert command[-4:] == ["--max-model-len", "512", "--dtype", "bfloat16"]  # the user's own words come last
    assert command[command.index("--dtype") + 1] == "float32"  # as stored, which vLLM's `auto` is not
    assert "secret" not in " ".join(command)
    assert environment["VLLM_API_KEY"] == "secret"
    assert environment["MINIGPT4_SEPARATOR"] == "###"
    assert environment["VLLM_MAX_IMAGE_PIXELS"] == "2000000"
    assert json.loads(environment["MINIGPT4_PICTURES"]) == {"megabytes": 20.0, "seconds": 3.0, "allow_private": False}
    module, _, name = value(command, "--middleware").rpartition(".")
    assert getattr(sys.modules[module], name) is vllm_front.Front


def test_a_whole_folder_is_served_as_it_is_at_a_free_port(
    ours: str, begun: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = whole_folder(ours, cache=tmp_path / "cache").name
    monkeypatch.setenv("MINIGPT4_API_KEY", "of the environment")
    command, environment = begun(folder, "--port", "0", "--dtype", "bfloat16", "--trust_remote_code")
    assert value(command, "--model") == folder
    assert int(value(command, "--port")) > 0
    assert value(command, "--dtype") == "bfloat16"
    assert "--trust-remote-code" in command
    assert environment["VLLM_API_KEY"] == "of the environment"
    assert not (tmp_path / "home").exists()


def test_an_adapter_whose_parts_have_moved_is_served(
    ours: str, begun: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, eyes, words = tmp_path / "adapter", str(VISION_BACKBONE), str(LANGUAGE_BACKBONE)
    shutil.copytree(ours, adapter)
    config = json.loads((adapter / "config.json").read_text())
    for source in config["backbones"].values():
        source["name_or_path"] = str(tmp_path / "gone")
    (adapter / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="gone"):
        begun(str(adapter))
    moved = ["--vision", eyes, "--qformer", eyes, "--language_model", words]
    command, _ = begun(str(adapter), *moved, "--host", "0.0.0.0")
    assert (Path(value(command, "--model")) / "model.safetensors").is_file()
    assert "Everybody who reaches this machine may ask" in capsys.readouterr().out


# ---- what stands in front of it -------------------------------------------------------------------------------------


def ask(
    path: str,
    body: bytes = b"{}",
    headers: list[tuple[bytes, bytes]] | None = None,
    kind: str = "http",
    method: str = "POST",
) -> tuple[int, Any]:
    """The status, and what vLLM was given or the sentence that the client gets."""
    sent: list[Any] = []
    given: list[bytes] = []
    parts = [{"type": "http.request", "body": body[:5], "more_body": True}]
    parts += [{"type": "http.request", "body": body[5:], "more_body": False}]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        more = True
        while more:
            message = await receive()
            given.append(message["body"])
            more = message["more_body"]
        if (b"content-length", b"0") not in scope["headers"]:
            assert (b"content-length", str(len(b"".join(given))).encode()) in scope["headers"]
        await send({"type": "http.response.start", "status": 200})

    async def receive() -> Any:
        return parts.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-length", str(len(body)).encode()), *(headers or [])]
    scope = {"type": kind, "path": path, "method": method, "headers": headers}
    asyncio.run(vllm_front.Front(app)(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return sent[0]["code"], None
    if sent[0]["status"] == 200:
        return 200, b"".join(given)
    return sent[0]["status"], json.loads(sent[1]["body"])["error"]["message"]


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(
    "stop, stops",
    [
        ({}, ["###"]),
        ({"stop": None}, ["###"]),
        ({"stop": "end"}, ["end", "###"]),
        ({"stop": ["a", "b"]}, ["a", "b", "###"]),
        ({"stop": ["###"]}, ["###"]),
        ({"stop": 5}, 5),  # which vLLM refuses
    ],
)
def test_every_reply_ends_at_the_separator(monkeypatch: pytest.MonkeyPatch, stop: Any, stops: Any) -> None:
    monkeypatch.setenv("MINIGPT4_SEPARATOR", "###")
    for path in (CHAT, "/v1/completions"):
        status, body = ask(path, json.dumps({"prompt": "größer", **stop}).encode())
        assert (status, json.loads(body)) == (200, {"prompt": "größer", "stop": stops})


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[1]", b"\xff"])
def test_a_body_that_is_no_request_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    monkeypatch.setenv("MINIGPT4_SEPARATOR", "###")
    assert ask(CHAT, body) == (200, body)


def test_a_template_without_separator_changes_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT4_SEPARATOR", "")
    assert ask(CHAT, b'{"stop": null}') == (200, b'{"stop": null}')


def test_the_key_is_asked_for_everywhere_but_for_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "a key")
    for path in (CHAT, "/v1/models", "/tokenize", "/metrics"):
        for headers in ([], [(b"authorization", b"Bearer another")], [(b"authorization", b"\xff")]):
            status, reason = ask(path, headers=headers)
            assert status == 401
            assert "API key is wrong or missing" in reason
        assert ask(path, headers=[(b"authorization", b"Bearer a key")])[0] == 200
    assert ask("/health")[0] == 200
    assert ask(CHAT, method="OPTIONS")[0] == 200  # of browsers, before they send it
    monkeypatch.delenv("VLLM_API_KEY")
    assert ask(CHAT)[0] == 200


def test_what_does_not_end_at_the_separator_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("/invocations", "/v1/responses", "/v1/messages", "/v1/chat/completions/render", "/"):
        assert ask(path) == (404, "This server answers /v1/chat/completions, /v1/completions and /v1/models only.")
    assert ask("/v1/realtime", kind="websocket") == (1008, None)
    monkeypatch.setenv("MINIGPT4_SEPARATOR", "###")
    monkeypatch.setattr(vllm_front, "MAX_BODY", 10**6)
    assert ask(CHAT, b"x" * (10**6 + 1)) == (413, "The request is larger than 1 MB.")


# ---- the plug-in ----------------------------------------------------------------------------------------------------


def test_vllm_finds_the_plug_in_by_its_name() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"minigpt4": f"{vllm_plugin.__name__}:register"}


def test_a_release_of_vllm_that_lacks_what_is_needed_gets_a_warning_and_serves_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, monkeypatch, "0.10.0")
    vllm_plugin.register()
    assert "MiniGPT-4 cannot be served: this release of vLLM has no vllm.renderers.registry" in caplog.text
