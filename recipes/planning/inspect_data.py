"""Show data as the model will see them: text, tokens, what carries loss, lengths, and what is skipped and why.

    minigpt4 inspect pictures/
    minigpt4 inspect chats.json --stage 2 --language_model lmsys/vicuna-7b-v1.1 --output inspect.html

Takes the arguments of `minigpt4 stage1` and `stage2`. Of models, only the tokenizer and the configurations are read.
"""

import copy
import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4Processor
from modeling_minigpt4.composition_minigpt4 import compose_config
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.bad_samples import SampleCounts
from recipes_minigpt4.data.collator import COUNTS, StageCollator
from recipes_minigpt4.data.formatting import rows_maker, stage1_rows, stage2_rows
from recipes_minigpt4.data.grouping import compare_pads
from recipes_minigpt4.data.sources import open_source
from recipes_minigpt4.planning.options import InspectArguments
from recipes_minigpt4.planning.plan import PlannedStage1, PlannedStage2, tell_stage
from recipes_minigpt4.training.arguments import ModelArguments, StageParser
from recipes_minigpt4.training.model import backbone_sources, check_saved
from recipes_minigpt4.training.options import GROUPED
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import replace_text
from recipes_minigpt4.utils.html import data_uri, render_page, render_table, thumbnail
from recipes_minigpt4.utils.redaction import redact
from recipes_minigpt4.utils.text import format_table, heading


LOOKED_AT = 1000  # samples of a dataset, unless `num_samples` says how many
LEGEND = "⟦ ⟧ carries loss, ↵ is a line break"


@dataclass
class Shown:
    """
    A row as the model will see it.

    Args:
        stretches: its text, cut where loss begins or ends, and whether a stretch carries loss.
        tokens: of the row, those of pictures included.
        learned: tokens that carry loss.
        images: its pictures, not yet resized.
    """

    stretches: list[tuple[str, bool]]
    tokens: int
    learned: int
    images: list[PIL.Image.Image] = field(default_factory=list)


