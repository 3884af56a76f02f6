"""Curation in the embedded world, where truth is known: the scripted mender, what is counted, and the study itself."""

import json
import math
import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from chat_models import save_ours

from recipes_minigpt4.curation import curate, study
from recipes_minigpt4.curation.describe import Draft
from recipes_minigpt4.curation.matching import open_matcher
from recipes_minigpt4.curation.mend import Mending
from recipes_minigpt4.curation.rows import CuratedRow, read_rows
from recipes_minigpt4.curation.rules import RULES
from recipes_minigpt4.curation.scripted_mender import MANNERS, mend, tidy
from recipes_minigpt4.curation.source import scenes_of
from recipes_minigpt4.curation.truth import defects, false_share, is_flawless, statements
from recipes_minigpt4.evaluation.speakers import SpeakerOptions
from recipes_minigpt4.tiny.metrics import is_failure
from recipes_minigpt4.tiny.scenes import Scene, Thing, describe, draw_scene
from recipes_minigpt4.utils.errors import RecipeError


HEART, CROSS = Thing("large", "green", "heart", "top", "left"), Thing("small", "red", "cross", "bottom", "centre")
SCENE = Scene((HEART, CROSS), "grey")
OPENING, END = "The image shows two coloured shapes on a grey background.", "The rest of the image is empty."
TRUE = f"{OPENING} A large green heart sits in the top left of the image. {END}"
COUNT = 24  # scenes of the miniature


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on the embedded world's parts, whose projection is new."""
    return Path(save_ours(tmp_path_factory.mktemp("stage1")))


# ---- the mender -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "draft, mended",
    [
        (f"{TRUE} {OPENING} In the top left there is a large green heart. {END}", TRUE),
        (f"a green heart {TRUE} A green heart on a grey background.", TRUE),
        (f"{TRUE} In the bottom centre there is", TRUE),
        (
            "a blue star at the top left and an orange cross at the centre a blue star at the top left",
            "There is a blue star in the top left. There is an orange cross in the centre.",
        ),
        ("A green heart sits in the top left. A red heart sits in the top left.", None),
    ],
    ids=["again", "line in front", "broken off", "line alone", "contradiction"],
)
def test_the_mender_tidies_and_cannot_know_what_is_false(draft: str, mended: str | None) -> None:
    assert tidy(draft) == (mended or draft)
    assert not is_failure(tidy(draft))


def test_every_manner_of_the_mender_is_found_by_its_rule_or_by_none(tmp_path: Path) -> None:
    mender = curate.open_mender(curate.parse(["--model", "m", "--dataset_name", "tiny", "--mender", "tiny"]), tmp_path)
    drafts = [describe(scene, random.Random(place)) for place, scene in enumerate(scenes_of(3, 400))]
    requests = [Mending("Mend this.").request(draft) for draft in drafts]
    answers = {place: answer.text for place, answer in mender.ask(requests)}
    assert [answers[place] for place in range(400)] == [mend(request).text for request in requests]
    manners = Counter(mend(request).manner for request in requests)
    assert set(manners) == set(MANNERS) and 0.45 < manners["mended"] / 400 < 0.63


# ---- what is true ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sentence, right",
    [
        ("A large green heart sits in the top left of the image.", [True]),
        ("A green heart and a red cross on a grey background.", [True]),
        ("A green heart sits in the top right.", [False]),
        ("There is a small green heart.", [False]),
        ("There is a red heart.", [False]),
        ("The image shows one coloured shape.", [False]),
        ("The picture has a white background.", [False]),
        ("Nothing else can be seen.", []),
        (f"There is a tiny red cross. {END} There is a pink cross.", [True, False]),
    ],
)
def test_every_claim_of_a_sentence_is_checked(sentence: str, right: list[bool]) -> None:
    assert statements(sentence, SCENE) == right


def test_careful_descriptions_have_no_fault_and_those_of_other_scenes_do() -> None:
    scenes = scenes_of(0, 60)
    texts = [describe(scene, random.Random(place)) for place, scene in enumerate(scenes)]
    assert false_share(texts, scenes) == 0
    assert false_share(texts, scenes[1:] + scenes[:1]) > 0.9
    rows = [CuratedRow("0", "0", "0.png", text, True, text, text) for text in texts]
    assert all(is_flawless(row, "mended", scene) for row, scene in zip(rows, scenes, strict=True))


@pytest.mark.parametrize(
    "text, manner, wanted",
    [
        (TRUE, "mended", set()),
        (f"{TRUE} In the top left there is a large green heart.", "left as it was", {"repetition"}),
        (f"a red cross {TRUE}", "left as it was", {"unfinished"}),
        ("There is a red cross.", "mended", {"short"}),
        (f'"{TRUE}"', "quotes", {"preamble"}),
        ("", "nothing", {"unmended"}),
    ],
)
def test_texts_have_the_defects_that_rules_are_there_for(text: str, manner: str, wanted: set[str]) -> None:
    assert defects(CuratedRow("0", "0", "0.png", "Draft.", False, text, text or None), manner) == wanted


# ---- the score ------------------------------------------------------------------------------------------------------


