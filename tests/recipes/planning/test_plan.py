"""`minigpt4 plan`: what it tells before a run, against what the run then is."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.data_loader import prepare_data_loader
from damaged import jpeg
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader
from transformers import Blip2Config, LlamaConfig, ResNetConfig

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, backbones
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.benchmark.models import SIZES, build_config, build_ours, build_processor
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.planning.data import Source, longest_row, measure_sources, plan_schedule
from recipes_minigpt4.planning.memory import AutocastOfGPU, Step, trace_encoding, trace_step
from recipes_minigpt4.planning.model import SCHEMES, build_skeleton, check_quantization, list_parts, quantize_skeleton
from recipes_minigpt4.planning.parallel import Parallelism, hold
from recipes_minigpt4.planning.plan import Plan, PlannedStage1, make_plan, tell_stage
from recipes_minigpt4.training.arguments import ModelArguments
from recipes_minigpt4.training.last_layer import LastLayer
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


TOLERANCE = 0.15
LORA = '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}'


# ---- measuring a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def long_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs whose captions are longer than any answer may be."""
    folder = tmp_path_factory.mktemp("long")
    pairs = [{"image": f"{number}.jpg", "caption": "a long picture of a square " * 40} for number in range(16)]
    for number, pair in enumerate(pairs):
        (folder / pair["image"]).write_bytes(jpeg(number))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    return folder / "pairs.jsonl"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Folder of a whole model of one of the benchmarks' sizes, with a Q-Former or without, or with a ResNet."""
    folders: dict[tuple[str, bool | str], str] = {}

    def save(size: str, qformer: bool | str) -> str:
        if (size, qformer) not in folders:
            config = build_config(SIZES[size])
            if qformer is not True:
                resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
                vision = resnet if qformer == "ResNet" else config.vision_config
                parts = {"vision_config": vision, "text_config": config.text_config}
                config = MiniGPT4Config(qformer_config=None, **parts)
            torch.manual_seed(0)
            folder = str(tmp_path_factory.mktemp(size))
            MiniGPT4ForConditionalGeneration(config).save_pretrained(folder)
            build_processor(config).save_pretrained(folder)
            folders[size, qformer] = folder
        return folders[size, qformer]

    return save


class Measured:
    """What the second step of a run took, in bytes, and the trainer; the allocator of the CPU has counted."""

    trainer: MiniGPT4Trainer
    step: int = 0


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """Run a stage and measure its second optimizer step."""

    def run(stage: int, arguments: list[str]) -> Measured:
        measured, calls = Measured(), []
        take = MiniGPT4Trainer.training_step

        def training_step(trainer: MiniGPT4Trainer, *args, **kwargs):
            calls.append(None)
            if len(calls) != 2 * trainer.args.gradient_accumulation_steps:
                return take(trainer, *args, **kwargs)
            before = sum(p.grad.nbytes for p in trainer.model.parameters() if p.grad is not None)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                result = take(trainer, *args, **kwargs)
            measured.step = before + most_allocated(profiler, tmp_path / "trace.json")
            return result

        monkeypatch.setattr(MiniGPT4Trainer, "training_step", training_step)
        measured.trainer = (stage1_pretrain if stage == 1 else stage2_finetune).main(arguments)
        return measured

    return run


def most_allocated(profiler: profile, path: Path) -> int:
    """The most bytes that were allocated at once, above what there was at the start."""
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


