"""Digests of weights: numbers that tell their bits apart, for the price of reading them once, on any device."""

from collections.abc import Mapping
from functools import lru_cache

import torch


# Odd numbers without structure, those of SplitMix64.
_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)

# Lanes of eight bytes that an accelerator works on at once, 128 MB.
_AT_ONCE = 1 << 24


def digest(tensor: torch.Tensor, first_row: int = 0) -> torch.Tensor:
    """
    A number that tells the bits of a tensor and their places.

    It is made of integers that wrap around, so it is the same on every device and for any number of threads, and the
    digests of parts of a tensor's rows add up to its own. Rows are weighed as lanes of eight bytes, which begin where
    sign and exponent of no number lie at a lane's upper end, for little is left of that where a product wraps around.
    Numbers of two bytes are too short for it and weighed twice. One changed element shows; two of one row hide each
    other by a chance of 2^-16 at most, and more of them by less.

    Args:
        tensor: of any shape and dtype. Its rows are along the first axis.
        first_row: place of its first row in the whole tensor.

    Returns:
        `torch.LongTensor` of shape `()`, on the tensor's device if that computes with integers.
    """
    tensor = tensor.detach()
    if tensor.device.type not in ("cpu", "cuda"):
        tensor = tensor.cpu()
    if tensor.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=tensor.device)
    rows = tensor.shape[0] if tensor.ndim else 1
    lanes = tensor.contiguous().view(rows, -1)
    size = lanes.shape[1] * lanes.element_size()
    lane = next(dtype for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8) if size % dtype.itemsize == 0)
    lanes = lanes.view(lane)
    count, device = lanes.shape[1], lanes.device
    if lane != torch.int64:
        sums = _weigh(lanes.to(torch.int64), _weights(0, count, device))
    else:
        sums = lanes[:, 0] * _ODD[0]  # whose first bytes no lane has that begins behind them
        sums = torch.add(sums, lanes[:, -1], alpha=_ODD[1])
        for offset in ((2,) if tensor.element_size() >= 4 else (0, 4)) if count > 1 else ():
            sums = _fold(sums) + _weigh(_between(lanes, offset), _weights(offset, count - 1, device))
    sums, places = _fold(sums), _weights(first_row, rows, device)
    return torch.dot(sums, places) if device.type == "cpu" else (sums * places).sum()


def _fold(values: torch.Tensor) -> torch.Tensor:
    """Bring the upper half of int64 numbers into the lower one, where products keep it; one to one."""
    return (values >> 32).bitwise_xor_(values)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """Spread every bit of int64 numbers over all of them, one to one."""
    values = (values ^ (values >> 30)) * _ODD[1]
    values = (values ^ (values >> 27)) * _ODD[2]
    return values ^ (values >> 31)


@lru_cache(maxsize=64)
def _weights(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Odd int64 numbers that belong to places, from `first` on, each unlike the others; kept for the next save."""
    return _mix(torch.arange(first + 1, first + 1 + count, device=device) * _ODD[0]) | 1


def _between(lanes: torch.Tensor, offset: int) -> torch.Tensor:
    """Lanes that begin so many bytes behind the beginning of others, without a copy on the CPU; one less in a row."""
    rows, count = lanes.shape
    if lanes.device.type != "cpu":
        return lanes.view(torch.int16)[:, offset // 2 :][:, : 4 * (count - 1)].contiguous().view(torch.int64)
    memory = lanes.numpy().reshape(-1).view("uint8")
    values = torch.frombuffer(memory, dtype=torch.int64, count=rows * count - 1, offset=offset)
    return values.as_strided((rows, count - 1), (count, 1))


def _weigh(lanes: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The weighted sum of each row."""
    if lanes.device.type == "cpu":
        return torch.mv(lanes, weights)
    at_once = max(1, _AT_ONCE // lanes.shape[1])  # accelerators multiply no matrices of integers
    return torch.cat([(part * weights).sum(1) for part in lanes.split(at_once)])


def digests(tensors: Mapping[str, torch.Tensor], first_rows: Mapping[str, int] | None = None) -> dict[str, int]:
    """The digest of each tensor; those of one tensor under several names are computed once."""
    places = {name: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for name, t in tensors.items()}
    once = {place: name for name, place in places.items()}
    names = list(once.values())
    with torch.inference_mode():
        found = [digest(tensors[name], (first_rows or {}).get(name, 0)) for name in names]
        values: dict[str, int] = {}
        for device in {one.device for one in found}:  # one wait for each device
            there = [(name, one) for name, one in zip(names, found, strict=True) if one.device == device]
            numbers = torch.stack([one for _, one in there]).tolist()
            values.update(zip((name for name, _ in there), numbers, strict=True))
    return {name: values[once[place]] for name, place in places.items()}


__all__ = ["digest", "digests"]
