"""Train in a script of your own, with TRL's `SFTTrainer` and nothing of the recipes.

    python -m recipes_minigpt4.examples.train_with_trl demo-output/adapter chats.jsonl runs/mine

Every line of `chats.jsonl` has a `prompt` and a `completion`, lists of messages, and `images`, a list of paths. Only
the completion carries loss.
"""

import sys

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor


def main(adapter: str, chats: str, output: str) -> None:
    """Go on training the model in `adapter` on `chats`, and save it with its processor in `output`."""
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter)
    processor = MiniGPT4Processor.from_pretrained(adapter)
    model.freeze_backbones()  # only the projection trains
    rows = load_dataset("json", data_files=chats, split="train")
    config = SFTConfig(
        output,
        max_steps=20,
        per_device_train_batch_size=2,
        learning_rate=1e-4,
        max_length=None,  # TRL would cut rows, and with them pictures
        remove_unused_columns=False,
        bf16=False,  # True on a GPU
        report_to="none",
    )
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
