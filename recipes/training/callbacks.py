"""What a run shows while it trains: images per second beside its bar, and a panel of pictures with descriptions.

    minigpt4 stage1 --config tiny_stage1 --panel_steps 50 --report_to tensorboard

The panel asks for the same pictures again and again, greedily and with the training prompt. It lies in `panel.html`
of the output folder, where every picture has a row and every N steps a column, and goes to TensorBoard, W&B and
trackio if the run reports to them.
"""

import importlib
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback, is_deepspeed_zero3_enabled

from processing_minigpt4.conversations_minigpt4 import LENGTH_MARK
from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.data.bad_samples import ENOUGH
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.errors import one_line as told
from recipes_minigpt4.utils.files import replace_text
from recipes_minigpt4.utils.html import data_uri, render_page, render_texts, thumbnail


PANEL_ROWS = 4
MAX_NEW_TOKENS = 48  # a short description; the panel is to be looked at, and training waits for it
SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}
TRACKERS = ("wandb", "trackio")  # which have the same `Table`, `Image` and `log`


# What a line of the log shows: name in the log → title, format. The trackers and `trainer_state.json` get everything.
SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "learning_rate": ("learning rate", "{:.2e}"),
    "mean_token_accuracy": ("accuracy", "{:.3f}"),
    "images_per_second": ("images/s", "{:.1f}"),
    "eval_loss": ("evaluation loss", "{:.4f}"),
    "eval_mean_token_accuracy": ("accuracy", "{:.3f}"),
}


def log_line(logs: Mapping[str, Any], state: Any) -> str | None:
    """A few aligned numbers; None for what the last lines of a run tell."""
    if "train_runtime" in logs:
        return None
    shown = {name: SHOWN[name] for name in SHOWN if name in logs} or {
        name: (name.removeprefix("eval_"), "{:.3f}" if isinstance(value, float) else "{}")
        for name, value in logs.items()
        if name != "epoch"
    }
    numbers = [f"{title} {style.format(logs[name])}" for name, (title, style) in shown.items()]
    width = len(f"{state.max_steps:,}")
    return "  ".join([f"step {state.global_step:>{width},}/{state.max_steps:,}", *numbers])


class ImagesProgressCallback(ProgressCallback):
    """The bar of transformers, which shows steps and the time left, with loss and images per second behind it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin where a checkpoint was; its steps took no time of this run, and so tell nothing of the time left."""
        if state.is_world_process_zero:
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True)
        self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if line := log_line(logs, state):
            self.training_bar.write(line)
        if "loss" in logs:
            rate = f", {logs['images_per_second']:.1f} images/s" if "images_per_second" in logs else ""
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4f}{rate}")


