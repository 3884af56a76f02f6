"""Stage 1: teach the projection what pictures hold, from many image–caption pairs (paper, section 3.2).

The embedded world, on a laptop:

    minigpt4 stage1 --config tiny_stage1

The original's run, on 4 GPUs, with any field of the YAML file overridden:

    accelerate launch --num_processes 4 -m recipes_minigpt4.stage1_pretrain \\
        --config stage1_vicuna_7b --dataset_name "laion/*.tar" "cc_sbu/*.tar" --output_dir runs/stage1

A row is `[BOS][image][caption][line break]`; only caption and line break carry loss.
"""

import sys
from collections.abc import Sequence


if __name__ == "__main__":  # under `accelerate launch -m`: the command, before anything else is imported
    from recipes_minigpt4.cli import main as run

    raise SystemExit(run(["stage1", *sys.argv[1:]]))

from transformers import TrainerCallback

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.evaluation_split import load_evaluation_pairs
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.training.argument_checks import check_length, check_start
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments, StageParser
from recipes_minigpt4.training.model import check_model, load_model
from recipes_minigpt4.training.train import train_and_save
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


def parse(arguments: Sequence[str]) -> tuple[ModelArguments, DataArguments, StageArguments]:
    """Read the arguments of this stage; those of the command line win over the YAML file."""
    model, data, training = StageParser("stage1", (ModelArguments, DataArguments, StageArguments)).parse(arguments)
    return model, data, training


def main(arguments: Sequence[str], callbacks: Sequence[TrainerCallback] = ()) -> MiniGPT4Trainer:
    """Train stage 1; returns the trainer, whose `model` is trained and whose `state.log_history` holds the losses."""
    model_args, data_args, training_args = parse(arguments)
    check_start(model_args, data_args, training_args)
    check_model(model_args)

    # Data, which are looked at before a model is loaded
    pairs = load_pairs(data_args, stage=1, seed=training_args.seed)
    held_out = load_evaluation_pairs(data_args, 1, pairs)
    check_length(training_args, pairs)

    # Model: frozen backbones and a new projection
    model, processor = load_model(model_args, training_args)

    # Rows: pairs as prompt–completion rows
    rows = stage1_rows(pairs, processor, data_args, grouping=training_args.grouping)
    held_out_rows = None if held_out is None else stage1_rows(held_out, processor, data_args)

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
        stage=1,
    )
    if held_out is not None and training_args.eval_suites:
        trainer.watch_suites(held_out)
    train_and_save(trainer)
    return trainer
