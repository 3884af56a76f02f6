"""`minigpt4 curate`, from pictures to rows: the whole path, going on after it was stopped, a dry run, the funnel."""

import io
import json
import os
import random
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_models import save_ours
from curation_runs import Mender, Parrot, Run, noise, noises
from damaged import jpeg

from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.curation import curate as curate_module
from recipes_minigpt4.curation.curate import parse
from recipes_minigpt4.utils.errors import RecipeError


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "out", "--dataset_name", noises(tmp_path / "pictures", 6))


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_a_model_and_a_mender_make_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The command itself, with a model of ours and scripted answers; a second start has nothing to do."""
    (tmp_path / "mender.jsonl").write_text(
        '{"match": "\\\\n([^\\\\n]+)$", "answer": "The picture shows this: \\\\1."}\n'
    )
    command = ["curate", "--model", save_ours(tmp_path / "ours"), "--dataset_name", "tiny", "--num_samples", "3"]
    command += ["--max_hash_distance", "-1", "--max_new_tokens", "6", "--device", "cpu"]
    command += ["--mender", f"stub:{tmp_path / 'mender.jsonl'}", "--output_dir", str(tmp_path / "out")]
    assert run_command(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows] == ["scene 0", "scene 1", "scene 2"]
    for row in rows:
        assert (tmp_path / "out" / row["file"]).is_file() and row["continued"] and row["draft"]
        assert row["mended"].startswith("The picture shows this: ")
    told = capsys.readouterr().out
    assert "Load the model" in told and "3 → 3 → 3 → " in told
    before = (tmp_path / "out" / "rows.jsonl").read_bytes()
    assert run_command(command) == 0
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == before
    assert "Load the model" not in capsys.readouterr().out, "there is nothing to describe"


def test_the_funnel_tells_how_many_are_left_and_why(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pictures" / "broken.jpg").write_bytes(jpeg()[:-60])
    noise(2).save(tmp_path / "pictures" / "again.bmp")
    answers = iter(["I apologize for that.", *["{} It is mended."] * 5])
    run.mender.answer = lambda text: next(answers).format(text)
    funnel = run()
    assert (funnel.drawn, funnel.described, funnel.mended, funnel.left) == (8, 6, 6, 5)
    assert funnel.left_out == {"cannot be read": 1, "looks like another": 1} and funnel.rules["apology"] == 1
    told = capsys.readouterr().out
    assert "8 → 6 → 6 → 5" in told and "refused: apology" in told
    assert json.loads((run.folder / "funnel.json").read_text())["left"] == 5
    assert {one["name"]: one["reason"] for one in run.lines("left_out")}["broken.jpg"] == "cannot be read"


def test_what_made_the_rows_is_written_down(run: Run) -> None:
    run("--num_beams", 2, "--continue_up_to", 10)
    made = json.loads((run.folder / "made.json").read_text())
    assert made["model"] == "1" and made["mender"] == "stub" and made["mending"] == [0.7, 200]
    assert made["sampling"] == {"max_new_tokens": 300, "num_beams": 2, "temperature": 0.0}
    assert made["prompts"]["continue"] == "Continue" and made["continue_up_to"] == 10
    assert made["dry_run"] is None and made["spent"]["cost"] == 0


def test_no_row_tells_where_things_lie_on_this_machine(run: Run, tmp_path: Path) -> None:
    run()
    for path in run.folder.rglob("*.jsonl"):
        assert str(tmp_path) not in path.read_text(), path.name


def test_bars_tell_how_fast_and_for_how_much(run: Run, capsys: pytest.CaptureFixture) -> None:
    run()
    told = capsys.readouterr().out
    assert "pictures/s" in told and "answers/s" in told


# ---- a dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_tells_what_all_of_it_will_take(run: Run, capsys: pytest.CaptureFixture) -> None:
    """Two of six pictures; the run goes on from there."""
    run("--dry_run", 2)
    assert (run.describer.asked, run.mender.asked) == (2, 2)
    told = capsys.readouterr().out
    words = sum(record["prompt_tokens"] + record["completion_tokens"] for record in run.lines("mended"))
    (row,) = [line.split() for line in told.splitlines() if line.startswith("tokens of the mender")]
    assert row[-2:] == [f"{words:,}", f"{3 * words:,}"]
    assert "Dry run: 2 of 6 pictures" in told and "the same command without --dry_run goes on from here" in told
    run()
    assert (run.describer.asked, run.mender.asked) == (6, 6) and len(run.lines("rows")) == 6


def test_a_dry_run_extrapolates_what_was_measured_in_an_earlier_start(run: Run, capsys, monkeypatch) -> None:
    """Time of describing and mending, whenever that was; a second dry run does nothing and tells the same."""
    now = [0.0]

    def slow(work):
        def later(*args):
            now[0] += 30.0
            return work(*args)

        return later

    monkeypatch.setattr(run.describer, "describe", slow(run.describer.describe))
    run.mender.answer = slow(run.mender.answer)
    for module in ("describe", "mend", "gather"):
        monkeypatch.setattr(f"recipes_minigpt4.curation.{module}.time.perf_counter", lambda: now[0])
    tables = []
    for _ in range(2):
        run("--dry_run", 2, "--num_samples", 4)
        tables.append(capsys.readouterr().out.partition("== Dry run")[2])
    assert tables[0] == tables[1]
    told = {" ".join(line.split()) for line in tables[0].splitlines()}
    assert {"describe 30 s 1 min 0 s", "mend 1 min 0 s 2 min 0 s", "all of it 1 min 30 s 3 min 0 s"} <= told


def test_a_dry_run_leaves_the_rows_of_a_whole_one(run: Run) -> None:
    run("--dry_run", 2)
    assert len(run.lines("rows")) == 2, "they can be looked at"
    run()
    run("--dry_run", 2)
    assert len(run.lines("rows")) == 6


def test_without_prices_no_cost_is_told(run: Run, capsys: pytest.CaptureFixture) -> None:
    run("--dry_run", 2, "--mender", "openai:MODEL")
    assert "no prices" in capsys.readouterr().out
    run("--dry_run", 2, "--mender", "openai:MODEL", "--mender_price_per_million_prompt_tokens", 1)
    assert "no prices" not in capsys.readouterr().out


# ---- options --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["model", "dataset_name", "mender"])
def test_what_is_missing_is_named(missing: str) -> None:
    given = {"model": "m", "dataset_name": "d", "mender": "stub:f"}
    arguments = [text for name, value in given.items() if name != missing for text in (f"--{name}", value)]
    with pytest.raises(RecipeError, match=rf"^--{missing} is missing; it names "):
        parse(arguments)


def test_the_shipped_configuration_is_the_papers(tmp_path: Path) -> None:
    text = shipped_configs()["curate_cc3m"].read_text(encoding="utf-8")
    args = parse(["--config", "curate_cc3m", "--model", "runs/stage1", "--mender", "openai:MODEL"])
    assert (args.num_samples, args.continue_up_to) == (5000, 80)
    assert (args.mend_temperature, args.mend_max_tokens, args.mender_attempts) == (0.7, 200, 6)
    assert args.dataset_name == "cc3m/*.tar" and {"model", "mender"}.isdisjoint(yaml.safe_load(text))
    assert "--config curate_cc3m" in text


def test_answers_are_kept_where_the_options_say(tmp_path: Path) -> None:
    (tmp_path / "mender.jsonl").write_text('{"answer": "a"}\n')
    arguments = ["--model", "m", "--dataset_name", "d", "--mender", f"stub:{tmp_path / 'mender.jsonl'}"]
    folders = [
        curate_module.open_mender(parse([*arguments, *more]), tmp_path).cache.path.parent
        for more in ([], ["--mender_cache", str(tmp_path / "shared")])
    ]
    assert folders == [tmp_path / "answers", tmp_path / "shared"]


# ---- going on -------------------------------------------------------------------------------------------------------


def test_more_pictures_do_what_is_new(run: Run) -> None:
    run("--num_samples", 2)
    first = run.lines("rows")
    run("--num_samples", 4)
    assert (run.describer.asked, run.mender.asked) == (4, 4) and run.lines("rows")[:2] == first
    run("--num_samples", 3)
    assert (run.describer.asked, run.mender.asked) == (4, 4) and len(run.lines("rows")) == 3


@pytest.mark.parametrize("where", ["describe", "mend"])
def test_ctrl_c_ends_politely_and_tells_how_to_go_on(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    describer, mender = Parrot(), Mender()
    monkeypatch.setattr(curate_module, "open_describer", lambda *_: describer)
    run = Run(tmp_path / "out")
    answer, describe = mender.answer, describer.describe

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def stub(args, folder):
        from recipes_minigpt4.llm.client import ClientOptions
        from recipes_minigpt4.llm.stub import stub_client

        return stub_client(mender, ClientOptions(cache=folder / "answers"))

    monkeypatch.setattr(curate_module, "open_mender", stub)
    mender.answer = lambda text: interrupt() if where == "mend" and mender.asked == 4 else answer(text)
    monkeypatch.setattr(
        describer,
        "describe",
        lambda pictures: interrupt() if where == "describe" and describer.asked == 4 else describe(pictures),
    )
    pictures = noises(tmp_path / "pictures", 6)
    command = [
        str(text) for text in ("curate", *run.arguments, "--dataset_name", pictures, "--output_dir", run.folder)
    ]
    assert run_command(command) == 130
    assert capsys.readouterr().err.endswith("minigpt4 curate: Interrupted; the same command goes on where it was.\n")
    assert len(run.lines("drafts")) == (4 if where == "describe" else 6)
    mender.answer, describer.describe = answer, describe
    assert run_command(command) == 0
    assert describer.asked == 6 and mender.asked == 6 + (where == "mend") and len(run.lines("rows")) == 6


WATCHED = ("/curation/", "/llm/", "utils/journal.py", "utils/files.py")  # of an installed package or a checkout


def start_and_die(run: Run, line: int, told: Path) -> int:
    """
    Curate in a process of its own, which is killed when it is at a line of the code that curates, asks and writes.

    What is on disk must not be described or paid for again.

    Args:
        line: at which of those that are run; 0 for none.
        told: gets what went wrong, or how many lines there were.

    Returns:
        The exit status.
    """
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    try:
        signal.alarm(60)
        sys.stdout = io.StringIO()
        describe, lines = run.describer.describe, [0]

        def kept(pattern: str) -> str:
            return "".join(path.read_text(encoding="utf-8") for path in run.folder.glob(pattern))

        def describe_new(pictures: list) -> list:
            drafts = describe(pictures)
            assert not any(draft.text in kept("drafts.jsonl") for draft in drafts), "described twice"
            return drafts

        def mend_new(text: str) -> str:
            assert f"{text} It is mended." not in kept("answers/*.jsonl") + kept("mended.jsonl"), "paid twice"
            return f"{text} It is mended."

        def trace(frame: Any, event: str, _: object) -> Any:
            if not any(part in frame.f_code.co_filename for part in WATCHED):
                return None
            lines[0] += event == "line"
            if event == "line" and lines[0] == line:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        run.describer.describe, run.mender.answer = describe_new, mend_new  # type: ignore[method-assign]
        threading.settrace(trace)
        sys.settrace(trace)
        run()
        sys.settrace(None)
        told.write_text(str(lines[0]))
        os._exit(0)
    except BaseException:
        told.write_text(traceback.format_exc())
    os._exit(1)


def test_killed_at_twenty_random_moments_it_gives_the_same_rows_and_pays_for_nothing_twice(tmp_path: Path) -> None:
    """After some kills half a line stands at the end of a file, as if the kill had been within it."""
    pictures, told = noises(tmp_path / "pictures", 12), tmp_path / "told"

    def start(name: str, line: int) -> int:
        status = start_and_die(Run(tmp_path / name, "--dataset_name", pictures), line, told)
        assert status in (0, -signal.SIGKILL), told.read_text()
        return status

    assert start("undisturbed", 0) == 0
    lines, rows = int(told.read_text()), (tmp_path / "undisturbed" / "rows.jsonl").read_bytes()
    assert rows.count(b"\n") == 12 and lines > 5000
    chance, kills, ended = random.Random(0), 0, 0
    while kills < 20:
        folder = tmp_path / f"killed {ended}"
        if start(folder.name, chance.randrange(1, lines)) == 0:
            assert (folder / "rows.jsonl").read_bytes() == rows
            ended += 1
            continue
        kills += 1
        for path in sorted(folder.glob("*.jsonl")) if chance.random() < 0.5 else ():
            with path.open("ab") as file:
                file.write(b'{"digest": "half a li')
    assert start(folder.name, 0) == 0
    assert (folder / "rows.jsonl").read_bytes() == rows
