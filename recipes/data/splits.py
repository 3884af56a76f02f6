"""Splits and their slices, such as `train[:95%]`: taken from files, which know none, and compared with each other."""

import re
from typing import Any

from datasets import Dataset, ReadInstruction, concatenate_datasets

from recipes_minigpt4.utils.errors import RecipeError, one_line


MANY = 10**6  # rows of a dataset of which nobody knows the number; shares of it are near enough


def take_slice(rows: Dataset, split: str) -> Dataset:
    """
    The rows of a slice, such as `train[:95%]`, from a file, which has one split only, whatever that is called.

    Raises:
        RecipeError: if it is none, or empty.
    """
    if "[" not in split:
        return rows
    parts = [rows.select(range(start, max(start, end))) for _, start, end in ranges_of(split, len(rows))]
    taken = parts[0] if len(parts) == 1 else concatenate_datasets(parts)
    if not len(taken):
        raise RecipeError(f"--dataset_split {split} takes none of {len(rows):,} rows; take more.")
    return taken


def ranges_of(split: str, count: int) -> list[tuple[str, int, int]]:
    """
    The split, first row and row behind the last of every part of a text such as `train[:95%]+test`.

    Args:
        split: the text.
        count: rows of each split.

    Raises:
        RecipeError: if it is no split.
    """
    names = {part.partition("[")[0].strip() for part in split.split("+")}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(dict.fromkeys(names, count))
    except (ValueError, AssertionError) as error:
        raise RecipeError(
            f"--dataset_split is {split!r}, and no split ({one_line(error)}); write one such as train or train[:95%]."
        ) from error
    return [(part.splitname, part.from_ or 0, count if part.to is None else part.to) for part in parts]


def overlap(first: str, second: str, rows: Any, any_name: bool = False) -> bool:
    """
    Whether two texts mean some of the same rows.

    Args:
        first, second: splits of the same dataset.
        rows: what `datasets` has loaded of it, which may tell how many rows there are.
        any_name: whether the names of splits mean nothing, as those of a file.
    """
    if any_name:
        first, second = (re.sub(r"(^|\+)[^\[+]*", r"\1train", text) for text in (first, second))
    known = getattr(getattr(rows, "info", None), "splits", None) or {}
    name = first.partition("[")[0].strip()
    count = (known[name].num_examples if name in known else 0) or MANY
    return any(
        one[0] == other[0] and max(one[1], other[1]) < min(one[2], other[2])
        for one in ranges_of(first, count)
        for other in ranges_of(second, count)
    )
