"""Reports of `minigpt4 evaluate`: tables beside the paper's, replies with pictures, and numbers in model cards."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from hub_server import HubServer
from huggingface_hub import ModelCard
from stored_replies import store_replies

from recipes_minigpt4 import cli
from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.paper import CLAIMS, MODELS, compare, paper_labels
from recipes_minigpt4.evaluation.run_facts import keep_facts
from recipes_minigpt4.evaluation.speakers import revision_of
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.utils.errors import RecipeError


GOOD = "A dog plays with a red ball."
CUT = "A dog plays with a"  # unfinished
COUNT = 12


def run(folder: Path, *options: object) -> dict[str, Any]:
    arguments = ["--from_replies", "--output_dir", folder, "--resamples", "50", *options]
    return evaluate.main([str(text) for text in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Replies of two models: after stage 1 all fail but the last, after stage 2 the first alone."""
    said = {"stage1": [CUT] * (COUNT - 1) + [GOOD], "stage2": ["<b>A cut</b> &"] + [GOOD] * (COUNT - 1)}
    store_replies(tmp_path, SUITES["failures"](), said)
    return tmp_path


# ---- beside the paper -----------------------------------------------------------------------------------------------


def numbers_of(ours: float, theirs: float, low: float, high: float, pictures: int = 100) -> dict[str, Any]:
    """Those of a suite with two models; the interval is that of the second less the first."""
    models = {"stage2": {"detailed": {"value": ours}}, "stage1": {"detailed": {"value": theirs}}}
    difference = {"value": theirs - ours, "low": low, "high": high}
    return {
        "pictures": pictures,
        "measures": {"detailed": {"title": "failures", "style": "{:.1%}"}},
        "models": models,
        "differences": {"stage1 - stage2": {"detailed": difference}},
    }


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        (numbers_of(0.1, 0.5, 0.3, 0.5), "agrees"),  # the paper has fewer failures after stage 2 as well
        (numbers_of(0.5, 0.1, -0.5, -0.3), "differs"),
        (numbers_of(0.1, 0.2, -0.1, 0.3), "no clear difference"),
        (numbers_of(0.1, 0.1, 0.0, 0.0), "no clear difference"),
        (numbers_of(0.1, 0.5, 0.3, 0.5, pictures=9), "not comparable"),
    ],
)
def test_verdicts(numbers: dict[str, Any], verdict: str) -> None:
    (row,) = compare({"failures": numbers}, {"stage2": "stage2", "stage1": "stage1"})
    assert row["verdict"] == verdict
    assert row["difference"]["value"] == pytest.approx(row["here"][0] - row["here"][1])


def test_a_model_that_is_not_there_is_not_compared() -> None:
    (row,) = compare({"failures": numbers_of(0.1, 0.5, 0.3, 0.5)}, {"stage2": "stage2"})
    assert (row["verdict"], row["missing"], row["here"]) == ("not comparable", ["stage1"], [0.1, None])


def test_claims_are_about_measures_that_there_are() -> None:
    for claim in CLAIMS:
        assert claim.other in MODELS
        assert claim.suite not in SUITES or claim.measure in SUITES[claim.suite].measures, claim


def test_labels_by_convention_and_by_option() -> None:
    labels = ["ours", "BLIP2-ft", "mine", "b2"]
    assert paper_labels([], labels) == {"stage2": "ours", "blip2_ft": "BLIP2-ft"}
    told = paper_labels(["stage2=mine", "blip2=b2"], labels)
    assert told == {"stage2": "mine", "blip2_ft": "BLIP2-ft", "blip2": "b2"}
    with pytest.raises(RecipeError, match="names no model of the paper; it has stage2, stage1, blip2"):
        paper_labels(["gpt4=mine"], labels)
    with pytest.raises(RecipeError, match="names no label of a model here; there are ours, BLIP2-ft, mine, b2"):
        paper_labels(["blip2=blip"], labels)


