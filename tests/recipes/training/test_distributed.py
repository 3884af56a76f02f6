"""
FSDP2 over gloo: weights that are really spread over two processes, saved and resumed whole.

torch shards on CPUs too; accelerate 1.15 hands models to FSDP on accelerators only (`AcceleratorState.__init__`), and
that is all that `shard_on_cpus` changes.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from closeness import SHARE
from ranks import Ranks, start
from safetensors import safe_open
from test_accelerate_configs import prepare
from test_ranks import SETTINGS, largest_deviation, logs
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


LORA = json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]})


def shard_on_cpus() -> None:
    """Let accelerate take CPUs for accelerators, which it shards models on."""
    ready = PartialState.__init__

    def __init__(self: PartialState, *args: object, **kwargs: object) -> None:  # noqa: N807
        ready(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = __init__


def shard_on_cpus_and_tell() -> None:
    """The same, and print what the trainer's tensors and checkpoints are."""
    shard_on_cpus()
    save = MiniGPT4Trainer.save_model

    def save_model(self: MiniGPT4Trainer, *args: object, **kwargs: object) -> None:
        local = {name: tensor for name, tensor in self.model.named_parameters() if isinstance(tensor, DTensor)}
        print("sharded:", len(local), "of", len(list(self.model.parameters())))
        weight = local["model.language_projection.weight"]
        print(self.accelerator.state.fsdp_plugin.mixed_precision_policy)
        print("local:", tuple(weight.to_local().shape), "whole:", tuple(weight.shape))
        try:
            self.model.save_pretrained(Path(self.args.output_dir, "by_hand"))
        except ValueError as error:
            print("refused:", error)
        save(self, *args, **kwargs)

    MiniGPT4Trainer.save_model = save_model


@pytest.fixture(scope="module")
def fsdp() -> Iterator[dict[str, str]]:
    """The environment that `accelerate launch --config_file fsdp2.yaml` gives to ranks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
        environment = prepare("fsdp2")[1]
    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION")
    yield {name: value for name, value in environment.items() if name.startswith("FSDP_") or name in names}


@pytest.fixture
def train_sharded(stage: Callable, uneven_pairs_file: Path, fsdp: dict[str, str], tmp_path: Path) -> Callable:
    """`train_sharded(output, before=…, **fields)`: two ranks under FSDP2; their folder and the ranks, ended."""

    def train(
        output: str = "sharded",
        command: str = "stage1",
        before: Callable[[], None] = shard_on_cpus,
        environment: dict[str, str] | None = None,
        code: int = 0,
        **fields,
    ) -> tuple[Path, Ranks]:
        fields = {"dataset_name": uneven_pairs_file, **SETTINGS, **fields}
        arguments = [command, *stage(output=output, **fields)]
        with start(arguments, environment={**fsdp, **(environment or {})}, before=before) as ranks:
            assert ranks.wait() == [code] * 2, ranks.output()
        return tmp_path / output, ranks

    return train


@pytest.fixture
def train_whole(stage: Callable, uneven_pairs_file: Path, tmp_path: Path) -> Callable:
    """`train_whole(command, **fields)`: one process with twice the batch; its folder."""

    def train(command: str = "stage1", **fields) -> Path:
        fields = {"dataset_name": uneven_pairs_file, "per_device_train_batch_size": 4, **SETTINGS, **fields}
        {"stage1": stage1_pretrain, "stage2": stage2_finetune}[command].main(stage(output="whole", **fields))
        return tmp_path / "whole"

    return train


def other_language_model(parts: dict[str, str], folder: Path, **changes: object) -> str:
    """A language model like that of `parts`, but for some fields of its configuration."""
    shutil.copytree(parts["language_model"], folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder, **changes)).save_pretrained(folder)
    return str(folder)


# ---- training -------------------------------------------------------------------------------------------------------


VARIANTS = {
    "stage 2": {"command": "stage2"},
    "with LoRA": {"peft_config": LORA},
    "language model trains": {"train_parts": "language_model"},
    "without Q-Former": {"qformer": None},
}
FIRST_FSDP = {
    "FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD", "FSDP_SYNC_MODULE_STATES": "false",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_sharded_training_equals_that_of_one_process(
    name: str, train_sharded: Callable, train_whole: Callable
) -> None:
    whole = train_whole(**VARIANTS[name])
    sharded, _ = train_sharded(**VARIANTS[name])
    assert largest_deviation(whole, sharded) <= SHARE
    if "LoRA" in name:
        assert largest_deviation(whole, sharded, "peft/adapter_model.safetensors") <= SHARE


@pytest.mark.slow
def test_tied_embeddings_are_sharded_together(
    train_sharded: Callable, train_whole: Callable, parts: dict[str, str], tmp_path: Path
) -> None:
    tied = other_language_model(parts, tmp_path / "tied", tie_word_embeddings=True)
    fields = {"language_model": tied, "train_parts": "language_model"}
    assert largest_deviation(train_whole(**fields), train_sharded(**fields)[0]) <= SHARE


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_layers_that_are_forgotten_after_their_forward(
    checkpointing: str, train_sharded: Callable, train_whole: Callable, parts: dict[str, str], tmp_path: Path
) -> None:
    """Answers are scored by a backward pass of their own within the forward one, amid the layers' coming and going."""
    deep = other_language_model(parts, tmp_path / "deep", num_hidden_layers=4)
    fields = {"language_model": deep, "gradient_checkpointing": checkpointing}
    assert largest_deviation(train_whole(**fields), train_sharded(**fields)[0]) <= SHARE


