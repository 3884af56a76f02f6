"""Models side by side: the same question to all, votes that count once, and numbers that `minigpt4 evaluate` makes."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from PIL import Image

from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.suites.votes import ALL_BAD, BEST, TIE
from recipes_minigpt4.serving.compare import Comparison, Told, answers, new_comparison
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.serving.votes import FILE, BallotBox
from recipes_minigpt4.utils.errors import RecipeError


ASKED = "Describe the image in detail."
DRAWN = ReplySettings(temperature=2.0, top_p=1.0, max_new_tokens=8)
LABELS = ("ours", "blip2")


@pytest.fixture(scope="module")
def two(talkers: dict[str, Talker]) -> dict[str, Talker]:
    """The models that are compared."""
    return {label: talkers[label] for label in LABELS}


def ask(two: dict[str, Talker], picture: Image.Image, settings: ReplySettings = DRAWN, blind: bool = True) -> Any:
    comparison = new_comparison(list(two), "scene.png", picture, ASKED, settings, blind)
    steps = [{label: one.text for label, one in comparison.told.items()} for _ in steps_of(comparison, two, picture)]
    return comparison, steps


def steps_of(comparison: Comparison, two: dict[str, Talker], picture: Image.Image) -> Any:
    return answers(comparison, two, picture, threading.Event())


def whole(texts: dict[str, str], number: int = 0, prompt: str = ASKED) -> Comparison:
    """A comparison that has ended, made without a model."""
    picture = Image.new("RGB", (40, 30), (number, 90, 90))
    comparison = new_comparison(list(texts), f"{number}.png", picture, prompt, replace(DRAWN, seed=3), True)
    for label, text in texts.items():
        comparison.told[label].text, comparison.told[label].new_tokens = text, 4
    return comparison


# ---- replies --------------------------------------------------------------------------------------------------------


def test_all_get_the_same_question_and_seed_and_grow_together(two: dict[str, Talker], scenes: list[Any]) -> None:
    comparison, steps = ask(two, scenes[0])
    assert comparison.settings.seed is not None  # one for all, though nobody has named one
    assert comparison.is_whole
    assert len(steps) > 4 and set(steps[0].values()) == {""}
    for label, talker in two.items():
        alone = "".join(Talk(talker).ask(ASKED, [scenes[0]], comparison.settings))
        assert comparison.told[label].text == alone
        assert all(step[label] == alone[: len(step[label])] for step in steps)


def test_two_comparisons_at_once_mix_nothing(two: dict[str, Talker], scenes: list[Any]) -> None:
    settings = [replace(DRAWN, seed=seed) for seed in range(3)]
    alone = [ask(two, scene, one)[0].told for scene, one in zip(scenes, settings, strict=False)]
    with ThreadPoolExecutor(3) as people:
        found = list(people.map(lambda pair: ask(two, *pair)[0].told, zip(scenes, settings, strict=False)))
    assert found == alone


def test_what_was_stopped_or_failed_cannot_be_voted_on(
    two: dict[str, Talker], scenes: list[Any], tmp_path: Path
) -> None:
    stop = threading.Event()
    long = replace(DRAWN, max_new_tokens=400)
    comparison = new_comparison(list(two), "scene.png", scenes[0], ASKED, replace(long, seed=1), True)
    for step, _ in enumerate(answers(comparison, two, scenes[0], stop)):
        if step == 2:
            stop.set()
    assert not comparison.is_whole
    closed = new_comparison(list(two), "scene.png", scenes[0], ASKED, replace(long, seed=1), True)
    with contextlib.closing(steps_of(closed, two, scenes[0])) as steps:
        next(steps)
    assert not closed.is_whole  # nobody waits for the end
    asked = "Describe it. " * 400  # more than the window has
    failed = new_comparison(list(two), "scene.png", scenes[0], asked, replace(DRAWN, seed=1), True)
    list(steps_of(failed, two, scenes[0]))
    assert "tokens" in str(failed.told["ours"].error)
    for one in (comparison, closed, failed):
        with pytest.raises(RecipeError, match="Not all models have replied to their end"):
            BallotBox(tmp_path, two).add(one, TIE)
    assert not list(tmp_path.iterdir())


def test_too_little_or_too_much_to_compare_gets_a_sentence(scenes: list[Any]) -> None:
    with pytest.raises(RecipeError, match="There is no question; write one"):
        new_comparison(["a", "b"], "scene.png", scenes[0], " ", DRAWN, True)
    for labels in (["a"], list("abcde")):
        with pytest.raises(RecipeError, match=f"Two to 4 models can be compared, and these are {len(labels)}"):
            new_comparison(labels, "scene.png", scenes[0], ASKED, DRAWN, True)


def test_names_are_hidden_and_shuffled_until_the_vote() -> None:
    labels = ["untrained", "stage1", "stage2", "blip2"]
    picture = Image.new("RGB", (40, 30))
    orders = set()
    for _ in range(60):
        comparison = new_comparison(labels, "scene.png", picture, ASKED, replace(DRAWN, seed=5), True)
        orders.add(tuple(comparison.order))
        assert [comparison.title(place) for place in range(4)] == ["A", "B", "C", "D"]
    assert {order[0] for order in orders} == set(labels)
    assert comparison.title(1, voted=True) == f"B: {comparison.order[1]}"
    seen = new_comparison(labels, "scene.png", picture, ASKED, DRAWN, False)
    assert [seen.title(place) for place in range(4)] == labels


# ---- votes ----------------------------------------------------------------------------------------------------------


def numbers_of(folder: Path, *options: str) -> dict[str, Any]:
    return evaluate.main(["--from_replies", "--output_dir", str(folder), "--resamples", "20", *options])


def test_evaluate_counts_what_people_voted(two: dict[str, Talker], tmp_path: Path) -> None:
    box = BallotBox(tmp_path, two)
    for number in range(4):
        assert box.add(whole({"ours": "A dog.", "blip2": "A cat."}, number), BEST, "ours")
    box.add(whole({"ours": "A dog.", "blip2": "A cat."}, 4), BEST, "blip2")
    box.add(whole({"ours": "A dog.", "blip2": "A dog."}, 5), BEST, "blip2")  # the same words are as good
    box.add(whole({"ours": "A dog.", "blip2": "A cat."}, 6), TIE)
    box.add(whole({"ours": "", "blip2": "A"}, 7), ALL_BAD)
    box.close()
    results = numbers_of(box.folder)
    (numbers,) = results["suites"].values()
    assert numbers["pictures"] == 8

    told = {label: {name: number["value"] for name, number in of.items()} for label, of in numbers["models"].items()}
    assert told["ours"] == {"best": 5 / 8, "not_worse": 6 / 8, "bad": 1 / 8}
    assert told["blip2"] == {"best": 2 / 8, "not_worse": 3 / 8, "bad": 1 / 8}
    page = (box.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") >= 4 and "A cat." in page and "minigpt4 app" in page
    lines = [json.loads(line) for line in (box.folder / FILE).read_text(encoding="utf-8").splitlines()]
    assert [line["vote"] for line in lines] == [BEST] * 6 + [TIE, ALL_BAD]
    assert lines[0]["best"] == "ours" and lines[0]["blind"] is True and lines[0]["settings"]["seed"] == 3
    assert sorted(lines[0]["order"]) == ["blip2", "ours"]


def test_a_double_click_is_one_vote_and_the_first_counts(two: dict[str, Talker], tmp_path: Path) -> None:
    box, comparison = BallotBox(tmp_path, two), whole({"ours": "A dog.", "blip2": "A cat."})
    with ThreadPoolExecutor(4) as fingers:
        counted = list(fingers.map(lambda _: box.add(comparison, BEST, "ours"), range(4)))
    assert sorted(counted) == [False, False, False, True]
    assert not box.add(comparison, ALL_BAD)
    box.close()
    reopened = BallotBox(tmp_path, two)
    assert not reopened.add(comparison, ALL_BAD)  # nor after the page was served anew
    reopened.close()
    (line,) = (box.folder / FILE).read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["vote"] == BEST


def test_people_who_vote_at_once_mix_nothing(two: dict[str, Talker], tmp_path: Path) -> None:
    box = BallotBox(tmp_path, two)
    asked = [whole({"ours": f"A dog {n}.", "blip2": f"A cat {n}."}, n, f"What is {n}?") for n in range(24)]
    with ThreadPoolExecutor(8) as people:
        assert all(people.map(lambda one: box.add(one, BEST, "ours"), asked))
    with pytest.raises(RecipeError, match="Another process writes into"):
        BallotBox(tmp_path, two).add(whole({"ours": "A dog.", "blip2": "A cat."}), TIE)
    box.close()
    numbers = numbers_of(box.folder)["suites"]["votes"]
    assert numbers["pictures"] == 24 and numbers["models"]["ours"]["best"]["value"] == 1
    for label in LABELS:
        lines = (box.folder / label / "votes" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
        found = {(row["prompt"], row["text"]) for row in map(json.loads, lines)}
        word = "dog" if label == "ours" else "cat"
        assert found == {(f"What is {n}?", f"A {word} {n}.") for n in range(24)}


def test_a_vote_that_was_half_written_is_whole_the_next_time(two: dict[str, Talker], tmp_path: Path) -> None:
    box = BallotBox(tmp_path, two)
    for number in range(2):
        box.add(whole({"ours": "A dog.", "blip2": "A cat."}, number), BEST, "ours")
    box.close()
    told = box.folder / "blip2" / "votes" / "replies.jsonl"
    lines = told.read_text(encoding="utf-8").splitlines(keepends=True)
    told.write_text(lines[0] + lines[1][:20], encoding="utf-8")  # the process was killed here
    again = BallotBox(tmp_path, two)
    again.add(whole({"ours": "A dog.", "blip2": "A cat."}, 2), TIE)
    again.close()
    numbers = numbers_of(box.folder)["suites"]["votes"]
    assert numbers["pictures"] == 3 and numbers["models"]["blip2"]["not_worse"]["value"] == pytest.approx(1 / 3)


def test_votes_on_other_models_go_elsewhere(
    two: dict[str, Talker], talkers: dict[str, Talker], tmp_path: Path
) -> None:
    others = {"ours": talkers["llava"], "blip2": talkers["blip2"]}
    named = {"a b/c": talkers["ours"], "blip2": talkers["blip2"]}
    folders = {BallotBox(tmp_path, models).folder for models in (two, others, named)}
    assert len(folders) == 3 and all(folder.parent == tmp_path for folder in folders)
    box = BallotBox(tmp_path, named)
    box.add(whole({"a b/c": "A dog.", "blip2": "A cat."}), TIE)
    box.close()
    assert (box.folder / "a_b_c" / "votes" / "replies.jsonl").is_file()


def test_a_vote_for_nobody_gets_a_sentence(two: dict[str, Talker], tmp_path: Path) -> None:
    box, comparison = BallotBox(tmp_path, two), whole({"ours": "A dog.", "blip2": "A cat."})
    for answer, best in ((BEST, None), (BEST, "another"), (TIE, "ours"), ("worst", None)):
        with pytest.raises(RecipeError, match="is no vote; name the best one, or say tie or bad"):
            box.add(comparison, answer, best)
    assert Told() == Told("", None, None) and not list(tmp_path.iterdir())


# ---- on the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(two: dict[str, Talker], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A page with the models, whose votes are in `folder`."""
    app_server = pytest.importorskip("app_server")
    folder = tmp_path_factory.mktemp("votes")
    with app_server.serve(two, "--output_dir", str(folder)) as page:
        yield page
        page.page.votes.close()