def test_the_option_names_models(tmp_path: Path) -> None:
    store_replies(tmp_path, SUITES["failures"](), {"a": [CUT] * COUNT, "b": [GOOD] * COUNT})
    assert {row["verdict"] for row in run(tmp_path)["paper"]} == {"not comparable"}
    rows = run(tmp_path, "--paper_labels", "stage1=a", "stage2=b")["paper"]
    assert [(row["measure"], row["verdict"]) for row in rows] == [
        ("detailed", "agrees"),
        ("poem", "no clear difference"),  # a poem may end anywhere, so nobody fails
    ]


# ---- the report -----------------------------------------------------------------------------------------------------


def test_the_tables_of_a_report(folder: Path, capsys) -> None:
    store_replies(folder, SUITES["coverage"](), {"stage1": ["A dog."], "stage2": ["A cat."]})
    keep_facts(folder, {"stage1": "runs/one", "stage2": "runs/two"}, {"failures": "photos"}, num_samples=12, seed=3)
    results = run(folder)
    table = (folder / "table.md").read_text(encoding="utf-8")
    page = (folder / "report.html").read_text(encoding="utf-8")
    told = capsys.readouterr().out
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert "| stage2 | 8.3% (" in table and "| stage1 | 91.7% (" in table
    assert re.search(r"\| stage2 − stage1 \| -83\.3% \(-\d", table)
    claim = "Table 3, failures: failures, detailed"
    assert f"| {claim} | agrees | stage 1 alone | 2.0% / 35.0% | 8.3% / 91.7% |" in table
    assert f'<td data-title="">{claim}</td><td data-title="verdict">agrees</td>' in page
    for text in (table, page):
        assert "coverage: it needs a judge: name one with --judge" in text
        assert "Models: stage1: runs/one; stage2: runs/two. Data: failures: photos." in text
        assert "At most 12 rows of each, drawn with seed 3." in text
    assert "of 2 comparisons 1 agrees, 1 no clear difference" in told and "coverage: no numbers" in told