@pytest.mark.slow
def test_half_precision_is_for_weights_only(train_sharded: Callable, train_whole: Callable) -> None:
    whole = train_whole(bf16="true")
    sharded, ranks = train_sharded(bf16="true", before=shard_on_cpus_and_tell)
    policy = "param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None"
    assert policy in ranks.output(0)
    assert largest_deviation(whole, sharded) <= 1e-3
    with safe_open(sharded / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


@pytest.mark.slow
def test_sharded_models_train_from_stored_features(train_sharded: Callable, tmp_path: Path) -> None:
    plain, _ = train_sharded()
    stored, ranks = train_sharded(output="stored", cache_features=tmp_path / "features")
    assert "16 computed now" in ranks.output(0)
    assert largest_deviation(plain, stored) <= SHARE


# ---- saving and resuming --------------------------------------------------------------------------------------------


def test_a_sharded_model_trains_like_a_whole_one_and_is_written_whole(
    train_sharded: Callable, train_whole: Callable
) -> None:
    whole = train_whole()
    folder, ranks = train_sharded(before=shard_on_cpus_and_tell)
    assert largest_deviation(whole, folder) <= SHARE
    for one, other in zip(logs(whole), logs(folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], abs=1e-4)
    for rank in range(2):
        printed = ranks.output(rank)
        assert "sharded: 77 of 77" in printed, printed[-2000:]
        assert "local: (12, 16) whole: (24, 16)" in printed
        assert "refused: model.language_projection" in printed and "trainer.save_model()" in printed
    assert not (folder / "by_hand").exists()
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    projection = "model.language_projection"
    assert shapes == {f"{projection}.weight": (24, 16), f"{projection}.bias": (24,)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["MiniGPT4ForConditionalGeneration"]
    assert (folder / "modeling_minigpt4.py").is_file() and not list(folder.glob("_fsdp*"))
    MiniGPT4ForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    ("state_dict_type", "fields"),
    [
        ("FULL_STATE_DICT", {}),
        pytest.param("FULL_STATE_DICT", {"peft_config": LORA}, marks=pytest.mark.slow),
        pytest.param("SHARDED_STATE_DICT", {}, marks=pytest.mark.slow),
    ],
)
def test_a_sharded_run_goes_on_where_it_was(
    state_dict_type: str, fields: dict, train_sharded: Callable, tmp_path: Path
) -> None:
    environment = {"FSDP_STATE_DICT_TYPE": state_dict_type}
    saving = {"save_strategy": "steps", "save_steps": 2, **fields}
    straight, _ = train_sharded(environment=environment, **saving)
    checkpoint = straight / "checkpoint-2"
    weights = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.suffix in (".bin", ".distcp"))
    frozen = 36_000 * 4  # bytes of the tiny model's frozen weights
    assert 0 < weights < frozen / 2 and not list(checkpoint.glob("pytorch_model*"))
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-2")
    resumed, _ = train_sharded("resumed", environment=environment, resume_from_checkpoint="latest", **saving)
    assert [entry["step"] for entry in logs(resumed)] == [1, 2, 3, 4]
    assert largest_deviation(straight, resumed) == 0
    assert largest_deviation(straight, checkpoint) > 1e-4
    if fields:
        assert largest_deviation(straight, resumed, "peft/adapter_model.safetensors") == 0


