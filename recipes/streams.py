"""Streams that go on where they were: a shuffle that needs no memory of its own, and the state of the data loader.

`datasets` knows how far every source has been read, and torchdata's `StatefulDataLoader` collects that from the
workers with every batch. What neither keeps is the content of a shuffle buffer, so samples are shuffled in blocks
instead: a block can be read again from where it starts.
"""

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


def loader_state(loader: Any) -> dict[str, Any]:
    """
    Where the samples are that come after the last batch that `loader` gave out.

    Args:
        loader: what accelerate makes of a data loader with `use_stateful_dataloader`.
    """
    state: dict[str, Any] = loader.state_dict()
    snapshot = state.get("_snapshot") or {}
    # A worker that has given nothing yet reports a state from before it was told its share of the shards, which mixes
    # of several sources must not be started with. Without one it starts as it did.
    for name, worker in snapshot.get("_worker_snapshots", {}).items():
        if int(name.rpartition("_")[2]) >= snapshot["_snapshot_step"]:
            worker["dataset_state"] = None
    return state
