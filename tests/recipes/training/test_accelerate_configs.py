"""The shipped configurations of `accelerate launch`, read and checked by accelerate itself."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from recipes_minigpt4.accelerate import LAUNCH_CONFIGS


NAMES = ["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3", "multi_node"]


def prepare(name: str, *options: str) -> tuple[SimpleNamespace, dict[str, str]]:
    """What `accelerate launch` makes of a file and of options: torchrun's arguments, and the ranks' environment."""
    command = [
        "--config_file",
        str(LAUNCH_CONFIGS / f"{name}.yaml"),
        *options,
        "-m",
        "recipes_minigpt4.stage1_pretrain",
    ]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(command))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        deepspeed_command, environment = prepare_deepspeed_cmd_env(args)
        assert deepspeed_command is None  # torchrun's, not DeepSpeed's own launcher
    else:
        environment = prepare_multi_gpu_env(args)
    return args, environment


@pytest.fixture(autouse=True)
def every_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever else uses this machine."""
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)


@pytest.fixture
def ranks_environment(monkeypatch: pytest.MonkeyPatch):
    """`ranks_environment(name, *options)`: put this process where a rank would be."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)

    def build(name: str, *options: str) -> None:
        for variable, value in prepare(name, *options)[1].items():
            monkeypatch.setenv(variable, value)

    return build


def test_these_files_are_shipped() -> None:
    assert sorted(path.stem for path in LAUNCH_CONFIGS.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_knows_every_key(name: str) -> None:
    path = LAUNCH_CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    options = {action.dest for action in launch.launch_command_parser()._actions}
    nested = {**config.fsdp_config, **config.deepspeed_config}
    assert nested.keys() <= options, "accelerate launch would silently ignore these"
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert "mixed_precision" not in written  # the stages choose


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_would_launch_it(name: str) -> None:
    args, environment = prepare(name)
    assert args.module and args.training_script == "recipes_minigpt4.stage1_pretrain"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"
    kinds = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}
    meant = [variable for variable, kind in kinds.items() if name.startswith(kind)]
    assert [variable for variable in kinds if environment.get(variable) == "true"] == meant
    machines = 2 if name == "multi_node" else 1
    assert int(args.nproc_per_node) * machines == args.num_processes


@pytest.mark.parametrize("name", NAMES)
def test_the_command_line_wins(name: str) -> None:
    args, _ = prepare(name, "--num_processes", "6")
    assert args.num_processes == 6


def test_machines_find_each_other() -> None:
    options = ["--main_process_ip", "10.0.0.7", "--machine_rank"]
    for rank in (0, 1):
        args, _ = prepare("multi_node", *options, str(rank))
        assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("2", "8", rank)
        assert (args.rdzv_endpoint, args.rdzv_backend) == ("10.0.0.7:29500", "static")


def test_fsdp2_is_what_accelerate_builds(ranks_environment) -> None:
    ranks_environment("fsdp2")
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # so the model's own
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert not (plugin.activation_checkpointing or plugin.cpu_ram_efficient_loading)
    assert type(plugin.cpu_offload).__name__ == "OffloadPolicy"  # which keeps weights on the GPU


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_is_what_accelerate_builds(stage: int, ranks_environment) -> None:
    ranks_environment(f"deepspeed_zero{stage}")
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    assert plugin.zero_stage == stage and plugin.zero3_init_flag == (stage == 3)
    assert config["gradient_accumulation_steps"] == "auto" and config["gradient_clipping"] == "auto"
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is False
    devices = [config["zero_optimization"][f"offload_{what}"]["device"] for what in ("optimizer", "param")]
    assert devices == ["none", "none"]


def test_the_module_tells_where_the_files_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes_minigpt4.accelerate"], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip(), "ddp.yaml").is_file()
