"""A training step: what it computes, what it leaves out, and where alone it waits for the device."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from damaged import jpeg
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils
from trl import SFTTrainer

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import BytePictures, StageCollator
from recipes_minigpt4.data.formatting import Rows, stage1_rows, stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.last_layer import LastLayer
from recipes_minigpt4.training.loss import is_causal_decoder
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


# Operations whose result tells the host a number or a shape, so that it waits for the device.
WAITS = {
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero", "aten.equal", "aten._unique2",
    "aten.unique_dim", "aten.unique_consecutive", "aten.bincount", "aten.allclose",
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Collects operations for which a host would wait for its GPU; copies to the host are not seen on a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).rpartition(".")[0]
        by_mask = name in ("aten.index", "aten.index_put", "aten.index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trainer_of(compose: Callable, tmp_path: Path) -> Callable:
    """A trainer on ragged rows; keywords are settings."""
    pairs = [{"image": f"{number}.jpg", "caption": "a long picture of a square " * number} for number in range(1, 9)]
    for number, pair in enumerate(pairs):
        (tmp_path / pair["image"]).write_bytes(jpeg(number))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))

    def build(stage: int = 1, kind: type = MiniGPT4Trainer, **settings) -> MiniGPT4Trainer:
        model, processor = compose()
        model.freeze_backbones()
        args = DataArguments(dataset_name=str(tmp_path / "pairs.jsonl"))
        rows = (stage1_rows if stage == 1 else stage2_rows)(load_pairs(args, stage), processor, args)
        settings = {"use_cpu": not torch.cuda.is_available(), "per_device_train_batch_size": 4, **settings}
        arguments = StageArguments(output_dir=str(tmp_path / "run"), max_steps=4, disable_tqdm=True, **settings)
        trainer = kind(model=model, args=arguments, train_dataset=rows, processing_class=processor)
        trainer.create_optimizer_and_scheduler(4)
        trainer.model.train()
        return trainer

    return build


def step(trainer: MiniGPT4Trainer, batch: dict) -> torch.Tensor:
    """One step as the Trainer takes it, up to the optimizer."""
    _, number = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    with LastLayer(trainer.model.language_model):  # as in `train`
        loss = trainer.training_step(trainer.model, dict(batch), number)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.model.zero_grad()
    return loss


def batch_of(trainer: MiniGPT4Trainer) -> dict:
    return next(iter(trainer.get_train_dataloader()))


@pytest.fixture
def rows_are_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers looks at the positions for several sequences in a row, and waits for the answer."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_waits_only_where_transformers_looks_for_packed_rows(
    stage: int, checkpointing: bool, trainer_of: Callable, rows_are_not_packed: None
) -> None:
    trainer = trainer_of(stage, gradient_checkpointing=checkpointing)
    batch = batch_of(trainer)
    assert len(set((batch["labels"] != -100).sum(1).tolist())) > 1  # the rows are ragged
    step(trainer, batch)  # the first one makes the optimizer's state
    with Waits() as waits:
        step(trainer, batch)
    assert waits.found == []
    with Waits() as waits:
        trainer.log({"loss": 1.0})
    assert waits.found  # so they are seen where there are some


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_on_a_gpu_waits_nowhere_else(stage: int, trainer_of: Callable, rows_are_not_packed: None) -> None:
    trainer = trainer_of(stage)
    batch = batch_of(trainer)
    step(trainer, batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(trainer, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---- the same as TRL's ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_loss_gradient_and_metrics_are_those_of_trl(
    stage: int, attention: str, checkpointing: bool, trainer_of: Callable
) -> None:
    """TRL scores every position of padded rows behind a mask; the step scores answers alone and has no mask."""
    trainer = trainer_of(stage, gradient_checkpointing=checkpointing)
    trainer.model.set_attn_implementation(attention)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    batch = trainer._prepare_inputs(batch_of(trainer))
    tokens = (batch["labels"][:, 1:] != -100).sum()
    found = []
    for compute in (trainer.compute_loss, lambda *args, **kwargs: SFTTrainer.compute_loss(trainer, *args, **kwargs)):
        inputs = dict(batch)
        if found:
            del inputs["label_positions"]
        trainer.model.zero_grad()
        with LastLayer(trainer.model.language_model):  # as in `train`
            loss = compute(trainer.model, inputs, num_items_in_batch=tokens)
            loss.backward()
        trainer._log_answers()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        trainer._metrics["train"].clear()
        found.append((loss.item(), trainer.model.model.language_projection.weight.grad.clone(), metrics))
    (loss, gradient, metrics), (trl_loss, trl_gradient, trl_metrics) = found
    assert loss == pytest.approx(trl_loss, rel=1e-5)
    assert_close(gradient, trl_gradient)
    trl_metrics["num_tokens"] -= metrics["num_tokens"]  # TRL goes on counting
    assert metrics == pytest.approx(trl_metrics, rel=1e-4)


def test_logged_numbers_are_those_of_trl(trainer_of: Callable) -> None:
    settings = {"logging_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    logs = []
    for compute_loss in (MiniGPT4Trainer.compute_loss, SFTTrainer.compute_loss):

        class Kind(MiniGPT4Trainer):
            pass

        def computed(self, model, inputs, *args, compute_loss=compute_loss, **kwargs):
            if compute_loss is SFTTrainer.compute_loss:
                inputs.pop("label_positions")
            return compute_loss(self, model, inputs, *args, **kwargs)

        Kind.compute_loss = computed
        trainer = trainer_of(kind=Kind, **settings)
        trainer.train()
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for ours, trls in zip(*logs, strict=True):
        assert ours.keys() == trls.keys()
        for name in ("loss", "grad_norm", "learning_rate", "num_tokens"):
            assert ours[name] == pytest.approx(trls[name], rel=1e-4), name
        assert {"entropy", "mean_token_accuracy"} <= ours.keys()


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_other_losses_are_left_to_trl(settings: dict, trainer_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, asked = trainer_of(**settings), []
    compute = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args: asked.append(1) or compute(*args))
    assert step(trainer, batch_of(trainer)).isfinite() and asked


# ---- what it leaves out ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_only_answers_reach_the_head_and_the_end_of_the_last_layer(stage: int, trainer_of: Callable) -> None:
    trainer, shapes = trainer_of(stage), {}
    last = trainer.model.language_model.layers[-1]
    parts = {"layer": last.input_layernorm, "keys": last.self_attn.k_proj, "queries": last.self_attn.q_proj,
             "output": last.self_attn.o_proj, "mlp": last.mlp.gate_proj, "head": trainer.model.lm_head}  # fmt: skip
    batch = batch_of(trainer)
    with LastLayer(trainer.model.language_model):
        for name, part in parts.items():  # behind the hooks that leave positions out
            part.register_forward_pre_hook(
                lambda module, args, name=name: shapes.setdefault(name, args[0].shape[:-1].numel()) and None
            )
        trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(batch)))
    rows, length = batch["input_ids"].shape
    answers, every = int((batch["labels"] != -100).sum()), rows * (length - 1)
    assert shapes == {"layer": every, "keys": every} | dict.fromkeys(["queries", "output", "mlp", "head"], answers)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["none", "not reentrant", "reentrant"])
def test_the_frozen_vision_side_has_no_graph(checkpointing: bool | None, trainer_of: Callable) -> None:
    trainer, outputs = trainer_of(), []
    if checkpointing is not None:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        trainer.model.train()
    base = trainer.model.model
    for part in (base.vision_model, base.qformer):
        part.register_forward_hook(lambda module, args, output: outputs.append(output.last_hidden_state))
    assert step(trainer, batch_of(trainer)).requires_grad is False  # the Trainer gives it back detached
    assert len(outputs) == 2
    assert all(output.grad_fn is None and not output.requires_grad for output in outputs)


def test_pictures_are_decoded_in_workers(trainer_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(dataloader_num_workers=2)
    decode = Rows.picture

    def in_a_worker(self, stored):
        assert torch.utils.data.get_worker_info() is not None
        return decode(self, stored)

    monkeypatch.setattr(Rows, "picture", in_a_worker)
    assert [len(batch["pixel_values"]) for batch in trainer.get_train_dataloader()] == [4, 4]


# ---- pads -----------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """A decoder that looks at the whole row."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(8, 16)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings

    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=inputs_embeds + inputs_embeds.mean(1, keepdim=True))


