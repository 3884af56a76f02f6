"""Batches of rows of like length, so that few of their tokens are pads (`--train_sampling_strategy group_by_length`).

Samples are taken in blocks of a few batches, shuffled, sorted by length, cut into batches, and the batches shuffled.
Order and cut depend on the seed and the place of the block alone, so that a run can go on in the middle of one, and
processes that read streams of their own get batches from the same part of the lengths in the same step.

A step divides its loss by the answer tokens that so many rows have on average. Divided by its own, as steps of rows
in any order are, a token of a short answer would count several times as much as one of a long answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler


BATCHES = 16  # of a block
AT_ONCE = 1000  # rows of data of known length that are measured together
LENGTH, EXPECTED = "length", "expected"  # columns: tokens of a row; answer tokens that a row has on average
Measure = Any  # of a batch of pairs: tokens of each row and those with loss, or None (`Rows.measure`)


class Grouping(NamedTuple):
    """
    How batches are made.

    Args:
        batch_size: rows of a batch of one process.
        processes: that share the rows of data of known length; their batches of one step are of like length.
        seed: of the order.
    """

    batch_size: int
    processes: int
    seed: int


def order_block(lengths: Sequence[int] | np.ndarray, batch_size: int, random: np.random.Generator) -> list[int]:
    """
    The order in which a block is read.

    Args:
        lengths: of its rows.
        batch_size: rows that follow each other and are of like length; what is left over comes last, as it is drawn.
        random: draws the order of rows of one length, what is left over, and the order of batches.
    """
    order = random.permutation(len(lengths))
    whole = len(order) - len(order) % batch_size
    by_length = order[:whole][np.argsort(np.asarray(lengths)[order[:whole]], kind="stable")]
    batches = random.permutation(by_length.reshape(-1, batch_size))
    return [int(at) for at in (*batches.flat, *order[whole:])]


def share_of_pads(lengths: Sequence[int], batch_size: int) -> float:
    """Share of pads, 0 to 1, in batches of rows in this order."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    places = sum(max(batch) * len(batch) for batch in batches)
    return 1 - sum(lengths) / places if places else 0.0


def compare_pads(lengths: Sequence[int], batch_size: int, seed: int = 0) -> tuple[float, float]:
    """Share of pads, 0 to 1, in batches of one process: of rows in any order, and of rows of like length."""
    shuffled = [lengths[at] for at in np.random.default_rng(seed).permutation(len(lengths))]
    grouped = [lengths[at] for at in LikeLengthSampler(lengths, Grouping(batch_size, 1, seed))]
    return share_of_pads(shuffled, batch_size), share_of_pads(grouped, batch_size)


# ---- data of known length -------------------------------------------------------------------------------------------


def add_lengths(pairs: Dataset, measure: Measure) -> Dataset:
    """Pairs with the columns `length` and `expected`; pictures are not read."""
    texts = pairs.remove_columns("image") if "image" in pairs.column_names else pairs
    measured = [one for start in range(0, len(texts), AT_ONCE) for one in measure(texts[start : start + AT_ONCE])]
    lengths, expected = _lengths_and_mean(measured)
    return pairs.add_column(LENGTH, lengths).add_column(EXPECTED, [expected] * len(lengths))


class LikeLengthSampler(Sampler[int]):
    """
    Every row once an epoch, in batches of like length.

    Args:
        lengths: of all rows.
        grouping: how batches are made.

    Attributes:
        epoch: that comes next; each has an order of its own.
    """

    def __init__(self, lengths: Sequence[int], grouping: Grouping) -> None:
        self.lengths, self.grouping, self.epoch = np.asarray(lengths), grouping, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.grouping.seed, self.epoch))
        order = random.permutation(len(self.lengths))
        step = self.grouping.batch_size * self.grouping.processes
        for start in range(0, len(order), BATCHES * step):
            block = order[start : start + BATCHES * step]
            yield from (int(block[at]) for at in order_block(self.lengths[block], step, random))


# ---- streams --------------------------------------------------------------------------------------------------------


def group_stream(stream: IterableDataset, measure: Measure, grouping: Grouping) -> IterableDataset:
    """
    A stream in batches of like length, with the column `expected`.

    Args:
        stream: samples that are cheap to hold, with pictures as files; each worker holds a block of them.
        measure: of a batch of samples.
        grouping: how batches are made.
    """
    options = {"measure": measure, "grouping": grouping}
    size = BATCHES * grouping.batch_size
    return stream.map(_order, batched=True, batch_size=size, with_indices=True, fn_kwargs=options)


def _order(
    block: Mapping[str, list[Any]], indices: list[int], measure: Measure, grouping: Grouping
) -> dict[str, list[Any]]:
    lengths, expected = _lengths_and_mean(measure(block))
    random = np.random.default_rng((grouping.seed, indices[0]))
    order = order_block(lengths, grouping.batch_size, random)
    return {
        **{name: [values[at] for at in order] for name, values in block.items()},
        EXPECTED: [expected] * len(order),
    }


def _lengths_and_mean(measured: Sequence[tuple[int, int] | None]) -> tuple[list[int], float]:
    """
    Length of every row, and the mean of tokens with loss.

    Rows that cannot be used have the length of the one before, so that they do not fill batches of their own.
    """
    known = [one for one in measured if one is not None]
    lengths, last = [], known[0][0] if known else 0
    for one in measured:
        last = last if one is None else one[0]
        lengths.append(last)
    return lengths, sum(learned for _, learned in known) / max(len(known), 1)
