"""Secrets: in addresses, errors, logs and files of a run."""

import functools
import http.server
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from damaged import sample, write_tar
from hub_server import TOKEN

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import holds_secret, redact, redact_logs


SECRET = "pa55word"
AWS = "AKIA" + "ABCDEFGHIJKLMNOP"


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"https://me:{SECRET}@host:80/x/y.tar", "https://host:80/x/y.tar"),
        (f"https://me:pa/{SECRET}@host/x.tar, and more", "https://host/x.tar, and more"),
        (f"https://{SECRET}@host/x.tar", "https://host/x.tar"),
        (f"cannot open (https://host/x.tar?a=1&token={SECRET}).", "cannot open (https://host/x.tar?…)."),
        (f"https://host/x.tar?X-Amz-Signature={SECRET}&X-Amz-Date=1 is gone", "https://host/x.tar?… is gone"),
        (f"s3://bucket/x.tar#{SECRET}", "s3://bucket/x.tar?…"),
        (f"'https://host/{{00..09}}.tar?sig={SECRET}'", "'https://host/{00..09}.tar?…'"),
        (f"log in with {TOKEN}", "log in with hf_…"),
        (f"https://user:{TOKEN}@huggingface.co/you/x", "https://huggingface.co/you/x"),
        (f"hub_token={SECRET}, seed=1", "hub_token=…, seed=1"),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer …"),
        (f"key {AWS}", "key …"),
        ("ghp_" + "a1B2" * 9, "…"),
        ("hf_oauth_" + "a1B2" * 9, "hf_…"),
    ],
)
def test_secrets_are_left_out(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert str(RecipeError(text)) == shown and one_line(OSError(text)) == shown.rstrip(".")


@pytest.mark.parametrize(
    "text",
    [
        "hf://datasets/you/x@main/part-??.tar",
        "/data/{00000..00009}.tar",
        "eos_token=</s> max_new_tokens=5 and hf_hub_download of hf_transfer",
        "def prompts(hf_processor_mm_kwargs, hf_hub_download_of_everything)",
        "https://host:8080/x@y.tar",
        "mail me@host.org: 50% of 3/4",
        "unexpected token: } at 5",
        "owner/name@a1b2c3",
    ],
)
def test_all_else_stays(text: str) -> None:
    assert redact(text) == text and not holds_secret(text)


def test_secrets_of_the_environment_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "q7!zz-plain words")
    monkeypatch.setenv("SHORT_TOKEN", "no")
    assert redact("it said q7!zz-plain words, no") == "it said …, no"
    assert holds_secret("q7!zz-plain words") and not holds_secret("no")


def test_logs_of_every_library_are_without(caplog: pytest.LogCaptureFixture) -> None:
    before = logging.getLogRecordFactory()
    try:
        redact_logs()
        redact_logs()  # once is enough
        logging.getLogger("anybody").warning("%s of %s", f"https://host/x?token={SECRET}", 3)
        logging.getLogger("anybody").warning("all %d %s", 5, "is well")
        logging.getLogger("anybody").warning("%d", 7)
    finally:
        logging.setLogRecordFactory(before)
    assert caplog.messages == ["https://host/x?… of 3", "all 5 is well", "7"]


def test_a_traceback_is_without(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fail(arguments: list[str]) -> None:
        raise ConnectionError(f"https://me:{SECRET}@host/x.tar?sig={SECRET}")

    monkeypatch.setattr(stage1_pretrain, "main", fail)
    assert cli.main(["stage1"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.endswith("ConnectionError: https://host/x.tar?…\n")
    assert SECRET not in printed


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """A tar behind an address with a password and a signature; one of its samples has no caption."""
    samples = [*map(sample, range(10)), sample(10, caption=None)]
    write_tar(tmp_path / "web" / "deep" / "x.tar", samples)
    serve = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    serve.func.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://me:{SECRET}@127.0.0.1:{server.server_port}/deep/%s?X-Amz-Signature={SECRET}&token={SECRET}"
        server.shutdown()


def test_a_run_from_a_signed_address_keeps_it_to_itself(
    address: str, stage: Callable, tmp_path: Path, capsys, caplog
) -> None:
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "max_bad_share": 0.5, "shuffle_buffer": 1}
    assert cli.main(["stage1", *stage(dataset_name=address % "x.tar", **fields)]) == 0
    printed = capsys.readouterr()
    assert "× no caption, such as http://127.0.0.1" in printed.out and "/deep/x.tar?…/000010" in printed.out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| data | files of the web (x.tar) |" in card and "127.0.0.1" not in card and "deep" not in card
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in printed.out + printed.err + caplog.text


def test_an_address_that_is_wrong_is_told_without_its_secrets(address: str, stage: Callable, capsys) -> None:
    assert cli.main(["stage1", *stage(dataset_name=address % "none.tar")]) == 2
    told = capsys.readouterr().err
    assert "/deep/none.tar" in told and SECRET not in told