def storages(tensors) -> int:
    """Bytes of tensors, shared ones once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def told(plan: Plan, *names: str) -> int:
    """Bytes of these parts at the peak."""
    return sum(size for name, size, _ in plan.memory if name in names)


def check_measured(plan: Plan, measured: Measured) -> None:
    """Compare a plan with a run, part by part."""
    model, optimizer = measured.trainer.model, measured.trainer.optimizer
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    moving = told(plan, "gradients", "vision side", "activations", "logits")
    found = {
        "weights": (told(plan, "weights"), storages([*model.parameters(), *model.buffers()])),
        "optimizer": (told(plan, "optimizer"), storages(states)),
        "step": (moving, measured.step),
    }
    print({name: (*pair, f"{pair[0] / pair[1] - 1:+.2%}") for name, pair in found.items()})
    for name, (planned, real) in found.items():
        assert planned == pytest.approx(real, rel=TOLERANCE), name
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(part.count for part in plan.parts if part.trains) == trained
    assert sum(part.count for part in plan.parts) == sum(p.numel() for p in model.parameters())
    assert plan.schedule.steps == measured.trainer.state.max_steps == measured.trainer.state.global_step


CASES = {
    "stage 1": (1, True, {}),
    "stage 1, checkpointing": (1, True, {"gradient_checkpointing": True}),
    "stage 1, bfloat16, checkpointing": (1, True, {"bf16": True, "gradient_checkpointing": True}),
    "stage 1, bfloat16, no Q-Former": (1, False, {"bf16": True}),
    "stage 2": (2, True, {"per_device_train_batch_size": 3, "max_txt_len": 60}),
    "stage 2, no Q-Former, checkpointing": (2, False, {"gradient_checkpointing": True}),
    "stage 2, bfloat16": (2, True, {"bf16": True}),
    "accumulation, cached features": (1, True, {"gradient_accumulation_steps": 2, "cache_features": "features"}),
    "adapter": (1, True, {"peft_config": LORA}),
    "stage 1, BatchNorm": (1, "ResNet", {"attn_implementation": "eager"}),
    "stage 1, BatchNorm, bfloat16, cached features": (
        1,
        "ResNet",
        {"bf16": True, "cache_features": "features", "attn_implementation": "eager"},
    ),
    "language model trains": (1, True, {"train_parts": "language_model"}),
    "Q-Former trains": (1, True, {"train_parts": "qformer"}),
}


@pytest.fixture
def case(saved: Callable, long_pairs: Path, tmp_path: Path) -> Callable:
    """Arguments of a case of `CASES` and its stage."""

    def build(name: str, size: str, **more) -> tuple[int, list[str]]:
        stage, qformer, changes = CASES[name]
        fields = {
            "model_name_or_path": saved(size, qformer), "dataset_name": long_pairs, "output_dir": tmp_path / "run",
            "num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 4, "max_txt_len": 24,
            "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
            "warmup_steps": 1, **changes, **more,
        }  # fmt: skip
        if "cache_features" in fields:
            fields["cache_features"] = tmp_path / fields["cache_features"]
        return stage, [text for key, value in fields.items() for text in (f"--{key}", str(value))]

    return build


@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_then_takes(name: str, case: Callable, measure: Callable) -> None:
    stage, arguments = case(name, "tiny")
    check_measured(make_plan([*arguments, "--stage", str(stage)]), measure(stage, arguments))


@pytest.mark.parametrize("qformer, autocast", [(True, None), (False, torch.bfloat16)])
def test_encoding_for_the_cache_takes_what_is_planned(qformer: bool, autocast: Any, tmp_path: Path) -> None:
    whole, small = build_config(SIZES["mid"]), build_config(SIZES["tiny"])
    parts = {"vision_config": whole.vision_config, "text_config": small.text_config}
    config = MiniGPT4Config(**parts, qformer_config=whole.qformer_config if qformer else None)
    model = MiniGPT4ForConditionalGeneration(config)
    model.freeze_backbones()
    pixels = torch.randn(2, 3, *config.image_size)
    precision = torch.autocast("cpu", autocast) if autocast else nullcontext()
    with precision, torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        features = model.model.encode_images(pixels).last_hidden_state
    skeleton = MiniGPT4ForConditionalGeneration._skeleton(config)
    skeleton.freeze_backbones()
    encoding = trace_encoding(skeleton, Step(rows=2, length=1, answer=1, autocast=autocast, gpu=False))
    assert encoding.peak["batch"] == pixels.nbytes
    assert encoding.peak["vision side"] == pytest.approx(most_allocated(profiler, tmp_path / "trace.json"), rel=0.15)
    assert encoding.shape == features.shape[1:]


def test_filling_the_cache_is_told(case: Callable, capsys: pytest.CaptureFixture) -> None:
    _, arguments = case("stage 1", "tiny", cache_features="features", max_steps=1)
    cli.main(["plan", *arguments])
    told = capsys.readouterr().out
    for pattern in (
        r"filling the cache +[\d.]+ GB per process at the peak, before the first step\n",
        r"\n  made of +weights [\d.]+, batch [\d.]+, vision side [\d.]+, features [\d.]+\n",
        r"\n  pictures +16, equal ones once: [\d.]+ kB on disk, 512 bytes and [\d.e-]+ GFLOP each\n",
        r"\n  time +0 s of computing, at [\d.]+ TFLOP/s \(as measured here .*reading",
    ):
        assert re.search(pattern, told), pattern
    assert make_plan(case("stage 1", "tiny")[1]).filling is None


def test_features_of_the_released_vision_side_are_planned() -> None:
    whole, small = PRESETS["vicuna-7b"].config(), build_config(SIZES["tiny"])
    parts = {"vision_config": whole.vision_config, "qformer_config": whole.qformer_config}
    skeleton = MiniGPT4ForConditionalGeneration._skeleton(MiniGPT4Config(**parts, text_config=small.text_config))
    encoding = trace_encoding(skeleton, Step(rows=1, length=1, answer=1))
    assert encoding.shape == (32, 768)
    assert 5e11 < encoding.flops < 6e11  # 2 × 1.0 billion parameters × 257 patches, and attention


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_plan_is_what_a_run_of_a_larger_model_takes(name: str, case: Callable, measure: Callable) -> None:
    stage, arguments = case(name, "mid")
    check_measured(make_plan([*arguments, "--stage", str(stage)]), measure(stage, arguments))


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


def named(arguments: list[str]) -> dict[str, str]:
    """Names and values of a command line."""
    return {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}


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


# ---- parallelism ----------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerate_file(tmp_path: Path) -> Callable:
    """A configuration file of accelerate's; keywords are its fields."""

    def write(**fields) -> str:
        path = tmp_path / "accelerate.yaml"
        path.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_processes": 4, **fields}))
        return str(path)

    return write


