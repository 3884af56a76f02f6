"""Pictures from everything that the recipes read; captions are not needed."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset, Image, List

from processing_minigpt4.image_opening_minigpt4 import without_content
from recipes_minigpt4.curation.store import fingerprint
from recipes_minigpt4.data.bad_samples import BadSampleError
from recipes_minigpt4.data.columns import IMAGE_ENDINGS, PICTURES
from recipes_minigpt4.data.files import open_dataset, refuse_address, root_reason, writable_cache
from recipes_minigpt4.data.webdataset import Outage, expand, find, groups_of, tars_named
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.evaluation.tables import BESIDE, Places, find_rows, picture_in
from recipes_minigpt4.tiny.scenes import Scene, draw_scene, sample_scenes
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.redaction import redact


SHUFFLED = 256  # pictures of a stream that are mixed at a time; they are in memory
SCENES = 200  # of the embedded world, unless another number is asked for
COLUMNS = {name for names in PICTURES for name in names} | {name.lower() for name in BESIDE}

Key = TypeVar("Key", int, str)
Keyed = tuple[str, Picture]  # a picture and what it is known by in its source, where names may repeat


class Pictures(NamedTuple):
    """
    What a source has.

    Args:
        drawn: its pictures with their keys, in the order in which they are drawn; none of them is open.
        total: how many there are; None where nobody knows.
    """

    drawn: Iterator[Keyed]
    total: int | None = None


@dataclass(frozen=True)
class Source:
    """
    Where pictures come from.

    Args:
        name: a folder, a table, tar files, a dataset of the Hub, or `tiny`.
        images: folder of the pictures that a table names; None for that of the table.
        split, config, revision: of a dataset.
        streaming: read a dataset of the Hub without fetching it whole.
        seed: of the order. The first N of it are the sample of N.
        scenes: how many the embedded world has.
    """

    name: str
    images: Path | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    streaming: bool = False
    seed: int = 0
    scenes: int = SCENES

    @property
    def made(self) -> str:
        """What is drawn from where, as one word."""
        return fingerprint(**{**asdict(self), "scenes": None})

    @property
    def is_stream(self) -> bool:
        """Whether its pictures have to be fetched anew to know which comes next."""
        return tars_named(self.name) is not None or (self.streaming and not self._path.exists())

    @property
    def _path(self) -> Path:
        return Path(self.name).expanduser().absolute()

    def open(self) -> Pictures:
        """
        Its pictures in a seeded order; streams are mixed in blocks.

        Raises:
            RecipeError: if there are none, or not that split.
        """
        if self.name == TINY:
            self._refuse_split()
            return self._scenes()
        if (pattern := tars_named(self.name)) is not None:
            self._refuse_split()
            return Pictures(self._shuffled(self._of_tars(expand(pattern))))
        if self._path.is_file():
            self._refuse_split()
        if self._path.is_dir() and (paths := pictures_below(self._path, self.split)):
            if not (self._path / self.split).is_dir():
                self._refuse_split()
            files = {path.relative_to(self._path).as_posix(): path for path in paths}
            drawn = ((key, Picture(plain_name(key, self._path), files[key])) for key in self._order(list(files)))
            return Pictures(drawn, len(files))
        if self.streaming:
            return Pictures(self._shuffled(self._of_stream()))
        places = Places([self.name], self.images, self.split, self.config, self.revision, option="--dataset_name")
        return self._of_rows(*find_rows(places))

    def _refuse_split(self) -> None:
        if self.split != "train":
            raise RecipeError(
                f"{self.name} has no split {self.split}; leave --dataset_split out, and take a part of the pictures "
                "with --num_samples."
            )

    # ---- orders ----

    def _order(self, keys: Sequence[Key]) -> list[Key]:
        """Keys in an order in which others that come or go change nothing."""

        def place(key: Key) -> bytes:
            return hashlib.sha256(f"{self.seed} {key}".encode("utf-8", "surrogateescape")).digest()

        return sorted(keys, key=place)

    def _shuffled(self, pictures: Iterable[Keyed]) -> Iterator[Keyed]:
        """A stream of which each is drawn out of a block of the next."""
        rng, block = random.Random(self.seed), []
        for picture in pictures:
            block.append(picture)
            if len(block) == SHUFFLED:
                yield block.pop(rng.randrange(len(block)))
        rng.shuffle(block)
        yield from block

    # ---- kinds ----

    def _of_rows(self, rows: Any, folder: Path) -> Pictures:
        """Those of a table or of a dataset that is on this machine."""
        found = rows.column_names if isinstance(rows, Dataset) else list(rows[0])
        kept = [column for column in found if column.lower() in COLUMNS]
        if not kept:
            raise RecipeError(f"{self.name} has no column of pictures; it has {', '.join(found)}, and needs `image`.")
        rows = _undecoded(rows.select_columns(kept)) if isinstance(rows, Dataset) else rows
        places = self._order(range(len(rows)))
        drawn = (keyed for place in places for keyed in pictures_of(rows[place], folder.absolute(), place))
        return Pictures(drawn, len(rows))

    def _of_tars(self, tars: Sequence[str]) -> Iterator[Keyed]:
        for number in self._order(range(len(tars))):
            tar = tars[number]
            shown = redact(Path(tar.split("?")[0]).name)
            try:
                for place, members in enumerate(groups_of(tar)):
                    Outage.broken = 0
                    content = find(members, "image")
                    if isinstance(content, bytes):
                        name = f"{shown}/{members['__key__'].decode('utf-8', 'replace')}"
                        yield f"{number}:{place}", Picture(name, content)
            except BadSampleError as error:
                Outage.count(shown, error)
                yield f"{number}:", Picture(f"{shown}, where it breaks off", b"")

    def _of_stream(self) -> Iterator[Keyed]:
        """Those of a dataset of the Hub."""
        refuse_address(self.name)
        with writable_cache():
            data: Any = open_dataset(self.name, self._path, self.config, self.split, self.revision, streaming=True)
        try:
            found = data.column_names or list(next(iter(data), {}))
            if not any(column.lower() in COLUMNS for column in found):
                raise RecipeError(
                    f"{self.name} has no column of pictures; it has {', '.join(found)}, and needs `image`."
                )
            for place, row in enumerate(_undecoded(data)):
                yield from pictures_of(row, self.images or Path(), place)
        except RecipeError:
            raise
        except Exception as error:  # the many ways in which a stream breaks off
            raise RecipeError(
                f"{self.name} cannot be read on ({root_reason(error)}); the same command goes on where it was."
            ) from error

    def _scenes(self) -> Pictures:
        scenes = scenes_of(self.seed, self.scenes)
        drawn = ((str(place), Picture(f"scene {place}", draw_scene(scene))) for place, scene in enumerate(scenes))
        return Pictures(drawn, self.scenes)


def scenes_of(seed: int, count: int) -> list[Scene]:
    """The scenes of the embedded world that a curation draws, as stage 2 may: none that an evaluation asks for."""
    rng = random.Random(f"curation, seed {seed}")
    return sample_scenes(rng, count, lambda scene: not scene.is_reserved and not scene.has_held_out_pair)


def pictures_below(folder: Path, split: str) -> list[Path]:
    """The files of a folder that are pictures by their names; those of the folder of the split, if there is one."""
    start = folder / split if (folder / split).is_dir() else folder
    files = (path for path in sorted(start.rglob("*")) if path.suffix.lower().lstrip(".") in IMAGE_ENDINGS)
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(start).parts)]


def pictures_of(row: Mapping[str, Any], folder: Path, place: int) -> Iterator[Keyed]:
    """The picture of a row, or each of several; one that cannot be read where a row has none."""
    several = next((value for name, value in row.items() if name.lower() in COLUMNS and isinstance(value, list)), None)
    parts = [row] if several is None else [{"image": value} for value in several]
    for number, part in enumerate(parts or [{}]):
        key = f"{place}.{number}" if number else str(place)
        picture = picture_in(part, folder, place) or Picture(f"row {place}, which names none", b"")
        yield key, replace(picture, name=plain_name(picture.name, folder))


def _undecoded(data: Any) -> Any:
    """The same with pictures as they are stored: a damaged one is told when it is its turn."""
    for column, kind in (data.features or {}).items():
        if isinstance(kind, Image):
            data = data.cast_column(column, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            data = data.cast_column(column, List(Image(decode=False)))
    return data


def plain_name(name: str, folder: Path) -> str:
    """What a picture is called without the folders of this machine, secrets of addresses, and content."""
    if "://" in name:
        return redact(name)
    path = Path(without_content(name))
    if path.is_absolute():
        path = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return path.as_posix().encode("utf-8", "replace").decode()


def first(pictures: Pictures, count: int | None) -> Iterator[Keyed]:
    """The sample of so many; all of them for None."""
    return islice(pictures.drawn, count)
