"""Both stages from the command line: what trains, what is saved, resuming, and mistakes."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from closeness import assert_close
from safetensors.torch import load_file
from transformers import AutoProcessor, GenerationConfig
from trl import SFTConfig

from modeling_minigpt4 import AutoModelForVision2Seq, MiniGPT4ForConditionalGeneration
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


PROJECTION = {"model.language_projection.weight", "model.language_projection.bias"}
CODE = {"configuration_minigpt4.py", "modeling_minigpt4.py", "backbones.py", "processing_minigpt4.py"}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def history_of(folder: Path) -> list[dict]:
    """What was logged at every step."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [entry for entry in state["log_history"] if "loss" in entry]


@pytest.fixture
def run(capsys: pytest.CaptureFixture) -> Callable:
    """Run the command as a user does; returns what it printed."""

    def call(command: str, arguments: list[str], status: int = 0) -> str:
        assert cli.main([command, *arguments]) == status
        printed = capsys.readouterr()
        return printed.err.splitlines()[-1] if status else printed.out  # progress bars go to standard error too

    return call


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["stage1", "stage2"])
def test_only_the_projection_moves(command: str, stage: Callable) -> None:
    module = {"stage1": stage1_pretrain, "stage2": stage2_finetune}[command]
    before: dict[str, torch.Tensor] = {}

    class Trainer(module.MiniGPT4Trainer):  # type: ignore[name-defined]
        def train(self, *args, **kwargs):
            before.update({name: tensor.clone() for name, tensor in self.model.state_dict().items()})
            return super().train(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MiniGPT4Trainer", Trainer)
        trainer = module.main(stage(max_steps=2))
    after = trainer.model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == PROJECTION
    assert {name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad} == PROJECTION
    assert after["model.language_projection.weight"].dtype == torch.float32


def test_more_parts_train_when_asked_for(run: Callable, stage: Callable, tmp_path: Path) -> None:
    printed = run("stage1", stage(max_steps=1, train_parts="qformer"))
    assert re.search(r"^trains .*qformer [\d,]+.* parameters; frozen: vision_model", printed, re.MULTILINE)
    saved = tensors_of(tmp_path / "run")
    assert {name.split(".")[1] for name in saved} == {"language_projection", "qformer", "query_tokens"}


def test_stage2_goes_on_from_stage1(run: Callable, stage: Callable, tmp_path: Path) -> None:
    run("stage1", stage("one", max_steps=2))
    run("stage2", stage("two", max_steps=2, model_name_or_path=tmp_path / "one"))
    run("stage2", stage("none", max_steps=1, model_name_or_path=tmp_path / "one", learning_rate=1e-30,
                        warmup_start_learning_rate=0, min_learning_rate=0))  # fmt: skip
    one, two, none = (tensors_of(tmp_path / name) for name in ("one", "two", "none"))
    assert one.keys() == two.keys() == PROJECTION
    assert not equal(one, two)
    assert equal(one, none)  # without a step to speak of, the projection of stage 1 is what is saved


def test_stage2_finds_backbones_that_have_moved(run, stage, tmp_path: Path, parts: dict[str, str]) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for name in ("blip2", "llama"):
        shutil.copytree(Path(parts["vision"]).parent / name, old / name)
    places = {"vision": "blip2", "qformer": "blip2", "language_model": "llama"}
    run("stage1", stage("one", **{part: old / name for part, name in places.items()}))
    old.rename(new)
    fields = {"model_name_or_path": tmp_path / "one"}
    told = run("stage2", stage("two", **fields), status=2)
    assert str(old) in told and "moved" in told
    run("stage2", stage("two", **fields, **{part: new / name for part, name in places.items()}))
    assert tensors_of(tmp_path / "two").keys() == PROJECTION


def test_workers_change_nothing(run: Callable, stage: Callable, tmp_path: Path) -> None:
    for name, workers in (("none", 0), ("one", 1)):
        run("stage1", stage(name, dataloader_num_workers=workers))
    assert equal(tensors_of(tmp_path / "none"), tensors_of(tmp_path / "one"))


@pytest.mark.parametrize("how", ["bf16", "dtype"])
def test_the_projection_stays_in_float32(how: str, stage: Callable, tmp_path: Path) -> None:
    fields = {"bf16": {"bf16": True}, "dtype": {"dtype": "bfloat16"}}[how]
    trainer = stage1_pretrain.main(stage(**fields))
    dtypes = {name: tensor.dtype for name, tensor in trainer.model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == PROJECTION
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "run").values()} == {torch.float32}
    assert all(0 < entry["loss"] < 20 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("template, separator", [("vicuna_v0", "###"), ("llama2", None)])
def test_replies_of_the_adapter_stop_as_its_template_says(template, separator, run, stage, tmp_path: Path) -> None:
    run("stage1", stage(chat_template=template, max_steps=1))
    run("stage2", stage("two", model_name_or_path=tmp_path / "run", max_steps=1))
    for folder in (tmp_path / "run", tmp_path / "two"):
        assert getattr(GenerationConfig.from_pretrained(folder), "separator", None) == separator
        assert AutoProcessor.from_pretrained(folder).separator == separator


def test_same_seed_same_adapter(run: Callable, stage: Callable, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("stage1", stage(name, seed=seed))
    a, b, c = (tensors_of(tmp_path / name) for name in "abc")
    assert equal(a, b) and not equal(a, c)


# ---- what is saved --------------------------------------------------------------------------------------------------


def test_checkpoints_are_adapter_only_and_complete(run: Callable, stage: Callable, tmp_path: Path, pictures) -> None:
    run("stage1", stage(max_steps=2, save_strategy="steps", save_steps=1))
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1", tmp_path / "run" / "checkpoint-2"):
        saved = tensors_of(folder)
        assert saved.keys() == PROJECTION
        assert (folder / "model.safetensors").stat().st_size < 4000
        names = {path.name for path in folder.iterdir()}
        assert names >= {"config.json", "generation_config.json", "README.md", "tokenizer.json", *CODE}
        assert GenerationConfig.from_pretrained(folder).separator == "###"
        processor = AutoProcessor.from_pretrained(folder)
        inputs = processor(images=pictures[0], text="<image> a", return_tensors="pt")
        model = AutoModelForVision2Seq.from_pretrained(folder)
        assert torch.equal(
            model.state_dict()["model.language_projection.weight"], saved["model.language_projection.weight"]
        )
        assert torch.isfinite(model(**inputs).logits).all()  # fmt: skip


def test_loss_rate_and_images_per_second_are_logged(run: Callable, stage: Callable, tmp_path: Path) -> None:
    run("stage1", stage(max_steps=4, logging_steps=2, gradient_accumulation_steps=2))
    history = history_of(tmp_path / "run")
    assert [entry["step"] for entry in history] == [2, 4]
    for entry in history:
        assert entry["loss"] > 0 and entry["learning_rate"] > 0 and entry["images_per_second"] > 0


def test_images_per_second_counts_images(stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes_minigpt4.training import trainer as module

    clock = iter(range(1000))  # every look at the clock is one second after the last
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    trainer = stage1_pretrain.main(stage(max_steps=3, gradient_accumulation_steps=2))
    rates = [entry["images_per_second"] for entry in trainer.state.log_history if "loss" in entry]
    assert rates == [4.0, 4.0, 4.0]  # 2 rows × 2 batches between two looks


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["true", "latest", "folder"])
def test_resuming_equals_a_run_without_a_break(run: Callable, stage: Callable, tmp_path: Path, wanted: str) -> None:
    fields = {"max_steps": 5, "warmup_steps": 2, "save_strategy": "steps", "save_steps": 3}
    run("stage1", stage("whole", **fields))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "broken" / "checkpoint-3")
    source = tmp_path / "broken" / "checkpoint-3" if wanted == "folder" else wanted
    run("stage1", stage("broken", **fields, resume_from_checkpoint=source))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert equal(tensors_of(whole), tensors_of(broken))
    assert not equal(tensors_of(whole), tensors_of(whole / "checkpoint-3"))
    logged = [[(entry["step"], entry["loss"], entry["learning_rate"]) for entry in history_of(folder)]
              for folder in (whole, broken)]  # fmt: skip
    assert logged[0] == logged[1] and len(logged[0]) == 5


@pytest.mark.parametrize("wanted", ["true", "nowhere"])
def test_nothing_to_resume_from_is_told(run: Callable, stage: Callable, wanted: str) -> None:
    told = run("stage1", stage(resume_from_checkpoint=wanted), status=2)
    check_sentence(told, ("resume", "--resume_from_checkpoint"))


# ---- other ways to start --------------------------------------------------------------------------------------------


def test_accelerate_launches_a_stage(parts: dict[str, str], pairs_file: Path, tmp_path: Path) -> None:
    config = {
        **parts, "dataset_name": str(pairs_file), "output_dir": str(tmp_path / "run"), "max_steps": 2,
        "learning_rate": 0.01, "warmup_steps": 1, "per_device_train_batch_size": 2, "save_strategy": "no",
        "use_cpu": True, "logging_steps": 1,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [*launch, "-m", "recipes_minigpt4.stage1_pretrain", "--config", str(tmp_path / "run.yaml"), "--seed", "3"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trains" in done.stdout and "frozen" in done.stdout
    assert tensors_of(tmp_path / "run").keys() == PROJECTION
    assert "| seed | 3 |" in (tmp_path / "run" / "README.md").read_text()


def test_modules_are_commands_of_their_own(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "recipes_minigpt4.stage2_finetune", "--config", "nowhere.yaml"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr.strip().splitlines()[-1]


# ---- configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in shipped_configs() if "stage" in name and "blip2" not in name])
def test_shipped_configurations_parse(name: str) -> None:
    module = stage1_pretrain if "stage1" in name else stage2_finetune
    text = shipped_configs()[name].read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    model, data, training = module.parse(["--config", name, "--use_cpu", "true"])
    for field, value in written.items():
        (owner,) = [part for part in (model, data, training) if hasattr(part, field)]
        found = getattr(owner, field)
        value = [value] if field == "dataset_name" and isinstance(value, str) else value
        assert getattr(found, "value", found) == value, field  # enumerations hold their text
    assert bool(model.model_name_or_path) != bool(model.vision and model.language_model)
    assert f"--config {name}" in text  # the comment on top tells how to run it
    meant = re.search(r"# Meant for (?:about )?([\d,]+) pictures, .*: ([\d,]+) steps of (\d+)\.", text)
    pictures, steps, rows = (int(number.replace(",", "")) for number in meant.groups())
    processes = 4 if "--num_processes 4" in text else 1
    assert (steps, rows) == (training.max_steps, processes * training.per_device_train_batch_size)
    assert data.num_samples in (None, pictures)


@pytest.mark.parametrize(
    "name, steps, batch, rates, warmup",
    [
        ("stage1_vicuna_7b", 20_000, 64, (1e-6, 1e-4, 8e-5), 5000),
        ("stage2_vicuna_7b", 1_000, 12, (1e-6, 3e-5, 1e-5), 200),
    ],
)
def test_configurations_of_the_original_have_its_numbers(name, steps, batch, rates, warmup) -> None:
    module = stage1_pretrain if "stage1" in name else stage2_finetune
    _, data, args = module.parse(["--config", name, "--use_cpu", "true"])
    assert (args.max_steps, args.per_device_train_batch_size, args.warmup_steps) == (steps, batch, warmup)
    assert (args.warmup_start_learning_rate, args.learning_rate, args.min_learning_rate) == rates
    assert (args.weight_decay, args.seed, args.steps_per_epoch) == (0.05, 42, warmup)
    assert data.max_txt_len == {"stage1_vicuna_7b": 32, "stage2_vicuna_7b": 160}[name]


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_command_line_wins_over_the_file(form: str, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        f"output_dir: {tmp_path}/a\nlearning_rate: 0.5\nmax_steps: 7000\nuse_cpu: true\n"
    )
    arguments = form.format(tmp_path / "own.yaml").split()
    _, _, args = stage1_pretrain.parse([*arguments, "--learning_rate", "0.25"])
    assert (args.learning_rate, args.max_steps) == (0.25, 7000)


# What is passed beside a complete command line, and what the sentence has to name.
MISTAKES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "unknown field": (["--learning_rat", "1"], ("learning_rat", "learning_rate")),
    "a field like no other": (["--xyzzy", "1"], ("xyzzy", "--help")),
    "a stray value": (["stray"], ("stray", "--FIELD")),
    "wrong number": (["--max_steps", "many"], ("max_steps", "many")),
    "wrong truth value": (["--bf16", "perhaps"], ("perhaps",)),
    "no such file": (["--config", "nowhere.yaml"], ("nowhere.yaml", "tiny_stage1")),
    "config without a name": (["--config"], ("--config",)),
    "no such dtype": (["--dtype", "float7"], ("float7", "bfloat16")),
    "no such part to train": (["--train_parts", "ears"], ("ears", "qformer")),
    "no such backbone": (["--language_model", "./nowhere"], ("nowhere", "language_model")),
    "no such adapter": (["--model_name_or_path", "./nowhere"], ("nowhere",)),
    "no such template": (["--chat_template", "vicuna_v9"], ("vicuna_v9", "vicuna_v0")),
    "no such attention": (["--attn_implementation", "psychic"], ("psychic",)),
    "no such schedule": (["--original_schedule", "false", "--lr_scheduler_type", "zigzag"], ("zigzag", "cosine")),
    "no such dataset": (["--dataset_name", "./nowhere"], ("nowhere", "--dataset_name")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_in_one_sentence(name: str, run: Callable, stage: Callable) -> None:
    arguments, named = MISTAKES[name]
    check_sentence(run("stage1", [*stage(), *arguments], status=2), named)


# The text of a YAML file, and what the sentence has to name.
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown field": ("learning_rat: 1\n", ("learning_rat", "learning_rate")),
    "no YAML": ("a: [1\n", ("YAML",)),
    "a list": ("- 1\n", ("own.yaml", "YAML mapping")),
    "empty": ("", ("own.yaml", "YAML mapping")),
    "values that contradict each other": ("bf16: true\nfp16: true\n", ("bf16", "fp16")),
    "wrong number": ("max_steps: many\n", ("max_steps", "many")),
}


@pytest.mark.parametrize("name", FILES)
def test_mistakes_in_a_file_are_told_in_one_sentence(name: str, run: Callable, tmp_path: Path) -> None:
    text, named = FILES[name]
    (tmp_path / "own.yaml").write_text(text)
    arguments = ["--config", str(tmp_path / "own.yaml"), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    check_sentence(run("stage1", arguments, status=2), named)


@pytest.mark.parametrize(
    "fields, named",
    [
        ({"vision": None}, ("--vision", "--model_name_or_path")),
        ({"language_model": None}, ("--language_model",)),
        ({"dataset_name": None}, ("--dataset_name",)),
        ({"max_length": 3}, ("max_length", "3")),
    ],
)
def test_what_is_missing_or_too_small_is_told(fields, named, run: Callable, stage: Callable) -> None:
    check_sentence(run("stage1", stage(**fields), status=2), named)


def check_sentence(told: str, named: tuple[str, ...]) -> None:
    assert told.startswith("minigpt4 stage1: ") and told.endswith("."), told
    assert not [word for word in named if word not in told], told


def test_loaded_adapter_is_what_was_trained(run: Callable, stage: Callable, tmp_path: Path, pictures) -> None:
    trainer = stage2_finetune.main(stage(max_steps=2))
    model = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "run")
    inputs = processor(images=pictures[:1], text="<image> What is it?", return_tensors="pt")
    with torch.no_grad():
        trained = trainer.model.eval()(**inputs).logits
        assert_close(model(**inputs).logits, trained)


def test_the_trainer_names_the_settings_that_it_takes(compose: Callable, tmp_path: Path) -> None:
    model, processor = compose()
    with pytest.raises(RecipeError, match=r"takes `args=StageArguments\(...\)`.* got SFTConfig"):
        MiniGPT4Trainer(model=model, args=SFTConfig(str(tmp_path), use_cpu=True), processing_class=processor)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="4.57 writes weights on every machine")
def test_weights_of_every_machine_are_not_promised(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["stage1", *stage(save_on_each_node=True)]) == 2
    assert "transformers 5 writes weights on the first machine only" in capsys.readouterr().err
