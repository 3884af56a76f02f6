"""Suites over scenes, where what is true is known: who tells the truth has every point, who lies has none."""

import json
import random
from pathlib import Path

import pytest

from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.replies import Said
from recipes_minigpt4.tiny.scenes import Scene, describe, evaluation_scenes


COUNT = 12
TRUE = {"coverage": {"covered": 5.0, "first_covered": 1.0}, "chair": {"chair_i_long": 0.0, "recall_long": 1.0}}
FALSE = {"coverage": {"covered": 0.0, "first_covered": 0.0}, "chair": {"chair_i_long": 1.0, "recall_long": 0.0}}


class Teller:
    """Describes another scene than it is shown, or the same one."""

    def __init__(self, step: int) -> None:
        self.revision, self.step = str(step), step
        self.scenes: dict[bytes, Scene] = {
            image.tobytes(): scene for image, scene in evaluation_scenes(COUNT, COUNT // 3)
        }

    def answer(self, questions, pictures) -> list[Said]:
        return [Said(describe(self._scene(picture), random.Random(0)), True) for picture in pictures]

    def _scene(self, picture) -> Scene:
        shown = self.scenes[picture.tobytes()]
        if not self.step:
            return shown
        there = {thing.pair for thing in shown.things}
        return next(other for other in self.scenes.values() if not there & {thing.pair for thing in other.things})


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict:
    monkeypatch.setattr(evaluate, "open_speaker", lambda name, options: Teller(int(name)))
    suites = ["coverage", "failures", "chair", "captions"]
    models = ["--models", "true=0", "false=1", "--num_samples", str(COUNT), "--output_dir", str(tmp_path / "out")]
    return evaluate.main(["--config", "tiny_evaluate", *models, "--suites", *suites])


@pytest.mark.parametrize("label, expected", [("true", TRUE), ("false", FALSE)])
def test_the_truth_has_every_point_and_a_lie_has_none(results: dict, label: str, expected: dict) -> None:
    for suite, measures in expected.items():
        told = results["suites"][suite]["models"][label]
        for measure, value in measures.items():
            assert told[measure]["value"] == pytest.approx(value), (suite, measure)


def test_a_sound_text_is_no_failure_whether_true_or_not(results: dict) -> None:
    for told in results["suites"]["failures"]["models"].values():
        assert told["detailed"]["value"] == 0


def test_judges_are_compared_with_the_truth(results: dict) -> None:
    """The rule that counts words sees no places, so that it cannot agree with the truth everywhere."""
    (pair,) = results["suites"]["coverage"]["judges"]["agreement"]
    assert {pair["one"], pair["other"]} == {"truth", "words"} and 0.5 < pair["same"] < 1 and pair["kappa"] > 0


def test_models_are_compared_on_the_same_scenes(results: dict) -> None:
    gap = results["suites"]["chair"]["differences"]["false - true"]["chair_i_long"]
    assert gap["value"] == 1 and gap["low"] == gap["high"] == 1


def test_every_suite_runs_on_models(ours: str, blip2: str, tmp_path: Path) -> None:
    arguments = ["--config", "tiny_evaluate", "--models", f"untrained={ours}", f"blip2={blip2}", "--num_samples", "3"]
    evaluate.main([*arguments, "--output_dir", str(tmp_path / "out")])
    told = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]
    assert list(told) == ["coverage", "failures", "chair", "aokvqa", "gqa", "pope", "captions"]
    for name, numbers in told.items():
        assert numbers["pictures"] == 3
        for of_model in numbers["models"].values():
            assert any(measure["value"] is not None for measure in of_model.values()), name
    assert 0 <= told["aokvqa"]["models"]["blip2"]["likelihood"]["value"] <= 1