@pytest.fixture(scope="module")
def files(scenes: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pictures as files."""
    folder = tmp_path_factory.mktemp("files")
    for number, scene in enumerate(scenes):
        scene.save(folder / f"scene{number}.png")
    return sorted(folder.iterdir())


def test_two_people_compare_and_vote_at_once(
    served: Any, files: list[Path], scenes: list[Any], tmp_path: Path
) -> None:
    import app_server

    alone = [
        {
            label: "".join(Talk(talker).ask(ASKED, [scene], app_server.GREEDY))
            for label, talker in served.talkers.items()
        }
        for scene in scenes[:2]
    ]

    def vote(number: int) -> dict[str, str]:
        with app_server.person(served, tmp_path / str(number)) as client:
            asked = app_server.message(ASKED, files[number])
            _, note, _, *hidden = client.predict(asked, True, api_name="/compare")
            assert note == "Which reply is the best?" and [one["label"] for one in hidden] == ["A", "B"]
            note, *shown = client.predict(api_name="/vote_b")
            labels = {one["label"][:1]: one["label"][3:] for one in shown}
            assert note == f"Counted: {labels['B']} is the best."
            assert [one["value"] for one in shown] == [one["value"] for one in hidden]
            note, *_ = client.predict(api_name="/vote_bad")
            assert note == "You have voted on this already; the first vote counts."
            return {labels[one["label"][:1]]: one["value"] for one in shown}

    with ThreadPoolExecutor(2) as people:
        assert list(people.map(vote, range(2))) == alone
    numbers = numbers_of(served.page.votes.folder)["suites"]["votes"]
    assert numbers["pictures"] == 2
    assert sum(numbers["models"][label]["best"]["value"] for label in LABELS) == 1


def test_the_page_says_what_is_missing(served: Any, files: list[Path], tmp_path: Path) -> None:
    import app_server
    from gradio_client.exceptions import AppError

    with app_server.person(served, tmp_path) as client:
        for api, given, told in (
            ("/vote_a", (), "There is nothing to vote on; ask the models first"),
            ("/compare", (app_server.message(ASKED), True), "Models are compared on one picture; add one"),
            ("/compare", (app_server.message(" ", files[0]), True), "There is no question; write one"),
        ):
            with pytest.raises(AppError, match=told):
                client.predict(*given, api_name=api)


def test_a_stop_ends_all_replies(served: Any, files: list[Path], tmp_path: Path) -> None:
    import app_server
    from gradio_client.exceptions import AppError

    with app_server.person(served, tmp_path) as client, app_server.slow(served.talkers["ours"]):
        job = client.submit(app_server.message(ASKED, files[0]), False, max_new_tokens=400, api_name="/compare")
        app_server.wait_until(lambda: job.outputs())
        client.predict(api_name="/compare_stop")
        _, note, _, *replies = job.result(timeout=60)
        assert note == "Replies were stopped, so there is nothing to vote on; ask again."
        assert [one["label"] for one in replies] == list(LABELS)  # nobody asked to hide them
        with pytest.raises(AppError, match="Not all models have replied to their end"):
            client.predict(api_name="/vote_tie")


@pytest.mark.browser
def test_somebody_votes_in_a_browser(served: Any, files: list[Path], browser: Browser) -> None:
    before = len(list(votes_in(served.page.votes.folder)))
    browser.resize(1200, 1000)
    browser.open(served.url)
    browser.wait_for("document.querySelectorAll('button[role=tab]').length >= 3")
    tab = "[...document.querySelectorAll('button[role=tab]')].find((tab) => /Compare/.test(tab.textContent))"
    browser.evaluate(f"{tab}.click()")
    browser.wait_for("document.querySelector('#compare-box input[type=file]') !== null")
    browser.choose_file("#compare-box input[type=file]", files[0])
    browser.wait_for("document.querySelector('#compare-box .thumbnail-item') !== null")
    assert browser.evaluate("document.querySelector('#compare-best-a').disabled")
    browser.click("#compare-box button.submit-button")
    browser.wait_for("document.querySelector('#compare-note').textContent.includes('Which reply is the best?')")
    assert browser.evaluate("document.querySelector('#compare-picture img').naturalWidth") > 0
    browser.evaluate("document.querySelector('#compare-best-a').dispatchEvent(new MouseEvent('dblclick'))")
    browser.evaluate("[1, 2].forEach(() => document.querySelector('#compare-best-a').click())")
    browser.wait_for("/Counted|voted on this/.test(document.querySelector('#compare-note').textContent)")
    title = browser.evaluate("document.querySelector('#compare-reply-a label').textContent").strip()
    lines = list(votes_in(served.page.votes.folder))
    assert len(lines) == before + 1 and title == f"A: {lines[-1]['best']}"
    assert browser.evaluate("document.querySelector('#compare-best-a').disabled")
    for width in (1200, 400):
        browser.resize(width, 900)
        browser.wait_for(f"document.documentElement.scrollWidth <= {width}")


def votes_in(folder: Path) -> Iterator[dict[str, Any]]:
    path = folder / FILE
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines() if path.exists() else [])
