"""People as judges: what the page shows, what it saves, and what becomes of it."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from stored_replies import store_replies

from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.utils.errors import RecipeError


Deck = dict[str, Any]
SAID = {
    "paleozoic": ["A dog with a red ball.", "A dog.", "Nothing </script> of the sort <b>here</b>."],
    "mesozoic": ["A red ball.", "A dog.", "A cat."],
}
CAPTIONS = ("a dog", "a red ball")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store_replies(tmp_path, SUITES["coverage"](), SAID, CAPTIONS)
    return tmp_path


def run(folder: Path, *options: str) -> dict[str, Any]:
    return evaluate.main(["--from_replies", "--output_dir", str(folder), "--resamples", "20", *options])


def deck_of(folder: Path, suite: str = "coverage") -> Deck:
    """What the page of a suite holds."""
    text = (folder / f"judge-{suite}.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="deck">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def save(deck: Deck, path: Path, answer: Callable[[Mapping[str, str]], str | None]) -> Path:
    """What the page saves if a person answers so; None for what was not reached."""
    told = [(case, answer(case["shown"])) for case in deck["cases"]]
    rows = [
        {**case["shown"], "case": case["case"], "answer": said, "seal": case["seals"][said]}
        for case, said in told
        if said is not None
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def truth(shown: Mapping[str, str]) -> str:
    caption = next(caption for caption in CAPTIONS if caption in shown["question"])
    return "yes" if caption in shown["reply"].lower() else "no"


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_holds_what_is_judged_and_not_who_spoke(folder: Path) -> None:
    results = run(folder, "--judge", "human")
    assert results["to_judge"] == {"coverage": str(folder / "judge-coverage.html")}
    assert "nobody has judged it yet" in results["skipped"]["coverage"]
    deck = deck_of(folder)
    shown = [case["shown"] for case in deck["cases"]]
    replies = {text for texts in SAID.values() for text in texts}
    assert {(one["prompt"], one["reply"]) for one in shown} == {
        ("Describe the image in detail.", one) for one in replies
    }
    assert len(shown) == 5 * len(CAPTIONS)  # both models say the same of the second picture, which is judged once
    assert len(deck["pictures"]) == 3
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in deck["pictures"].values())
    page = (folder / "judge-coverage.html").read_text(encoding="utf-8")
    assert "zoic" not in page and "revision" not in page
    assert page.count("<script") == 2 and not re.search(r'(?:src|href)="http', page)


def test_the_order_is_the_seed_s_and_tells_no_model(folder: Path) -> None:
    def order(*options: str) -> list[str]:
        run(folder, "--judge", "human", *options)
        return [case["case"] for case in deck_of(folder)["cases"]]

    first = order()
    assert order() == first == order("--models", "mesozoic", "paleozoic")
    others = [order("--seed", str(seed)) for seed in (1, 2, 3)]
    assert all(sorted(one) == sorted(first) for one in others)
    assert any(one != first for one in others)
    replies = [case["shown"]["reply"] for case in deck_of(folder)["cases"]]
    assert replies[::2] == replies[1::2]  # the questions about one reply follow each other


def test_a_page_needs_the_pictures(folder: Path) -> None:
    shutil.rmtree(folder / "pictures")
    with pytest.raises(RecipeError, match=r"3 of 3 are not in .*pictures; run the command without --from_replies"):
        run(folder, "--judge", "human")


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_decisions_become_numbers(folder: Path) -> None:
    run(folder, "--judge", "human")
    file = save(deck_of(folder), folder / "anna.jsonl", truth)
    numbers = run(folder, "--judge", f"human:{file}")["suites"]["coverage"]
    covered = {label: of_model["covered"]["value"] for label, of_model in numbers["models"].items()}
    assert covered == pytest.approx({"paleozoic": 5 * (1 + 0.5 + 0) / 3, "mesozoic": 5 * (0.5 + 0.5 + 0) / 3})
    assert numbers["judges"]["unread"] == {"human:anna.jsonl": 0}


def test_what_was_skipped_or_not_reached_is_unread(folder: Path) -> None:
    run(folder, "--judge", "human")

    def hesitant(shown: Mapping[str, str]) -> str | None:
        return {"A dog.": "skip", "A cat.": None}.get(shown["reply"], truth(shown))

    file = save(deck_of(folder), folder / "ben.jsonl", hesitant)
    numbers = run(folder, "--judge", f"human:{file}")["suites"]["coverage"]
    # two models' "A dog." with two questions each, and "A cat." with two
    assert numbers["judges"]["unread"] == {"human:ben.jsonl": 6}
    assert numbers["models"]["mesozoic"]["covered"]["value"] == pytest.approx(2.5)


def test_two_people_give_kappa(folder: Path) -> None:
    run(folder, "--judge", "human")
    one = save(deck_of(folder), folder / "anna.jsonl", truth)
    two = save(deck_of(folder), folder / "ben.jsonl", lambda shown: "yes" if "dog" in shown["reply"] else truth(shown))
    judges = run(folder, "--judge", f"human:{one}", f"human:{two}")["suites"]["coverage"]["judges"]
    (pair,) = judges["agreement"]
    # Of 12 answers Anna says yes to 5, Ben to these and to the ball with both models' "A dog.", 7.
    same, chance = 10 / 12, (5 * 7 + 7 * 5) / 144
    assert (pair["one"], pair["other"], pair["answers"]) == ("human:anna.jsonl", "human:ben.jsonl", 12)
    assert pair["same"] == pytest.approx(same) and pair["kappa"] == pytest.approx((same - chance) / (1 - chance))


def test_a_file_speaks_of_its_own_suite_alone(folder: Path) -> None:
    store_replies(folder, SUITES["failures"](), {label: ["A dog."] for label in SAID})
    run(folder, "--judge", "human")
    file = save(deck_of(folder, "failures"), folder / "anna.jsonl", lambda shown: "no")
    results = run(folder, "--judge", f"human:{file}")
    assert results["skipped"] == {"coverage": "it needs a judge: name one with --judge"}
    judges = results["suites"]["failures"]["judges"]
    assert judges["agreement"][0]["other"] == "the suite itself" and judges["agreement"][0]["same"] == 1.0


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"answer": "no"', '"answer": "yes"'), ("A cat.", "A dog!"), ('"key": "', '"key": "0')],
    ids=["answer", "reply", "key"],
)
def test_a_changed_line_is_refused(folder: Path, old: str, new: str) -> None:
    run(folder, "--judge", "human")
    file = save(deck_of(folder), folder / "anna.jsonl", truth)
    change(file, old, new)
    with pytest.raises(RecipeError, match=r"1 of the 10 decisions in .*anna\.jsonl do not fit \(1 changed after"):
        run(folder, "--judge", f"human:{file}")


def test_decisions_on_other_replies_are_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run(folder, "--judge", "human")
    file = save(deck_of(folder), folder / "anna.jsonl", truth)
    other = tmp_path_factory.mktemp("other")
    said = {"paleozoic": SAID["paleozoic"], "mesozoic": ["A red ball.", "A dog.", "A cow."]}
    store_replies(other, SUITES["coverage"](), said, CAPTIONS)
    with pytest.raises(RecipeError, match=r"2 of the 10 decisions .*2 about other replies than those here"):
        run(other, "--judge", f"human:{file}")


def test_files_that_are_none(folder: Path) -> None:
    run(folder, "--judge", "human")
    file = save(deck_of(folder), folder / "anna.jsonl", truth)
    torn = folder / "torn.jsonl"
    save(deck_of(folder), torn, lambda shown: "yes")
    torn.write_text(torn.read_text(encoding="utf-8") + file.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "notes.txt").write_text("yes\nno\n", encoding="utf-8")
    (folder / "empty.jsonl").write_text("\n", encoding="utf-8")
    for named, message in {
        "nowhere.jsonl": "cannot be read",
        "notes.txt": "Line 1 of .* is no decision",
        "empty.jsonl": "holds no decisions",
        "torn.jsonl": "decides 6 cases in two ways",
    }.items():
        with pytest.raises(RecipeError, match=message):
            run(folder, "--judge", f"human:{folder / named}")
    with pytest.raises(RecipeError, match="twice; a second judge needs a file of its own"):
        run(folder, "--judge", f"human:{file}", f"human:{folder / '.' / 'anna.jsonl'}")


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.browser
def test_a_person_judges_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    count = 150  # with two captions each: 300 cases
    store_replies(tmp_path, SUITES["coverage"](), {"ours": [f"A dog, number {place}." for place in range(count)]})
    run(tmp_path, "--judge", "human")
    deck = deck_of(tmp_path)
    page = tmp_path / "judge-coverage.html"
    browser.open(page)
    elements = browser.evaluate("document.querySelectorAll('*').length")
    assert elements < 60  # one case at a time, so that hundreds do not make the page slow

    def count_of() -> str:
        return browser.evaluate("document.getElementById('count').textContent")

    def question() -> str:
        return browser.evaluate("document.getElementById('question').textContent")

    assert question() == deck["cases"][0]["shown"]["question"]
    assert browser.evaluate("document.getElementById('picture').naturalWidth") > 0
    for key in "123":
        browser.press(key)
    assert count_of() == "3 of 300 decided, 1 of them skipped"
    browser.press("ArrowLeft")
    browser.press("Backspace")
    assert question() == deck["cases"][1]["shown"]["question"]
    browser.press("1")  # it was no
    browser.open(page)  # closed and opened again
    assert count_of() == "3 of 300 decided, 1 of them skipped"
    assert question() == deck["cases"][3]["shown"]["question"]
    browser.click("[data-answer=no]")
    for _ in range(296):
        browser.press("2")
    assert count_of() == "300 of 300 decided, 1 of them skipped"
    assert browser.evaluate("document.getElementById('case').hidden")
    browser.click("#again")
    assert question() == deck["cases"][2]["shown"]["question"]
    browser.press("1")

    browser.click("#save")
    file = browser.downloaded("decisions-coverage.jsonl")
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    assert answers == ["yes"] * 3 + ["no"] * 297
    numbers = run(tmp_path, "--judge", f"human:{file}")["suites"]["coverage"]
    assert numbers["models"]["ours"]["covered"]["value"] == pytest.approx(5 * 3 / 300)
    assert numbers["judges"]["unread"] == {"human:decisions-coverage.jsonl": 0}


@pytest.mark.browser
def test_texts_are_shown_as_they_are_at_any_width(folder: Path, browser: Browser) -> None:
    run(folder, "--judge", "human")
    deck = deck_of(folder)
    odd = next(place for place, case in enumerate(deck["cases"]) if "</script>" in case["shown"]["reply"])
    for width in (1200, 400):
        for dark in (False, True):
            browser.resize(width, 800, dark)
            browser.open(folder / "judge-coverage.html")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            bright = "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'"
            assert browser.evaluate(bright) is not dark
    for _ in range(odd):
        browser.press("1")
    assert browser.evaluate("document.querySelector('[data-text=reply]').textContent") == SAID["paleozoic"][2]