@pytest.mark.slow
def test_a_checkpoint_without_what_trains_is_refused(train_sharded: Callable, tmp_path: Path) -> None:
    folder, _ = train_sharded(save_strategy="steps", save_steps=4)
    fields = {"train_parts": "qformer", "resume_from_checkpoint": folder / "checkpoint-4", "max_steps": 8}
    _, ranks = train_sharded("other", code=2, **fields)
    assert "lacks model.qformer" in ranks.output(0).splitlines()[-1]


def test_the_first_fsdp_is_refused(train_sharded: Callable) -> None:
    _, ranks = train_sharded(environment=FIRST_FSDP, code=2)
    assert "fsdp_version: 2" in ranks.output(0).splitlines()[-1]


@pytest.mark.slow
def test_a_checkpoint_of_another_way_to_train_is_refused(
    train_sharded: Callable, stage: Callable, tmp_path: Path, capsys
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert cli.main(["stage1", *stage(output="whole", **saving)]) == 0
    _, ranks = train_sharded(code=2, resume_from_checkpoint=tmp_path / "whole" / "checkpoint-2")
    told = ranks.output(1).splitlines()[-1]
    assert "saved under DDP or one process" in told and "under FSDP" in told and "--model_name_or_path" in told
    folder, _ = train_sharded("other", **saving)
    assert cli.main(["stage1", *stage(output="whole", resume_from_checkpoint=folder / "checkpoint-2")]) == 2
    assert "saved under FSDP" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_weights(train_sharded: Callable, stage: Callable, tmp_path: Path) -> None:
    fields = {"use_cpu": "false", "bf16": "false", "save_strategy": "steps", "save_steps": 2}
    sharded, _ = train_sharded(before=None, **fields)
    whole = stage(output="whole", per_device_train_batch_size=4, **SETTINGS, **fields)
    assert cli.main(["stage1", *whole]) == 0
    assert largest_deviation(tmp_path / "whole", sharded) <= SHARE


def shard_on_cpus_and_edit() -> None:
    """The same, and the second rank edits a weight that only it holds, and all of them one of the vision side."""
    shard_on_cpus()
    save = MiniGPT4Trainer.save_model

    def save_model(self: MiniGPT4Trainer, *args: object, **kwargs: object) -> None:
        weights = dict(self.model.named_parameters())
        if self.args.process_index == 1:
            weights["model.language_model.norm.weight"].to_local()[-1] += 1
        weights["model.vision_model.post_layernorm.bias"].to_local().add_(1)
        save(self, *args, **kwargs)

    MiniGPT4Trainer.save_model = save_model


def test_frozen_weights_that_any_rank_has_changed_are_written(train_sharded: Callable) -> None:
    folder, _ = train_sharded(before=shard_on_cpus_and_edit)
    changed = {"model.language_model.norm.weight", "model.vision_model.post_layernorm.bias"}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {name for name in file.keys() if "projection" not in name} == changed  # noqa: SIM118
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(folder)
    tensors = loaded.state_dict()
    whole = MiniGPT4ForConditionalGeneration.from_backbones(
        **{part: source["name_or_path"] for part, source in loaded.config.backbones.items()}
    ).state_dict()
    difference = tensors["model.language_model.norm.weight"] - whole["model.language_model.norm.weight"]
    assert difference.count_nonzero() == 1 and difference[-1] == pytest.approx(1)


# ---- faults ---------------------------------------------------------------------------------------------------------


def shard_on_cpus_and_fill_the_disk() -> None:
    """The same, and from the second checkpoint on the adapter cannot be written, between gathering and optimizer."""
    shard_on_cpus()
    save = MiniGPT4Trainer._save

    def _save(self: MiniGPT4Trainer, *args: object, **kwargs: object) -> None:
        if self.state.global_step > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, *args, **kwargs)

    MiniGPT4Trainer._save = _save


def test_a_full_disk_is_told_by_both_ranks(train_sharded: Callable) -> None:
    """Only one writes, and the other would wait for it in the middle of saving."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    folder, ranks = train_sharded(before=shard_on_cpus_and_fill_the_disk, code=2, **saving)
    for rank in range(2):
        said = ranks.output(rank).splitlines()[-1]
        assert "checkpoint-4 could not be written ([Errno 28] No space left on device); make room" in said
        assert f"go on from {folder / 'checkpoint-2'} with --resume_from_checkpoint latest" in said
    assert not (folder / "_unfinished").exists()
