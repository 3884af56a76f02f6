"""`--eval_suites`: what a model says on a few held-out rows, at every evaluation of a run."""

from collections.abc import Callable

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from recipes_minigpt4 import stage2_finetune
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.evaluation_split import load_evaluation_pairs
from recipes_minigpt4.evaluation.while_training import SuitesOnRows
from recipes_minigpt4.utils.errors import RecipeError


SPLITS = {"dataset_split": "train[:6]", "eval_split": "train[6:]"}
WATCHED = {"eval_strategy": "steps", "eval_steps": 1, "eval_suites": "failures captions", "eval_suite_rows": 2}


@pytest.fixture
def run(stage: Callable) -> Callable:
    """Arguments of stage 2 on the first six pairs, evaluated on the other two; keywords are fields."""

    def build(**fields: object) -> list[str]:
        arguments = stage(**{**SPLITS, **WATCHED, "chat_template": "vicuna_v0", **fields})
        return [part for text in arguments for part in (text.split() if text == WATCHED["eval_suites"] else [text])]

    return build


def test_measures_are_those_of_the_model_at_each_step(run: Callable, stage: Callable) -> None:
    """The last are what the saved model gives."""
    trainer = stage2_finetune.main(run())
    told = [entry for entry in trainer.state.log_history if "eval_failures_detailed" in entry]
    assert [entry["step"] for entry in told] == [1, 2]
    folder = trainer.args.output_dir
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    arguments = DataArguments(dataset_name=[stage()[stage().index("--dataset_name") + 1]], **SPLITS)
    pairs = load_evaluation_pairs(arguments, 2)
    again = SuitesOnRows(["failures", "captions"], pairs, 2).measure(model.eval(), processor)
    assert {name: told[-1][f"eval_{name}"] for name in again} == pytest.approx(again)
    assert again["captions_mean_words"] > 0


def test_training_goes_on_as_if_nothing_had_been_asked(run: Callable) -> None:
    asked = stage2_finetune.main(run())
    plain = stage2_finetune.main(run(output="plain", eval_suites=None, eval_suite_rows=None))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (asked, plain)]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("metric, better", [("captions_rouge_l", True), ("failures_detailed", False), ("loss", False)])
def test_a_checkpoint_can_be_the_best_in_a_measure(run: Callable, metric: str, better: bool) -> None:
    settings = {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "metric_for_best_model": metric,
    }
    trainer = stage2_finetune.main(run(**settings))
    told = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    assert trainer.args.greater_is_better is better
    assert trainer.state.best_metric == pytest.approx(max(told) if better else min(told))


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"eval_suites": "chair"}, "names chair; while a run trains, failures and captions can be computed"),
        ({"eval_strategy": None, "eval_steps": None, "eval_split": None}, "no data to evaluate on"),
        ({"metric_for_best_model": "captions_mean_words"}, "is 'captions_mean_words'; the suites tell failures_"),
        ({"eval_suite_rows": 0}, "--eval_suite_rows is 0; it has to be a whole number from 1 on"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run: Callable, fields: dict, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        stage2_finetune.main(run(**fields))
