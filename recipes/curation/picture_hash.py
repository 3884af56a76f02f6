"""Which pictures look alike: a perceptual hash, and a search for hashes that differ in few bits."""

from collections import defaultdict

import numpy as np
import PIL.Image


SIDE = 8  # cells of the grid that is compared
LEAST = 3  # grey levels by which neighbours differ where a bit says so; below, it is noise
LEVELS = np.arange(1, 17) * 15  # of the mean red, green and blue: a bit for each that is reached
BITS = 3 * (SIDE * SIDE + len(LEVELS))
BANDS = 20  # parts of a hash: two that differ in fewer bits than there are parts have one of them in common
MOST_BITS = BANDS - 1  # that may differ so that the search finds all


def picture_hash(picture: PIL.Image.Image) -> int:
    """
    What a picture looks like, in 240 bits: whether each cell of an 8 × 8 grid is brighter than the one to its left, in
    red, green and blue apart, and how bright it is on the whole. Scaling, compression and slight changes of colour
    hardly change it.
    """
    small = picture.convert("RGB").resize((SIDE + 1, SIDE), PIL.Image.Resampling.BOX)
    cells = np.asarray(small, dtype=np.int16)
    rises = (cells[:, 1:] - cells[:, :-1] >= LEAST).flatten()
    bright = (cells.mean(axis=(0, 1))[:, None] >= LEVELS).flatten()
    return int("".join("1" if bit else "0" for bit in (*rises, *bright)), 2)


class SeenHashes:
    """
    Finds, among hashes seen before, one that differs from a new one in at most `distance` bits.

    Args:
        distance: at most `MOST_BITS`; below 0, nothing looks like anything.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        self._seen: dict[int, str] = {}
        self._parts: dict[tuple[int, int], list[int]] = defaultdict(list)

    def find(self, wanted: int) -> str | None:
        """The name of one that looks alike; None if there is none."""
        for place in enumerate(_parts(wanted)):
            for known in self._parts.get(place, ()):
                if (known ^ wanted).bit_count() <= self.distance:
                    return self._seen[known]
        return None

    def add(self, seen: int, name: str) -> None:
        """Remember one under a name."""
        if seen not in self._seen:
            self._seen[seen] = name
            for place in enumerate(_parts(seen)):
                self._parts[place].append(seen)


def _parts(value: int) -> list[int]:
    width = -(-BITS // BANDS)
    return [(value >> (width * number)) & ((1 << width) - 1) for number in range(BANDS)]
