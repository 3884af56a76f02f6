"""Which rows are exported: rules that count, people's word, scores, chance, and pictures that differ."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes_minigpt4.curation.decided import case_of, decisions_about
from recipes_minigpt4.curation.features import encode_features, read_features
from recipes_minigpt4.curation.picking import Decision, Picks, most_different, pick, rules_of
from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.curation.rules import RULES
from recipes_minigpt4.utils.errors import RecipeError


def row(name: str, text: str | None = "A text.", scores: dict | None = None, **verdicts: str) -> CuratedRow:
    return CuratedRow(name, f"{name}.png", f"picture/{name}.png", f"Draft {name}.", False, text, text, verdicts,
                      scores or {})  # fmt: skip


def taken(rows: list[CuratedRow], **picks: object) -> list[str]:
    return [one.picture for one in pick(rows, Picks(**picks), no_features)[0]]


def no_features(_: object) -> np.ndarray:
    raise AssertionError("features are read where nobody needs them")


# ---- rules and people -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "counting"),
    [
        ([], set(RULES)),
        (["-drifted"], set(RULES) - {"drifted"}),
        (["-drifted", "-short"], set(RULES) - {"drifted", "short"}),
        (["+short"], {"short"}),
        (["+short", "+marks"], {"short", "marks"}),
        (["-all"], set()),
        (["-all", "+short"], {"short"}),
        (["+all", "-short"], set(RULES) - {"short"}),
    ],
)
def test_rules_that_count(changes: list[str], counting: set[str]) -> None:
    assert set(rules_of(changes)) == counting


@pytest.mark.parametrize("change", ["drifted", "-drfited", "+", "short-"])
def test_a_rule_that_is_none_is_named(change: str) -> None:
    with pytest.raises(RecipeError, match=rf"--rules \{change[0]}?.*names no rule; write \+NAME or -NAME, .*drifted"):
        rules_of([change])


def test_rules_filter_and_tell_why() -> None:
    rows = [row("a"), row("b", short="9 characters"), row("c", short="9", marks="###"), row("d", None, unmended="no")]
    picked, reasons = pick(rows, Picks(), no_features)
    assert [one.picture for one in picked] == ["a"]
    assert reasons == {"rule: short": 2, "no text": 1}
    assert taken(rows, rules=("marks",)) == ["a", "b"]
    assert taken(rows, rules=()) == ["a", "b", "c"]


def test_people_overrule_rules() -> None:
    rows = [row("a"), row("b", short="9"), row("c", short="9"), row("d"), row("e", None, unmended="no")]
    decisions = {
        "a": Decision("drop"),
        "b": Decision("keep"),
        "c": Decision("edit", " Better. "),
        "d": Decision("torn"),
        "e": Decision("keep"),
    }
    picked, reasons = pick(rows, Picks(decisions=decisions), no_features)
    assert {one.picture: one.text for one in picked} == {"b": "A text.", "c": "Better."}
    assert reasons == {"dropped by people": 1, "people disagree": 1, "no text": 1}


def test_which_text_is_taken() -> None:
    one = CuratedRow("a", "a", "a", "The draft.", False, "It is already correct.", "The draft.")
    texts = [pick([one], Picks(text=text), no_features)[0][0].text for text in ("picked", "mended", "draft")]
    assert texts == ["The draft.", "It is already correct.", "The draft."]


def test_nothing_left_is_told() -> None:
    with pytest.raises(RecipeError, match="No row is left; let fewer rules count"):
        taken([row("a", short="9")])


def saved(path: Path, *lines: dict) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_decisions_are_read_by_picture_and_text(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("c"), row("d")]
    cases = [case_of(one) for one in rows]
    mine = saved(
        tmp_path / "me.jsonl",
        {"case": cases[0], "answer": "drop"},
        {"case": cases[1], "answer": "edit", "text": "New."},
        {"case": cases[2], "answer": "keep"},
        {"case": cases[2], "answer": "drop"},
        {"case": cases[3], "answer": "skip"},
        {"case": case_of(row("a", "Another text.")), "answer": "drop"},
    )
    yours = saved(tmp_path / "you.jsonl", {"case": cases[0], "answer": "keep"}, {"case": cases[2], "answer": "drop"})
    assert decisions_about(rows, [mine]) == (
        {"a": Decision("drop"), "b": Decision("edit", "New."), "c": Decision("drop")},
        1,
    )
    assert decisions_about(rows, [mine, yours])[0]["a"].answer == "torn"
    assert decisions_about(rows, [mine, yours])[0]["c"].answer == "drop"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"case": "x", "answer": "keep"}\n', "None of the 1 decisions in .* is about the rows of this folder"),
        ('{"case": "x", "answer": "perhaps"}\n', "Line 1 of .* is no decision"),
        ('{"case": "x", "answer": "edit"}\n', "Line 1 of .* is no decision"),
        ("[]\n", "Line 1 of .* is no decision"),
        ("no JSON\n", "Line 1 of .* is no decision"),
        ("\n", "holds no decisions"),
    ],
)
def test_what_are_no_decisions_is_told(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(RecipeError, match=told):
        decisions_about([row("a")], [tmp_path / "x.jsonl"])


# ---- how many, and which --------------------------------------------------------------------------------------------


def scored_rows() -> list[CuratedRow]:
    numbers = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.7}
    return [row(name, scores={"match_mean": value, "length": 1 - value}) for name, value in numbers.items()] + [
        row("e")
    ]


def test_the_best_by_a_score() -> None:
    rows = scored_rows()
    assert taken(rows, keep=2, by="score") == ["b", "d"]
    assert taken(rows, keep=1, by="score", score="length") == ["a"]
    assert taken(rows, keep_share=0.8, by="score") == ["a", "b", "c", "d"]  # one without a score comes last
    assert taken(rows, keep=99, by="score") == ["a", "b", "c", "d", "e"]


def test_the_least_score() -> None:
    picked, reasons = pick(scored_rows(), Picks(min_score=0.5), no_features)
    assert [one.picture for one in picked] == ["b", "c", "d"]
    assert reasons == {"match_mean below 0.5": 2}


def test_a_score_that_is_not_there_is_told() -> None:
    with pytest.raises(RecipeError, match=r"no score 'judge'; they have match_mean, length\. Name one with --score"):
        taken(scored_rows(), by="score", keep=1, score="judge")
    with pytest.raises(RecipeError, match=r"no score that tells how good they are; they have length\."):
        taken([row("a", scores={"length": 3.0})], by="score")


def test_chance_has_a_seed_and_hangs_on_nothing_else() -> None:
    rows = [row(str(place)) for place in range(40)]
    first = taken(rows, keep=10)
    assert len(first) == 10 and first == taken(rows, keep=10) == sorted(first, key=int)
    assert first != taken(rows, keep=10, seed=1)
    assert set(first) <= set(taken(rows, keep=20))
    fewer = [one for one in rows if one.picture not in first[:3]]
    assert set(first[3:]) <= set(taken(fewer, keep=10))


def test_diverse_takes_one_of_every_kind_first() -> None:
    rng = np.random.default_rng(0)
    kinds = np.eye(4, dtype=np.float32)
    vectors = np.concatenate([kinds[[kind]] + 0.01 * rng.standard_normal((count, 4)).astype(np.float32)
                              for kind, count in enumerate((20, 5, 3, 1))])  # fmt: skip
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kind_of = [0] * 20 + [1] * 5 + [2] * 3 + [3]
    assert {kind_of[place] for place in most_different(vectors, 4)} == {0, 1, 2, 3}
    assert sorted(most_different(vectors, 29)) == list(range(29))
    rows = [row(str(place)) for place in range(29)]
    picked, reasons = pick(rows, Picks(keep=4, by="diverse"), lambda left: vectors)
    assert {kind_of[int(one.picture)] for one in picked} == {0, 1, 2, 3}
    assert reasons == {"not picked (diverse)": 25}


def test_equal_pictures_do_not_confuse_diverse() -> None:
    vectors = np.ones((5, 3), np.float32) / np.sqrt(3)
    assert sorted(most_different(vectors, 5)) == [0, 1, 2, 3, 4]


def test_features_come_back_as_they_were_pooled(tmp_path: Path) -> None:
    seen = torch.randn(2, 3, 8)
    rows = [row("a"), row("b")]
    stored = encode_features(seen)
    lines = [
        {"digest": one.picture, "text": one.draft, "features": text} for one, text in zip(rows, stored, strict=True)
    ]
    saved(tmp_path / "drafts.jsonl", *lines)
    wanted = torch.nn.functional.normalize(seen.mean(1), dim=-1).numpy()
    assert np.abs(read_features(tmp_path, rows) - wanted).max() < 1e-3
    with pytest.raises(RecipeError, match=r"1 of 3 pictures have no features.*choose --by score or --by random"):
        read_features(tmp_path, [*rows, row("c")])


def test_describing_leaves_features(tmp_path: Path, curate_tiny: Callable) -> None:
    folder = curate_tiny("--num_samples", "6")
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    vectors = read_features(folder, [CuratedRow(**line) for line in lines])
    assert vectors.shape[0] == len(lines) > 3 and np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3)
    assert np.abs(vectors @ vectors.T - 1).max() > 1e-3  # the pictures differ
