"""Streams that go on where they were: a shuffle that needs no memory of its own, and the state of the data loader.

`datasets` knows how far every source has been read, and torchdata's `StatefulDataLoader` collects that from the
workers with every batch. What neither keeps is the content of a shuffle buffer, so samples are shuffled in blocks
instead: a block can be read again from where it starts.
"""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
from datasets import IterableDataset
from packaging.version import Version


# Before, `shuffle` forgot a sample of each worker when it was resumed, with a buffer of one too.
SHUFFLE_FORGETS = Version(datasets.__version__) < Version("5.2")


def shuffle_shards(stream: IterableDataset, seed: int) -> IterableDataset:
    """Shuffle the shards of a stream and nothing else; old releases of `datasets` leave them in their order."""
    return stream if SHUFFLE_FORGETS else stream.shuffle(seed=seed, buffer_size=1)


def shuffle_blocks(stream: IterableDataset, size: int, seed: int) -> IterableDataset:
    """
    Shuffle a stream block by block, with an order that depends on `seed` and on the place of the block alone.

    Args:
        stream: samples that are cheap to hold, with pictures as files.
        size: samples of a block; each worker holds one.
        seed: of the orders.
    """
    if size < 2:
        return stream
    return stream.map(_permute, batched=True, batch_size=size, with_indices=True, fn_kwargs={"seed": seed})


def _permute(block: dict[str, list[Any]], indices: list[int], seed: int) -> dict[str, list[Any]]:
    order = np.random.default_rng((seed, indices[0])).permutation(len(indices))
    return {name: [values[at] for at in order] for name, values in block.items()}


def loader_state(loader: Any, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    Where the samples are that come after the last batch that `loader` gave out.

    Args:
        loader: what accelerate makes of a data loader with `use_stateful_dataloader`.
        start: the state that it was started with, if it was.
    """
    state: dict[str, Any] = loader.state_dict()
    if not (workers := state.get("_snapshot", {}).get("_worker_snapshots")):
        return state
    # A worker that has given nothing yet reports the state of a dataset that was not told its share or its start, so
    # what it was started with stands in. They give batches in turn.
    fresh = {"_snapshot_step": 0, "_last_yielded_worker_id": -1, "_worker_snapshots": {}}
    before: dict[str, Any] = start["_snapshot"] if start else fresh
    batches = state["_snapshot"]["_snapshot_step"] - before["_snapshot_step"]
    for turn in range(batches, len(workers)):
        name = f"worker_{(before['_last_yielded_worker_id'] + 1 + turn) % len(workers)}"
        known = before["_worker_snapshots"].get(name)
        workers[name] = {**workers[name], "dataset_state": None} if known is None else known
    return state
