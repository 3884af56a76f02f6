"""Curations whose model and mender are functions: they count what they are asked, and cost nothing.

run = Run(tmp_path / "curated", "--dataset_name", pictures)
run()
assert run.describer.asked == 6 and run.mender.asked == 6
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from recipes_minigpt4.curation.curate import curate, parse
from recipes_minigpt4.curation.describe import Draft
from recipes_minigpt4.curation.funnel import Funnel
from recipes_minigpt4.curation.store import fingerprint
from recipes_minigpt4.llm.client import ClientOptions, Request
from recipes_minigpt4.llm.stub import stub_client


def said_about(picture: PIL.Image.Image) -> str:
    """A description that no other picture has."""
    red, green, blue = (round(sum(band.getdata()) / (picture.width * picture.height)) for band in picture.split())
    return f"The picture is {picture.width} wide, with a mean of {red} red, {green} green and {blue} blue in it."


class Parrot:
    """A model that describes by the pixels; counts the pictures that it is asked about."""

    def __init__(self, revision: str = "1") -> None:
        self.revision, self.made = revision, fingerprint(revision=revision)
        self.asked = self.loaded = 0

    def load(self) -> None:
        self.loaded += 1

    def describe(self, pictures: Sequence[PIL.Image.Image]) -> list[Draft]:
        self.asked += len(pictures)
        return [Draft(said_about(picture), 17, False) for picture in pictures]


class Mender:
    """Answers what a function makes of the description, and counts."""

    def __init__(self, answer: Callable[[str], str] = lambda text: f"{text} It is mended.") -> None:
        self.answer, self.asked = answer, 0
        self.seen: list[Request] = []

    def __call__(self, request: Request) -> str:
        self.asked += 1
        self.seen.append(request)
        return self.answer(str(request.messages[-1]["content"]))


class Run:
    """A curation in a folder; the same command each time it is called, with more arguments behind."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.folder, self.describer, self.mender = folder, Parrot(), Mender()
        self.arguments = ["--model", "none", "--mender", "stub:none", "--batch_size", 2, *arguments]

    def __call__(self, *more: object, client: Any = None) -> Funnel:
        args = parse([str(text) for text in (*self.arguments, "--output_dir", self.folder, *more)])
        options = ClientOptions(cache=self.folder / "answers", concurrency=1, attempts=args.mender_attempts)
        return curate(args, client or stub_client(self.mender, options), self.describer)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What a file of the folder holds."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def noise(number: int, side: int = 48) -> PIL.Image.Image:
    """A picture of coarse coloured noise, another one for every number: no two look alike."""
    cells = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return PIL.Image.fromarray(cells).resize((side, side), PIL.Image.Resampling.BICUBIC)


def noises(folder: Path, count: int, side: int = 48) -> Path:
    """A folder with so many of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        noise(number, side).save(folder / f"{number}.png")
    return folder
