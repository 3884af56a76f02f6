"""
DeepSpeed over gloo, where it is installed (tried with 0.19.8): ZeRO-2 and ZeRO-3 with two ranks.

It builds an operation in C++ at its first run, so it needs a compiler, and time.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.utils import DeepSpeedPlugin
from closeness import SHARE
from ranks import Ranks, start
from safetensors import safe_open
from safetensors.torch import load_file
from test_accelerate_configs import prepare
from test_ranks import SETTINGS, largest_deviation, logs

from recipes_minigpt4 import stage1_pretrain
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed"),
]

# What accelerate and DeepSpeed need to hear to take CPUs for what they train on.
ON_CPUS = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}


def bfloat16_on_cpus() -> None:
    """transformers asks for a GPU, or for `use_cpu`, which would switch DeepSpeed off."""
    import transformers.training_args

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True


def tell_what_is_left() -> None:
    """Let every rank print what it has of the projection, and try to save it by itself."""
    complete, save = DeepSpeedPlugin.__post_init__, MiniGPT4Trainer.save_model

    def __post_init__(self: DeepSpeedPlugin) -> None:  # noqa: N807
        complete(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # small ones too

    DeepSpeedPlugin.__post_init__ = __post_init__

    def save_model(self: MiniGPT4Trainer, *args: object, **kwargs: object) -> None:
        optimizer = self.model_wrapped.optimizer
        print("bucket:", getattr(optimizer, "reduce_bucket_size", None))
        print("local:", tuple(self.model.model.language_projection.weight.shape))
        try:
            self.model.save_pretrained(Path(self.args.output_dir, "by_hand"))
        except ValueError as error:
            print("refused:", error)
        save(self, *args, **kwargs)

    MiniGPT4Trainer.save_model = save_model


@pytest.fixture(params=[2, 3], ids=["ZeRO-2", "ZeRO-3"])
def zero_stage(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def train(
    zero_stage: int, stage: Callable, uneven_pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable:
    """`train(output, before=…, **fields)`: two ranks under DeepSpeed; their folder and the ranks, ended."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    environment = prepare(f"deepspeed_zero{zero_stage}")[1]
    mine = {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}

    def run(
        output: str = "sharded", before: Callable[[], None] | None = None, code: int = 0, **fields
    ) -> tuple[Path, Ranks]:
        fields = {"dataset_name": uneven_pairs_file, **SETTINGS, "use_cpu": "false", "ddp_backend": "gloo", **fields}
        arguments = ["stage1", *stage(output=output, **fields)]
        with start(arguments, environment={**mine, **ON_CPUS}, before=before) as ranks:
            assert ranks.wait(400) == [code] * 2, ranks.output()
        return tmp_path / output, ranks

    return run


def dtypes(file: Path) -> set[str]:
    with safe_open(file, "pt") as stored:
        return {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118


def test_it_trains_like_one_process_and_saves_the_projection(
    zero_stage: int, train: Callable, stage: Callable, uneven_pairs_file: Path, tmp_path: Path
) -> None:
    fields = {"dataset_name": uneven_pairs_file, "per_device_train_batch_size": 4, **SETTINGS}
    stage1_pretrain.main(stage(output="whole", **fields))
    folder, ranks = train(before=tell_what_is_left)
    assert largest_deviation(tmp_path / "whole", folder) <= SHARE
    trained = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert f"bucket: {trained}\n" in ranks.output(0)  # and not DeepSpeed's own 500,000,000
    if zero_stage == 3:
        for rank in range(2):
            assert "local: (0,)" in ranks.output(rank)
            assert "refused: model.language_projection" in ranks.output(rank)
        assert not (folder / "by_hand").exists()


def test_it_goes_on_where_it_was(train: Callable, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    straight, _ = train(**saving)
    checkpoint = straight / "checkpoint-2"
    frozen = 36_000 * 4  # bytes of the tiny model's frozen weights
    assert 0 < sum(path.stat().st_size for path in checkpoint.rglob("*.pt")) < frozen / 2
    shutil.copytree(checkpoint, tmp_path / "resumed" / "checkpoint-2")
    resumed, _ = train("resumed", resume_from_checkpoint="latest", **saving)
    assert [entry["step"] for entry in logs(resumed)] == [1, 2, 3, 4]
    assert largest_deviation(straight, resumed) <= 1e-7
    assert largest_deviation(straight, checkpoint) > 1e-4


@pytest.mark.parametrize("zero_stage", [3])
def test_features_need_a_whole_vision_side(zero_stage: int, train: Callable, tmp_path: Path) -> None:
    _, ranks = train(code=2, cache_features=tmp_path / "features")
    assert "--cache_features" in ranks.output(0).splitlines()[-1]


def test_half_precision_is_not_saved(train: Callable) -> None:
    folder, _ = train(before=bfloat16_on_cpus, bf16="true")
    assert dtypes(folder / "model.safetensors") == {"F32"}