def test_a_decoder_that_looks_ahead_keeps_its_mask(trainer_of: Callable) -> None:
    trainer, masks = trainer_of(), []
    decoder = trainer.model.language_model
    assert is_causal_decoder(decoder) and trainer._is_causal
    assert not is_causal_decoder(Mean())
    assert not is_causal_decoder(Mean().to("meta"))  # which cannot be tried
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    batch = batch_of(trainer)
    step(trainer, batch)
    trainer._is_causal = False
    step(trainer, batch)
    assert masks[0] is None and torch.equal(masks[1], batch["attention_mask"])


def test_rows_that_end_in_a_picture_take_trls_step(trainer_of: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last column cannot be left out."""
    trainer, asked = trainer_of(), []
    compute = SFTTrainer.compute_loss
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda *args: asked.append(1) or compute(*args))
    texts, images = ("<s>a long picture of <image>", "<s>a <image> b"), trainer.train_dataset[0]["images"]
    rows = [{"text": text, "images": images} for text in texts]
    trainer.data_collator.completion_only_loss = False
    batch = trainer.data_collator(rows)
    assert step(trainer, batch).isfinite() and asked


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_travel_as_bytes_and_arrive_as_the_same_pixels(trainer_of: Callable) -> None:
    trainer = trainer_of()
    rows = [trainer.train_dataset[index] for index in range(4)]
    batch = trainer.data_collator([dict(row) for row in rows])
    assert batch["pixel_values"].dtype == torch.uint8
    prepared = trainer._prepare_inputs(dict(batch))["pixel_values"].cpu()
    own = trainer.processing_class.image_processor([row["images"][0] for row in rows], return_tensors="pt")
    assert prepared.dtype == torch.float32 and torch.equal(prepared, own["pixel_values"])


def test_arrays_of_floats_stay_floats(trainer_of: Callable) -> None:
    trainer = trainer_of()
    rows = [dict(trainer.train_dataset[index]) for index in range(2)]
    for row in rows:
        row["images"] = [torch.randint(0, 256, (3, 40, 30)).float()]
    pixels = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))["pixel_values"].cpu()
    own = trainer.processing_class.image_processor([row["images"][0] for row in rows], return_tensors="pt")
    assert torch.equal(pixels, own["pixel_values"])


def test_pictures_that_no_table_turns_back_stay_floats(compose: Callable) -> None:
    """Another image processor than ours has no table, and its bytes would reach the model as they are."""
    processor = compose()[1]
    own = processor.image_processor
    processor.image_processor = SimpleNamespace(fetch_images=own.fetch_images)
    collator = StageCollator.like(StageCollator(processor, completion_only_loss=True))
    assert collator.processor.image_processor is processor.image_processor
    processor.image_processor = own
    collator = StageCollator.like(StageCollator(processor, completion_only_loss=True))
    assert isinstance(collator.processor.image_processor, BytePictures)
