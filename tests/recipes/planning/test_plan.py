"""`minigpt4 plan`: what it tells before a run, against what the run then is."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from planned import LORA, TOLERANCE, named, told
from torch.utils.data import DataLoader
from transformers import Blip2Config, LlamaConfig

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, backbones
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.benchmark.models import SIZES, build_config
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.planning.data import Source, longest_row, measure_sources, plan_schedule
from recipes_minigpt4.planning.memory import AutocastOfGPU
from recipes_minigpt4.planning.model import build_skeleton, check_quantization, list_parts
from recipes_minigpt4.planning.plan import Plan, PlannedStage1, make_plan, tell_stage
from recipes_minigpt4.training.arguments import ModelArguments
from recipes_minigpt4.utils.errors import RecipeError


# ---- parameters -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def configurations(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Arguments that name the backbones of a released model, folders with a configuration and nothing else."""

    def save(preset: str) -> list[str]:
        folder, config = tmp_path_factory.mktemp(preset), PRESETS[preset].config()
        config.text_config.save_pretrained(folder / "llm")
        qformer = {} if config.qformer_config is None else {"qformer_config": config.qformer_config.to_dict()}
        vision = {"vision_config": config.vision_config.to_dict(), "num_query_tokens": config.num_query_tokens}
        Blip2Config(**vision, **qformer).save_pretrained(folder / "blip2")
        parts = {"vision": "blip2", "language_model": "llm", **({"qformer": "blip2"} if qformer else {})}
        return [text for part, name in parts.items() for text in (f"--{part}", str(folder / name))]

    return save


def test_the_released_model_is_planned_from_configurations_alone(
    configurations: Callable, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--config", "stage1_vicuna_7b", *configurations("vicuna-7b"), "--gradient_checkpointing", "false"]
    assert cli.main(["plan", *arguments, "--num_processes", "4", "--hours", "10"]) == 0
    printed = capsys.readouterr().out
    for text in (
        "stage 1 on GPU, DDP, 4 processes, computed in bfloat16",
        "7,832,688,128  of which 3,149,824 train and 7,829,538,304 are frozen",
        "fits into 24 GB NO, 40 GB yes, 80 GB yes",
        "20,000 of 256 pictures (4 × 64 rows × 1 accumulated): 5,120,000 pictures",
        "65 tokens: 1 prompt, 32 picture, 32 answer",
        "pads                  none are counted, as all rows are the longest",
        "in 10 h               142.2 images/s, 35.6 of each GPU",
        "not on this machine",
    ):
        assert text in printed


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_released_models(preset: str, configurations: Callable) -> None:
    model, training = ModelArguments(**named(configurations(preset))), PlannedStage1("run")
    parts = list_parts(build_skeleton(model, training))
    with torch.device("meta"):
        whole = MiniGPT4ForConditionalGeneration(PRESETS[preset].config())
    assert sum(part.count for part in parts) == whole.num_parameters()
    projection = sum(p.numel() for p in whole.model.language_projection.parameters())
    assert [(part.name, part.count, part.dtype) for part in parts if part.trains] == [
        ("projection", projection, "float32")
    ]
    assert {part.dtype for part in parts if not part.trains} == {"bfloat16"}


def test_nothing_is_loaded(stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("something was loaded")

    monkeypatch.setattr(backbones.Checkpoint, "__init__", refuse)
    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "from_pretrained", refuse)
    monkeypatch.setattr("PIL.Image.open", refuse)
    plan = make_plan(stage(max_txt_len=8))
    assert plan.peak > 0 and not plan.on_gpu


def test_what_a_stage_has_saved_is_planned(stage: Callable) -> None:
    """An adapter-only folder with an adapter of PEFT, from which the run goes on."""
    trained = stage1_pretrain.main(stage(peft_config=LORA)).model
    plan = make_plan(stage("next", model_name_or_path=Path(stage()[stage().index("--output_dir") + 1])))
    assert plan.stage == 2
    assert sum(part.count for part in plan.parts) == sum(p.numel() for p in trained.parameters())
    assert {part.name: part.count for part in plan.parts if part.trains} == {
        "projection": sum(p.numel() for p in trained.model.language_projection.parameters()),
        "adapter": sum(p.numel() for n, p in trained.named_parameters() if "lora_" in n),
    }


def test_tied_heads_count_once(parts: dict[str, str], tmp_path: Path, stage: Callable) -> None:
    config = LlamaConfig.from_pretrained(parts["language_model"], tie_word_embeddings=True)
    config.save_pretrained(tmp_path / "tied")
    tied = make_plan(stage(language_model=tmp_path / "tied", max_txt_len=8))
    untied = make_plan(stage(max_txt_len=8))
    counts = [sum(part.count for part in plan.parts) for plan in (untied, tied)]
    assert counts[0] - counts[1] == config.vocab_size * config.hidden_size


# ---- steps and checkpoints ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"num_train_epochs": 1, "per_device_train_batch_size": 3},
        {"num_train_epochs": 2.5, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
        {"num_train_epochs": 1, "per_device_train_batch_size": 3, "dataloader_drop_last": True},
        {"max_steps": 3},
    ],
)
def test_steps_are_those_the_trainer_takes(fields: dict, stage: Callable) -> None:
    arguments = stage(**{"max_steps": -1, "max_txt_len": 8, **fields})
    state = stage1_pretrain.main(arguments).state
    plan = make_plan(arguments)
    assert plan.schedule.steps == state.max_steps == state.global_step
    assert plan.schedule.epochs == pytest.approx(state.epoch, abs=0.35)  # the last batch of an epoch may be a part


