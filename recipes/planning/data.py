"""What a run reads and how many steps it takes, told without opening a picture: counts, bytes, lengths of rows."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
from datasets import DatasetDict, load_dataset_builder, load_from_disk

from modeling_minigpt4 import MiniGPT4Config
from processing_minigpt4 import MiniGPT4Processor
from recipes_minigpt4.data.arguments import DataArguments, check_dataset_weights
from recipes_minigpt4.data.files import (
    FILE_TYPES,
    captioned_pictures,
    file_type,
    open_binary,
    read_annotations,
    refuse_address,
)
from recipes_minigpt4.data.formatting import BLANK, INSTRUCTIONS, instruction_format
from recipes_minigpt4.data.webdataset import expand, tars_named
from recipes_minigpt4.training.argument_checks import NO_END, steps_per_epoch
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments
from recipes_minigpt4.training.model import backbone_sources
from recipes_minigpt4.utils.embedded_world import TINY, stage_examples
from recipes_minigpt4.utils.errors import RecipeError, one_line


ANSWER_TOKENS = {1: 32, 2: 160}  # as in `stage1_rows` and `stage2_rows`
# Of a prompt whose tokenizer is not at hand: Llama's makes one token of about 3.5 characters of these.
CHARACTERS_PER_TOKEN = 3


# ---- datasets -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """
    A dataset as far as it is known.

    Args:
        name: as it was given.
        samples: how many, or None.
        nbytes: that are read in one pass, or None.
        files: how many tar files, or None.
        streams: whether it is read as a stream, without end.
        note: what else there is to say.
    """

    name: str
    samples: int | None = None
    nbytes: int | None = None
    files: int | None = None
    streams: bool = False
    note: str = ""


def measure_sources(args: DataArguments, stage: int) -> list[Source]:
    """
    Size of every dataset of a run, without reading its pictures.

    Raises:
        RecipeError: if there is none, or its file cannot be read.
    """
    if not args.dataset_name:
        raise RecipeError("No data: name a dataset, a folder or a file with --dataset_name.")
    check_dataset_weights(args)
    sources = [_measure(name, args, stage) for name in args.dataset_name]
    if args.streaming or len(sources) > 1:
        sources = [replace(source, streams=True) for source in sources]
    if (count := args.num_samples) is not None:
        sources = [
            source if source.samples is None else replace(source, samples=min(count, source.samples))
            for source in sources
        ]
    return sources


def _measure(name: str, args: DataArguments, stage: int) -> Source:
    path = Path(name).expanduser()
    if name == TINY:
        return Source(name, args.num_samples or _tiny_count(stage), note="drawn by the recipes")
    if (pattern := tars_named(name)) is not None:
        return _measure_tars(name, pattern)
    refuse_address(name)
    try:
        if path.is_file():
            return _measure_file(name, path)
        if (path / "filter_cap.json").is_file():
            rows = read_annotations(path / "filter_cap.json")
            return Source(name, len(rows), _bytes((path / "image").glob("*")))
        if path.is_dir():
            return _measure_folder(name, path, args)
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name} cannot be read ({one_line(error)}); fix the file.") from error
    return _measure_hub(name, args)


def _tiny_count(stage: int) -> int:
    (count, *_) = stage_examples(stage).__defaults__ or (0,)  # type: ignore[attr-defined]
    return int(count)


def _measure_tars(name: str, pattern: str) -> Source:
    """Number of tar files, and bytes of those on disk; how many samples they hold is written nowhere."""
    if "://" in pattern:
        files = len(expand(pattern)) if pattern.startswith("http") else None
        return Source(name, files=files, streams=True, note="elsewhere, so not looked at")
    try:
        tars = [Path(tar) for tar in expand(pattern)]
    except RecipeError:  # a plan is often made where the data is not
        return Source(name, streams=True, note="not on this machine")
    return Source(name, nbytes=_bytes(tars), files=len(tars), streams=True)


def _measure_file(name: str, path: Path) -> Source:
    ending = file_type(path)
    note = "pictures lie elsewhere"
    if ending == ".parquet":
        return Source(name, pyarrow.parquet.ParquetFile(path).metadata.num_rows, path.stat().st_size)
    if ending == ".json":
        return Source(name, len(read_annotations(path)), path.stat().st_size, note=note)
    with open_binary(path) as file:
        lines = sum(1 for line in file if line.strip())
    header = 1 if FILE_TYPES[ending] == "csv" else 0
    if header:
        note += "; a line counts as a row"
    return Source(name, max(lines - header, 0), path.stat().st_size, note=note)


def _measure_folder(name: str, path: Path, args: DataArguments) -> Source:
    """A folder with `metadata.jsonl` or `metadata.csv`, or one that `datasets` has saved."""
    if (table := next(iter(sorted(path.glob("metadata.*"))), None)) is not None and table.suffix in FILE_TYPES:
        table_size = _measure_file(name, table)
        return Source(name, table_size.samples, _bytes(path.rglob("*")))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = load_from_disk(str(path))  # which maps files and reads nothing
        rows = saved.get(args.dataset_split) if isinstance(saved, DatasetDict) else saved
        return Source(name, None if rows is None else len(rows), _bytes(path.rglob("*.arrow")))
    if pictures := captioned_pictures(path, args.dataset_split):
        return Source(name, len(pictures["image"]), _bytes(path.rglob("*")))
    return Source(name, None, _bytes(path.rglob("*")))


def _measure_hub(name: str, args: DataArguments) -> Source:
    """What the Hub tells of a dataset, if it can be asked and its card says so."""
    try:
        info = load_dataset_builder(name, args.dataset_config, revision=args.dataset_revision).info
        split = (info.splits or {}).get(args.dataset_split)
    except Exception as error:  # the many ways in which `datasets` says that something is not there
        return Source(name, streams=args.streaming, note=f"unknown ({one_line(error)[:80]})")
    if split is None or not split.num_examples:
        return Source(name, nbytes=info.download_size, streams=args.streaming, note="its card tells no number of rows")
    return Source(name, split.num_examples, info.download_size, streams=args.streaming)


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


# ---- steps ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """
    How long a run is.

    Args:
        global_batch: samples of a step, of all processes.
        steps: of the optimizer.
        epochs: passes over the data, or None if its size is unknown.
        checkpoints: that are on disk in the end.
    """

    global_batch: int
    steps: int
    epochs: float | None
    checkpoints: int

    @property
    def samples(self) -> int:
        """Samples seen in the run, the last batch of an epoch counted as a full one."""
        return self.global_batch * self.steps


def plan_schedule(training: StageArguments, sources: list[Source], processes: int) -> Schedule:
    """
    Steps as the Trainer counts them.

    Raises:
        RecipeError: for data without end or of unknown size without `max_steps`.
    """
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    samples = None if any(source.samples is None for source in sources) else sum(s.samples or 0 for s in sources)
    per_epoch = None
    if samples is not None and not sources[0].streams:
        per_epoch = steps_per_epoch(training, samples, processes)
    if training.max_steps > 0:
        steps = training.max_steps
    elif sources[0].streams:
        raise RecipeError(NO_END)
    elif per_epoch is None:
        raise RecipeError("How many samples there are is not known here; say how long to train with --max_steps.")
    else:
        steps = math.ceil(training.num_train_epochs * per_epoch)
    epochs = (
        steps / per_epoch if per_epoch else (steps * batch * accumulation * processes / samples if samples else None)
    )
    return Schedule(batch * accumulation * processes, steps, epochs, _checkpoints(training, steps, per_epoch))


def _checkpoints(training: StageArguments, steps: int, per_epoch: int | None) -> int:
    strategy = getattr(training.save_strategy, "value", training.save_strategy)
    if strategy == "no":
        return 0
    interval: float = per_epoch or steps
    if strategy == "steps":
        interval = training.save_steps if training.save_steps >= 1 else math.ceil(training.save_steps * steps)
    count = math.ceil(steps / interval)  # the end of a run is saved as well
    return min(count, training.save_total_limit or count)


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowLength:
    """
    The longest row, in tokens.

    Args:
        prompt: text before the answer.
        image: image tokens.
        answer: what carries loss, at most.
        assumption: what was assumed, or nothing.
    """

    prompt: int
    image: int
    answer: int
    assumption: str = ""

    @property
    def total(self) -> int:
        return self.prompt + self.image + self.answer


def longest_row(model_args: ModelArguments, data_args: DataArguments, config: MiniGPT4Config, stage: int) -> RowLength:
    """Prompt, picture and an answer of full length, by the model's own tokenizer where it lies on this machine."""
    answer = data_args.max_txt_len or ANSWER_TOKENS[stage]
    image = config.num_image_tokens
    processor = _local_processor(model_args, config)
    if processor is None:
        if stage == 1:
            return RowLength(1, image, answer)
        around = "###Human: <Img></Img> {} ###Assistant: "
        longest = max(len(around.format(text)) for text in INSTRUCTIONS)
        prompt = 1 + -(-longest // CHARACTERS_PER_TOKEN)
        return RowLength(prompt, image, answer, f"{prompt} tokens of prompt, as the tokenizer is not on this machine")
    prompts: tuple[str, ...] = ((processor.tokenizer.bos_token or "") + processor.image_token,)
    if stage == 2:
        prompts, _, _ = instruction_format(processor, data_args.instruction_template)
    rows = [processor(images=[BLANK], text=text, add_special_tokens=False)["input_ids"][0] for text in prompts]
    return RowLength(max(map(len, rows)) - image, image, answer)


def _local_processor(args: ModelArguments, config: MiniGPT4Config) -> Any:
    """The processor that a run would have, or None if its files would have to be fetched."""
    options: dict[str, Any] = {} if args.chat_template is None else {"chat_template": args.chat_template}
    options |= {"local_files_only": True, "trust_remote_code": args.trust_remote_code}
    try:
        if args.model_name_or_path:
            return MiniGPT4Processor.from_pretrained(args.model_name_or_path, **options)
        parts = {part: source for part, source in backbone_sources(args).items() if part != "qformer"}
        return MiniGPT4Processor.from_backbones(**parts, config=config, **options)
    except (OSError, ValueError, TypeError):
        return None
