"""What goes wrong in a long curation: each has one clear sentence, and nothing that was done is lost."""

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatServer, completion
from curation_runs import Parrot, Run, noises

from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.curation import curate as curate_module
from recipes_minigpt4.curation.store import held
from recipes_minigpt4.llm.client import ClientOptions, open_client
from recipes_minigpt4.llm.limits import Clock
from recipes_minigpt4.utils import journal
from recipes_minigpt4.utils.errors import RecipeError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return noises(tmp_path / "pictures", 6)


@pytest.fixture
def run(tmp_path: Path, pictures: Path) -> Run:
    return Run(tmp_path / "out", "--dataset_name", pictures)


# ---- the mender -----------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[ChatServer]:
    pytest.importorskip("openai")
    with ChatServer(lambda asked: f"{asked['messages'][-1]['content']} It is mended.") as server:
        yield server


@pytest.fixture
def mended_by(server: ChatServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`mended_by(**options)`: a funnel of a run whose mender is the server; pauses between attempts take no time."""
    monkeypatch.setattr(Clock, "wait", lambda self, seconds, stop: None)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def start(**options: Any) -> Any:
        settings = ClientOptions(base_url=server.url, concurrency=1, cache=run.folder / "answers", prefix="mender_")
        return run(client=open_client("openai:mender", replace(settings, **options)))

    return start


def whole(run: Run) -> bool:
    """Whether every picture has the answer to its own description."""
    rows = run.lines("rows")
    return len(rows) == 6 and all(row["mended"] == f"{row['draft']} It is mended." for row in rows)


TROUBLE = {
    "throttles": (
        {"status": 429, "headers": {"Retry-After": "0"}, "body": {"error": {"message": "slow down"}}},
        None,
    ),
    "is overloaded": ({"status": 503, "body": {"error": {"message": "overloaded"}}}, None),
    "closes the connection": ({"close": True}, None),
    "answers with a page": ({"body": b"<html>Bad gateway</html>", "kind": "text/html"}, None),
    "answers with nothing": ({"body": b""}, None),
    "says nothing": ({"body": completion({"messages": [], "model": "m"}, "  ")}, None),
    "times out": ({"hang": True}, {"timeout": 0.3}),
}


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_that_passes_changes_nothing(kind: str, server: ChatServer, mended_by: Callable, run: Run) -> None:
    plan, options = TROUBLE[kind]
    server.next(times=2, **plan)
    assert mended_by(**(options or {})).mended == 6
    assert whole(run) and len(server.seen) == 6 + 2


@pytest.mark.parametrize("kind", TROUBLE)
def test_trouble_that_stays_with_a_description_costs_that_one_until_the_next_start(
    kind: str, server: ChatServer, mended_by: Callable, run: Run, capsys: pytest.CaptureFixture
) -> None:
    """Two attempts on the first description are without success; the others go on."""
    plan, options = TROUBLE[kind]
    server.next(times=2, **plan)
    funnel = mended_by(attempts=2, **(options or {}))
    assert (funnel.described, funnel.mended, funnel.rules["unmended"]) == (6, 5, 1)
    told = re.search(
        r"1 of 6 descriptions were not mended, most of them for this: (.+)\. The same", capsys.readouterr().out
    )
    assert told and len(told[1]) < 200
    assert mended_by(attempts=2).mended == 6
    assert whole(run) and len(server.seen) == 2 + 5 + 1 and run.describer.asked == 6


def test_a_mender_that_is_gone_ends_the_run_in_one_sentence(server: ChatServer, mended_by: Callable, run: Run) -> None:
    """After one answer it answers with a page for good."""
    server.next()
    server.next(times=100, **TROUBLE["answers with a page"][0])
    told = (
        r"^openai:mender at http://127\.0\.0\.1:\d+/v1 has answered none of the last 5 requests \(it answered, but "
        r"not in JSON .*\); look after it, and start again: what it answered before is kept\.$"
    )
    with pytest.raises(RecipeError, match=told):
        mended_by(attempts=1)
    assert sum(record["text"] is not None for record in run.lines("mended")) == 1
    server._plans.clear()
    asked = len(server.seen)
    assert mended_by().mended == 6 and whole(run) and len(server.seen) == asked + 5


def test_another_language_is_told_by_a_rule_and_kept(server: ChatServer, mended_by: Callable, run: Run) -> None:
    server.next(
        body=completion(
            {"messages": [], "model": "m"}, "这张图片显示了很多彩色的方块，它们没有任何规律，背景也是彩色的。" * 2
        )
    )
    funnel = mended_by()
    assert funnel.mended == 6 and funnel.rules["language"] == 1
    (row,) = [row for row in run.lines("rows") if "language" in row["verdicts"]]
    assert row["mended"].startswith("这张图片")


def test_answers_in_the_wrong_order_find_their_pictures(server: ChatServer, mended_by: Callable, run: Run) -> None:
    """All six requests are under way before any is answered, and they are answered backwards."""
    server.together, turn, count = 6, threading.Condition(), [0]

    def backwards(asked: dict[str, Any]) -> str:
        place = [one["messages"][-1]["content"] for one in server.seen].index(asked["messages"][-1]["content"])
        with turn:
            turn.wait_for(lambda: count[0] == 5 - place, timeout=10)
            count[0] += 1
            turn.notify_all()
        time.sleep(0.02)
        return f"{asked['messages'][-1]['content']} It is mended."

    server.answer = backwards
    mended_by(concurrency=6)
    assert count == [6] and whole(run)
    assert [record["digest"] for record in run.lines("mended")] != [row["picture"] for row in run.lines("rows")]


def test_one_answer_under_all_pictures_is_told(server: ChatServer, mended_by: Callable, run: Run) -> None:
    server.answer = lambda asked: "The picture is full of colours, and there is nothing else to be seen in it."
    funnel = mended_by()
    assert funnel.rules["shared"] == 6 and funnel.left == 0


# ---- the disk -------------------------------------------------------------------------------------------------------


class FullDisk:
    """The disk is full when so many lines of all steps are written; a part of the next is."""

    def __init__(self, patch: pytest.MonkeyPatch, lines: int) -> None:
        self.left, self.full = lines, True
        append = journal.Journal.append
        disk = self

        class Half:
            def __init__(self, file: Any) -> None:
                self.file, self.was = file, False

            def write(self, content: bytes) -> int:
                if self.was:
                    raise OSError(errno.ENOSPC, "No space left on device")
                self.was = True
                return int(self.file.write(content[:10]))

            def close(self) -> None:
                self.file.close()

        def fill(self: Any, line: Any) -> None:
            disk.left -= 1
            if disk.full and disk.left < 0:
                self._file = Half(self._file)
            append(self, line)

        patch.setattr(journal.Journal, "append", fill)


@pytest.mark.parametrize("step, lines", [("pictures", 3), ("drafts", 8), ("mended", 15)])
def test_a_full_disk_ends_the_run_and_loses_nothing(
    step: str, lines: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six lines of pictures, six of drafts, six of mended texts."""
    disk = FullDisk(monkeypatch, lines)
    told = rf"/{step}\.jsonl cannot be written \(No space left on device\); make room and run the command again, which"
    with pytest.raises(RecipeError, match=told):
        run()
    assert len(run.lines(step)) == lines % 6 and all(
        path.read_bytes()[-1:] == b"\n" for path in run.folder.glob("*.jsonl")
    )
    disk.full = False
    asked = run.describer.asked
    run()
    assert (
        whole(run)
        and run.mender.asked == 6
        and run.describer.asked == asked + (6 - lines % 6 if step == "drafts" else 6 - asked)
    )


def test_a_disk_that_is_full_at_the_end_is_told_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = curate_module.write_rows

    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(curate_module, "write_rows", fill)
    with pytest.raises(RecipeError, match=r"out cannot be written \(No space left on device\); make room and run the"):
        run()
    monkeypatch.setattr(curate_module, "write_rows", replaced)
    run()
    assert whole(run) and (run.describer.asked, run.mender.asked) == (6, 6)


def test_a_step_of_another_program_is_told(run: Run) -> None:
    run.folder.mkdir()
    (run.folder / "drafts.jsonl").write_text('{"text": "A picture."}\n')
    with pytest.raises(
        RecipeError, match=r"drafts\.jsonl has lines without 'digest', so another program or version wr"
    ):
        run()


# ---- pictures and models that change --------------------------------------------------------------------------------


def test_a_picture_that_vanishes_before_it_is_described_is_told_and_the_others_go_on(
    run: Run, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its copy goes while the model is loaded, and its source too. When the source is back, so is the row."""
    load = run.describer.load

    def lose() -> None:
        load()
        record = run.lines("pictures")[0]
        (run.folder / record["file"]).unlink()
        shutil.move(pictures / record["name"], pictures / f"{record['name']}.away")
        lost.append(record["name"])

    lost: list[str] = []
    run.describer.load = lose  # type: ignore[method-assign]
    funnel = run()
    told = f"1 of 6 pictures cannot be read any more, {lost[0]} (its copy is gone); the others go on, and the"
    assert told in capsys.readouterr().out
    assert (funnel.drawn, funnel.described, funnel.left_out) == (6, 5, {"vanished since": 1})
    assert len(run.lines("rows")) == 5 and run.describer.asked == 5
    run.describer.load = load  # type: ignore[method-assign]
    shutil.move(pictures / f"{lost[0]}.away", pictures / lost[0])
    assert run().described == 6 and whole(run) and run.describer.asked == 6


def test_a_picture_that_vanishes_after_it_was_described_keeps_its_texts_for_when_it_is_back(
    run: Run, pictures: Path
) -> None:
    run()
    row = run.lines("rows")[2]
    (run.folder / row["file"]).rename(run.folder / "aside")
    shutil.move(pictures / row["name"], pictures / f"{row['name']}.away")
    assert run().described == 5
    shutil.move(pictures / f"{row['name']}.away", pictures / row["name"])
    assert run().described == 6 and whole(run) and (run.describer.asked, run.mender.asked) == (6, 6)


def test_another_model_is_told_describes_anew_and_the_old_texts_are_kept(
    run: Run, capsys: pytest.CaptureFixture
) -> None:
    run()
    old, first = run.lines("drafts"), run.describer
    run.describer = Parrot("2")
    run()
    told = (
        "6 pictures were described before, by another model or with other words; they are described anew, and the old"
    )
    assert told in capsys.readouterr().out
    assert run.describer.asked == 6 and run.lines("drafts")[:6] == old and len(run.lines("drafts")) == 12
    run.describer = first
    run()
    assert "described before" not in capsys.readouterr().out
    assert first.asked == 6, "the old ones count again with the old model"


# ---- two processes --------------------------------------------------------------------------------------------------


def test_a_second_process_is_refused_in_one_sentence_and_does_not_disturb_the_first(
    run: Run, pictures: Path, capfd: pytest.CaptureFixture
) -> None:
    """It starts while the first one describes; the model is not even looked at."""
    command = ["curate", "--model", "none", "--mender", "stub:none"]
    command += ["--dataset_name", str(pictures), "--output_dir", str(run.folder)]
    describe, statuses = run.describer.describe, []

    def meanwhile(given: Any) -> Any:
        if not statuses:
            if not (process := os.fork()):
                os._exit(run_command(command))
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        return describe(given)

    run.describer.describe = meanwhile  # type: ignore[method-assign]
    run()
    assert statuses == [2] and whole(run)
    sentence = (
        f"Another process curates in {run.folder}; wait until it has ended, or name another folder with --output_dir."
    )
    assert capfd.readouterr().err.splitlines()[-1] == f"minigpt4 curate: {sentence}"


def test_the_folder_is_free_after_a_run_that_failed(run: Run) -> None:
    with pytest.raises(RecipeError, match="--mend_prompt"):
        run("--mend_prompt", "nowhere.txt")
    with held(run.folder):
        pass


def test_a_mistake_of_the_command_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mender.jsonl").write_text('{"answer": "a"}\n')
    command = ["curate", "--dataset_name", "tiny", "--mender", f"stub:{tmp_path / 'mender.jsonl'}"]
    command += ["--model", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "out")]
    assert run_command(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minigpt4 curate: There is no model at {tmp_path / 'nowhere'} (")
    assert not (tmp_path / "out" / "pictures.jsonl").exists(), "it is told before anything is done"