@pytest.mark.parametrize("samples, processes", [(8, 3), (9, 2), (7, 4), (24, 3)])
def test_batches_are_shared_out_as_accelerate_does(samples: int, processes: int) -> None:
    training = PlannedStage1("run", per_device_train_batch_size=2)
    loader = prepare_data_loader(
        DataLoader(list(range(samples)), batch_size=2), num_processes=processes, process_index=0
    )
    assert plan_schedule(replace(training, num_train_epochs=1), [Source("x", samples)], processes).steps == len(loader)


def test_checkpoints_are_those_on_disk(case: Callable, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "num_train_epochs": 2}
    stage, arguments = case("language model trains", "tiny", **saving)
    plan = make_plan([*arguments, "--stage", str(stage)])
    stage1_pretrain.main(arguments)
    folders = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(folders) == plan.schedule.checkpoints == 2
    weights, state = plan.checkpoint_bytes
    assert weights == pytest.approx((folders[0] / "model.safetensors").stat().st_size, rel=TOLERANCE)
    assert state == pytest.approx((folders[0] / "optimizer.pt").stat().st_size, rel=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in shipped_configs() if "stage" in name and "blip2" not in name])
def test_the_stage_is_told_from_the_configuration(name: str) -> None:
    assert tell_stage(["--config", name]) == int(name.partition("stage")[2][0])
    assert tell_stage(["--config", name, "--stage", "1"]) == tell_stage([f"--config={name}", "--stage=1"]) == 1


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(pairs_file: Path, pictures: list, tmp_path: Path) -> dict[str, str]:
    """The same eight pairs in all the ways in which they may lie there."""
    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    here = pairs_file.parent
    table = [{"file_name": row["image"], "image": str(here / row["image"]), "caption": row["caption"]} for row in rows]
    pandas.DataFrame(table).to_csv(tmp_path / "pairs.csv", index=False)
    pandas.DataFrame(table).to_parquet(tmp_path / "pairs.parquet")
    (folder := tmp_path / "folder").mkdir()
    (curated := tmp_path / "curated" / "image").mkdir(parents=True)
    for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        picture.save(folder / row["image"])
        picture.save(curated / f"{number}.jpg")
    pandas.DataFrame(table).drop(columns="image").to_csv(folder / "metadata.csv", index=False)
    notes = [{"image_id": str(number), "caption": row["caption"]} for number, row in enumerate(rows)]
    (curated.parent / "filter_cap.json").write_text(json.dumps({"annotations": notes}))
    Dataset.from_list(table).save_to_disk(tmp_path / "arrow")
    paths = {"jsonl": pairs_file, "csv": "pairs.csv", "parquet": "pairs.parquet", "folder": folder,
             "curated": curated.parent, "arrow": "arrow"}  # fmt: skip
    return {name: str(tmp_path / path) for name, path in paths.items()}


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder", "curated", "arrow"])
def test_samples_are_counted_without_opening_a_picture(
    kind: str, sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = DataArguments(dataset_name=sources[kind])
    expected = len(load_pairs(args, stage=2))
    monkeypatch.setattr("PIL.Image.open", None)
    (source,) = measure_sources(args, stage=2)
    assert source.samples == expected == 8 and source.nbytes > 0 and not source.streams


def test_several_datasets_are_a_stream_and_num_samples_counts(sources: dict[str, str]) -> None:
    args = DataArguments(dataset_name=[sources["jsonl"], sources["csv"]], num_samples=5)
    assert [(source.samples, source.streams) for source in measure_sources(args, stage=1)] == [(5, True)] * 2
    assert [source.samples for source in measure_sources(DataArguments(dataset_name="tiny"), stage=1)] == [8000]


def test_tars_are_counted_and_weighed(tmp_path: Path, stage: Callable) -> None:
    for number in range(3):
        (tmp_path / f"{number}.tar").write_bytes(b"\0" * 10240)
    (source,) = measure_sources(DataArguments(dataset_name=str(tmp_path / "{0..2}.tar")), stage=1)
    assert (source.files, source.nbytes, source.samples, source.streams) == (3, 3 * 10240, None, True)
    with pytest.raises(RecipeError, match="A stream of samples has no end"):
        make_plan(stage(dataset_name=tmp_path / "*.tar", max_steps=-1))


def test_a_dataset_that_is_nowhere_is_unknown(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    """Its size is, and the rest is told: a plan may be made where the data is not."""
    cli.main(["plan", *stage(dataset_name="nobody/nothing", max_txt_len=8)])
    printed = capsys.readouterr().out
    assert "nobody/nothing" in printed and "number of samples unknown" in printed
    with pytest.raises(RecipeError, match="not known here"):
        make_plan(stage(dataset_name="nobody/nothing", max_steps=-1))


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2])
def test_the_longest_row_is_that_of_a_batch(number: int, stage: Callable, long_pairs: Path) -> None:
    arguments = stage(
        dataset_name=long_pairs, max_txt_len=11, per_device_train_batch_size=16, chat_template="vicuna_v0"
    )
    row = make_plan([*arguments, "--stage", str(number)]).row
    trainer = (stage1_pretrain if number == 1 else stage2_finetune).main(arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    assert row.total == batch["input_ids"].shape[1] and not row.assumption
    assert row.answer == len(batch["label_positions"]) // 16


def test_a_prompt_without_a_tokenizer_is_assumed(configurations: Callable) -> None:
    """The shipped tokenizer of the embedded world splits more than Llama's, of which the assumption speaks."""
    model = ModelArguments(**named(configurations("vicuna-7b")))
    row = longest_row(model, DataArguments(), PRESETS["vicuna-7b"].config(), stage=2)
    assert "tokenizer is not on this machine" in row.assumption
    assert (row.image, row.answer) == (32, 160) and 20 < row.prompt < 60


# ---- what cannot be planned -----------------------------------------------------------------------------------------


def test_a_model_that_fits_nowhere_is_told_and_is_no_failure(
    configurations: Callable, capsys: pytest.CaptureFixture
) -> None:
    rows = ["--per_device_train_batch_size", "512", "--max_txt_len", "2", "--gradient_checkpointing", "false"]
    assert cli.main(["plan", "--config", "stage1_vicuna_13b", *configurations("vicuna-13b"), *rows]) == 0
    assert "fits into 24 GB NO, 40 GB NO, 80 GB NO; share the weights" in capsys.readouterr().out


def test_a_decoder_that_needs_values_is_told(stage: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers of some experts choose tokens by number; weights, optimizer and steps are still planned."""
    forward = MiniGPT4ForConditionalGeneration.forward

    def choose(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        assert outputs.log_probs.nonzero().shape[0] > 3
        return outputs

    monkeypatch.setattr(MiniGPT4ForConditionalGeneration, "forward", choose)
    plan = make_plan(stage(max_txt_len=8))
    assert any("activations and logits are NOT counted" in note for note in plan.notes)
    assert told(plan, "weights") > 0 and told(plan, "optimizer") > 0


@pytest.mark.parametrize("settings", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_trls_own_steps_score_every_token(settings: dict, stage: Callable) -> None:
    own, trls = (make_plan([*stage(max_txt_len=4, **more), "--stage", "2"]) for more in ({}, settings))
    assert any("TRL" in note for note in trls.notes)
    assert most_of(trls, "logits") > most_of(own, "logits")


def most_of(plan: Plan, name: str) -> int:
    return next(most for part, _, most in plan.memory if part == name)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_hours_are_a_time(value: str, stage: Callable) -> None:
    with pytest.raises(RecipeError, match=r"--hours is .*above 0"):
        make_plan([*stage(), "--hours", value])


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--config", "stage3"], "There is no configuration 'stage3'"),
        (["--stage", "3"], "--stage is 3; there are 1 and 2"),
        (["--num_processes", "0"], "--num_processes is 0"),
        (["--per_device_train_batch_size", "0"], "per_device_train_batch_size is 0"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0"),
        (["--num_samples", "0"], "--num_samples is 0"),
        (["--hour", "3"], "There is no argument 'hour'; the nearest is hours"),
        (["--accelerate_config", "nowhere.yaml"], "There is no file nowhere.yaml"),
        (["--language_model", "nobody/nothing"], "The language_model backbone nobody/nothing cannot be opened"),
        (["--train_parts", "nose"], "No such part to train: nose"),
        (["--attn_implementation", "wishful"], "wishful"),
        (["--fsdp", "full_shard"], "--accelerate_config"),
    ],
)
def test_mistakes_are_told_in_a_sentence(
    arguments: list[str], told: str, stage: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["plan", *stage(), *arguments]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("minigpt4 plan: ") and told in printed[-1]


@pytest.mark.parametrize(
    "content, told",
    [
        ("a: [", "is not a configuration file of accelerate"),
        ("only words", "is not a configuration file of accelerate"),
        ("distributed_type: TPU\nnum_processes: 8\n", "a plan knows one process"),
        ("distributed_type: XLA\nnum_processes: 8\n", "the distributed_type XLA"),
        ("distributed_type: MEGATRON_LM\nnum_processes: 8\n", "the distributed_type MEGATRON_LM"),
        ("distributed_type: MULTI_GPU\nnum_processes: 4\nwishes: 3\n", "wishes"),
        ("distributed_type: MULTI_GPU\n", "add --num_processes"),
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}\n", "fsdp_version: 2"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 7}\n", "zero_stage 7"),
        ("distributed_type: MULTI_GPU\nnum_processes: 4\nparallelism_config: {tp_size: 2}\n", "parallelism_config"),
    ],
)
def test_other_files_of_accelerate_are_refused(content: str, told: str, stage: Callable, tmp_path: Path) -> None:
    (tmp_path / "accelerate.yaml").write_text(content)
    with pytest.raises(RecipeError) as error:
        make_plan([*stage(), "--accelerate_config", str(tmp_path / "accelerate.yaml")])
    assert told in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_quantization_is_told() -> None:
    model = MiniGPT4ForConditionalGeneration._skeleton(build_config(SIZES["tiny"]))
    model.freeze_backbones()
    with pytest.raises(RecipeError, match="Nothing trains through torchao-int4"):
        check_quantization("torchao-int4", model)
    with pytest.raises(RecipeError, match="There is no quantization 'int3'; use bnb-int8"):
        check_quantization("int3", model)
    model.freeze_backbones(train=["language_model"])
    with pytest.raises(RecipeError, match="cannot train"):
        check_quantization("bnb-nf4", model)


def test_a_model_of_another_kind_is_told(parts: dict[str, str], stage: Callable) -> None:
    with pytest.raises(RecipeError, match="a model of the type 'llama'"):
        make_plan(stage(model_name_or_path=parts["language_model"]))


def test_autocast_of_a_gpu_norms_in_float32() -> None:
    norm, states = torch.nn.LayerNorm(4, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16)
    with AutocastOfGPU():
        assert norm(states).dtype == torch.bfloat16  # without autocast
        with torch.autocast("cpu", torch.bfloat16):
            assert norm(states).dtype == torch.float32
            assert (states @ states.T).dtype == torch.bfloat16