@pytest.mark.parametrize("bfloat16", [False, True])
def test_fsdp2_holds_what_torch_then_holds(bfloat16: bool, tmp_path: Path) -> None:
    """In a process of its own: what other tests have left there would be measured too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        weights, gathered, own, peaks = pool.submit(hold_and_measure, bfloat16, tmp_path).result()
    assert weights == pytest.approx(own, rel=0.02)  # whose shards are padded
    assert gathered == pytest.approx(peaks[1] - peaks[0], rel=TOLERANCE)
    assert weights + gathered + peaks[0] == pytest.approx(own + peaks[1], rel=0.05)


def hold_and_measure(bfloat16: bool, folder: Path) -> tuple[int, int, int, list[int]]:
    """
    torch shards a model and takes a step in a group of processes of which only this one is real.

    Returns:
        Bytes that are planned for weights and for what is gathered; bytes of the process's own weights; and the peaks
        of a step without and with shards.
    """
    wrapped = ("LlamaDecoderLayer", "Blip2QFormerLayer", "Blip2EncoderLayer")
    settings = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ",".join(wrapped)}
    dtype = torch.bfloat16 if bfloat16 else None
    peaks = []
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        for shards in (False, True):
            model = build_ours(SIZES["tiny"], seed=0)
            for name, parameter in model.named_parameters():
                if bfloat16 and "language_projection" not in name:
                    parameter.data = parameter.data.to(dtype)
            model.train()
            if shards:
                held = hold(model, Parallelism("fsdp2", 4, settings=settings), dtype)
                shard(model, wrapped, dtype)
            peaks.append(peak_of_a_step(model, dtype, folder))
        own = sum(p.to_local().nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    finally:
        dist.destroy_process_group()
    return held.weights, held.gathered, own, peaks


def shard(model: torch.nn.Module, wrapped: tuple[str, ...], dtype: torch.dtype | None) -> None:
    """What accelerate does for FSDP2 (`fsdp2_prepare_model`)."""
    options = {"mesh": init_device_mesh("cpu", (4,)), "mp_policy": MixedPrecisionPolicy(dtype, torch.float32)}
    for module in reversed(list(model.modules())[1:]):
        if type(module).__name__ in wrapped:
            fully_shard(module, **options, reshard_after_forward=True)
    fully_shard(model.get_input_embeddings(), **options, reshard_after_forward=True)
    fully_shard(model.lm_head, **options, reshard_after_forward=False)
    fully_shard(model, **options)


def peak_of_a_step(model: MiniGPT4ForConditionalGeneration, dtype: torch.dtype | None, folder: Path) -> int:
    """Bytes that the second of two steps allocates at most."""
    rows, answer, image = 8, 24, model.config.num_image_tokens
    ids = torch.zeros(rows, 1 + image + answer, dtype=torch.long)
    ids[:, 1 : 1 + image] = model.config.image_token_id
    places = (ids == model.config.image_token_id).flatten().nonzero().squeeze(-1)
    before = torch.arange(ids.numel()).view(ids.shape)[:, -answer:].flatten()
    # In the dtype that FSDP2 would cast them to, which has nothing to do with weights.
    pixels = torch.zeros(rows, 3, *model.config.image_size, dtype=dtype or torch.float32)
    answers = torch.zeros_like(before)

    def step() -> None:
        with LastLayer(model.language_model), torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = model(
                input_ids=ids, pixel_values=pixels, image_positions=places, answers=answers, answer_positions=before
            )
        outputs.log_probs.sum().backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return most_allocated(profiler, folder / "trace.json")


DEEPSPEED = {"distributed_type": "DEEPSPEED"}
LAYERS = {"fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


@pytest.mark.parametrize(
    "fields, title",
    [
        ({"distributed_type": "NO", "num_processes": 1}, "one process"),
        ({"distributed_type": "MULTI_GPU", "num_machines": 2}, "DDP, 4 processes on 2 machines"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, **LAYERS}}, "FSDP2, 4 processes"),
        ({**DEEPSPEED, "deepspeed_config": {"zero_stage": 2}}, "DeepSpeed ZeRO-2, 4 processes"),
        ({**DEEPSPEED, "deepspeed_config": {"zero_stage": 3}}, "DeepSpeed ZeRO-3, 4 processes"),
    ],
)
def test_files_of_accelerate_are_understood(
    fields: dict, title: str, accelerate_file: Callable, case: Callable
) -> None:
    _, arguments = case("stage 1", "tiny", use_cpu=False, warmup_steps=1)
    alone = make_plan([*arguments, "--stage", "1"])
    shared = make_plan([*arguments, "--stage", "1", "--accelerate_config", accelerate_file(**fields)])
    assert shared.parallelism.title == title
    sharded = any(name in title for name in ("FSDP2", "ZeRO-3"))
    assert (told(shared, "weights") < told(alone, "weights") / 2) is sharded
    assert bool(told(shared, "weights of other GPUs, gathered")) is sharded
    assert told(shared, "activations") == pytest.approx(told(alone, "activations"), rel=0.5)
    assert shared.schedule.global_batch == shared.parallelism.processes * 4


def test_a_run_on_several_processors_is_planned_for_them(accelerate_file: Callable, case: Callable) -> None:
    _, arguments = case("stage 1", "tiny", use_cpu=False)
    file = accelerate_file(distributed_type="MULTI_CPU", use_cpu=True)
    plan = make_plan([*arguments, "--stage", "1", "--accelerate_config", file])
    assert not plan.on_gpu and plan.precision is None and plan.parallelism.title == "DDP, 4 processes"


def test_what_zero_shares_and_buffers_follows_its_file(
    accelerate_file: Callable, case: Callable, tmp_path: Path
) -> None:
    _, arguments = case("language model trains", "tiny", use_cpu=False)
    zero = {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True}
    plans = []
    for offload in ("none", "cpu"):
        content = {"zero_optimization": {**zero, "offload_optimizer": {"device": offload}}}
        (tmp_path / "zero.json").write_text(json.dumps(content))
        file = accelerate_file(**DEEPSPEED, deepspeed_config={"deepspeed_config_file": str(tmp_path / "zero.json")})
        plans.append(make_plan([*arguments, "--stage", "1", "--accelerate_config", file]))
    trained = sum(part.count for part in plans[0].parts if part.trains)
    width = SIZES["tiny"].text["hidden_size"]
    buckets = 2 * 4 * width * width  # two of float32, of what transformers writes for "auto"
    masters, states = 4 * trained / 4, 8 * trained / 4
    assert told(plans[0], "optimizer") == pytest.approx(states, rel=0.01) and told(plans[1], "optimizer") == 0
    assert told(plans[0], "buffers for gradients, master copies") == pytest.approx(buckets + masters, rel=0.01)
    assert told(plans[1], "buffers for gradients, master copies") == buckets


# ---- quantization ---------------------------------------------------------------------------------------------------


def test_a_quantization_makes_weights_smaller(case: Callable) -> None:
    _, arguments = case("stage 1", "tiny", use_cpu=False)
    plain = make_plan([*arguments, "--stage", "1"])
    small = make_plan([*arguments, "--stage", "1", "--quantization", "bnb-nf4"])
    assert told(small, "weights") < told(plain, "weights")
    assert {part.name for part in small.parts if part.dtype == "bnb-nf4"} == {"language model"}


def linear(inputs: int, outputs: int) -> torch.nn.Linear:
    return torch.nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)


def test_torchaos_int8_takes_what_is_told() -> None:
    api = pytest.importorskip("torchao.quantization")
    layer = linear(320, 192)
    planned = SCHEMES["torchao-int8"].nbytes(layer.weight)
    api.quantize_(layer, api.Int8WeightOnlyConfig())
    weight = layer.weight
    assert planned == weight.qdata.nbytes + weight.scale.nbytes


@pytest.mark.parametrize("name", ["bnb-int8", "bnb-nf4"])
def test_bitsandbytes_takes_what_is_told(name: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    weight = linear(320, 192).weight
    planned = SCHEMES[name].nbytes(weight)
    if name == "bnb-int8":
        codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.data.half())
        assert planned == codes.nbytes + scales.nbytes
        return
    codes, state = bnb.functional.quantize_4bit(weight.data, compress_statistics=True, quant_type="nf4")
    beside = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert planned == codes.nbytes + sum(tensor.nbytes for tensor in beside)


@pytest.mark.parametrize("name", SCHEMES)
def test_only_linear_layers_of_the_decoder_are_quantized(name: str) -> None:
    model = MiniGPT4ForConditionalGeneration._skeleton(build_config(SIZES["tiny"]))
    model.freeze_backbones()
    before, after = list_parts(model), list_parts(model, name)
    layers = [m.weight for m in model.language_model.modules() if isinstance(m, torch.nn.Linear)]
    exact = sum(part.nbytes for part in before) - sum(weight.nbytes for weight in layers)
    quantized = sum(part.nbytes for part in after)
    assert quantized == exact + sum(SCHEMES[name].nbytes(weight) for weight in layers)
    assert sum(part.count for part in after) == sum(part.count for part in before)
    quantize_skeleton(model, name)
    assert hold(model, Parallelism(), None).weights == quantized + sum(
        buffer.nbytes for key, buffer in model.named_buffers() if not key.endswith("scales")
    )


def test_a_step_through_quantized_layers_keeps_what_they_keep() -> None:
    """bitsandbytes' int8 keeps inputs, torchao's the weights that it has multiplied by, nf4 neither."""
    kept = {}
    for name in (None, "bnb-nf4", "bnb-int8", "torchao-int8"):
        model = MiniGPT4ForConditionalGeneration._skeleton(build_config(SIZES["tiny"]))
        model.freeze_backbones()
        quantize_skeleton(model, name)
        step = Step(rows=8, length=29, answer=24, gpu=False)
        kept[name] = trace_step(model, step, lambda parameters: torch.optim.AdamW(parameters, fused=True)).most
    activations = {name: most["activations"] for name, most in kept.items()}
    assert activations[None] <= activations["bnb-nf4"] < min(activations["bnb-int8"], activations["torchao-int8"])
    weights = {name: most["weights"] for name, most in kept.items()}
    assert weights["bnb-nf4"] < weights["bnb-int8"] == weights["torchao-int8"] < weights[None]


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