@dataclass
class Inspection:
    """What was found in one dataset: some rows, tokens of all rows, what was skipped, and the batches of a run."""

    name: str
    limit: int | None
    samples: SampleCounts
    shown: list[Shown] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    cut: int = 0
    batch_size: int = 1

    def lengths(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows of a table of lengths."""
        rows = [
            [title, f"{statistics.median(counts):g}", f"{max(counts):,}"]
            for title, counts in (("whole row", self.tokens), ("what carries loss", self.learned))
        ]
        return ["tokens", "median", "longest"], rows

    def cut_line(self) -> str:
        share = self.cut / len(self.tokens)
        return f"cut at max_txt_len {self.limit}: {self.cut:,} of {len(self.tokens):,} rows ({share:.1%})"

    def pads_line(self) -> str:
        any_order, grouped = compare_pads(self.tokens, self.batch_size)
        return (
            f"pads in batches of {self.batch_size}: {any_order:.1%}; with --train_sampling_strategy {GROUPED} "
            f"{grouped:.1%}"
        )


class NoPictures:
    """Stands where a processor has its image processor: an inspection needs no pixels."""

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: Sequence[Any], **options: Any) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.zeros(len(images))}


def main(arguments: Sequence[str]) -> list[Inspection]:
    """
    Print what becomes of data, and write a page if asked to.

    Raises:
        RecipeError: for arguments that make no sense, and for what the stage itself would refuse.
    """
    model_args, data_args, training, inspect_args, stage = parse(arguments)
    if not data_args.dataset_name:
        raise RecipeError("No data: name a dataset, a folder or a file, as in `minigpt4 inspect pictures/`.")
    processor = load_processor(model_args)
    found = []
    for place, name in enumerate(data_args.dataset_name):
        heading(f"{redact(name)}, as stage {stage} sees it")
        found.append(inspect(place, data_args, processor, stage, training, inspect_args.rows))
        print(format_inspection(found[-1]), flush=True)
    if inspect_args.output:
        write_page(Path(inspect_args.output), found, stage)
    return found


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, Any, InspectArguments, int]:
    """Read datasets, which may stand in front without `--dataset_name`, the arguments of a stage, and its number."""
    names = list(itertools.takewhile(lambda text: not text.startswith("-"), arguments))
    arguments = [*(["--dataset_name", *names] if names else []), *arguments[len(names) :]]
    stage = tell_stage(arguments)
    kinds = (ModelArguments, DataArguments, PlannedStage1 if stage == 1 else PlannedStage2, InspectArguments)
    model, data, training, inspected = StageParser("inspect DATA", kinds).parse(arguments)
    return model, data, training, inspected, stage


def load_processor(args: ModelArguments) -> Any:
    """
    The processor of a model, or one with the tokenizer of a language model; what is not named is `tiny`.

    Raises:
        RecipeError: if a part cannot be found.
    """
    template = {} if args.chat_template is None else {"chat_template": args.chat_template}
    trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    try:
        if args.model_name_or_path:
            _, base = check_saved(args.model_name_or_path)
            args.check_saved_fields(MiniGPT4Config.from_pretrained(base))
            return MiniGPT4Processor.from_pretrained(base, **trust, **template)
        vision, qformer = (args.vision, args.qformer) if args.vision else (TINY, TINY)
        named = replace(args, vision=vision, qformer=qformer, language_model=args.language_model or TINY)
        parts = backbone_sources(named)
        config = compose_config(
            parts["vision"], parts["language_model"], parts.get("qformer"), trust, **named.new_fields()
        )
        return MiniGPT4Processor.from_backbones(parts["vision"], parts["language_model"], config, **trust, **template)
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"{one_line(error)}.") from error


def inspect(place: int, args: DataArguments, processor: Any, stage: int, training: Any, count: int) -> Inspection:
    """Look at one pass over the dataset at a place of `dataset_name`, and keep the first `count` rows to show."""
    seed = training.seed
    (name, limit) = (args.dataset_name or [])[place], args.num_samples or LOOKED_AT
    wanted = replace(args, num_samples=limit)
    pairs = open_source(name, wanted, stage, typed=False, place=place)
    rows = stage1_rows(pairs, processor, args) if stage == 1 else stage2_rows(pairs, processor, args, seed)
    maker = rows_maker(stage, processor, args, seed)
    plain = copy.copy(processor)
    plain.image_processor = NoPictures()
    collator = StageCollator(plain, completion_only_loss=True)
    found = Inspection(name, maker.max_txt_len, SampleCounts(args.max_bad_share))
    found.batch_size = training.per_device_train_batch_size
    for row in rows:
        batch = collator([row])
        found.samples.add(1, batch[COUNTS]["skipped"])
        if row["skipped"]:
            continue
        ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
        found.tokens.append(len(ids))
        found.learned.append(sum(label != -100 for label in labels))
        found.cut += maker.is_cut(row)
        if len(found.shown) < count:
            stretches = list(_stretches(processor, ids, labels))
            found.shown.append(Shown(stretches, found.tokens[-1], found.learned[-1], row["images"]))
    return found


def _stretches(processor: Any, ids: list[int], labels: list[int]) -> Iterator[tuple[str, bool]]:
    pairs = zip(ids, labels, strict=True)
    for is_learned, group in itertools.groupby(pairs, lambda pair: pair[1] != -100):
        yield processor.decode([token for token, _ in group]), is_learned


# ---- in the terminal ------------------------------------------------------------------------------------------------


def format_inspection(found: Inspection) -> str:
    """What is printed about a dataset."""
    lines = [f"{LEGEND}\n"] if found.shown else []
    for number, row in enumerate(found.shown, 1):
        text = "".join(f"⟦{text}⟧" if is_learned else text for text, is_learned in row.stretches)
        lines += [f"{number:>2}  {describe(row)}", "    " + text.replace("\n", "↵"), ""]
    if found.tokens:
        lines += [format_table(*found.lengths()), found.cut_line(), found.pads_line()]
    return "\n".join([*lines, found.samples.report()])


def describe(row: Shown) -> str:
    """Tokens and pictures of a row in a line."""
    sizes = ", ".join(f"{image.width} × {image.height}" for image in row.images)
    pictures = "picture" if len(row.images) == 1 else f"{len(row.images)} pictures"
    return f"{row.tokens} tokens, {row.learned} with loss; {pictures} of {sizes} pixels"


# ---- as a page ------------------------------------------------------------------------------------------------------


def write_page(path: Path, found: Sequence[Inspection], stage: int) -> None:
    """
    Write a page with thumbnails.

    Raises:
        RecipeError: if it cannot be written.
    """
    body = "\n".join(["<h1>What the model will see</h1>", *(render_inspection(one, stage) for one in found)])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, render_page("What the model will see", body))
    except OSError as error:
        raise RecipeError(f"--output {path} cannot be written ({error.strerror}); name another file.") from error
    print(f"\nwritten: {path}")


def render_inspection(found: Inspection, stage: int) -> str:
    """What a page says about a dataset, as HTML."""
    parts = [f"<h2>{escape(redact(found.name))}</h2>", f'<p class="soft">{escape(found.samples.report())}</p>']
    if found.tokens:
        header, rows = found.lengths()
        parts += [render_table(header, rows), f"<p>{escape(found.cut_line())}</p>"]
        parts.append(f"<p>{escape(found.pads_line())}</p>")
        parts.append(f"<p>Rows of stage {stage}; <mark>marked text</mark> carries loss.</p>")
    for row in found.shown:
        pictures = "".join(
            f'<img src="{data_uri(thumbnail(image))}" alt="" style="height: auto">' for image in row.images
        )
        text = "".join(
            f"<mark>{escape(text)}</mark>" if is_learned else escape(text) for text, is_learned in row.stretches
        )
        parts.append(
            f"<article><div>{pictures}</div><dl><dt>{escape(describe(row))}</dt><dd>{text}</dd></dl></article>"
        )
    return "\n".join(parts)


def _picture(image: PIL.Image.Image) -> str:
    return f'<img src="{data_uri(thumbnail(image))}" alt="" style="height: auto">'
