"""BLIP-2 trained the ordinary way on the stages' rows: what moves, what carries loss, how it is asked afterwards."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from recipes_minigpt4.data.formatting import INSTRUCTIONS
from recipes_minigpt4.evaluation import blip2
from recipes_minigpt4.evaluation.blip2 import Collator, tiny_blip2
from recipes_minigpt4.evaluation.speakers import SpeakerOptions, open_speaker
from recipes_minigpt4.utils.errors import RecipeError


@pytest.fixture
def train(tmp_path: Path, pairs_file: Path) -> Callable:
    """Train for two steps; keywords are options."""

    def run(output: str = "run", **fields: object):
        settings = {
            "model_name_or_path": "tiny", "dataset_name": pairs_file, "output_dir": tmp_path / output, "max_steps": 2,
            "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", **fields,
        }  # fmt: skip
        return blip2.main([text for name, value in settings.items() for text in (f"--{name}", *str(value).split(" "))])

    return run


def moved(model: torch.nn.Module) -> set[str]:
    """Parts that are not what they were."""
    before = dict(tiny_blip2()[0].named_parameters())
    changed = [name for name, value in model.named_parameters() if not torch.equal(value, before[name])]
    return {name.split(".")[0] for name in changed}


@pytest.mark.parametrize("parts", [{"language_projection"}, {"language_projection", "qformer", "query_tokens"}])
def test_what_is_named_trains_and_nothing_else(train: Callable, parts: set[str]) -> None:
    assert moved(train(train_parts=" ".join(sorted(parts))).model) == parts


@pytest.mark.parametrize("stage", [1, 2])
def test_only_the_answer_and_its_end_carry_loss(stage: int, pictures: list) -> None:
    _, processor = tiny_blip2()
    rows = [
        {"image": picture, "text": text} for picture, text in zip(pictures, ("a red star", "a heart"), strict=False)
    ]
    batch = Collator(processor, stage, blip2.QUESTION, 32)(rows)
    for ids, labels, mask, row in zip(
        *(batch[name] for name in ("input_ids", "labels", "attention_mask")), rows, strict=True
    ):
        scored = ids[labels != -100]
        assert processor.tokenizer.decode(scored[:-1]).strip() == row["text"]
        assert int(scored[-1]) == processor.tokenizer.eos_token_id and (labels[mask == 0] == -100).all()
        prompt = processor.tokenizer.decode(ids[(labels == -100) & (mask == 1)], skip_special_tokens=True).strip()
        known = {f"Question: {text} Answer:" for text in INSTRUCTIONS}
        assert prompt in known if stage == 2 else prompt.replace("<image>", "") == ""
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum() == 2 * 16


def test_what_was_trained_is_asked_as_it_was_trained(train: Callable, tmp_path: Path, ask_about: Callable) -> None:
    for stage, written in ((1, ""), (2, "Question: What? Answer:")):
        train(f"stage{stage}", stage=stage)
        speaker = open_speaker(str(tmp_path / f"stage{stage}"), SpeakerOptions("cpu", "float32"))
        (question,) = ask_about("What?")
        assert speaker.written(question) == written
        assert speaker.answer([question], [question.picture.open()])[0].finished is not None


def test_a_run_goes_on_from_another(train: Callable, tmp_path: Path) -> None:
    first = train("first", stage=1).model
    second = train("second", model_name_or_path=tmp_path / "first").model
    stored = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "first")
    assert torch.equal(stored.language_projection.weight, first.language_projection.weight)
    assert not torch.equal(second.language_projection.weight, first.language_projection.weight)


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"train_parts": "projector"}, "names 'projector', which BLIP-2 does not have; it has query_tokens, "),
        ({"stage": 3}, "--stage is 3; it has to be 1 or 2"),
        ({"model_name_or_path": "nowhere"}, "nowhere cannot be loaded as BLIP-2"),
        ({"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"streaming": True}, "leave --streaming and tar files out"),
    ],
)
def test_mistakes_are_told_in_a_sentence(train: Callable, fields: dict, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        train(**fields)
