"""TRL's other losses and trainers: labels are the ids themselves, rows have no picture, replies end at a separator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from modeling_minigpt4 import MiniGPT4DataCollator
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


COMMON = {
    "max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "bf16": False,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
}  # fmt: skip


def rows(pictures: list, *with_picture: bool) -> Dataset:
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A red square."}]
    return Dataset.from_list([{"messages": chat, "images": pictures[:1] if one else []} for one in with_picture])


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    loss = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


def sft(compose: Callable, folder: Path, data: Dataset, *, kind: Any = SFTTrainer, own: Any = None, **fields) -> Any:
    loss = fields.pop("compute_loss_func", None)
    model, processor = compose(chat_template="vicuna_v0")
    model.freeze_backbones()
    config = (StageArguments if kind is MiniGPT4Trainer else SFTConfig)(
        str(folder), max_length=None, **{**COMMON, "remove_unused_columns": False, **fields}
    )
    return kind(
        model=model, args=config, train_dataset=data, processing_class=processor, compute_loss_func=loss,
        data_collator=None if own is None else own(processor),
    )  # fmt: skip


def expected_loss(trainer: Any, smoothing: float = 0.0) -> float:
    """Mean over the text, from logits alone; 4.57 counts the first token of each row too, which nobody predicts."""
    batch = next(iter(trainer.get_train_dataloader()))
    _, count = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    ids = batch["input_ids"]
    text = batch["attention_mask"].bool() & (ids != trainer.model.config.image_token_id)
    labels = ids.masked_fill(~text, -100)[:, 1:]
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        log_probs = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)[labels != -100]
    chosen = log_probs.gather(-1, labels[labels != -100][:, None])
    assert count - len(chosen) in (0, len(ids))  # of words, not of placeholders
    if not smoothing:
        return float(-chosen.sum() / count)
    return float(-((1 - smoothing) * chosen.mean() + smoothing * log_probs.mean()))


# ---- labels that are the ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, MiniGPT4DataCollator])
@pytest.mark.parametrize(
    ("fields", "smoothing"), [({}, 0), ({"label_smoothing_factor": 0.2}, 0.2), ({"compute_loss_func": own_loss}, 0)]
)
def test_every_loss_is_that_of_the_text(own, fields, smoothing, compose, pictures, tmp_path: Path) -> None:
    trainer = sft(compose, tmp_path, rows(pictures, True, True), own=own, **fields)
    expected = expected_loss(trainer, smoothing)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-4)  # logged with four digits


def test_dft_trains(compose, pictures, tmp_path: Path) -> None:
    trainer = sft(compose, tmp_path, rows(pictures, True, True), loss_type="dft")
    trainer.train()
    assert trainer.state.log_history[0]["loss"] > 0


# ---- rows with and without pictures ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SFTTrainer, MiniGPT4Trainer])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mixed_rows_train_one_by_one(kind, checkpointing: bool, compose, pictures, tmp_path: Path) -> None:
    data = rows(pictures, False, True, False, False)
    fields = {"max_steps": 4, "per_device_train_batch_size": 1, "gradient_checkpointing": checkpointing}
    trainer = sft(compose, tmp_path, data, kind=kind, **fields)
    trainer.train()
    norms = sorted(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry)
    assert norms[:3] == [0, 0, 0] and norms[3] > 0


def test_noise_on_embeddings_is_an_option_of_the_recipes(compose, pictures, tmp_path: Path) -> None:
    found = []
    for alpha in (None, 50.0):
        torch.manual_seed(0)
        trainer = sft(compose, tmp_path, rows(pictures, True), kind=MiniGPT4Trainer, neftune_noise_alpha=alpha)
        trainer.train()
        found.append(trainer.state.log_history[0]["loss"])
    assert found[0] != found[1]


# ---- reinforcement learning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_replies_end_where_the_template_ends_them(kind, config, compose, pictures, tmp_path: Path) -> None:
    model, processor = compose(chat_template="vicuna_v0")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "saved")  # RLOO opens the model a second time
    hash_mark = processor.tokenizer.convert_tokens_to_ids("#")
    seen: list[tuple[str, list[int]]] = []

    def reward(completions: list, completion_ids: list, **kwargs: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        seen.extend(zip(texts, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    args = config(
        str(tmp_path), num_generations=8, max_completion_length=16, seed=1,
        generation_kwargs={"sequence_bias": [[[hash_mark], 5.6]]}, **{**COMMON, "per_device_train_batch_size": 8},
    )  # fmt: skip
    prompt = [{"role": "user", "content": "What?"}]
    data = Dataset.from_list([{"prompt": prompt, "image": pictures[0]}] * 8)
    trainer = kind(model=str(tmp_path / "saved"), args=args, reward_funcs=reward, train_dataset=data)
    trainer.train()
    eos = processor.tokenizer.eos_token_id
    by_template = [ids for _, ids in seen if ids[-4:] == [*[hash_mark] * 3, eos]]
    assert len({len(ids) for ids in by_template}) > 1  # so that there were pads behind some
    for _, ids in seen:  # ended by the template, by the model, or at the longest
        assert ids in by_template or [hash_mark] * 3 not in [ids[place : place + 3] for place in range(len(ids))]
        assert eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 16)
    assert not any(text.endswith("###") for text, _ in seen)
    log = next(entry for entry in trainer.state.log_history if "completions/clipped_ratio" in entry)
    assert log["completions/clipped_ratio"] == pytest.approx(sum(ids[-1] != eos for _, ids in seen) / len(seen))
    assert log["completions/mean_length"] == pytest.approx(sum(len(ids) for _, ids in seen) / len(seen))
