"""Digests of weights: numbers that tell their bits apart, for the price of reading them once, on any device."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch


# Odd numbers without structure, as in-between steps of SplitMix64 have them.
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


# Lanes of eight bytes that an accelerator works on at once, 128 MB.
_AT_ONCE = 1 << 24


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Spread every bit of int64 numbers over all of them, one to one; wraps around."""
    values = (values ^ (values >> 30)) * _ODD[1]
    values = (values ^ (values >> 27)) * _ODD[2]
    return values ^ (values >> 31)


def _weights(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd int64 numbers that belong to places, from `first` on, each unlike the others."""
    return _mix(torch.arange(first + 1, first + 1 + count, device=device) * _ODD[0]) | 1


def digest(tensor: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """
    A number that tells the bits of a tensor and their places, in integers that wrap around, so it is the same on every
    device. The digests of parts of its rows add up to its own.

    One changed element always shows. Several hide each other by a chance of 2^-32 or less, for every bit counts in the
    lower half of a lane of eight bytes at least once, where sums keep it.

    Args:
        tensor: of any shape and dtype. Its rows are along the first axis.
        first_row: place of its first row in the whole tensor.

    Returns:
        `torch.LongTensor` of shape `()` on the tensor's device.
    """
    tensor = tensor.detach()
    rows = tensor.shape[0] if tensor.ndim else 1
    if tensor.device.type not in ("cpu", "cuda"):  # others lack operations on integers
        tensor = tensor.cpu()
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    lanes = tensor.contiguous().view(rows, -1)
    size = lanes.shape[1] * lanes.element_size()
    lane = next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if size % dtype.itemsize == 0)
    lanes = lanes.view(lane)
    count = lanes.shape[1]
    weights = _weights(0, 2 * count, tensor.device)
    if lane != torch.int64:
        sums = _weigh(lanes.to(torch.int64), weights[:count])
    else:
        sums = _weigh(lanes, weights[:count])
        if count > 1:
            sums += _mix(_weigh(_shifted(lanes), weights[count : 2 * count - 1]))
    return (_mix(sums) * _weights(first_row, rows, tensor.device)).sum()


def _shifted(lanes: torch.Tensor) -> torch.Tensor:
    """The lanes that begin in the middle of each one and end in the middle of the next, without a copy on the CPU."""
    rows, count = lanes.shape
    if lanes.device.type != "cpu":
        return lanes.view(torch.int32)[:, 1:-1].contiguous().view(torch.int64)
    memory = lanes.numpy().reshape(-1).view("uint8")
    between = torch.frombuffer(memory, dtype=torch.int64, count=rows * count - 1, offset=4)
    return between.as_strided((rows, count - 1), (count, 1))


def _weigh(lanes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each row."""
    if lanes.device.type == "cpu":
        return torch.mv(lanes, weights)
    at_once = max(1, _AT_ONCE // lanes.shape[1])
    return torch.cat([(part * weights).sum(1) for part in lanes.split(at_once)])


def digests(tensors: Mapping[str, torch.Tensor], first_rows: Mapping[str, int] | None = None) -> dict[str, int]:
    """The digest of each tensor; those of one tensor under several names are computed once."""
    places = {name: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for name, t in tensors.items()}
    once = {place: name for name, place in places.items()}

    def compute(name: str) -> torch.Tensor:
        return digest(tensors[name], (first_rows or {}).get(name, 0))

    names = sorted(once.values(), key=lambda name: -tensors[name].nbytes)
    with torch.no_grad():
        if any(tensors[name].device.type != "cpu" for name in names) or torch.get_num_threads() == 1:
            found = [compute(name) for name in names]
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                found = list(pool.map(compute, names))
        values: dict[str, int] = {}
        for device in {one.device for one in found}:  # one wait for each device
            there = [(name, one) for name, one in zip(names, found, strict=True) if one.device == device]
            numbers = torch.stack([one for _, one in there]).tolist()
            values.update(zip((name for name, _ in there), numbers, strict=True))
    return {name: values[once[place]] for name, place in places.items()}


__all__ = ["digest", "digests"]
