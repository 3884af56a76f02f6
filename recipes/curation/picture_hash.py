"""Which pictures look alike: a perceptual hash, and a search for hashes that differ in few bits."""

from collections import defaultdict

import numpy as np
import PIL.Image


SIDE = 8  # cells of the grid that is compared
LEAST = 3  # grey levels by which neighbours differ where a bit says so; below, it is noise
BANDS = 16  # parts of a hash: two that differ in fewer bits than there are parts have one of them in common


def picture_hash(picture: PIL.Image.Image) -> int:
    """
    What a picture looks like, in 192 bits: whether each cell of an 8 × 8 grid is brighter than the one to its left, in
    red, green and blue apart. Scaling, compression and slight changes of colour hardly change it.
    """
    small = picture.convert("RGB").resize((SIDE + 1, SIDE), PIL.Image.Resampling.BOX)
    cells = np.asarray(small, dtype=np.int16)
    bits = (cells[:, 1:] - cells[:, :-1] >= LEAST).flatten()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class SeenHashes:
    """
    Finds, among hashes seen before, one that differs from a new one in at most `distance` bits.

    Args:
        distance: below 16, the number of parts by which candidates are found.
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
    width = 3 * SIDE * SIDE // BANDS
    return [(value >> (width * number)) & ((1 << width) - 1) for number in range(BANDS)]
