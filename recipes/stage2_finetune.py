"""Stage 2: teach the model to answer well, from few curated descriptions in the chat template (paper, section 3.3).

The embedded world, from what stage 1 left in runs/tiny_stage1:

    minigpt4 stage2 --config tiny_stage2

The original's run, on one GPU, with any field of the YAML file overridden:

    accelerate launch -m recipes_minigpt4.stage2_finetune \\
        --config stage2_vicuna_7b --model_name_or_path runs/stage1 --dataset_name cc_sbu_align --output_dir runs/stage2

A row is `[BOS]###Human: <Img>[image]</Img> {instruction} ###Assistant: {answer}###`, or what the language model's own
chat template makes of it; only the answer and its end carry loss.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass


if __name__ == "__main__":  # under `accelerate launch -m`: the command, before anything else is imported
    from recipes_minigpt4.cli import main as run

    raise SystemExit(run(["stage2", *sys.argv[1:]]))

from transformers import TrainerCallback

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.evaluation_split import load_evaluation_pairs
from recipes_minigpt4.data.formatting import stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.training.argument_checks import check_length, check_start
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments, StageParser
from recipes_minigpt4.training.model import check_model, load_model
from recipes_minigpt4.training.options import option
from recipes_minigpt4.training.train import train_and_save
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


@dataclass(repr=False)
class Stage2Arguments(StageArguments):
    """The original's numbers for stage 2."""

    learning_rate: float = option("learning_rate", stage=2)
    min_learning_rate: float = option("min_learning_rate", stage=2)
    warmup_steps: int = option("warmup_steps", stage=2)


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, Stage2Arguments]:
    """Read the arguments of this stage; those of the command line win over the YAML file."""
    model, data, training = StageParser("stage2", (ModelArguments, DataArguments, Stage2Arguments)).parse(arguments)
    return model, data, training


def main(arguments: Sequence[str], callbacks: Sequence[TrainerCallback] = ()) -> MiniGPT4Trainer:
    """Train stage 2; returns the trainer, whose `model` is trained and whose `state.log_history` holds the losses."""
    model_args, data_args, training_args = parse(arguments)
    check_start(model_args, data_args, training_args)
    check_model(model_args)

    # Data, which are looked at before a model is loaded
    pairs = load_pairs(data_args, stage=2, seed=training_args.seed)
    held_out = load_evaluation_pairs(data_args, 2, pairs)
    check_length(training_args, pairs)

    # Model: the adapter of stage 1 and its frozen backbones
    model, processor = load_model(model_args, training_args)

    # Rows: pairs as prompt–completion rows, each with one of the four instructions
    rows = stage2_rows(pairs, processor, data_args, seed=training_args.seed, grouping=training_args.grouping)
    held_out_rows = None if held_out is None else stage2_rows(held_out, processor, data_args, training_args.seed)

    # Training
    trainer = MiniGPT4Trainer(
        model=model,
        args=training_args,
        train_dataset=rows,
        eval_dataset=held_out_rows,
        processing_class=processor,
        callbacks=list(callbacks),
        dataset_name=data_args.dataset_name,
        max_bad_share=data_args.max_bad_share,
        non_finite=training_args.non_finite,
        stage=2,
    )
    if held_out is not None and training_args.eval_suites:
        trainer.watch_suites(held_out)
    train_and_save(trainer)
    return trainer
