"""Pictures from everything that the recipes read; captions are not needed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Image, load_dataset

from recipes_minigpt4.data.bad_samples import BadSampleError
from recipes_minigpt4.data.columns import PICTURES
from recipes_minigpt4.data.files import root_reason
from recipes_minigpt4.data.webdataset import expand, find, groups_of, tars_named
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.evaluation.tables import Places, open_rows
from recipes_minigpt4.tiny.scenes import draw_scene, sample_scenes
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError


SHUFFLED = 1000  # pictures of a stream that are mixed at a time
SCENES = 200  # of the embedded world, unless another number is asked for


@dataclass(frozen=True)
class Source:
    """
    Where pictures come from.

    Args:
        name: a folder, a table, tar files, a dataset of the Hub, or `tiny`.
        images: folder of the pictures that a table names; None for that of the table.
        split, revision: of a dataset.
        streaming: read a dataset of the Hub without fetching it whole.
        seed: of the order.
    """

    name: str
    images: Path | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    seed: int = 0

    def pictures(self) -> Iterator[Picture]:
        """
        The pictures in a seeded order, none of them opened. Streams are mixed in blocks.

        Raises:
            RecipeError: if there are none.
        """
        if self.name == TINY:
            return self._scenes()
        if (pattern := tars_named(self.name)) is not None:
            return self._shuffled(self._of_tars(pattern))
        if self.streaming:
            return self._shuffled(self._of_stream())
        rows = open_rows(Places([self.name], self.images, self.split, None, self.revision))
        pictures = [row["image"] for row in rows]
        random.Random(self.seed).shuffle(pictures)
        return iter(pictures)

    def _shuffled(self, pictures: Iterator[Picture]) -> Iterator[Picture]:
        """A stream of which each is drawn out of a block of the next."""
        rng, block = random.Random(self.seed), []
        for picture in pictures:
            block.append(picture)
            if len(block) == SHUFFLED:
                yield block.pop(rng.randrange(len(block)))
        rng.shuffle(block)
        yield from block

    def _of_tars(self, pattern: str) -> Iterator[Picture]:
        tars = expand(pattern)
        random.Random(self.seed).shuffle(tars)
        for tar in tars:
            try:
                for members in groups_of(tar):
                    content = find(members, "image")
                    if isinstance(content, bytes):
                        yield Picture(f"{Path(tar).name}/{members['__key__'].decode('utf-8', 'replace')}", content)
            except BadSampleError as error:
                yield Picture(f"{Path(tar).name}, behind what could be read ({error.detail})", b"")

    def _of_stream(self) -> Iterator[Picture]:
        try:
            data: Any = load_dataset(self.name, split=self.split, revision=self.revision, streaming=True)
            column = next(name for names in PICTURES for name in names if name in (data.column_names or ()))
        except StopIteration:
            raise RecipeError(f"{self.name} has no column of pictures; it has {data.column_names}.") from None
        except Exception as error:  # the many ways in which `datasets` says that something is not there
            raise RecipeError(
                f"{self.name} with the split {self.split} cannot be opened ({root_reason(error)})."
            ) from error
        for place, row in enumerate(data.cast_column(column, Image(decode=False))):
            stored = row[column]
            name = str(stored.get("path") or place) if isinstance(stored, dict) else str(place)
            yield Picture(name, stored["bytes"] if isinstance(stored, dict) else stored)

    def _scenes(self) -> Iterator[Picture]:
        rng = random.Random(f"curation, seed {self.seed}")
        scenes = sample_scenes(rng, SCENES, lambda scene: not scene.is_reserved and not scene.has_held_out_pair)
        return (Picture(f"scene {place}", draw_scene(scene)) for place, scene in enumerate(scenes))
