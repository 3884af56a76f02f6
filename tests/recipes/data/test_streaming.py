"""Streams that are stopped and go on: no sample comes twice and none is left out."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from damaged import sample, write_tar
from datasets import IterableDataset
from safetensors.torch import load_file
from stopped import stop_after
from torch.utils.data import DataLoader

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.data import webdataset
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.data.streaming import loader_state, shuffle_blocks
from recipes_minigpt4.utils.errors import RecipeError


TARS, PER_TAR = 8, 7


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sources of eight tars, and a file of pictures."""
    for source, first in (("laion", 0), ("cc", 1000)):
        for tar in range(TARS):
            numbers = range(first + PER_TAR * tar, first + PER_TAR * (tar + 1))
            write_tar(tmp_path / source / f"{tar}.tar", [sample(number) for number in numbers])
    return tmp_path


def arguments_of(source: str, folder: Path, pairs_file: Path) -> DataArguments:
    names = {
        "one source": [folder / "laion"],
        "a mixture": [folder / "laion", folder / "cc"],
        "tars and a file": [folder / "laion", pairs_file],
        "a file": [pairs_file],
    }[source]
    weights = [115, 14] if len(names) > 1 else None
    return DataArguments(
        dataset_name=[str(name) for name in names], dataset_weights=weights, shuffle_buffer=10, streaming=True
    )


def texts(rows: list[dict]) -> list[str]:
    return [row["text"] for row in rows]


def loader_of(args: DataArguments, workers: int, rank: int):
    """What the trainer makes: accelerate's loader of one of two processes."""
    loader = DataLoader(load_pairs(args, stage=1, seed=3), batch_size=3, collate_fn=texts, num_workers=workers)
    return prepare_data_loader(
        loader, num_processes=2, process_index=rank, put_on_device=False, dispatch_batches=False,
        use_stateful_dataloader=True,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*set_vital")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", ["one source", "a mixture", "tars and a file", "a file"])
def test_stopped_again_and_again_a_stream_gives_every_sample_as_often(
    source: str, workers: int, folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Two processes, stopped after random numbers of batches, also before every worker has given one."""
    args, batches, draw = arguments_of(source, folder, pairs_file), 40, random.Random(workers)
    for rank in range(2):
        whole = list(itertools.islice(loader_of(args, workers, rank), batches))
        state, pieces = None, []
        while len(pieces) < batches:
            loader = loader_of(args, workers, rank)
            if state is not None:
                loader.load_state_dict(state)
            for batch in loader:
                pieces.append(batch)
                if len(pieces) == batches or draw.random() < (0.9 if len(pieces) < 3 else 0.12):
                    break
            torch.save(loader_state(loader, state), tmp_path / "state.pt")
            state = torch.load(tmp_path / "state.pt", weights_only=True)
        assert Counter(itertools.chain(*pieces)) == Counter(itertools.chain(*whole))
        assert pieces == whole


def test_blocks_are_shuffled_from_the_seed_and_their_place() -> None:
    numbers = IterableDataset.from_generator(count)
    orders = [[row["n"] for row in shuffle_blocks(numbers, 10, seed)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    for start in range(0, 40, 10):
        assert sorted(orders[0][start : start + 10]) == list(range(start, start + 10))
    first, second = orders[0][:10], [number - 10 for number in orders[0][10:20]]
    assert first != second and first != sorted(first)
    assert [row["n"] for row in shuffle_blocks(numbers, 1, 0)] == list(range(40))


def count() -> Iterator[dict[str, int]]:
    for number in range(40):
        yield {"n": number}


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_resumed_run_on_a_stream_is_the_run_that_never_stopped(
    accumulation: int, stage: Callable, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    write_tar(folder / "laion" / "8.tar", [sample(100, picture=b""), sample(101)])
    lora = json.dumps({"peft_type": "LORA", "r": 2, "lora_dropout": 0.2, "target_modules": ["q_proj"]})
    fields = {
        "dataset_name": folder / "laion", "shuffle_buffer": 6, "max_steps": 16, "save_strategy": "steps",
        "save_steps": 10, "gradient_accumulation_steps": accumulation, "peft_config": lora,
    }  # fmt: skip
    whole = stage1_pretrain.main(stage("whole", **fields))
    report = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("samples:"))
    with monkeypatch.context() as patch:
        stop_after(10, patch)
        with pytest.raises(RecipeError, match="stopped"):
            stage1_pretrain.main(stage(**fields))
    read = []
    make = webdataset.sample_of
    monkeypatch.setattr(webdataset, "sample_of", lambda *args: read.append(1) or make(*args))
    resumed = stage1_pretrain.main(stage(**fields, resume_from_checkpoint="latest"))
    for name in ("model.safetensors", "peft/adapter_model.safetensors"):
        one, two = load_file(tmp_path / "whole" / name), load_file(tmp_path / "run" / name)
        assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    for name in ("loss", "epoch", "num_tokens"):
        told = [[entry.get(name) for entry in t.state.log_history if "loss" in entry] for t in (whole, resumed)]
        assert told[0] == told[1], name
    assert report in capsys.readouterr().out  # with the samples of both parts
    # What came before is not read again, but for the block it stopped in.
    left = 2 * accumulation * 6
    assert len(read) <= left + 2 * (6 + PER_TAR)


def test_another_number_of_workers_is_refused(stage: Callable, folder: Path, tmp_path: Path, capsys) -> None:
    fields = {"dataset_name": folder / "laion", "save_strategy": "steps", "save_steps": 2}
    assert cli.main(["stage1", *stage(**fields)]) == 0
    more = {**fields, "max_steps": 3, "dataloader_num_workers": 2, "resume_from_checkpoint": "latest"}
    assert cli.main(["stage1", *stage(**more)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was saved with workers 0 and cannot go on in its stream with 2; resume as it was started" in said
    assert cli.main(["stage1", *stage(**more, ignore_data_skip=True)]) == 0
