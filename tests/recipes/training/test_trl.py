"""TRL's own trainer and script style, with nothing of ours but the model and its processor."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from closeness import assert_close
from datasets import Dataset, Features, Image, List, Value
from packaging.version import Version
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config


PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}
TEXT_AND_PICTURES = Features({"text": Value("string"), "images": List(Image())})
vision_masks = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="TRL asks for transformers 5.18 for assistant_only_loss with pictures",
)


def chat(question: str, answer: str, pictures: int = 1) -> list[dict]:
    content = [{"type": "image"}] * pictures + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


QUESTIONS = [("What is it?", "A red one."), ("Describe the picture.", "It is green, and rather large."),
             ("Colour?", "Blue."), ("And now?", "Nothing but black.")]  # fmt: skip


def as_messages(pictures) -> Dataset:
    rows = [{"messages": chat(*pair), "images": [picture]} for pair, picture in zip(QUESTIONS, pictures, strict=False)]
    return Dataset.from_list(rows)


def as_plain_messages(pictures) -> Dataset:
    """Contents as strings, where TRL itself puts the pictures."""
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": [picture],
        }
        for (question, answer), picture in zip(QUESTIONS, pictures, strict=False)
    ]
    return Dataset.from_list(rows)


def as_chats_in_two(pictures) -> Dataset:
    rows = [
        {"prompt": chat(*pair)[:1], "completion": chat(*pair)[1:], "images": [picture]}
        for pair, picture in zip(QUESTIONS, pictures, strict=False)
    ]
    return Dataset.from_list(rows)


def as_texts_in_two(pictures) -> Dataset:
    rows = [
        {"prompt": f"<s><image> {question} ", "completion": f"{answer}</s>", "image": picture}
        for (question, answer), picture in zip(QUESTIONS, pictures, strict=False)
    ]
    return Dataset.from_list(rows)


def as_text(pictures) -> Dataset:
    rows = [
        {"text": f"<s><image> {question} {answer}</s>", "images": [picture]}
        for (question, answer), picture in zip(QUESTIONS, pictures, strict=False)
    ]
    return Dataset.from_list(rows)


def different_numbers_of_pictures(pictures) -> Dataset:
    rows = [
        {"messages": chat("What do you see?", "Two of them.", 2), "images": pictures[:2]},
        {"messages": chat("And here?", "Only one.", 1), "images": pictures[2:3]},
        {"messages": chat("Hello?", "Hello yourself.", 0), "images": []},
        {"messages": chat("Again?", "Three.", 3), "images": pictures[3:6]},
    ]
    return Dataset.from_list(rows)


@pytest.fixture
def train(compose: Callable, tmp_path: Path) -> Callable:
    """Make an SFTTrainer as anybody would; keywords are those of SFTConfig."""

    def build(rows: Dataset, model=None, processor=None, peft_config=None, **fields) -> SFTTrainer:
        if model is None:
            model, processor = compose()
        defaults = {
            "output_dir": str(tmp_path / "out"), "max_steps": 2, "per_device_train_batch_size": 2,
            "learning_rate": 0.01, "logging_steps": 1, "use_cpu": True, "bf16": False, "report_to": "none",
            "save_strategy": "no", "disable_tqdm": True, "max_length": None,
        }  # fmt: skip
        if "text" in rows.column_names:
            defaults["remove_unused_columns"] = False  # TRL does not list `text` among the columns to keep
        return SFTTrainer(
            model=model,
            args=SFTConfig(**{**defaults, **fields}),
            train_dataset=rows,
            processing_class=processor,
            peft_config=peft_config,
        )

    return build


def first_batch(trainer: SFTTrainer) -> dict[str, torch.Tensor]:
    return next(iter(trainer.get_train_dataloader()))


def text_loss(model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the labelled text tokens, from logits alone, and their number."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1].float()
    labels = batch["labels"][:, 1:].clone()
    labels[labels == model.config.image_token_id] = -100
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), int((labels != -100).sum())


def losses(trainer: SFTTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


LAYOUTS = [
    as_messages,
    as_plain_messages,
    as_chats_in_two,
    as_texts_in_two,
    as_text,
    different_numbers_of_pictures,
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_the_projection_only(layout: Callable, train: Callable, pictures) -> None:
    trainer = train(layout(pictures))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == PROJECTION
    assert len(losses(trainer)) == 2 and all(0 < loss < 20 for loss in losses(trainer))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_is_the_cross_entropy_of_the_text(layout: Callable, train: Callable, pictures) -> None:
    trainer = train(layout(pictures), per_device_train_batch_size=4)
    model, batch = trainer.model, first_batch(trainer)
    expected, tokens = text_loss(model, batch)
    assert tokens > 0
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(tokens))
    assert_close(loss.detach(), expected / tokens)


@pytest.mark.parametrize("layout", [as_chats_in_two, as_texts_in_two])
def test_logged_loss_is_the_mean_over_the_answers(layout: Callable, train: Callable, pictures) -> None:
    trainer = train(layout(pictures), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    expected, tokens = text_loss(trainer.model, batch)
    trainer.train()
    assert losses(trainer) == pytest.approx([float(expected) / tokens], abs=1e-4)  # logged with four digits


@pytest.mark.parametrize("layout", [as_messages, as_text, different_numbers_of_pictures])
def test_placeholders_carry_no_loss(layout: Callable, train: Callable, pictures) -> None:
    trainer = train(layout(pictures))
    model, batch = trainer.model, first_batch(trainer)
    places = batch["input_ids"] == model.config.image_token_id
    assert places.any() and (batch["labels"][places] == -100).all()
    labelled = {**batch, "labels": batch["labels"].masked_fill(places, model.config.image_token_id)}
    with_places, without = (
        trainer.compute_loss(model, dict(inputs), num_items_in_batch=torch.tensor(10)) for inputs in (labelled, batch)
    )
    assert torch.equal(with_places, without)


@pytest.mark.parametrize("layout", [as_chats_in_two, as_texts_in_two])
def test_completions_alone_carry_loss(layout: Callable, train: Callable, pictures) -> None:
    trainer = train(layout(pictures))
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    processor = trainer.processing_class
    for labels, (question, answer) in zip(batch["labels"], QUESTIONS, strict=True):
        text = processor.decode(labels[labels != -100])
        assert answer in text and question not in text and "<image>" not in text
    everything = train(layout(pictures), completion_only_loss=False)
    batch = everything.data_collator([dict(row) for row in everything.train_dataset])
    for labels, (question, _) in zip(batch["labels"], QUESTIONS, strict=True):
        assert question in processor.decode(labels[labels != -100])


@vision_masks
@pytest.mark.parametrize("template, end", [("vicuna_v0", "###"), ("llama2", "</s>")])
def test_assistant_only_loss_trains_the_replies(template: str, end: str, train, compose, pictures) -> None:
    model, processor = compose(chat_template=template)
    trainer = train(as_messages(pictures), model, processor, assistant_only_loss=True)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    for labels, (_, answer) in zip(batch["labels"], QUESTIONS, strict=True):
        assert processor.decode(labels[labels != -100]) == answer + end
    trainer.train()
    assert all(0 < loss < 20 for loss in losses(trainer))


@vision_masks
def test_assistant_only_loss_trains_every_reply_of_a_long_chat(train, compose, pictures) -> None:
    model, processor = compose(chat_template="vicuna_v0")
    messages = [*chat("What?", "One."), *chat("And?", "Two.", 0)]
    rows = Dataset.from_list([{"messages": messages, "images": pictures[:1]}] * 2)
    trainer = train(rows, model, processor, assistant_only_loss=True)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    assert processor.decode(batch["labels"][0][batch["labels"][0] != -100]) == "One.###Two.###"


def test_pictures_are_never_cut_silently(train: Callable, pictures) -> None:
    for layout in (as_messages, as_chats_in_two):
        with pytest.raises(ValueError, match="max_length"):
            train(layout(pictures), max_length=4).train()


def test_max_length_cuts_text_behind_the_picture(train: Callable, pictures) -> None:
    trainer = train(as_texts_in_two(pictures), max_length=8)
    batch = first_batch(trainer)
    assert batch["input_ids"].shape[1] == 8
    assert int((batch["input_ids"] == trainer.model.config.image_token_id).sum()) == 2 * 3
    trainer.train()


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.found = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def test_checkpointing_is_on_and_changes_no_gradient(train: Callable, pictures) -> None:
    found, runs = [], []
    for fields in ({}, {"gradient_checkpointing": False}):  # TRL switches it on by default
        trainer, gradients, calls = train(as_messages(pictures), max_steps=1, **fields), Gradients(), []
        layer = trainer.model.model.language_model.layers[0]
        layer.self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer.add_callback(gradients)
        trainer.train()
        found.append(gradients.found)
        runs.append(len(calls))
    assert runs == [2, 1]  # once more in the backward pass, through the frozen language model
    assert found[0].keys() == found[1].keys() == PROJECTION
    for name in PROJECTION:
        assert_close(found[0][name], found[1][name])


def test_model_can_be_named_by_its_folder(train: Callable, compose: Callable, pictures, tmp_path: Path) -> None:
    model, processor = compose()
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    trainer = train(as_messages(pictures), model=str(tmp_path / "saved"))  # and the processor is found there
    assert type(trainer.model).__name__ == "MiniGPT4ForConditionalGeneration"
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    trainer.train()
    after = trainer.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == PROJECTION


@pytest.mark.parametrize("lora", [False, True])
def test_trl_s_vision_script_needs_nothing_special(lora: bool, compose, pictures, tmp_path: Path) -> None:
    """The steps of TRL's sft_vlm example: parser, Auto classes, trainer, save."""
    folder, output = tmp_path / "saved", tmp_path / "trained"
    for part in compose():
        part.save_pretrained(folder)
    arguments = [
        "--dataset_name", "none", "--model_name_or_path", str(folder), "--output_dir", str(output),
        "--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "0.01", "--use_cpu", "true",
        "--bf16", "false", "--report_to", "none", "--dtype", "float32", "--disable_tqdm", "true",
    ]  # fmt: skip
    if lora:
        arguments += ["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    _, training_args, model_args = TrlParser((ScriptArguments, SFTConfig, ModelConfig)).parse_args_and_config(
        arguments
    )
    training_args.max_length = None

    model = AutoModelForImageTextToText.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype)
    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=as_messages(pictures),
        processing_class=AutoProcessor.from_pretrained(folder),
        peft_config=get_peft_config(model_args),
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("lora_" in name for name in moved) if lora else moved == PROJECTION
    assert moved
    trainer.save_model(output)
    if not lora:
        loaded = AutoModelForImageTextToText.from_pretrained(output).state_dict()
        assert all(torch.equal(loaded[name], after[name]) for name in after)


def test_evaluation_runs_beside_training(train: Callable, pictures) -> None:
    trainer = train(as_messages(pictures), per_device_eval_batch_size=2)
    metrics = trainer.evaluate(as_messages(pictures))
    assert 0 < metrics["eval_loss"] < 20


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")  # TRL's own notice of its 2.0
def test_metrics_get_the_logits_of_all_tokens(train: Callable, pictures) -> None:
    seen = []
    trainer = train(as_texts_in_two(pictures), per_device_eval_batch_size=3)
    trainer.compute_metrics = lambda found: seen.append((found.predictions.shape, found.label_ids.shape)) or {}
    assert 0 < trainer.evaluate(as_texts_in_two(pictures))["eval_loss"] < 20
    ((logits, labels),) = seen
    assert labels[0] == len(QUESTIONS)
    assert logits == (*labels, trainer.model.config.text_config.vocab_size)
