"""Mending as the paper's script did, what it cost, and what happens to descriptions without an answer."""

import json
from pathlib import Path

import pytest
from curation_runs import Mender, Run, noises

from recipes_minigpt4.curation.curate import parse, read_prompt
from recipes_minigpt4.curation.mend import Mending, mend_all
from recipes_minigpt4.llm.client import ClientOptions
from recipes_minigpt4.llm.sending import NoAnswerError
from recipes_minigpt4.llm.stub import stub_client
from recipes_minigpt4.utils.errors import RecipeError


DRAFTS = {"a": "A red square.", "b": "A blue heart."}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "out", "--dataset_name", noises(tmp_path / "pictures", 6))


def test_the_mender_is_asked_as_the_papers_script_did(run: Run) -> None:
    run()
    drafts = {record["text"] for record in run.lines("drafts")}
    assert len(run.mender.seen) == 6
    for request in run.mender.seen:
        system, user = request.messages
        assert system == {"role": "system", "content": read_prompt("mend", None)} and user["role"] == "user"
        assert user["content"] in drafts and (request.temperature, request.max_tokens) == (0.7, 200)
    assert system["content"].startswith("Fix the error in the given paragraph. Remove any repeating sentences")
    args = parse(["--model", "m", "--dataset_name", "d", "--mender", "stub:none"])
    assert args.mender_attempts == 6


def test_answers_stand_in_the_rows_beside_their_drafts(run: Run) -> None:
    funnel = run()
    rows = run.lines("rows")
    assert len(rows) == 6 and all(row["mended"] == f"{row['draft']} It is mended." for row in rows)
    assert (funnel.drawn, funnel.described, funnel.mended) == (6, 6, 6)


@pytest.mark.parametrize(
    "more", [["--mend_temperature", "0.1"], ["--mend_max_tokens", "50"], ["--mend_prompt", "other.txt"]]
)
def test_another_way_of_mending_mends_again_and_describes_nothing(run: Run, tmp_path: Path, more: list) -> None:
    """And back again costs nothing at all."""
    (tmp_path / "other.txt").write_text("Mend this.\n")
    more = [str(tmp_path / "other.txt") if text == "other.txt" else text for text in more]
    run()
    run(*more)
    assert (run.mender.asked, run.describer.asked, run.describer.loaded) == (12, 6, 1)
    run(*more)
    run()
    assert (run.mender.asked, run.describer.asked, run.describer.loaded) == (12, 6, 1)
    if "--mend_prompt" in more:
        assert run.mender.seen[-1].messages[0]["content"] == "Mend this."


def test_another_mender_mends_again(run: Run) -> None:
    run()
    other = Mender(lambda text: f"{text} By another.")
    run(client=stub_client(other, name="other"))
    assert (other.asked, run.describer.asked) == (6, 6)
    assert all(row["mended"].endswith("By another.") for row in run.lines("rows"))


def test_failures_are_counted_and_asked_again_by_the_next_start(run: Run, capsys: pytest.CaptureFixture) -> None:
    failing = [True]

    def answer(text: str) -> str:
        if failing[0] and run.mender.asked % 3 == 0:
            raise NoAnswerError("it was asleep", again=False)
        return f"{text} It is mended."

    run.mender.answer = answer
    funnel = run()
    assert funnel.mended == 4 and funnel.rules["unmended"] == 2
    told = "2 of 6 descriptions were not mended, most of them for this: it was asleep. The same command asks again."
    assert told in capsys.readouterr().out
    assert [row["text"] for row in run.lines("rows")].count(None) == 2
    failing[0] = False
    assert run().mended == 6 and run.mender.asked == 8
    assert "were not mended" not in capsys.readouterr().out


def test_nothing_is_asked_about_an_empty_description(tmp_path: Path) -> None:
    mender = Mender()
    records = mend_all(tmp_path, {**DRAFTS, "c": " "}, stub_client(mender), Mending("Mend."))
    assert mender.asked == 2 and set(records) == {"a", "b"}


def test_the_cost_so_far_counts_what_earlier_starts_paid(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prices = {"price_per_million_prompt_tokens": 1e6, "price_per_million_completion_tokens": 0.0}
    client = stub_client(Mender(), ClientOptions(cache=tmp_path / "answers", **prices))
    mend_all(tmp_path, {"a": "A red square."}, client, Mending("Mend."))  # four words
    assert ", cost so far 4.00" in capsys.readouterr().out
    records = mend_all(tmp_path, DRAFTS, client, Mending("Mend."))
    assert ", cost so far 8.00" in capsys.readouterr().out
    assert [record["cost"] for record in records.values()] == [4.0, 4.0]


def test_a_budget_ends_the_run_and_a_larger_one_goes_on(run: Run) -> None:
    prices = {"price_per_million_prompt_tokens": 1e3, "price_per_million_completion_tokens": 1e3}

    def with_budget(most: float) -> object:
        return run(
            client=stub_client(run.mender, ClientOptions(cache=run.folder / "answers", max_cost=most, **prices))
        )

    with pytest.raises(RecipeError, match=r"max_cost 0.95 does not suffice: .* is spent, .*; raise it to go on"):
        with_budget(0.95)
    paid = run.mender.asked
    assert 0 < paid < 6 and len(run.lines("mended")) == paid
    with_budget(100.0)
    assert (run.mender.asked, run.describer.asked) == (6, 6)
    spent = json.loads((run.folder / "made.json").read_text())["spent"]
    words = sum(record["prompt_tokens"] + record["completion_tokens"] for record in run.lines("mended"))
    assert spent["cost"] == pytest.approx(words * 1e-3) and spent["prompt_tokens"] > spent["completion_tokens"] > 0


@pytest.mark.parametrize(
    "content, told", [(None, "No such file"), (b"  \n", "is empty"), (b"\xff\xfe", "it is no text")]
)
def test_a_prompt_that_is_none_is_told(run: Run, tmp_path: Path, content: bytes | None, told: str) -> None:
    if content is not None:
        (tmp_path / "prompt.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"--continue_prompt .*prompt\.txt .*{told}"):
        run("--continue_prompt", tmp_path / "prompt.txt")
    assert run.describer.asked == 0
