"""Wrong settings of the stages, the plan and the other commands: one sentence each, before a model is loaded."""

import dataclasses
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4 import cli
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.planning import options
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import RANGES


@pytest.fixture
def refuse(stage: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """`refuse(command="stage1", **fields)`: the one sentence that a command ends with, having loaded no model."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "_compose", load)

    def call(command: str = "stage1", arguments: list[str] | None = None, **fields: Any) -> str:
        assert cli.main([command, *(stage(**fields) if arguments is None else arguments)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("minigpt4 ")]
        assert line.endswith(".") and not line.endswith(".."), line
        return line

    return call


# ---- numbers --------------------------------------------------------------------------------------------------------

# Field → values outside its range.
OUT_OF_RANGE: dict[str, tuple[Any, ...]] = {
    "max_txt_len": (-4, 0),
    "num_samples": (-1, 0),
    "eval_num_samples": (-1, 0),
    "shuffle_buffer": (-1,),
    "max_bad_share": (-0.1, 1.1, "nan"),
    "projector_num_layers": (0, -1),
    "patch_merge_size": (0, -4),
    "image_size": (0, -224),
    "max_steps": (-5, -2, 0),
    "num_train_epochs": (0, -1, "nan", "inf"),
    "per_device_train_batch_size": (0, -1),
    "per_device_eval_batch_size": (0,),
    "gradient_accumulation_steps": (0, -1),
    "max_length": (0, -5),
    "learning_rate": (0, -1, "nan", "inf"),
    "min_learning_rate": (-1, "nan", "inf"),
    "warmup_start_learning_rate": (-0.1, "nan"),
    "warmup_steps": (-1,),
    "warmup_ratio": (-0.1, 1.1, "nan"),
    "steps_per_epoch": (0, -1),
    "weight_decay": (-0.1, "nan", "inf"),
    "adam_beta1": (-0.1, 1, "nan"),
    "adam_beta2": (1.5, "inf"),
    "adam_epsilon": (-0.1, "nan"),
    "max_grad_norm": (-1, "nan"),
    "label_smoothing_factor": (-0.1, 2),
    "neftune_noise_alpha": (-5, "nan"),
    "seed": (-1, 2**32),
    "data_seed": (-1,),
    "logging_steps": (0, -1, 1.5, "inf"),
    "save_steps": (0, -1, 2.5, "nan"),
    "eval_steps": (0, -1, 2.5),
    "panel_steps": (0, -1),
    "save_total_limit": (0, -1),
    "dataloader_num_workers": (-1,),
    "dataloader_prefetch_factor": (0, -1),
    "torch_empty_cache_steps": (0,),
}
NUMBERS = [(field, value) for field, values in OUT_OF_RANGE.items() for value in values]


@pytest.mark.parametrize("command", ["stage1", "stage2", "plan"])
@pytest.mark.parametrize("field, value", NUMBERS)
def test_numbers_out_of_range_are_told(field: str, value: Any, command: str, refuse: Callable) -> None:
    told = refuse(command, **{field: value})
    assert re.match(rf"minigpt4 {command}: --{field} is {re.escape(str(value))}(\.0)?; it has to be ", told), told
    assert RANGES[field].text in told


def test_every_number_with_a_range_is_a_setting_that_has_one() -> None:
    fields = {
        field.name: field.default
        for kind in (ModelArguments, DataArguments, StageArguments, options.PlanArguments, options.InspectArguments)
        for field in dataclasses.fields(kind)
    }
    assert RANGES.keys() <= fields.keys()
    assert all(fields[name] is None or RANGES[name].holds(fields[name]) for name in RANGES)
    numbers = {name for name, value in fields.items() if type(value) in (int, float)}
    without = {"local_rank", "past_index", "fsdp_min_num_params", "_n_gpu"}  # others set, or nobody
    assert numbers - RANGES.keys() <= without


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"max_steps": 0}, "--max_steps"),
        ({"learning_rate": math.nan}, "finite, and a number above 0"),
        ({"seed": True}, "--seed is True"),
        ({"save_steps": None}, "--save_steps is None"),
        ({"logging_steps": "often"}, "--logging_steps is 'often'"),
        ({"packing": True}, "--packing is True"),
    ],
)
def test_settings_made_in_python_are_checked_as_well(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=named):
        StageArguments(output_dir=str(tmp_path), use_cpu=True, **fields)


@pytest.mark.parametrize(
    "kind, fields", [(DataArguments, {"max_txt_len": 0}), (ModelArguments, {"projector_num_layers": "3"})]
)
def test_other_arguments_made_in_python_are_checked_as_well(kind: type, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=f"--{next(iter(fields))} is "):
        kind(**fields)


# Of runs whose warm-up is longer than they are → what is told.
TOO_LONG = {
    "the default": ({"warmup_steps": None, "max_steps": 400}, ("5,000 steps", "only 400", "up to 8 %", "steps 40 ")),
    "told by epochs": (
        {"warmup_steps": 9, "max_steps": None, "num_train_epochs": 2, "learning_rate": 1e-4},
        ("9 steps", "only 8", "--warmup_steps 1 (or --warmup_ratio 0.1)"),
    ),
    "restarted": (
        {"warmup_steps": 100, "steps_per_epoch": 20, "max_steps": 80, "learning_rate": 1e-4},
        ("100 steps", "only 80", "up to 21 %"),
    ),
    "of transformers": (
        {"warmup_steps": 100, "max_steps": 50, "original_schedule": False, "lr_scheduler_type": "cosine"},
        ("100 steps", "only 50", "up to 50 %"),
    ),
}


@pytest.mark.parametrize("command", ["stage1", "plan"])
@pytest.mark.parametrize("case", TOO_LONG)
def test_a_warmup_longer_than_the_run_is_told(case: str, command: str, refuse: Callable) -> None:
    fields, named = TOO_LONG[case]
    told = refuse(command, **fields)
    assert told.startswith(f"minigpt4 {command}: The warm-up takes ") and all(text in told for text in named), told


@pytest.mark.parametrize(
    "command, fields, named",
    [
        ("stage1", {"image_column": "photo"}, "has no column 'photo'; it has image, caption"),
        ("stage2", {"text_column": "story"}, "has no column 'story'; it has image, caption"),
        ("stage1", {"streaming": True, "max_steps": None}, "--max_steps"),
        ("stage1", {"dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
    ],
)
def test_data_are_looked_at_before_a_model_is_loaded(
    command: str, fields: dict[str, Any], named: str, refuse: Callable
) -> None:
    assert named in refuse(command, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"warmup_steps": 4, "max_steps": 4},
        {"warmup_steps": 5, "max_steps": 4, "original_schedule": False, "lr_scheduler_type": "constant"},
        {"warmup_steps": 200, "steps_per_epoch": 200, "max_steps": 1000},
        {"warmup_steps": None, "warmup_ratio": 1, "max_steps": 4},
    ],
)
def test_other_warmups_are_taken(fields: dict[str, Any], stage: Callable) -> None:
    from recipes_minigpt4 import stage1_pretrain

    stage1_pretrain.parse(stage(**fields))


def test_the_command_line_chooses_between_steps_and_ratio(refuse: Callable, stage: Callable, tmp_path: Path) -> None:
    from recipes_minigpt4 import stage1_pretrain

    def warmup(text: str, **fields: Any) -> int:
        (tmp_path / "own.yaml").write_text(text)
        arguments = stage(**{"warmup_steps": None, "max_steps": 60, **fields})
        _, _, args = stage1_pretrain.parse(["--config", str(tmp_path / "own.yaml"), *arguments])
        return args.get_warmup_steps(60)

    assert warmup("warmup_ratio: 0.05") == 3
    assert warmup("warmup_steps: 7", warmup_ratio=0.05) == 3
    assert warmup("warmup_ratio: 0.05", warmup_steps=7) == 7
    assert warmup("warmup_ratio: 0.5", warmup_ratio=0.05) == 3
    told = refuse(warmup_steps=7, warmup_ratio=0.05)
    assert "Both warmup_steps and warmup_ratio" in told
    with pytest.raises(RecipeError, match="Both warmup_steps and warmup_ratio"):
        warmup("warmup_ratio: 0.05\nwarmup_steps: 7")


@pytest.mark.parametrize("text", ["max_steps: 2.5", "seed: null", "per_device_train_batch_size: true"])
def test_numbers_in_a_file_are_told(text: str, refuse: Callable, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(f"{text}\nuse_cpu: true\noutput_dir: {tmp_path / 'run'}\n")
    assert f"--{text.partition(':')[0]} is " in refuse(arguments=["--config", str(tmp_path / "own.yaml")])


@pytest.mark.parametrize("fields", [{"hours": -1}, {"hours": "nan"}, {"num_processes": 0}, {"stage": 3}])
def test_numbers_of_a_plan_are_told(fields: dict[str, Any], refuse: Callable) -> None:
    assert f"--{next(iter(fields))} is " in refuse("plan", **fields)


@pytest.mark.parametrize(
    "command",
    [
        "demo --seed -1", "demo --seed 1.5", "demo --seed 4294967296", "ablate --seeds 0,-1", "ablate --seeds 1,1",
        "ablate --scenes 2", "benchmark train --rounds 0", "benchmark train --seed -1", "benchmark data --pictures 0",
        "benchmark train --batch_size -2", "benchmark generate --images 0",
    ],
)  # fmt: skip
def test_numbers_of_other_commands_are_told(command: str, refuse: Callable) -> None:
    name, *arguments = command.split()
    told = refuse(name, arguments)
    assert arguments[-2] in told and arguments[-1].split(",")[-1] in told, told


# ---- settings that cannot work or would do nothing ------------------------------------------------------------------

# What is set, and what the sentence names beside it.
SETTINGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"packing": True}, ("--packing", "leave it out")),
    ({"padding_free": True}, ("--padding_free", "leave it out")),
    ({"use_liger_kernel": True}, ("--use_liger_kernel", "Liger")),
    ({"assistant_only_loss": True}, ("--assistant_only_loss",)),
    ({"remove_unused_columns": True}, ("--remove_unused_columns",)),
    ({"pad_to_multiple_of": 8}, ("--pad_to_multiple_of",)),
    ({"router_aux_loss_coef": 0.1}, ("--router_aux_loss_coef",)),
    ({"chat_template_path": "x"}, ("--chat_template_path", "--chat_template;")),
    ({"model_init_kwargs": "{}", "dataset_kwargs": '{"a": 1}'}, ("--model_init_kwargs", "--dtype")),
    ({"dataset_text_field": "words"}, ("--dataset_text_field", "--text_column")),
    ({"eos_token": "</s>"}, ("--eos_token", "--end_sym")),
    ({"lr_scheduler_type": "constant"}, ("--lr_scheduler_type", "--original_schedule false")),
    ({"original_schedule": False, "lr_scheduler_type": "warmup_stable_decay"}, ("num_decay_steps",)),
    ({"original_schedule": False, "lr_scheduler_kwargs": '{"zzz": 1}'}, ("--lr_scheduler_kwargs", "zzz")),
    ({"gradient_checkpointing_kwargs": '{"zzz": 1}'}, ("gradient_checkpointing_kwargs", "zzz")),
    ({"gradient_checkpointing_kwargs": "zzz"}, ("--gradient_checkpointing_kwargs", "JSON")),
    ({"accelerator_config": "nowhere.json"}, ("--accelerator_config", "JSON")),
    ({"accelerator_config": '{"dispatch_batches": true}'}, ("dispatch_batches",)),
    ({"accelerator_config": '{"zzz": true}'}, ("zzz",)),
    ({"dataloader_persistent_workers": True}, ("--dataloader_num_workers",)),
    ({"max_length": 40, "truncation_mode": "keep_end"}, ("--truncation_mode",)),
    ({"min_learning_rate": 0.5}, ("--min_learning_rate is 0.5", "--learning_rate, 0.01")),
    ({"warmup_start_learning_rate": 0.5}, ("--warmup_start_learning_rate is 0.5", "--learning_rate, 0.01")),
    ({"report_to": "wandbb"}, ("wandbb", "wandb")),
    ({"eval_strategy": "steps"}, ("--eval_strategy", "--eval_dataset_name")),
    ({"eval_strategy": "epoch"}, ("--eval_strategy", "--eval_dataset_name")),
    ({"eval_on_start": True}, ("--eval_on_start", "--eval_split")),
    ({"eval_split": "validation"}, ("--eval_split", "--eval_strategy steps")),
    ({"load_best_model_at_end": True, "save_strategy": "epoch"}, ("--load_best_model_at_end",)),
    ({"save_strategy": "best", "metric_for_best_model": "loss"}, ("--save_strategy",)),
]
# Settings of some releases only.
SETTINGS += [
    ({name: value}, (f"--{name}", *named))
    for name, value, named in (
        ("group_by_length", True, ("--train_sampling_strategy group_by_length",)),
        ("train_sampling_strategy", "batch_rebalance", ("sequential",)),
        ("dataloader_multiprocessing_context", "spawn", ("--dataloader_num_workers",)),
    )
    if name in {field.name for field in dataclasses.fields(StageArguments)}
]


@pytest.mark.parametrize("command", ["stage1", "plan"])
@pytest.mark.parametrize("fields, named", SETTINGS, ids=lambda value: "-".join(value))
def test_settings_without_use_are_told(fields: dict[str, Any], named: tuple[str, ...], command, refuse) -> None:
    told = refuse(command, **fields)
    assert all(word in told for word in named), told


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"optim": "adamw_bnb_8bit"}, ("--optim adamw_bnb_8bit", "bitsandbytes")),
        ({"optim_args": "rubbish"}, ("--optim_args rubbish",)),
        ({"activation_offloading": True}, ("--activation_offloading", "GPU")),
        ({"attn_implementation": "flex_attention"}, ("flex_attention", "sdpa")),
        ({"torch_compile": True, "torch_compile_mode": "zzz"}, ("--torch_compile_mode", "'zzz'", "max-autotune")),
        ({"dtype": "int8"}, ("--dtype", "bfloat16")),
        ({"dtype": "float8_e4m3fn"}, ("--dtype", "bfloat16")),
        ({"output_dir": ""}, ("--output_dir is empty",)),
    ],
)
def test_what_this_machine_cannot_do_is_told(
    fields: dict[str, Any], named: tuple[str, ...], refuse, monkeypatch
) -> None:
    for module in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, module, None)  # as where it is not installed
    told = refuse(**fields)
    assert all(word in told for word in named), told


def test_a_reporter_that_is_not_installed_is_told(refuse: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes_minigpt4.training import argument_checks

    monkeypatch.setattr(argument_checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert "--report_to wandb needs its package; run `pip install wandb`" in refuse(report_to="wandb")


def test_a_choice_of_quantization_is_one_that_works(refuse: Callable) -> None:
    told = refuse(quantization="int4")
    assert "'int4'" in told and "bnb-nf4" in told and "torchao-int4" not in told


# ---- where results go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["output_dir", "cache_features"])
def test_folders_that_cannot_be_written_are_told(field: str, refuse: Callable, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in (("file", "it is a file"), ("file/below", "not a directory")):
        told = refuse(**{field: tmp_path / place})
        assert f"--{field} {tmp_path / place} cannot be written into ({reason})" in told, told


def test_a_folder_without_permission_is_told(refuse: Callable, tmp_path: Path, monkeypatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", forbidden)
    assert f"--output_dir {tmp_path / 'run'} cannot be written into (permission denied)" in refuse()


@pytest.mark.parametrize("field", ["model_name_or_path", "vision", "language_model", "dataset_name", "image_folder"])
@pytest.mark.parametrize("command", ["stage1", "stage2"])
def test_a_run_never_overwrites_what_it_reads(command: str, field: str, refuse: Callable, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    told = refuse(command, **{field: tmp_path / "one", "output_dir": f"{tmp_path}/x/../one/"})
    assert f"--{field} reads from" in told and "name another folder" in told
    assert not list((tmp_path / "one").iterdir())


def test_a_run_never_overwrites_another_model(refuse: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "holds a 'llama' model" in refuse()


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["stage1", "plan"])
@pytest.mark.parametrize(
    "fields, named",
    [
        ({"vision": "/nowhere"}, ("vision backbone /nowhere", "there is no such folder; name another")),
        ({"language_model": "./nowhere"}, ("language_model backbone ./nowhere", "there is no such folder")),
        ({"qformer": "None"}, ("'None'", "null in YAML")),
        ({"model_name_or_path": "/nowhere"}, ("--model_name_or_path /nowhere", "there is no such folder")),
        (
            {"model_name_or_path": "runs/nowhere"},
            ("runs/nowhere cannot be opened", "a stage has written"),
        ),
    ],
)
def test_models_that_are_not_there_are_told(fields: dict, named: tuple[str, ...], command: str, refuse) -> None:
    told = refuse(command, **fields)
    assert all(word in told for word in named), told
    assert "from_pretrained" not in told  # another door


@pytest.mark.parametrize("command", ["stage1", "plan"])
def test_swapped_parts_are_told_from_their_configurations(command: str, refuse, parts: dict[str, str]) -> None:
    llama, blip2 = parts["language_model"], parts["vision"]
    assert f"The vision backbone {llama} is a 'llama' model, which takes input_ids" in refuse(command, vision=llama)
    assert f"--model_name_or_path {llama} is a model of the type 'llama'" in refuse(command, model_name_or_path=llama)
    assert "without a Q-Former" in refuse(command, qformer=llama)
    (Path(blip2).parent / "bert").mkdir(exist_ok=True)
    BertConfig(vocab_size=40, hidden_size=16).save_pretrained(Path(blip2).parent / "bert")
    told = refuse(command, language_model=Path(blip2).parent / "bert")
    assert "is a 'bert' model, which reads in both directions" in told


def test_a_vision_side_is_no_language_model(stage, parts: dict[str, str], capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert cli.main(["stage1", *stage(language_model=parts["vision"])]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and "tensors of the language_model, so it is a model of another kind" in lines[0], lines


def test_yaml_names_parts_by_text(refuse: Callable, tmp_path: Path) -> None:
    for text, told in (("qformer: None", "null in YAML"), ("vision: 5", "--vision is 5")):
        (tmp_path / "own.yaml").write_text(
            f"{text}\nlanguage_model: tiny\ndataset_name: tiny\nnum_samples: 4\nwarmup_ratio: 0.1\nuse_cpu: true\n"
            f"output_dir: {tmp_path}/run\n"
        )
        vision = ["--vision", "tiny"] if "qformer" in text else []
        assert told in refuse(arguments=["--config", str(tmp_path / "own.yaml"), *vision])


def test_a_command_without_anything_says_what_would_do(refuse: Callable, tmp_path: Path) -> None:
    arguments = ["--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    assert "--config tiny_stage1" in refuse(arguments=arguments)


def test_a_row_longer_than_the_positions_is_told(stage, parts: dict[str, str], tmp_path: Path, capsys) -> None:
    shutil.copytree(parts["language_model"], tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 6}))
    assert cli.main(["stage1", *stage(language_model=tmp_path / "short")]) == 2
    assert "tokens, image tokens included, but the language model has 6 positions" in capsys.readouterr().err


# ---- fields of a new model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"patch_merge_layout": "round"}, "--patch_merge_layout is 'round'; it has to be consecutive or square."),
        (
            {"vision_feature_select_strategy": "cls"},
            "--vision_feature_select_strategy is 'cls'; it has to be default or full.",
        ),
        ({"vision_feature_layer": 1.5}, "--vision_feature_layer is 1.5; it has to be a whole number."),
        ({"image_size": "large"}, "--image_size is 'large'; it has to be a whole number from 1 on."),
    ],
)
def test_values_of_the_model_that_make_no_sense_are_told(fields: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(told)):
        ModelArguments(**fields)
