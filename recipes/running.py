"""How a run starts, ends, and goes on."""

from pathlib import Path

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_minigpt4.checks_minigpt4 import InputError
from recipes_minigpt4.checkpoints import (
    FILES,
    STATE,
    how_to_go_on,
    latest_checkpoint,
    newest_checkpoint,
    what_is_missing,
)
from recipes_minigpt4.faults import PreemptionCallback, is_lost_process
from recipes_minigpt4.trainer import MiniGPT4Trainer
from recipes_minigpt4.training import StageArguments, describe_parameters
from recipes_minigpt4.utils.errors import PreemptedError, RecipeError, one_line


def train_and_save(trainer: MiniGPT4Trainer) -> None:
    """
    Train, or go on from a checkpoint, then save the adapter with its processor and card, and push them if asked to.

    Raises:
        RecipeError: if there is no checkpoint to resume from, no room for the pictures or on the disk, a loss is not
            finite, another process is gone, or the push failed.
        PreemptedError: after SIGTERM; a checkpoint is saved then.
    """
    folder = Path(trainer.args.output_dir)
    check_max_length(trainer)
    if trainer.is_world_process_zero():
        print(describe_parameters(trainer.model))
    preemption = PreemptionCallback()
    trainer.add_callback(preemption)
    try:
        with preemption:
            _train(trainer, folder)
            if preemption.preempted:
                checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
                raise PreemptedError(
                    f"Stopped by SIGTERM after step {trainer.state.global_step}; go on from {checkpoint} with "
                    "--resume_from_checkpoint auto."
                )
            _save(trainer, folder)  # which a signal does not cut short
    finally:
        trainer.remove_callback(preemption)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _train(trainer: MiniGPT4Trainer, folder: Path) -> None:
    try:
        checkpoint = find_checkpoint(trainer.args)
        _check_same(checkpoint)
        if checkpoint is None and (older := latest_checkpoint(folder)) and trainer.is_world_process_zero():
            print(f"{older} is of an earlier run; remove it, or it may be taken for one of this run later.")
        trainer.train(resume_from_checkpoint=checkpoint)
    except RecipeError as error:
        raise RecipeError(own_words(error, folder)) from error
    except InputError as error:  # such as a row of more tokens than the model has positions
        raise RecipeError(own_words(error, folder)) from error
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        raise RecipeError(
            f"Another process of this run is gone, and what it said tells why ({one_line(error)[:200]}); "
            f"{how_to_go_on(folder)}."
        ) from error
    report(trainer)
    trainer.samples.over_all_processes(trainer.accelerator).check(enough=1)  # the run has no more to come


def _check_same(checkpoint: str | None) -> None:
    """Refuse to resume where the processes see different checkpoints, as on machines without a shared disk."""
    found = dict.fromkeys(gather_object([checkpoint]))
    if len(found) > 1:
        seen = " and ".join(str(each or "none") for each in found)
        raise RecipeError(
            f"The processes of this run see different newest checkpoints, {seen}; let all machines share "
            "output_dir, or copy the newest to each."
        )


def _save(trainer: MiniGPT4Trainer, folder: Path) -> None:
    try:
        trainer.save_model(_internal_call=True)  # otherwise it would push before all is saved
        trainer.save_state()
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"Training is done, but the adapter could not be written to {folder} ({one_line(error)}); make room, then "
            f"{how_to_go_on(folder)}."
        ) from error


def own_words(error: ValueError, folder: Path) -> str:
    """
    The sentence of an error that ended training, and where to go on.

    One from a worker of a data loader comes with that one's traceback around it.
    """
    sentence = str(error).rpartition(f"{RecipeError.__name__}: ")[2].strip()
    told = "--resume_from_checkpoint" in sentence
    if told or latest_checkpoint(folder) is None:
        return sentence
    return f"{sentence.rstrip('.')}, then {how_to_go_on(folder)}."


def report(trainer: MiniGPT4Trainer) -> None:
    """Tell what was skipped; all processes have to take part."""
    samples = trainer.samples.over_all_processes(trainer.accelerator)
    if trainer.is_world_process_zero():
        print(samples.report())
        if steps := trainer.finite_steps.report(trainer.state.global_step):
            print(steps)


def check_max_length(trainer: MiniGPT4Trainer) -> None:
    """Refuse a `max_length` that would cut pictures, before the first step rather than in it."""
    if (limit := trainer.args.max_length) is None:
        return
    row = next(iter(trainer.train_dataset))
    prompt = trainer.data_collator.processor(images=row["images"], text=row["prompt"], add_special_tokens=False)
    if (needed := len(prompt["input_ids"][0])) >= limit:
        raise RecipeError(
            f"max_length is {limit}, but picture and prompt alone take {needed} tokens; leave it out, for "
            "--max_txt_len cuts long answers and never a picture."
        )


def find_checkpoint(args: StageArguments) -> str | None:
    """
    The checkpoint that `--resume_from_checkpoint` means.

    A folder, or of the output folder the newest that is whole: `latest` has to find one, and `auto` starts from the
    beginning where there is none, so that a scheduler can run the same command again and again.

    Raises:
        RecipeError: if there is none, or the folder is no whole one.
    """
    wanted = str(args.resume_from_checkpoint or "").strip()
    if wanted.lower() in ("", "false", "none"):
        return None
    if wanted.lower() in ("true", "latest", "auto"):
        latest = newest_checkpoint(Path(args.output_dir))
        if latest is None and wanted.lower() != "auto":
            raise RecipeError(
                f"There is no checkpoint to resume from in {args.output_dir}; leave --resume_from_checkpoint out."
            )
        return None if latest is None else str(latest)
    folder = Path(wanted)
    if not (folder / STATE).is_file():
        raise RecipeError(f"There is no checkpoint to resume from at {wanted}; leave --resume_from_checkpoint out.")
    if (folder / FILES).is_file() and (reason := what_is_missing(folder)) is not None:
        raise RecipeError(f"{wanted} is not a whole checkpoint, for {reason}; name another, or `latest`.")
    return wanted