def test_worst_and_best_replies_stand_with_their_pictures(folder: Path) -> None:
    run(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    worst, best = (page.index(f"<h3>{which} replies of stage2</h3>") for which in ("Worst", "Best"))
    articles = re.findall(r"<article>.*?</article>", page, re.DOTALL)
    assert len(articles) == 6 and worst < page.index(articles[0]) < best < page.index(articles[3])
    assert "&lt;b&gt;A cut&lt;/b&gt; &amp;" in articles[0] and "stage2 · failures, detailed 100.0%" in articles[0]
    assert all("stage2 · failures, detailed 100.0%" not in article for article in articles[1:])
    assert all(article.count("data:image/jpeg;base64,") == 1 for article in articles)
    assert all(CUT in article or GOOD in article for article in articles)
    assert not re.search(r'(?:src|href)="http', page)


def test_a_report_without_pictures_names_them(folder: Path) -> None:
    shutil.rmtree(folder / "pictures")
    run(folder)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "data:image" not in page and '<p class="soft">picture 0</p>' in page


def test_judges_are_told(folder: Path) -> None:
    captions = ("a dog", "a red ball")
    store_replies(folder, SUITES["coverage"](), {"stage1": ["A dog."] * 3, "stage2": [GOOD] * 3}, captions)
    stub = folder / "stub.jsonl"
    answers = [
        {"match": "Test: A dog plays", "answer": "1: yes 2: yes"},
        {"match": ".", "answer": "1: yes 2: perhaps"},
    ]
    stub.write_text("".join(json.dumps(answer) + "\n" for answer in answers), encoding="utf-8")
    run(folder, "--judge", f"stub:{stub}", "--judge_repeats", "2", "--suites", "coverage")
    page = (folder / "report.html").read_text(encoding="utf-8")
    judge = re.search(r"The numbers are those of (stub:\S+)\.</p>", page)
    assert judge is not None
    assert f"{judge[1]}: 3 answers unread and counted nowhere else." in page
    assert f"{judge[1]}, asked several times, says the same in 100.0% of pairs of answers." in page


@pytest.mark.browser
def test_a_report_fits_a_telephone(folder: Path, browser: Browser) -> None:
    run(folder)
    browser.resize(400, 800, dark=True)
    browser.open(folder / "report.html")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400


# ---- cards ----------------------------------------------------------------------------------------------------------

CARD = """---
license: mit
tags:
- mine
my_own_field: 7
model-index:
- name: champion
  results:
  - task: {type: image-text-to-text}
    dataset: {type: else, name: something else}
    metrics: [{type: accuracy, value: 0.5}]
---

# A champion

Its text stays.
"""


@pytest.fixture
def model(ours: str, tmp_path: Path) -> Path:
    """A folder of ours, whose replies lie beside it."""
    folder = Path(shutil.copytree(ours, tmp_path / "adapter"))
    (folder / "README.md").unlink(missing_ok=True)
    revision = revision_of(str(folder), None)
    store_replies(tmp_path, SUITES["failures"](), {"ours": [CUT] * 3 + [GOOD] * 9}, revision=revision)
    keep_facts(tmp_path, {"ours": str(folder)}, {"failures": "/home/somebody/photos"})
    return folder


def metrics_of(card: ModelCard) -> dict[tuple[str, str | None, str], float]:
    return {
        (one.dataset_type, one.dataset_config, one.metric_type): one.metric_value for one in card.data.eval_results
    }


def test_numbers_go_into_the_card_and_all_else_stays(model: Path, tmp_path: Path, capsys) -> None:
    (model / "README.md").write_text(CARD, encoding="utf-8")
    for _ in range(2):  # the second time they replace themselves
        run(tmp_path, "--write_card", "ours")
    assert f"The numbers of ours are in its card: {model / 'README.md'}" in capsys.readouterr().out
    card = ModelCard.load(model / "README.md")
    assert (card.data.license, card.data.tags, card.data.my_own_field) == ("mit", ["mine"], 7)
    assert card.data.model_name == "champion"
    metrics = metrics_of(card)
    assert metrics["else", None, "accuracy"] == 0.5
    assert metrics["photos", "failures", "detailed"] == 0.25 and metrics["photos", "failures", "poem"] == 0.0
    assert len(metrics) == len(card.data.eval_results) == 1 + len(SUITES["failures"].measures)
    detailed = next(one for one in card.data.eval_results if one.metric_type == "detailed")
    assert detailed.metric_args["low"] <= 0.25 <= detailed.metric_args["high"]
    assert detailed.dataset_args == {"pictures": 12}
    assert "Its text stays." in card.text
    assert card.text.count("| failures: failures, detailed | 25.0% (") == 1
    assert "/home" not in str(card)


def test_a_push_keeps_the_numbers(model: Path, tmp_path: Path, hub: HubServer) -> None:
    run(tmp_path, "--write_card", "ours")  # the folder had no card, and gets this project's
    before = ModelCard.load(model / "README.md")
    assert before.data.license == "other" and "No measurements were given" not in before.text
    assert "# adapter\n" in before.text and "## Limits" in before.text
    assert cli.main(["push", str(model), "you/adapter"]) == 0
    card = ModelCard(hub.files("you/adapter")["README.md"].decode())
    assert metrics_of(card) == metrics_of(before) and metrics_of(card)["photos", "failures", "detailed"] == 0.25
    assert 'from_pretrained("you/adapter")' in card.text


def test_cards_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--write_card mine is no label of a model; there are ours"):
        run(tmp_path, "--write_card", "mine")
    keep_facts(tmp_path, {"far": "owner/name"}, {})
    with pytest.raises(RecipeError, match=r"writes into the README\.md of a folder, and owner/name is none"):
        run(tmp_path, "--write_card", "far")
    (model / "README.md").write_text("---\n- a list\n---\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"The card .*README\.md cannot be changed"):
        run(tmp_path, "--write_card", "ours")
    (model / "README.md").unlink()
    (model / "generation_config.json").write_text("{}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="replies of ours are not those of the weights that are in"):
        run(tmp_path, "--write_card", "ours")
    assert not (model / "README.md").exists()
