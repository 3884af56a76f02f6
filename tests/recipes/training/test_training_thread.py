"""A trainer in one thread while another lets the same model describe: neither notices the other."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.training.arguments import StageArguments
from recipes_minigpt4.training.trainer import MiniGPT4Trainer


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("trl", [False, True], ids=["recipes", "trl"])
def test_replies_and_losses_are_those_of_each_alone(
    trl: bool, checkpointing: bool, compose: Callable, picture: Callable, tmp_path: Path
) -> None:
    texts = ["a red square", "a blue square that is larger", "nothing", "a green one"]
    pictures = [picture(colour) for colour in ("red", "blue", "white", "green")]
    settings = {
        "use_cpu": True, "max_steps": 8, "disable_tqdm": True, "report_to": "none", "save_strategy": "no",
        "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-12, "bf16": False,
        "gradient_checkpointing": checkpointing, "max_length": None, "remove_unused_columns": False,
    }  # fmt: skip

    def make() -> tuple:
        model, processor = compose()
        model.freeze_backbones()
        if trl:
            rows = Dataset.from_dict(
                {
                    "messages": [
                        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": text}]
                        for text in texts
                    ],
                    "images": [[each] for each in pictures],
                }
            )
            config = SFTConfig(str(tmp_path), **settings)
            return model, processor, SFTTrainer(model, config, train_dataset=rows, processing_class=processor)
        for number, each in enumerate(pictures):
            each.save(tmp_path / f"{number}.png")
        lines = [f'{{"image": "{number}.png", "caption": "{text}"}}\n' for number, text in enumerate(texts)]
        (tmp_path / "rows.jsonl").write_text("".join(lines))
        data = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"))
        arguments = StageArguments(output_dir=str(tmp_path), original_schedule=False, **settings)
        rows = stage2_rows(load_pairs(data, 2), processor, data)
        return (
            model,
            processor,
            MiniGPT4Trainer(model=model, args=arguments, train_dataset=rows, processing_class=processor),
        )

    def losses(trainer: SFTTrainer) -> list[float]:
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    alone = losses(make()[2])
    model, processor, trainer = make()
    inputs = [
        processor(text=["<image> What is it?" + " Say more." * n], images=[pictures[n]], return_tensors="pt")
        for n in range(2)
    ]

    def describe() -> list[list[int]]:
        return [model.generate(**each, max_new_tokens=8, do_sample=False, separator="")[0].tolist() for each in inputs]

    expected, found, done = describe(), [], threading.Event()

    def talk() -> None:
        while not done.is_set() or not found:
            found.append(describe())

    thread = threading.Thread(target=talk)
    thread.start()
    together = losses(trainer)
    done.set()
    thread.join()
    assert together == pytest.approx(alone, rel=1e-6)
    assert found == [expected] * len(found)
    with torch.no_grad():
        assert describe() == expected
