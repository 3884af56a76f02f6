"""transformers' own Trainer: what it trains on, what it evaluates, and what it does to embeddings."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch.nn import functional as F
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration


WITH_PICTURE, TEXT = [1, 5, "image", 9, 7], [1, 5, 9, 7]


@pytest.fixture
def model(make_model) -> MiniGPT4ForConditionalGeneration:
    model = make_model()
    model.freeze_backbones()
    return model


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., TrainingArguments]:
    def build(kind: type = TrainingArguments, **fields: Any) -> TrainingArguments:
        defaults = {
            "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", "remove_unused_columns": False, "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 2, "logging_steps": 1, "max_grad_norm": 1e9,
        }  # fmt: skip
        return kind(**{**defaults, **fields})

    return build


@pytest.fixture
def collate(model, make_inputs) -> Callable[[list], dict[str, torch.Tensor]]:
    def batch(rows: list) -> dict[str, torch.Tensor]:
        inputs = make_inputs(model, rows, padding_side="right")
        ignored = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
        return {**inputs, "labels": inputs["input_ids"].masked_fill(ignored, -100)}

    return batch


def gradients(model: MiniGPT4ForConditionalGeneration) -> dict[str, torch.Tensor | None]:
    return {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}


# ---- batches without pictures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_rows_train_one_by_one(model, arguments, collate, checkpointing: bool) -> None:
    args = arguments(max_steps=4, lr_scheduler_type="constant")
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = model.model.language_projection.weight.clone()
    trainer = Trainer(model, args, data_collator=collate, train_dataset=[TEXT, WITH_PICTURE, TEXT, TEXT])
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert sorted(norms)[:3] == [0, 0, 0] and sorted(norms)[3] > 0
    assert not torch.equal(before, model.model.language_projection.weight)


@pytest.mark.parametrize("train", [[], ["qformer"], ["vision", "qformer"]])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_text_has_a_gradient_of_nought_for_all_that_waits_for_one(
    make_model, make_inputs, train: list[str], layers: int
) -> None:
    model = make_model(projector_num_layers=layers)
    model.freeze_backbones(train=train)
    inputs = make_inputs(model, [TEXT])
    evaluated = model(**inputs, labels=inputs["input_ids"])
    assert not evaluated.loss.requires_grad
    model.train()
    trained = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(trained.logits, evaluated.logits)
    trained.loss.backward()
    reached = [name for name, gradient in gradients(model).items() if gradient is not None]
    assert all(not gradients(model)[name].any() for name in reached)
    with_picture = make_inputs(model, [WITH_PICTURE])
    model.zero_grad()
    model(**with_picture, labels=inputs["input_ids"].new_full(with_picture["input_ids"].shape, 3)).loss.backward()
    assert reached == [name for name, gradient in gradients(model).items() if gradient is not None]


def test_an_adapter_learns_from_text_and_the_projection_does_not(make_model, make_inputs) -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    model.freeze_backbones()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    inputs = make_inputs(model, [TEXT])
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = gradients(model)
    assert all(gradient is not None for gradient in found.values())
    assert any(gradient.any() for name, gradient in found.items() if "lora_" in name)
    assert not any(gradient.any() for name, gradient in found.items() if "language_projection" in name)


# ---- noise on embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [[], ["language_model"]])
def test_neftune_moves_text_embeddings_while_training(model, arguments, collate, train: list[str]) -> None:
    model.freeze_backbones(train=train)
    alpha, seen = 5.0, []
    decoder, table = model.language_model, model.get_input_embeddings().weight.detach().clone()
    decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    args = arguments(max_steps=1, learning_rate=0.0, neftune_noise_alpha=alpha, eval_strategy="steps", eval_steps=1)
    trainer = Trainer(model, args, data_collator=collate, train_dataset=[WITH_PICTURE], eval_dataset=[WITH_PICTURE])
    trainer.train()
    trainer.model.train()
    model(**collate([WITH_PICTURE]))
    (trained, evaluated, afterwards) = (embeddings[0] for embeddings in seen)
    ids = collate([WITH_PICTURE])["input_ids"][0]
    text = ids != model.config.image_token_id
    noise = trained[text] - table[ids[text]]
    assert 0 < noise.abs().max() <= alpha / math.sqrt(trained.numel())
    assert torch.equal(trained[~text], evaluated[~text])
    for clean in (evaluated, afterwards):
        assert torch.equal(clean[text], table[ids[text]])


@torch.no_grad()
def test_replies_that_are_written_while_training_have_no_noise(make_model, make_inputs) -> None:
    model = make_model()
    inputs = make_inputs(model, [WITH_PICTURE])
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    model.freeze_backbones()
    model.train()
    model.get_input_embeddings().neftune_noise_alpha = 1000.0
    assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


# ---- evaluation -----------------------------------------------------------------------------------------------------


def test_predictions_are_logits_alone(model, arguments, collate) -> None:
    rows = [WITH_PICTURE, WITH_PICTURE, TEXT]
    trainer = Trainer(model, arguments(), data_collator=collate)
    found = trainer.predict(rows)
    batch = collate(rows[:2])
    assert found.predictions.shape == (3, batch["input_ids"].shape[1], model.config.text_config.vocab_size)
    with torch.no_grad():
        expected = model(**batch).logits
    assert_close(torch.from_numpy(found.predictions[:2]), expected)


def test_preprocessing_of_predictions_gets_the_logits(model, arguments, collate) -> None:
    trainer = Trainer(
        model, arguments(), data_collator=collate,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip
    assert trainer.predict([WITH_PICTURE] * 2).predictions.dtype.kind == "i"


def test_metrics_are_computed_from_the_logits_of_all_tokens(model, arguments, collate) -> None:
    def measure(found: EvalPrediction) -> dict[str, float]:
        logits, labels = torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids)
        assert logits.shape == (*labels.shape, model.config.text_config.vocab_size)
        scores = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
        return {"sum": scores.sum().item()}

    rows = [WITH_PICTURE, TEXT, WITH_PICTURE]
    trainer = Trainer(model, arguments(), data_collator=collate, eval_dataset=rows, compute_metrics=measure)
    with torch.no_grad():
        single = [(model(**batch).loss, batch["labels"]) for batch in (collate([row]) for row in rows)]
    expected = sum(loss.item() * int((labels[:, 1:] != -100).sum()) for loss, labels in single[:2])
    last = collate(rows[2:])  # whose picture is the first of its batch
    expected += single[2][0].item() * int((last["labels"][:, 1:] != -100).sum())
    assert trainer.evaluate()["eval_sum"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("text", [{}, {"pad_token_id": None}, {"pad_token_id": None, "eos_token_id": [2, 3]}])
def test_predict_with_generate_pads_without_a_tokenizer(make_model, arguments, collate, text: dict) -> None:
    model = make_model(text=text)
    model.generation_config.max_new_tokens = 3
    trainer = Seq2SeqTrainer(
        model, arguments(Seq2SeqTrainingArguments, predict_with_generate=True), data_collator=collate
    )
    rows = [WITH_PICTURE, TEXT]
    predictions = torch.from_numpy(trainer.predict(rows).predictions)
    assert model.config.pad_token_id == (0 if not text else 2)
    inputs = {name: value for name, value in collate(rows[:1]).items() if name != "labels"}
    expected = model.generate(**inputs)
    assert torch.equal(predictions[0, : expected.shape[1]], expected[0])
