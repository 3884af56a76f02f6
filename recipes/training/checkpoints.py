"""Checkpoints that are whole or not there: written beside, listed with their sizes, and renamed at the end.

A process can be killed, and a disk can fill up, at any moment of saving. So a checkpoint is written to the scratch
folder `_unfinished` of the output folder; then `files.json`, the list of its files with their sizes, goes into it, all
is flushed to the disk, and the folder gets its name, which is one step for the file system. What has no such list, or
not the files that stand there, is not taken for a checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from transformers.trainer import TRAINING_ARGS_NAME  # a pickle, which is not pushed and nobody needs to resume
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_minigpt4.compat_minigpt4 import IS_TRANSFORMERS_4
from recipes_minigpt4.utils.errors import RecipeError, one_line


UNFINISHED = "_unfinished"  # the underscore keeps it from being pushed
FORMER = "former-"  # begins the name of a checkpoint that is being replaced
FILES = "files.json"
STATE = "trainer_state.json"


# ---- writing --------------------------------------------------------------------------------------------------------


class NotWrittenError(RecipeError):
    """A checkpoint could not be written, of which all processes have heard."""


def write_whole(trainer: Any, final: Path, write: Callable[[], None]) -> None:
    """
    Write a checkpoint, on all processes of a run at once.

    Args:
        trainer: the trainer, for its processes.
        final: the checkpoint's folder; one that is there already is replaced.
        write: writes the checkpoint to the folder of the same name in `UNFINISHED`, beside `final`.

    Raises:
        NotWrittenError: on all processes, if any of them could not write; nothing is left of the attempt then.
    """
    scratch = final.parent / UNFINISHED / final.name
    if trainer.args.local_process_index == 0:
        restore_former(final.parent)
        shutil.rmtree(scratch.parent, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    with together(trainer, final):
        write()
    with together(trainer, final):
        if trainer.args.should_save:
            _put_in_place(scratch, final)
    if trainer.args.local_process_index == 0:  # on a machine that does not share that disk, what is left of it
        shutil.rmtree(scratch.parent, ignore_errors=True)


@contextmanager
def together(trainer: Any, final: Path | None) -> Iterator[None]:
    """
    Have all processes get past a part of writing a checkpoint, or none, so that no one waits for one that has stopped.

    Args:
        trainer: the trainer, for its processes.
        final: the checkpoint's folder; None if none is being written, and errors pass as they are.

    Raises:
        NotWrittenError: on all processes, if any of them could not write; nothing is left of the attempt then.
    """
    if final is None:
        yield
        return
    reason = None
    try:
        yield
    except NotWrittenError:
        raise
    except Exception as error:  # of a full disk, for example; safetensors, torch and Python each have their own
        reason = one_line(error)
    if not (reasons := [each for each in gather_object([reason]) if each]):
        return
    if trainer.args.local_process_index == 0:
        restore_former(final.parent)
        shutil.rmtree(final.parent / UNFINISHED, ignore_errors=True)
    raise NotWrittenError(
        f"{final} could not be written ({reasons[0]}); make room or fix what is in the way, then "
        f"{how_to_go_on(final.parent)}."
    )


def _put_in_place(scratch: Path, final: Path) -> None:
    files = [path for path in sorted(scratch.rglob("*")) if path.is_file() and path.name != TRAINING_ARGS_NAME]
    sizes = {path.relative_to(scratch).as_posix(): path.stat().st_size for path in files}
    (scratch / FILES).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    for path in (*files, scratch / FILES, scratch):
        _flush(path)
    if final.exists():
        os.replace(final, scratch.parent / f"{FORMER}{final.name}")
    os.replace(scratch, final)
    _flush(final.parent)
    shutil.rmtree(scratch.parent, ignore_errors=True)


def restore_former(output_dir: Path) -> None:
    """Put back a checkpoint that was about to be replaced by another of the same step when the process ended."""
    for path in (output_dir / UNFINISHED).glob(f"{FORMER}*"):
        final = output_dir / path.name.removeprefix(FORMER)
        if not final.exists():
            with suppress(FileNotFoundError):  # another process was faster
                os.replace(path, final)


def rotate(trainer: Any, run_dir: str) -> None:
    """Delete checkpoints that are more than `save_total_limit`, the oldest first, as transformers does."""
    if IS_TRANSFORMERS_4:
        trainer._rotate_checkpoints(use_mtime=True, output_dir=run_dir)
        return
    from transformers.trainer_utils import rotate_checkpoints

    args, best = trainer.args, trainer.state.best_model_checkpoint
    rotate_checkpoints(run_dir, args.save_total_limit, best_model_checkpoint=best, use_mtime=True)


def _flush(path: Path) -> None:
    """Have the disk keep a file or folder as it is now, so that a loss of power cannot part it from its name."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def written_beside(folder: Path) -> Iterator[Path]:
    """
    A scratch folder whose files replace those of `folder` at the end, each in one step.

    After an error `folder` is as it was.
    """
    scratch = folder / UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            _flush(path)
            os.replace(path, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- reading --------------------------------------------------------------------------------------------------------


def what_is_missing(checkpoint: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint of the recipes; None if it is one."""
    try:
        sizes = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no {FILES}"
    if STATE not in sizes:
        return f"it has no {STATE}"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} of {size:,} bytes"
    return None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The folders with the name of a checkpoint, the newest first."""
    pattern = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
    found = [(int(match[1]), path) for path in output_dir.glob("*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def latest_checkpoint(output_dir: Path, tell: Callable[[str], Any] | None = None) -> Path | None:
    """
    The newest whole checkpoint of an output folder.

    Args:
        output_dir: folder of a run.
        tell: is told of checkpoints that are passed over.
    """
    restore_former(output_dir)
    for path in checkpoints_of(output_dir):
        if (reason := what_is_missing(path)) is None:
            return path
        if tell is not None:
            tell(f"{path} is not a whole checkpoint, for {reason}; it is passed over")
    return None


def newest_checkpoint(output_dir: Path) -> Path | None:
    """
    The newest whole checkpoint to resume from, or None where there is nothing at all.

    Raises:
        RecipeError: if there are checkpoints and none is whole.
    """
    first_process = int(os.environ.get("RANK", "0")) == 0
    if (newest := latest_checkpoint(output_dir, print if first_process else None)) is None:
        for path in checkpoints_of(output_dir):
            raise RecipeError(
                f"No checkpoint of {output_dir} is whole, for {what_is_missing(path)} ({path.name}); name one that "
                "another trainer has saved with --resume_from_checkpoint FOLDER, or remove them."
            )
    return newest


def how_to_go_on(output_dir: Path) -> str:
    """What to do after a run has stopped, as the end of a sentence."""
    whole = latest_checkpoint(output_dir)
    if whole is None:
        return "start again, as no checkpoint was saved before"
    return f"go on from {whole} with --resume_from_checkpoint latest"