class LinesCallback(PrinterCallback):
    """Lines in the place of a bar, for output that is no terminal."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs and (line := log_line(logs, state)):
            print(line, flush=True)


@dataclass(frozen=True)
class Watched:
    """A picture of the panel, and how the model is asked about it."""

    images: Sequence[PIL.Image.Image]  # of its row, which is one
    prompt: str
    title: str  # what the training data say about it, or the name of its file
    one_line: bool  # whether a line break ends an answer, as in stage 1


class PanelCallback(TrainerCallback):
    """
    Lets the model describe a few fixed pictures every `steps` steps; training goes on as if nothing had been.

    Args:
        trainer: a `MiniGPT4Trainer`. Its model is asked, `panel.html` is written to its output folder, and it reports.
        steps: steps between two columns.
        folder: a folder of pictures. Default: the first rows of the training data.
        count: the most pictures that are shown.

    Raises:
        RecipeError: if there are no pictures, or no process holds the whole model.
    """

    def __init__(self, trainer: Any, steps: int, folder: str | None = None, count: int = PANEL_ROWS) -> None:
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise RecipeError(
                "A panel needs a whole model in one process; with FSDP or ZeRO-3, leave --panel_steps out."
            )
        self.trainer, self.steps = trainer, steps
        color = getattr(getattr(trainer.processing_class, "image_processor", None), "background_color", None)
        self.watched = read_panel(trainer.train_dataset, folder, count, color)
        self.page = Path(trainer.args.output_dir, "panel.html")
        self.run = ", ".join(
            [self.page.absolute().parent.name, *([f"stage {trainer.stage}"] if trainer.stage else [])]
        )
        self.grey = "the name of its file" if folder else "its caption in the training data"
        self.pictures = [{"title": one.title, "image": data_uri(thumbnail(one.images[0]))} for one in self.watched]
        self.columns: list[dict[str, Any]] = []
        self.pictures_sent = False  # to TensorBoard, once in a run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After a resume, keep the columns up to the checkpoint, if they are about the same pictures."""
        self.columns, self.pictures_sent = [], False
        try:
            kept = json.loads(self.page.with_suffix(".json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if kept.get("pictures") == self.pictures:
            self.columns = [column for column in kept["columns"] if column["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps or not state.is_world_process_zero:
            return
        started = time.perf_counter()
        replies = self.describe()
        self.columns.append({"step": state.global_step, "replies": replies})
        self.write()
        self.report(state.global_step, replies)
        self.trainer.leave_out(time.perf_counter() - started)

    def describe(self) -> list[str]:
        """The model's present replies, greedy and one picture at a time, which needs no padding."""
        processor, model, replies = self.trainer.processing_class, self.trainer.model, []
        with undisturbed(model), torch.no_grad(), self.trainer.accelerator.autocast():
            for one in self.watched:
                inputs = processor(
                    images=one.images, text=one.prompt, add_special_tokens=False, return_tensors="pt"
                ).to(model.device)
                output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, use_cache=True)
                (reply,) = processor.post_process_image_text_to_text(output[:, inputs["input_ids"].shape[1] :])
                replies.append(reply.strip().partition("\n")[0] if one.one_line else reply.strip())
        return replies

    def write(self) -> None:
        """Write the page, and beside it what a resumed run needs to go on with it."""
        self.page.parent.mkdir(parents=True, exist_ok=True)
        kept = {"pictures": self.pictures, "columns": self.columns}
        replace_text(self.page.with_suffix(".json"), json.dumps(kept, ensure_ascii=False) + "\n")
        replace_text(self.page, render_panel(self.pictures, self.columns, self.run, self.grey))

    def report(self, step: int, replies: Sequence[str]) -> None:
        """Log the descriptions wherever the run reports to and tables can be shown."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                self._report_to_tensorboard(callback.tb_writer, step, replies)
        for name in TRACKERS:
            if name in self.trainer.args.report_to:
                tracker = importlib.import_module(name)  # there, or the Trainer would have refused
                rows = [
                    [step, tracker.Image(thumbnail(one.images[0])), one.title, reply]
                    for one, reply in zip(self.watched, replies, strict=True)
                ]
                log_table(tracker, step, ["step", "image", "title", "description"], rows)

    def _report_to_tensorboard(self, writer: Any, step: int, replies: Sequence[str]) -> None:
        lines = ["| picture | title | description |", "| --- | --- | --- |"]
        for number, (one, reply) in enumerate(zip(self.watched, replies, strict=True), 1):
            lines.append(f"| {number} | {markdown_cell(one.title)} | {markdown_cell(reply)} |")
            if not self.pictures_sent:
                shown = np.asarray(thumbnail(one.images[0]))
                writer.add_image(f"panel/picture_{number}", shown, step, dataformats="HWC")
        self.pictures_sent = True
        writer.add_text("panel/descriptions", "\n".join(lines), step)
        writer.flush()


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode for a while; then every module's own mode again, and torch's random state as it was."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


# ---- pictures -------------------------------------------------------------------------------------------------------


def read_panel(rows: Any, folder: str | None, count: int, color: Any = None) -> list[Watched]:
    """
    The pictures to watch: the first rows of the training data, or the first pictures of a folder by name.

    Args:
        rows: of the training.
        folder: of pictures, or None.
        count: the most pictures.
        color: what shows through transparent pixels, as for the model; None shows what is stored under them.

    Raises:
        RecipeError: if there are none, or one cannot be read.
    """
    usable = (row for row in itertools.islice(iter(rows), ENOUGH) if not row.get("skipped"))
    first = list(itertools.islice(usable, 1 if folder else count))
    if not first or not (folder or first[0].get("images")):
        raise RecipeError("The training data hold no pictures to show; name a folder with --panel_images.")
    prompt, one_line = first[0]["prompt"], first[0]["completion"].endswith("\n")
    if not folder:
        return [
            Watched(
                [open_image(one, color) for one in row["images"][: row.get("asked")]],
                row["prompt"],
                title_of(row),
                one_line,
            )
            for row in first
        ]
    try:
        paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in SUFFIXES)[:count]
    except OSError as error:
        raise RecipeError(f"--panel_images {folder} is not a folder that can be read ({error.strerror}).") from error
    if not paths:
        raise RecipeError(f"--panel_images {folder} has no pictures; put some in it ({', '.join(sorted(SUFFIXES))}).")
    return [Watched([open_picture(path, color)], prompt, path.name, one_line) for path in paths]


def title_of(row: Mapping[str, Any]) -> str:
    """The first answer of a row as people read it, without the processor's mark of where it is cut."""
    completion: str = row["completion"]
    if learned := row.get("learned"):
        completion = completion[: learned[0][1]]
    return completion.partition(LENGTH_MARK)[0].strip()


def open_picture(path: Path, color: Any) -> PIL.Image.Image:
    try:
        picture: PIL.Image.Image = open_image(path, color)
    except ValueError as error:
        raise RecipeError(f"{path} cannot be read ({told(error.__cause__ or error)}); fix or remove it.") from error
    return picture


# ---- output ---------------------------------------------------------------------------------------------------------


def render_panel(pictures: Sequence[dict[str, str]], columns: Sequence[dict[str, Any]], run: str, grey: str) -> str:
    """
    A page that loads nothing from elsewhere: a row per picture, a column per step.

    Args:
        pictures: `title` and `image`, a link with the picture in it, of each row.
        columns: `step` and `replies`, one per picture, of each column.
        run: which run it is.
        grey: what the titles are.
    """
    rows = []
    for place, picture in enumerate(pictures):
        title = escape(picture["title"])
        shown = f'<img src="{picture["image"]}" alt="{title}">\n<span class="soft">{title}</span>'
        rows.append([shown, *(escape(column["replies"][place]) or "(nothing)" for column in columns)])
    header = ["picture", *(f"step {column['step']}" for column in columns)]
    body = f"""<h1>What the model says</h1>
<p>Run: <strong>{escape(run)}</strong>. The same pictures after more and more steps, described greedily in at most
{MAX_NEW_TOKENS} tokens. <span class="soft">Grey, under each picture: {grey}.</span></p>
<div class="wide">
{render_texts(header, rows)}
</div>"""
    return render_page(f"What the model says: {run}", body)


def markdown_cell(text: str) -> str:
    return " ".join(escape(text, quote=False).replace("|", "\\|").split())


def log_table(tracker: Any, step: int, columns: list[str], rows: list[list[Any]]) -> None:
    """Log a table where the Trainer's own numbers are; trackio's takes a data frame only, W&B's takes one too."""
    import pandas  # type: ignore[import-untyped]  # comes with datasets

    frame = pandas.DataFrame(rows, columns=columns)
    tracker.log({"panel": tracker.Table(dataframe=frame), "train/global_step": step})