def test_a_model_of_stage_1_scores_sentences_against_other_pictures(stage1: Path) -> None:
    pictures = [draw_scene(scene) for scene in scenes_of(0, 3)]
    options = SpeakerOptions("cpu", "auto", 3)
    matcher = open_matcher(str(stage1), options, lambda: pictures[:1])
    same, other, none = matcher.match(pictures, [[OPENING, END], [OPENING], []])
    assert same == pytest.approx([0, 0], abs=1e-5) and none == []
    (back,) = open_matcher(str(stage1), options, lambda: pictures[1:2]).match(pictures[:1], [[OPENING]])
    assert other[0] != 0 and back == pytest.approx([-other[0]], abs=1e-5)
    assert matcher.revision != open_matcher(str(stage1), options, lambda: pictures[1:2]).revision


# ---- the study ------------------------------------------------------------------------------------------------------


class Teller:
    """Describes scenes twice, each with a fault in its colours if it is one of every four."""

    made = revision = "teller"

    def __init__(self) -> None:
        self.scenes = {draw_scene(scene).tobytes(): (place, scene) for place, scene in enumerate(scenes_of(0, COUNT))}

    def load(self) -> None:
        """There is nothing to load."""

    def describe(self, pictures: Sequence[PIL.Image.Image]) -> list[Draft]:
        return [self._draft(*self.scenes[picture.tobytes()]) for picture in pictures]

    def _draft(self, place: int, scene: Scene) -> Draft:
        text = describe(scene, random.Random(place))
        if place % 4 == 0:
            text = text.replace(scene.things[0].colour, "pink" if scene.things[0].colour != "pink" else "blue")
        return Draft(f"{text} {text}", 40, True)


@pytest.fixture
def run(stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run()`: the study in miniature."""
    monkeypatch.setattr(curate, "open_describer", lambda *_: Teller())
    sizes = {"num_samples": COUNT, "rows": 4, "max_steps": 2, "batch_size": 2, "num_scenes": 2}
    told = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    arguments = ["--model", str(stage1), "--output_dir", str(tmp_path / "study"), "--seeds", "0", *told]
    return lambda: study.main(arguments)


def test_the_study_counts_what_is_known_and_goes_on_where_it_was(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run()
    stages = {name: {key: one["mean"] for key, one in told.items()} for name, told in results["stages"].items()}
    assert stages["drafts"]["failure_rate"] == 1 and stages["drafts"]["rows"] == COUNT
    assert 0 < stages["drafts"]["false_share"] < 0.25
    assert stages["filtered"]["failure_rate"] < stages["mended"]["failure_rate"] < 1
    assert stages["mended"]["rows"] > stages["filtered"]["rows"] > 0
    rows = read_rows(tmp_path / "study" / "seed-0" / "curated")
    assert results["rules"]["all"]["refused"] == sum(bool(row.verdicts) for row in rows)
    assert set(results["rules"]) >= set(RULES)
    sizes = {name: told["rows"]["mean"] for name, told in results["trained"].items()}
    fifth = math.ceil(stages["filtered"]["rows"] / 5)
    assert sizes == {
        **dict.fromkeys(("drafts", "mended", "filtered", "best by score", "true descriptions"), 4),
        **{"5% by score": 1, "5% by random": 1, "20% by score": fifth, "20% by random": fifth},
        "100%": stages["filtered"]["rows"],
    }
    written = (tmp_path / "study" / "tables.md").read_text()
    assert all(name in written for name in (*RULES, "true descriptions", "stage 1 alone"))
    monkeypatch.setattr(study.stage2_finetune, "main", lambda *_: pytest.fail("it is trained again"))
    assert run() == results == json.loads((tmp_path / "study" / "results.json").read_text())


def test_a_study_without_a_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="run `minigpt4 demo`"):
        study.main(["--model", str(tmp_path), "--output_dir", str(tmp_path / "study")])


@pytest.mark.slow
@pytest.mark.skipif("MENDER_FOLDER" not in os.environ, reason="MENDER_FOLDER names no folder of a chat model")
def test_a_real_language_model_mends(stage1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as SmolLM2-135M-Instruct: every draft is answered and judged, and a second start asks nothing."""
    monkeypatch.setattr(curate, "open_describer", lambda *_: Teller())
    arguments = {"model": stage1, "match": stage1, "num_samples": 3, "output_dir": tmp_path / "curated"}
    arguments |= {"mender": f"local:{os.environ['MENDER_FOLDER']}", "mender_device": "cpu", "mend_max_tokens": 80}
    told = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    funnel = curate.main(["--config", "tiny_curate", *told])
    assert funnel.described == funnel.mended == 3
    written = [tmp_path / "curated" / name for name in ("mended.jsonl", "rows.jsonl")]
    before = [path.read_text() for path in written]
    for row in read_rows(tmp_path / "curated"):
        assert row.text and row.scores["match_mean"] == row.scores["match_mean"]
        print(f"\n{row.draft}\n→ {row.mended}\n  {row.verdicts}")
    curate.main(["--config", "tiny_curate", *told])
    assert [path.read_text() for path in written] == before
