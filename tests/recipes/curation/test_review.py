"""People pick: what the page shows, what it saves or writes at once, and what becomes of it."""

import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from browser import Browser
from PIL import Image

from recipes_minigpt4 import cli
from recipes_minigpt4.curation import review
from recipes_minigpt4.curation.review import Decision, read_review
from recipes_minigpt4.curation.review_page import case_of, changed_words
from recipes_minigpt4.curation.rows import CuratedRow, read_rows, write_rows
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.utils.decision_page import seal_of
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import read_journal


pytestmark = pytest.mark.usefixtures("ctrl_c")


Deck = dict[str, Any]
KEPT, DROPPED = Decision("keep"), Decision("drop")
TEXTS = (  # draft, mended, verdicts, score
    ("a dog dog on a lawn", "A dog lies on a lawn.", {"short": "21 characters"}, 0.3),
    ("A red ball.", "A red ball </script> of <b>rubber</b>.", {}, 0.9),
    ("A cat cat.", "The paragraph is already correct.", {"short": "10 characters", "already_correct": "“it”"}, 0.1),
    ("A cow in a", None, {"unmended": "no answer"}, None),
    ("A house.", "A house. 🏠 It is old.", {}, 0.5),
)


def fill(folder: Path, texts: Sequence[tuple[str, str | None, dict[str, str], float | None]] = TEXTS) -> Path:
    """A folder as `minigpt4 curate` leaves it."""
    (folder / "picture").mkdir(parents=True)
    rows = []
    for place, (draft, mended, verdicts, score) in enumerate(texts):
        file = folder / "picture" / f"{place}.png"
        size = (600, 400) if place < len(TEXTS) else (60, 40)
        Image.new("RGB", size, (place % 256, place // 256, 90)).save(file)
        digest = Picture(file.name, file).digest
        file = file.rename(file.with_name(f"{digest}.png"))
        rows.append(
            CuratedRow(
                digest, f"{place}.png", f"picture/{file.name}", draft, False, mended,
                draft if mended and "already correct" in mended else mended, verdicts,
                {} if score is None else {"match": score},
            )
        )  # fmt: skip
    write_rows(folder, rows)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path / "curated")


def deck_of(page: Path | str) -> Deck:
    """What a page holds."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="deck">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def save(rows: Sequence[CuratedRow], path: Path, told: Sequence[str | tuple[str, str] | None]) -> Path:
    """What the page saves if a person decides so: an answer, or `edit` and a text."""
    lines = []
    for row, said in zip(rows, told, strict=False):
        if said is not None:
            answer, text = said if isinstance(said, tuple) else (said, None)
            case = case_of(row)
            line = {"picture": row.picture, "shown": row.text or "", "case": case, "answer": answer}
            lines.append({**line, **({"text": text} if text else {}), "seal": seal_of(case, answer, text)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_holds_every_row_and_loads_nothing(folder: Path) -> None:
    review.main([str(folder)])
    text, rows = (folder / "review.html").read_text(encoding="utf-8"), read_rows(folder)
    deck = deck_of(text)
    assert [case["shown"] for case in deck["cases"]] == [
        {"picture": row.picture, "shown": row.text or ""} for row in rows
    ]
    assert [case["rules"] for case in deck["cases"]] == [row.verdicts for row in rows]
    assert [case["scores"] for case in deck["cases"]] == [row.scores for row in rows]
    assert deck["rules"] == ["short", "already_correct", "unmended"] and deck["scores"] == ["match"]
    assert set(deck["pictures"]) == {row.picture for row in rows}
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in deck["pictures"].values())
    assert text.count("<script") == 2 and not re.search(r'(?:src|href)="http', text) and str(folder) not in text
    assert [case["said"] for case in deck["cases"]] == ["", "", "The paragraph is already correct.", "", ""]
    assert deck["cases"][3]["written"] == "A cow in a"  # with this an edit begins where the mender said nothing


@pytest.mark.parametrize(
    ("draft", "text", "gone", "came"),
    [
        ("a dog dog on a lawn", "A dog on a green lawn.", ["a dog"], ["A", "green", "."]),
        ("It is. It is.", "It is.", ["It is."], []),
        ("", "New.", [], ["New."]),
        ("same  words", "same words", [], []),
        ("one\ntwo ", "one three (3)", ["two"], ["three (3)"]),
        ("the dog’s well-kept ball_", "the dog's well-kept _ball", ["dog’s", "ball_"], ["dog's", "_ball"]),
    ],
)
def test_changed_words_are_marked(draft: str, text: str, gone: list[str], came: list[str]) -> None:
    old, new = changed_words(draft, text)
    assert ("".join(part for _, part in old), "".join(part for _, part in new)) == (draft, text)
    assert [part.strip() for differs, part in old if differs] == gone
    assert [part.strip() for differs, part in new if differs] == came


def test_a_picture_that_is_gone_leaves_its_row(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = read_rows(folder)[1]
    (folder / row.file).unlink()
    review.main([str(folder)])
    assert "1 of 5 pictures are not in" in capsys.readouterr().out
    assert deck_of(folder / "review.html")["pictures"][row.picture] is None


def test_the_page_begins_with_a_file_that_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)
    file = save(rows, folder / "anna.jsonl", ["keep", ("edit", "A ball."), None, "drop"])
    review.main([str(folder), "--decisions", str(file)])
    kept = {case_of(rows[0]): "keep", case_of(rows[1]): "edit A ball.", case_of(rows[3]): "drop"}
    assert deck_of(folder / "review.html")["kept"] == kept
    assert "1 kept, 1 dropped, 1 edited, of 5 rows" in capsys.readouterr().out


def test_a_folder_without_rows_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no rows\.jsonl; run `minigpt4 curate"):
        review.main([str(tmp_path)])


@pytest.mark.parametrize(("part", "option"), [("review", "--serve"), ("export", "--to"), ("", "--mender")])
def test_each_part_has_its_own_help(part: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["curate", *filter(None, [part]), "--help"])
    assert option in capsys.readouterr().out


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_decisions_are_read_by_picture(folder: Path) -> None:
    rows = read_rows(folder)
    file = save(rows, folder / "anna.jsonl", ["keep", ("edit", "Ein Ball – rot."), None, "drop"])
    assert read_review([file], rows) == {
        rows[0].picture: KEPT,
        rows[1].picture: Decision("edit", "Ein Ball – rot."),
        rows[3].picture: DROPPED,
    }


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"answer": "keep"', '"answer": "drop"'),
        ('"answer": "edit"', '"answer": "keep"'),
        ("A dog lies", "A cat lies"),
        ("A ball.", "A bull."),
        (', "text": "A ball."', ""),
    ],
    ids=["answer", "edit", "shown", "text", "no-text"],
)
def test_a_changed_line_is_refused(folder: Path, old: str, new: str) -> None:
    rows = read_rows(folder)
    file = save(rows, folder / "anna.jsonl", ["keep", ("edit", "A ball."), "drop"])
    change(file, old, new)
    with pytest.raises(RecipeError, match=r"1 of the 3 decisions in .*anna\.jsonl were changed after they were saved"):
        read_review([file], rows)


def test_texts_that_were_mended_anew_are_undecided(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)
    file = save(rows, folder / "anna.jsonl", ["drop"] * 3)
    now = [replace(rows[0], text="A dog sleeps on a lawn."), *rows[1:]]
    assert read_review([file], now) == {rows[1].picture: DROPPED, rows[2].picture: DROPPED}
    assert "1 of the 3 decisions in" in (told := capsys.readouterr().out) and "they do not count" in told
    assert read_review([file], [replace(row, text="Another.") for row in rows]) == {}
    assert "3 of the 3 decisions in" in capsys.readouterr().out


def test_files_that_are_none(folder: Path) -> None:
    rows = read_rows(folder)
    file = save(rows, folder / "anna.jsonl", ["keep"])
    other = save([replace(row, picture=row.picture[::-1]) for row in rows], folder / "other.jsonl", ["keep"] * 5)
    (folder / "notes.txt").write_text("keep\n", encoding="utf-8")
    for path, message in {
        other: r"None of the 5 decisions in .*other\.jsonl is about a picture of this folder",
        folder / "notes.txt": "Line 1 of .* is no decision",
        folder / "nowhere.jsonl": "cannot be read",
    }.items():
        with pytest.raises(RecipeError, match=message):
            read_review([path], rows)
    with pytest.raises(RecipeError, match="twice; a second person needs a file of their own"):
        read_review([file, folder / "." / "anna.jsonl"], rows)


def test_the_last_file_counts_and_that_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)
    one = save(rows, folder / "anna.jsonl", ["keep", "keep", "drop"])
    two = save(rows, folder / "ben.jsonl", ["keep", "drop", None, "drop"])
    expected = dict(zip([row.picture for row in rows], [KEPT, DROPPED, DROPPED, DROPPED], strict=False))
    assert read_review([one, two], rows) == expected
    assert "1 rows are decided differently" in capsys.readouterr().out
    torn = folder / "torn.jsonl"
    torn.write_text(one.read_text(encoding="utf-8") + two.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(RecipeError, match="decides 1 cases in two ways; keep what each person has saved in a file"):
        read_review([torn], rows)


# ---- two people -----------------------------------------------------------------------------------------------------


def test_two_people_give_kappa_and_conflicts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)
    one = save(rows, folder / "anna.jsonl", ["keep", ("edit", "A ball."), "drop", "drop"])
    two = save(rows, folder / "ben.jsonl", ["keep", ("edit", "One ball."), "keep", "drop", "keep"])
    told = review.main([str(folder), "--decisions", str(one), str(two)])
    (pair,) = told["agreement"]
    # Both decided four rows: Anna 1 keep, 1 edit, 2 drop; Ben 2 keep, 1 edit, 1 drop; three answers are the same.
    same, chance = 3 / 4, (1 * 2 + 1 * 1 + 2 * 1) / 16
    assert (pair["one"], pair["other"], pair["answers"]) == ("anna.jsonl", "ben.jsonl", 4)
    assert pair["same"] == pytest.approx(same) and pair["kappa"] == pytest.approx((same - chance) / (1 - chance))
    conflicts = list(read_journal(folder / "conflicts.jsonl"))
    assert conflicts == told["conflicts"]
    assert [line["picture"] for line in conflicts] == [
        rows[1].picture,
        rows[2].picture,
    ]  # two texts are a conflict too
    assert conflicts[0]["decisions"] == {
        "anna.jsonl": {"answer": "edit", "text": "A ball."},
        "ben.jsonl": {"answer": "edit", "text": "One ball."},
    }
    out = capsys.readouterr().out
    assert re.search(r"anna\.jsonl, ben\.jsonl +4 +75% +0\.64", out)
    assert "2 rows that they decide differently" in out and "anna.jsonl: edit – A ball." in out
    page = deck_of(folder / "conflicts.html")
    assert [case["notes"] for case in page["cases"]][1] == ["anna.jsonl: drop", "ben.jsonl: keep"]

    settled = save([rows[1], rows[2]], folder / page["file"], [("edit", "One ball."), "keep"])
    assert read_review([one, two, settled], rows)[rows[2].picture] == KEPT
    save(rows, two, ["keep"])  # once they agree, nothing is left of the conflicts
    assert review.main([str(folder), "--decisions", str(one), str(two)])["conflicts"] == []
    assert not (folder / "conflicts.jsonl").exists() and not (folder / "conflicts.html").exists()


# ---- served ---------------------------------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, capsys: pytest.CaptureFixture[str], act: Callable[[str], None]) -> Iterator[list[str]]:
    """Run `--serve` here until `act(address)` is done and somebody presses Ctrl-C; gives what was printed."""
    printed: list[str] = []
    failed: list[BaseException] = []

    def other_side() -> None:
        try:
            end = time.monotonic() + 60
            while not (found := re.search(r"Open (http://\S+)", "".join(printed))):
                assert time.monotonic() < end, printed
                printed.append(capsys.readouterr().out)
                time.sleep(0.02)
            act(found[1])
        except BaseException as error:
            failed.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=other_side)
    thread.start()
    review.main([str(folder), "--serve"])
    thread.join()
    printed.append(capsys.readouterr().out)
    if failed:
        raise failed[0]
    yield printed


def ask(
    address: str, method: str, place: str, body: object = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes]:
    """Status and content of an answer; `place` stands behind the token, or begins with a slash."""
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    content = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
    told = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(method, place if place[:1] == "/" else parts.path + place, content, {**told, **(headers or {})})
    answer = connection.getresponse()
    read = answer.status, answer.read()
    connection.close()
    return read


def test_decisions_are_written_at_once_and_ctrl_c_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)
    cases = [case_of(row) for row in rows]
    journal = folder / "decisions.jsonl"

    def act(address: str) -> None:
        assert address.startswith("http://127.0.0.1:")
        status, page = ask(address, "GET", "")
        deck = deck_of(page.decode())
        assert status == 200 and deck["served"] and deck["kept"] == {}
        assert ask(address, "GET", deck["pictures"][rows[0].picture]) == (200, (folder / rows[0].file).read_bytes())
        for place, line in enumerate(
            [
                {"case": cases[0], "answer": "keep"},
                {"case": cases[1], "answer": "edit", "text": "A ball 🔴."},
                {"case": cases[2], "answer": "drop"},
                {"case": cases[0], "answer": "drop"},  # another thought
                {"case": cases[2], "answer": "open"},  # undone
            ],
            1,
        ):
            assert ask(address, "POST", "decision", line)[0] == 204
            assert len(list(read_journal(journal))) == place
        kept = deck_of(ask(address, "GET", "")[1].decode())["kept"]
        assert kept == {cases[0]: "drop", cases[1]: "edit A ball 🔴."}
        with pytest.raises(RecipeError, match="Another process writes into"):
            review.main([str(folder), "--serve"])
        with pytest.raises(RecipeError, match=r"Port \d+ of this machine cannot be used"):
            others = str(folder / "others.jsonl")
            review.main([str(folder), "--serve", "--port", str(urlsplit(address).port), "--decisions", others])

    with served(folder, capsys, act) as printed:
        assert "0 kept, 1 dropped, 1 edited, of 5 rows; 3 are left. The same command goes on" in "".join(printed)
    assert read_review([journal], rows) == {rows[0].picture: DROPPED, rows[1].picture: Decision("edit", "A ball 🔴.")}
    with journal.open("a", encoding="utf-8") as file:
        file.write('{"picture": "half a')  # a kill
    assert len(read_review([journal], rows)) == 2


def test_others_reach_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)
    case = case_of(rows[0])
    (folder.parent / "outside.png").write_bytes(b"outside")
    (folder / "picture" / "link.png").symlink_to(folder.parent / "outside.png")
    write_rows(folder, [*rows, replace(rows[0], picture="a" * 64, file="picture/../../outside.png"),
                        replace(rows[0], picture="b" * 64, file="picture/link.png")])  # fmt: skip
    keep = {"case": case, "answer": "keep"}

    def act(address: str) -> None:
        port = urlsplit(address).port
        for method, body in (("GET", None), ("POST", keep)):
            place = "" if method == "GET" else "decision"
            for name in (f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1"):
                assert ask(address, method, place, body, {"Host": name})[0] == 403
            assert ask(address, method, place, body, {"Origin": "http://evil.example"})[0] == 403
            for path in (
                f"/{place}",
                f"/wrong/{place}",
                f"/{place}?token=",
                f"/{urlsplit(address).path[1:-2]}/{place}",
            ):
                assert ask(address, method, path, body)[0] == 404
        for path in ("rows.jsonl", "../rows.jsonl", "picture/../rows.jsonl", "picture/%2e%2e/rows.jsonl", "picture/",
                     f"picture/{'a' * 64}", f"picture/{'b' * 64}", rows[0].file, "decisions.jsonl"):  # fmt: skip
            assert ask(address, "GET", path)[0] == 404, path
        for body in (
            b"{", b"[]", b"[" * 100_000, {}, {**keep, "answer": "yes"}, {**keep, "case": "none"},
            {**keep, "text": "A."}, {"case": case, "answer": "edit"}, {"case": case, "answer": "edit", "text": " "},
            {"case": case, "answer": "edit", "text": "\ud800"}, {"case": case, "answer": ["keep"]},
            {"case": case_of(rows[3]), "answer": "keep"}, {"case": case, "answer": "edit", "text": "A" * 300_000},
        ):  # fmt: skip
            assert ask(address, "POST", "decision", body)[0] == 400, body
        assert (
            ask(address, "POST", "decision", keep, {"Content-Type": "text/plain"})[0] == 400
        )  # a form of another page
        assert ask(address, "POST", "", keep)[0] == 400 and ask(address, "DELETE", "decision")[0] == 501

    with served(folder, capsys, act) as printed:
        assert "Nothing was decided." in "".join(printed) and not (folder / "decisions.jsonl").exists()


def test_a_file_that_is_damaged_meanwhile_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = case_of(read_rows(folder)[0])
    journal = folder / "decisions.jsonl"

    def act(address: str) -> None:
        assert ask(address, "POST", "decision", {"case": case, "answer": "keep"})[0] == 204
        whole = journal.read_text(encoding="utf-8")
        journal.write_text("keep all of them\n", encoding="utf-8")
        status, told = ask(address, "GET", "")
        assert status == 500 and b"is no decision; name the file that the page has saved" in told
        journal.write_text(whole, encoding="utf-8")

    with served(folder, capsys, act) as printed:
        assert "1 kept, 0 dropped, 0 edited, of 5 rows" in "".join(printed)


def test_serving_needs_one_file_and_a_port(folder: Path) -> None:
    with pytest.raises(RecipeError, match="--serve writes into one file"):
        review.main([str(folder), "--serve", "--decisions", "a.jsonl", "b.jsonl"])
    with pytest.raises(RecipeError, match="from 0 to 65535"):
        review.main([str(folder), "--serve", "--port", "70000"])


# ---- in a browser ---------------------------------------------------------------------------------------------------


def seen(browser: Browser, name: str) -> str:
    return browser.evaluate(f"document.getElementById('{name}').textContent")


def select(browser: Browser, name: str, value: str) -> None:
    browser.evaluate(
        f"(() => {{ const one = document.getElementById('{name}'); one.value = {json.dumps(value)};"
        " one.dispatchEvent(new Event('change')); })()"
    )


@pytest.mark.browser
def test_a_person_picks_in_a_browser(tmp_path: Path, browser: Browser) -> None:
    many = [(f"A dog, number {place}.", f"A dog lies here, number {place}.", {}, place / 300) for place in range(295)]
    folder = fill(tmp_path / "curated", [*TEXTS, *many])
    rows = read_rows(folder)
    review.main([str(folder)])
    page = folder / "review.html"
    browser.open(page)
    assert browser.evaluate("document.querySelectorAll('*').length") < 110  # one row at a time, however many there are
    assert browser.evaluate("document.getElementById('picture').naturalWidth") == 384
    assert seen(browser, "draft") == TEXTS[0][0] and seen(browser, "text") == TEXTS[0][1]
    assert browser.evaluate("[...document.querySelectorAll('#draft del')].map((one) => one.textContent)") == [
        "a", "dog",
    ]  # fmt: skip
    assert "short 21 characters" in seen(browser, "rules") and seen(browser, "scores") == "match 0.3"

    browser.press("k")
    assert seen(browser, "text") == TEXTS[1][1]  # marks of HTML are text
    browser.press("n")
    assert "already correct" in seen(browser, "said") and seen(browser, "text") == "A cat cat."
    browser.press("d")
    assert browser.evaluate("document.querySelector('[data-answer=keep]').disabled")  # there is nothing to keep
    browser.press("k")
    assert seen(browser, "count").endswith("2 of 300 decided: 1 kept, 1 dropped, 0 edited")
    browser.press("e")
    assert browser.evaluate("document.getElementById('new').value") == "A cow in a"
    browser.write(" field, kdenu. 🐄")  # the letters are no keys now
    browser.press("Enter", ctrl=True)
    browser.press("e")
    browser.press("Escape")
    browser.press("u")
    assert seen(browser, "text") == "(nothing)" and seen(browser, "count").startswith(
        "Row 4 of 300 · 2 of 300 decided"
    )
    browser.press("e")
    browser.write(" field. 🐄")
    browser.press("Enter", ctrl=True)

    browser.open(page)  # closed and opened again
    assert seen(browser, "count") == "Row 2 of 300 · 3 of 300 decided: 1 kept, 1 dropped, 1 edited"
    select(browser, "by-rule", "short")
    assert seen(browser, "chosen") == "Sort and filter: 2 of 300 rows"
    select(browser, "by-rule", "")
    select(browser, "by-answer", "edit")
    assert seen(browser, "text") == "A cow in a field. 🐄" and seen(browser, "whose") == "Your text"
    select(browser, "by-answer", "open")
    select(browser, "order", "down")
    assert seen(browser, "scores") == "match 0.98"
    select(browser, "from", "0.03")
    select(browser, "to", "0.05")
    assert seen(browser, "scores") == "match 0.05" and seen(browser, "chosen") == "Sort and filter: 7 of 300 rows"
    for _ in range(7):
        browser.press("d")
    assert seen(browser, "end").startswith("These rows are decided. 290 others are not")
    browser.press("u")
    assert seen(browser, "scores") == "match 0.03"

    browser.click("#save")
    file = browser.downloaded("decisions-curated.jsonl")
    decided = read_review([file], rows)
    expected = {
        rows[0].picture: KEPT,
        rows[2].picture: DROPPED,
        rows[3].picture: Decision("edit", "A cow in a field. 🐄"),
    }
    expected |= {row.picture: DROPPED for row in rows[5:] if 0.03 < row.scores["match"] <= 0.05}
    assert decided == expected
    browser.click("#forget")
    browser.click("#forget")  # for another person
    browser.open(page)
    assert seen(browser, "count").startswith("Row 1 of 300 · 0 of 300 decided")


@pytest.mark.browser
def test_a_person_picks_while_it_is_served(folder: Path, browser: Browser, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_rows(folder)

    def written() -> dict[str, Decision]:
        return read_review([folder / "decisions.jsonl"], rows)

    def wait_for(expected: Mapping[str, Decision]) -> None:
        end = time.monotonic() + 60
        while not (folder / "decisions.jsonl").stat().st_size or written() != expected:
            assert time.monotonic() < end, written()
            time.sleep(0.02)

    def act(address: str) -> None:
        browser.open(address)
        browser.wait_for("document.getElementById('picture').naturalWidth === 600")  # the picture itself
        browser.press("k")
        browser.press("d")
        browser.press("u")
        browser.press("e")
        browser.write(" It bounces.")
        browser.click("#use")
        expected = {rows[0].picture: KEPT, rows[1].picture: Decision("edit", f"{TEXTS[1][1]} It bounces.")}
        wait_for(expected)
        browser.open(address.replace("127.0.0.1", "localhost"))
        assert seen(browser, "count") == "Row 3 of 5 · 2 of 5 decided: 1 kept, 0 dropped, 1 edited"
        assert browser.evaluate("document.getElementById('unsent').hidden")
        browser.press("d")
        wait_for({**expected, rows[2].picture: DROPPED})

    with served(folder, capsys, act):
        pass
    browser.press("d")  # nobody answers any more
    browser.wait_for("!document.getElementById('unsent').hidden")
    browser.click("#save")
    file = browser.downloaded("decisions-curated.jsonl")
    assert read_review([file], rows) == {**written(), rows[3].picture: DROPPED}


@pytest.mark.browser
def test_the_page_fits_any_width_and_the_dark(folder: Path, browser: Browser) -> None:
    review.main([str(folder)])
    for width in (1200, 400):
        for dark in (False, True):
            browser.resize(width, 800, dark)
            browser.open(folder / "review.html")
            browser.evaluate("document.getElementById('filters').open = true")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            bright = "getComputedStyle(document.body).backgroundColor === 'rgb(255, 255, 255)'"
            assert browser.evaluate(bright) is not dark
