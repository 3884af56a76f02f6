"""What loading keeps in memory: no second copy of the frozen weights, and no mapping of those that were converted."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.backbones import Checkpoint, StoredTensor, part_of


# transformers 5 converts in up to four threads, each of which holds a tensor or is about to drop one.
AT_A_TIME = 8


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, backbones) -> Path:
    """An adapter-only checkpoint; its backbones are stored in float32."""
    folder = tmp_path_factory.mktemp("adapter")
    MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts()).save_pretrained(folder)
    return folder


def load(adapter: Path, **options) -> dict[str, torch.Tensor]:
    """The loaded tensors that backbones provide."""
    tensors = MiniGPT4ForConditionalGeneration.from_pretrained(adapter, **options).state_dict()
    return {name: tensor for name, tensor in tensors.items() if part_of(name) is not None}


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Addresses of all tensors that were taken from files as they are."""
    addresses, tensor_of = set(), Checkpoint.tensor

    def note(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = tensor_of(self, key, dtype)
        if not isinstance(tensor, StoredTensor):
            addresses.add(tensor.data_ptr())
        return tensor

    monkeypatch.setattr(Checkpoint, "tensor", note)
    return addresses


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[StorageWeakRef, int]]:
    """Storages that were read for conversion, and how many were alive when each of them was read."""
    reads: list[tuple[StorageWeakRef, int]] = []
    read = StoredTensor.read

    def note(self) -> torch.Tensor:
        tensor = read(self)
        alive = 1 + sum(not storage.expired() for storage, _ in list(reads))
        reads.append((StorageWeakRef(tensor.untyped_storage()), alive))
        return tensor

    monkeypatch.setattr(StoredTensor, "read", note)
    return reads


@pytest.mark.parametrize("options", [{"dtype": torch.float32}, {"dtype": "auto"}, {"dtype": "float32"}])
def test_weights_of_the_right_dtype_stay_where_they_are_mapped(adapter, handed_over, converted, options) -> None:
    tensors = load(adapter, **options)
    copies = [name for name, tensor in tensors.items() if tensor.data_ptr() not in handed_over]
    assert not copies
    assert not converted


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.bfloat16},
        {"dtype": "bfloat16"},
        {"torch_dtype": torch.float16},
        {"dtype": torch.bfloat16, "device_map": "cpu"},
    ],
)
def test_converted_weights_leave_their_files_at_once(adapter, converted, options) -> None:
    tensors = load(adapter, **options)
    assert len(converted) == len(tensors) > 3 * AT_A_TIME
    assert max(alive for _, alive in converted) <= AT_A_TIME
    assert all(storage.expired() for storage, _ in converted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_conversion_gives_the_stored_values(adapter, dtype) -> None:
    stored = load(adapter, dtype=torch.float32)
    for name, tensor in load(adapter, dtype=dtype).items():
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, stored[name].to(dtype)), name


def test_a_stored_tensor_acts_as_the_tensor_it_stands_for(adapter) -> None:
    checkpoint = Checkpoint({"name_or_path": str(adapter)}, "adapter")
    name = "model.language_projection.weight"
    real, stored = checkpoint.tensor(name), checkpoint.tensor(name, torch.float16)
    assert isinstance(stored, StoredTensor)
    assert (stored.shape, stored.dtype, stored.device) == (real.shape, real.dtype, real.device)
    assert torch.equal(stored, real)
    assert torch.equal(stored[...], real)
    assert torch.equal(torch.cat([stored, stored]), torch.cat([real, real]))
    target = torch.zeros_like(real)
    target.copy_(stored)
    assert torch.equal(target, real)
