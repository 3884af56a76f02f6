"""The image placeholder lies outside the vocabulary: what happens wherever ids are looked up."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_close
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration


ROWS = [[1, 5, "image", 9, 7, 2], [1, "image", 5, 2]]


@pytest.fixture
def model(make_model) -> MiniGPT4ForConditionalGeneration:
    model = make_model()
    model.freeze_backbones()
    return model


@pytest.fixture
def batch(model, make_inputs) -> dict[str, torch.Tensor]:
    """Labels are the ids themselves, placeholders included; pads are -100."""
    inputs = make_inputs(model, ROWS, padding_side="right")
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def words(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return batch["labels"].masked_fill(batch["labels"] == model.config.image_token_id, -100)


def inputs_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return text.endswith(".") and "\n" not in text and text.count(". ") == 0


# ---- losses outside forward -----------------------------------------------------------------------------------------


def plain_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def module_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return torch.nn.CrossEntropyLoss(reduction="mean")(input=outputs["logits"][:, :-1].mT, target=labels[:, 1:])


def log_prob_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return F.nll_loss(
        outputs[0].float().log_softmax(-1)[:, :-1].flatten(0, 1), labels[:, 1:].reshape(-1), None, None, -100
    )


def trainer_for(model, batch: Any, folder: Any, **options: Any) -> Trainer:
    fields = {name: options.pop(name) for name in ("label_smoothing_factor",) if name in options}
    arguments = TrainingArguments(
        str(folder), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, per_device_train_batch_size=2, logging_steps=1, **fields,
    )  # fmt: skip
    return Trainer(
        model, arguments, data_collator=lambda rows: dict(batch), train_dataset=[0, 1], eval_dataset=[0, 1], **options
    )


@pytest.mark.parametrize("loss", [plain_loss, module_loss, log_prob_loss])
def test_a_loss_of_ones_own_learns_no_placeholders(model, batch, tmp_path, loss) -> None:
    with torch.no_grad():
        expected = plain_loss(model(**inputs_of(batch)), words(model, batch))
    trainer = trainer_for(model, batch, tmp_path, compute_loss_func=loss)
    evaluated = (
        trainer.evaluate()["eval_loss"] if "num_items_in_batch" in _told_in_evaluation(trainer, batch) else None
    )
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(float(expected), abs=1e-4)
    if evaluated is not None:
        assert evaluated == pytest.approx(float(expected), abs=1e-4)


def _told_in_evaluation(trainer: Trainer, batch: dict[str, torch.Tensor]) -> set[str]:
    """What a release tells the model in evaluation beside the batch."""
    seen: set[str] = set()
    labelled = {**batch, "labels": words(trainer.model, batch)}
    hook = trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    trainer.prediction_step(trainer.model, labelled, prediction_loss_only=True)
    hook.remove()
    return seen


def test_smoothed_labels_with_placeholders_end_in_a_sentence(model, batch, tmp_path) -> None:
    trainer = trainer_for(model, batch, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(
        ValueError, match=f"placeholder {model.config.image_token_id}.* -100.*MiniGPT4DataCollator"
    ) as error:
        trainer.train()
    assert one_sentence(error.value)


def test_smoothed_labels_are_shifted_as_others_are(model, batch, tmp_path) -> None:
    labels = words(model, batch)
    with torch.no_grad():
        log_probs = model(**inputs_of(batch)).logits[:, :-1].log_softmax(-1)[labels[:, 1:] != -100]
    chosen = log_probs.gather(-1, labels[:, 1:][labels[:, 1:] != -100][:, None])
    expected = -(0.9 * chosen.mean() + 0.1 * log_probs.mean())
    trainer = trainer_for(model, {**batch, "labels": labels}, tmp_path, label_smoothing_factor=0.1)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("look_up", [torch.gather, torch.Tensor.gather, torch.take_along_dim])
def test_scores_of_placeholders_are_not_looked_up(model, batch, look_up) -> None:
    log_probs = model.train()(**inputs_of(batch)).logits.log_softmax(-1)
    words_only = words(model, batch).clamp(min=0)
    found = look_up(
        log_probs, *((words_only[..., None], -1) if look_up is torch.take_along_dim else (-1, words_only[..., None]))
    )
    assert found.requires_grad and type(found) is torch.Tensor
    ids = batch["input_ids"][..., None]
    with pytest.raises(ValueError, match="no word of the language model and has no score"):
        look_up(log_probs, *((ids, -1) if look_up is torch.take_along_dim else (-1, ids)))


def test_an_id_that_is_a_mistake_stays_one(model, batch) -> None:
    outputs = model.train()(**inputs_of(batch))
    wrong = batch["labels"].clone()
    wrong[0, 1] = model.config.image_token_id + 1
    with pytest.raises((IndexError, RuntimeError)):
        plain_loss(outputs, wrong)


def test_logits_are_plain_tensors_for_everybody_else(model, batch) -> None:
    with torch.no_grad():
        assert type(model.train()(**inputs_of(batch)).logits) is torch.Tensor
    model.train()
    assert type(model(**batch).logits) is torch.Tensor
    assert type(model.eval()(**inputs_of(batch)).logits) is torch.Tensor
    guarded = model.train()(**inputs_of(batch)).logits
    plain = model(**batch).logits
    assert torch.equal(guarded, plain)
    loss = plain_loss(model(**inputs_of(batch)), batch["labels"])
    assert type(loss) is torch.Tensor
    loss.backward()
    found = model.model.language_projection.weight.grad.clone()
    model.zero_grad()
    plain_loss(model(**batch), words(model, batch)).backward()
    assert_close(found, model.model.language_projection.weight.grad)


def test_the_smoother_of_trainers_agrees_with_cross_entropy(model, batch) -> None:
    outputs = model.train()(**inputs_of(batch))
    smoothed = LabelSmoother(epsilon=0.0)(outputs, words(model, batch), shift_labels=True)
    assert_close(smoothed, plain_loss(outputs, batch["labels"]))


# ---- embeddings -----------------------------------------------------------------------------------------------------


def test_embeddings_give_placeholders_some_row(model, batch) -> None:
    table = model.get_input_embeddings()
    ids = batch["input_ids"]
    found = table(ids)
    assert torch.equal(
        found[ids != model.config.image_token_id], F.embedding(ids[ids != model.config.image_token_id], table.weight)
    )
    places = model.get_placeholder_mask(ids, model.get_image_features(batch["pixel_values"]).pooler_output)
    tokens = model.get_image_features(batch["pixel_values"]).pooler_output
    own = found.masked_scatter(places[..., None], tokens.to(found.dtype))  # as code for other models does it
    logits = model(inputs_embeds=own, attention_mask=batch["attention_mask"]).logits
    assert_close(logits, model(**inputs_of(batch)).logits)


def test_embeddings_that_are_set_or_resized_know_the_placeholder(model, batch) -> None:
    for change in (
        lambda one: one.set_input_embeddings(torch.nn.Embedding(300, 16)),
        lambda one: one.resize_token_embeddings(320),
    ):
        changed = copy.deepcopy(model)
        change(changed)
        ids = batch["input_ids"].masked_fill(
            batch["input_ids"] == model.config.image_token_id, changed.config.image_token_id
        )
        assert changed.get_input_embeddings()(ids).isfinite().all()
        assert len(changed.get_input_embeddings()._forward_pre_hooks) == 1
    assert len(pickle.loads(pickle.dumps(model)).get_input_embeddings()._forward_pre_hooks) == 1


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PromptEncoderConfig", "PrefixTuningConfig"])
def test_prompt_learning_of_peft_works_or_says_why_not(model, batch, kind: str) -> None:
    peft = pytest.importorskip("peft")
    width = {"encoder_hidden_size": 8} if kind == "PromptEncoderConfig" else {}
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **width))
    text = {name: batch[name][:, :1] for name in ("input_ids", "attention_mask", "labels")}
    assert tuned(**text).logits.isfinite().all()
    if kind == "PrefixTuningConfig":
        loss = tuned(**batch).loss
        loss.backward()
        assert loss.isfinite() and any(parameter.grad is not None for parameter in tuned.parameters())
        return
    with pytest.raises(ValueError, match=f"placeholders {model.config.image_token_id}.*LoRA, IA3 and prefix") as error:
        tuned(**batch)
    assert one_sentence(error.value)


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt(make_model, make_inputs) -> tuple[Any, dict[str, torch.Tensor]]:
    model = make_model()
    return model, make_inputs(model, [[1, 5, "image", 9, "image", 7, 5]])


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 4}, {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}]
)
def test_prompt_lookup_guesses_words_only(prompt, options) -> None:
    model, inputs = prompt
    expected = model.generate(**inputs, max_new_tokens=10, do_sample=False)
    # The prompt ends as it goes on before the first picture, so that the first guess is a placeholder.
    found = model.generate(**inputs, max_new_tokens=10, do_sample=False, **options)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_repetition_penalty": 1.5}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2},
        {"encoder_no_repeat_ngram_size": 2}, {"bad_words_ids": [[7]]}, {"sequence_bias": [[[7], 2.0]]},
        {"suppress_tokens": [300]}, {"begin_suppress_tokens": [300]}, {"guidance_scale": 1.5},
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 5]])},
        {"num_beams": 2, "encoder_repetition_penalty": 2.0},
    ],
)  # fmt: skip
def test_options_that_look_ids_up_work_with_pictures(prompt, options) -> None:
    model, inputs = prompt
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, **options)
    assert found.shape[1] > inputs["input_ids"].shape[1]
    assert (found[:, inputs["input_ids"].shape[1] :] < model.config.text_config.vocab_size).all()


def test_encoder_repetition_penalty_favours_words_of_the_prompt_alone(prompt) -> None:
    model, inputs = prompt
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **options).scores[0][0]
    favoured = model.generate(**inputs, **options, encoder_repetition_penalty=2.0).scores[0][0]
    assert set((plain != favoured).nonzero().flatten().tolist()) == {1, 5, 9, 7}


@pytest.mark.parametrize("option", ["no_repeat_ngram_size", "encoder_no_repeat_ngram_size"])
def test_what_follows_what_takes_pictures_for_no_words(make_model, make_inputs, option: str) -> None:
    model = make_model()
    inputs = make_inputs(model, [[1, 250, 5, "image", 9, 7, 5]])  # 250 is the highest id, and never behind 5
    options = {"max_new_tokens": 1, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    banned = model.generate(**inputs, **options, **{option: 2}).scores[0][0].isinf()
    assert banned.nonzero().flatten().tolist() == []
    inputs = make_inputs(model, [[1, 250, 5, "image", 9, 7, 5, 8, 5]])
    banned = model.generate(**inputs, **options, **{option: 2}).scores[0][0].isinf()
    assert banned.nonzero().flatten().tolist() == [8]


@pytest.mark.parametrize(
    "options",
    [
        {"bad_words_ids": [[300]]}, {"bad_words_ids": [[5, 300]]}, {"sequence_bias": [[[300], 2.0]]},
        {"sequence_bias": {(300,): 2.0}}, {"forced_eos_token_id": 300},
        {"guidance_scale": 1.5, "negative_prompt_ids": torch.tensor([[1, 300, 5]])},
    ],
)  # fmt: skip
def test_options_that_name_the_placeholder_end_in_a_sentence(prompt, options) -> None:
    model, inputs = prompt
    with pytest.raises(ValueError, match=r"placeholder 300.*(leave|take) it out") as error:
        model.generate(**inputs, max_new_tokens=5, **options)
    assert one_sentence(error.value)


def test_token_healing_would_lose_the_picture(prompt, tokenizer) -> None:
    model, inputs = prompt
    with pytest.raises(ValueError, match="placeholders 300; leave it out") as error:
        model.generate(**inputs, max_new_tokens=5, token_healing=True, tokenizer=tokenizer)
    assert one_sentence(error.value)
