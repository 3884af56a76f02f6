"""A run from its first step to the saved adapter."""

from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from modeling_minigpt4.checks_minigpt4 import InputError
from recipes_minigpt4.data.bad_samples import SampleCounts
from recipes_minigpt4.training.checkpoints import how_to_go_on, latest_checkpoint
from recipes_minigpt4.training.preemption import PreemptionCallback, is_lost_process
from recipes_minigpt4.training.resume import check_same, find_checkpoint
from recipes_minigpt4.training.summary import describe_end, describe_start, told_at_the_end
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
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
        print(describe_start(trainer))
    preemption = PreemptionCallback()
    trainer.add_callback(preemption)
    try:
        with preemption, told_at_the_end():
            samples = _train(trainer, folder)
            if preemption.preempted:
                checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
                raise PreemptedError(
                    f"Stopped by SIGTERM after step {trainer.state.global_step}; go on from {checkpoint} with "
                    "--resume_from_checkpoint auto."
                )
            _save(trainer, folder)  # which a signal does not cut short
    finally:
        trainer.remove_callback(preemption)
    if trainer.is_world_process_zero():
        print(describe_end(trainer, samples.pads))
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _train(trainer: MiniGPT4Trainer, folder: Path) -> SampleCounts:
    """Train; returns what all processes have drawn."""
    try:
        checkpoint = find_checkpoint(trainer.args)
        check_same(checkpoint)
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
    samples = report(trainer)
    samples.check(enough=1)  # the run has no more to come
    return samples


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


def report(trainer: MiniGPT4Trainer) -> SampleCounts:
    """Tell what was skipped, and return the counts; all processes have to take part."""
    samples = trainer.samples.over_all_processes(trainer.accelerator)
    if trainer.is_world_process_zero():
        print(samples.report())
        if steps := trainer.finite_steps.report(trainer.state.global_step):
            print(steps)
    return samples


def check_max_length(trainer: MiniGPT4Trainer) -> None:
    """Refuse a `max_length` that would cut pictures, before the first step rather than in it."""
    if (limit := trainer.args.max_length) is None:
        return
    row = next(iter(trainer.train_dataset))
    images = row["images"][: row.get("asked")]  # a chat may have more behind its first answer
    prompt = trainer.data_collator.processor(images=images, text=row["prompt"], add_special_tokens=False)
    if (needed := len(prompt["input_ids"][0])) >= limit:
        raise RecipeError(
            f"max_length is {limit}, but picture and prompt alone take {needed} tokens; leave it out, for "
            "--max_txt_len cuts long answers and never a picture."
        )
