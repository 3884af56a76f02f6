"""Batches of rows of like length: which rows they have, how few pads, and streams that stop and go on."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from damaged import sample, write_tar
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import COUNTS, StageCollator
from recipes_minigpt4.data.formatting import rows_maker, stage1_rows, stage2_rows
from recipes_minigpt4.data.grouping import Grouping, LikeLengthSampler, compare_pads, order_block, share_of_pads
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.data.streaming import loader_state


def lengths_of_captions(count: int, seed: int = 0) -> list[int]:
    """Rows of stage 1 with captions as those of CC3M and SBU: 10 words on average, and up to 40 and more."""
    words = np.exp(np.random.default_rng(seed).normal(np.log(9.2), 0.48, count)).clip(1, 50)
    return [33 + min(round(1.35 * number) + 1, 32) for number in words]


@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_few_pads_are_left_on_captions_as_they_are(batch_size: int) -> None:
    any_order, grouped = compare_pads(lengths_of_captions(20_000), batch_size)
    assert any_order > 0.12 and grouped < 0.03


def test_a_block_is_read_in_batches_of_like_length_in_any_order() -> None:
    lengths = [number // 4 for number in range(40)]  # four rows of each length
    orders = [order_block(lengths, 4, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == list(range(40)) and share_of_pads([lengths[at] for at in order], 4) == 0
        firsts = [lengths[at] for at in order[::4]]
        assert firsts != sorted(firsts)


def test_what_fills_no_batch_is_drawn_and_not_the_longest() -> None:
    lengths = list(range(43))
    left_over = [order_block(lengths, 4, np.random.default_rng(seed))[40:] for seed in range(50)]
    assert {len(rows) for rows in left_over} == {3}
    assert 15 < np.mean(left_over) < 27
    assert sorted(order_block(lengths[:3], 4, np.random.default_rng(0))) == [0, 1, 2]


def test_an_epoch_has_every_row_once_and_an_order_of_its_own() -> None:
    lengths = lengths_of_captions(1003)
    sampler = LikeLengthSampler(lengths, Grouping(batch_size=4, processes=2, seed=3))
    epochs = []
    for sampler.epoch in (0, 1, 0):
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) and sorted(epochs[-1]) == list(range(1003))
    assert epochs[0] == epochs[2] != epochs[1]
    other = LikeLengthSampler(lengths, Grouping(4, 2, seed=4))
    assert list(other) != epochs[0]
    # Batches of one step, one for each process, have like lengths too.
    assert share_of_pads([lengths[at] for at in epochs[0]], 8) < 0.05


# ---- lengths --------------------------------------------------------------------------------------------------------

ANSWERS = ["a red square", "A (long) text: " * 20, "x", "<image> is no picture", "⁂" * 40, ""]


@pytest.mark.parametrize("stage", [1, 2])
def test_lengths_are_those_of_the_rows_that_are_trained(stage: int, compose: Callable, pictures, tmp_path) -> None:
    processor = compose()[1]
    rows = []
    for number, answer in enumerate(ANSWERS):
        pictures[number].save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": answer})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    grouped = (stage1_rows if stage == 1 else stage2_rows)(
        load_pairs(args, stage), processor, args, grouping=Grouping(2, 1, 0)
    )
    collate = StageCollator(processor, completion_only_loss=True)
    batches = [collate([row]) for row in grouped]
    usable = [batch for batch in batches if not batch[COUNTS]["skipped"]]
    assert len(usable) == 5
    lengths = grouped.with_format(None)["length"]
    assert lengths[:5] == [batch["input_ids"].shape[1] for batch in usable]
    assert lengths[5] == lengths[4]  # it has none, and fills no batches with others that have none
    mean = sum(int((batch["labels"] != -100).sum()) for batch in usable) / 5
    assert [batch[COUNTS]["expected"] for batch in batches] == pytest.approx([mean] * 5 + [0])


def test_lengths_of_chats_are_known(compose: Callable, pictures, tmp_path: Path) -> None:
    for number in range(2):
        pictures[number].save(tmp_path / f"{number}.png")
    turns = [("user", "<image> This?"), ("assistant", "A red square."), ("user", "And <image>?"), ("assistant", "X.")]
    chat = {"images": ["0.png", "1.png"], "messages": [{"role": role, "content": text} for role, text in turns]}
    broken = {"images": [], "messages": chat["messages"]}
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, [chat, broken])))
    processor, args = compose()[1], DataArguments(dataset_name=str(tmp_path / "chats.jsonl"))
    pairs = load_pairs(args, stage=2)
    measured = rows_maker(2, processor, args).measure(pairs[:])
    batch = StageCollator(processor, completion_only_loss=True)([stage2_rows(pairs, processor, args)[0]])
    assert measured == [(batch["input_ids"].shape[1], int((batch["labels"] != -100).sum())), None]


# ---- streams --------------------------------------------------------------------------------------------------------


def caption(number: int) -> str:
    words = 1 + number * 7 % 24
    return f"number {number}" + " red" * words


@pytest.fixture
def uneven_tars(tmp_path: Path) -> Path:
    """Four tars with 24 samples each, whose captions have from two words to 25."""
    for tar in range(4):
        samples = [sample(number, caption(number)) for number in range(24 * tar, 24 * tar + 24)]
        write_tar(tmp_path / "uneven" / f"{tar}.tar", samples)
    return tmp_path / "uneven"


def stream_of(folder: Path, processor, grouping: Grouping | None):
    args = DataArguments(dataset_name=str(folder), shuffle_buffer=12)
    return stage1_rows(load_pairs(args, stage=1, seed=3), processor, args, grouping=grouping)


def test_a_stream_has_the_same_samples_in_batches_of_like_length(uneven_tars: Path, compose: Callable) -> None:
    processor = compose()[1]
    collate = StageCollator(processor, completion_only_loss=True)
    pads, seen = [], []
    for grouping in (None, Grouping(3, 1, 0), Grouping(3, 1, 1)):
        rows = list(itertools.islice(stream_of(uneven_tars, processor, grouping), 2 * 96))
        seen.append([row["completion"] for row in rows])
        counts = [collate(rows[start : start + 3])[COUNTS] for start in range(0, len(rows), 3)]
        pads.append(1 - sum(one["tokens"] for one in counts) / sum(one["places"] for one in counts))
        assert all((one["expected"] is None) == (grouping is None) for one in counts)
    assert pads[0] > 0.12 and max(pads[1:]) < 0.05
    assert Counter(seen[0]) == Counter(seen[1]) == Counter(seen[2]) and set(Counter(seen[0]).values()) == {2}
    assert seen[1] != seen[2]


@pytest.mark.filterwarnings("ignore:.*set_vital")
@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_again_and_again_a_stream_gives_the_same_batches(
    workers: int, uneven_tars: Path, compose: Callable, tmp_path: Path
) -> None:
    rows = stream_of(uneven_tars, compose()[1], Grouping(3, 1, 0))

    def loader() -> DataLoader:
        return StatefulDataLoader(rows, batch_size=3, collate_fn=completions, num_workers=workers)

    whole, draw, batches = list(itertools.islice(loader(), 40)), random.Random(workers), 40
    state, pieces = None, []
    while len(pieces) < batches:
        one = loader()
        if state is not None:
            one.load_state_dict(state)
        for batch in one:
            pieces.append(batch)
            if len(pieces) == batches or draw.random() < 0.15:
                break
        torch.save(loader_state(one, state), tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert pieces == whole


def completions(rows: list[dict]) -> list[str]:
    return [row["completion"] for row in rows]
