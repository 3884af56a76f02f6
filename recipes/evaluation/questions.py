"""What a model is asked: a picture, a prompt, how to answer, and what is true about the picture."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import PIL.Image

from processing_minigpt4.image_opening_minigpt4 import open_image


@dataclass(frozen=True)
class Sampling:
    """
    How a reply is made.

    Args:
        max_new_tokens: the most tokens of a reply.
        num_beams: beams of the search.
        temperature: 0 for the likeliest token every time; above, tokens are drawn, with a seed of the question's own.
    """

    max_new_tokens: int = 256
    num_beams: int = 1
    temperature: float = 0.0


@dataclass(frozen=True)
class Picture:
    """
    A picture that is opened when somebody looks at it.

    Args:
        name: what people call it: the name of its file, or its number.
        source: its path, its encoded bytes, or the picture itself.
    """

    name: str
    source: Any = field(repr=False)

    def open(self) -> PIL.Image.Image:
        """
        The picture, upright and in RGB, on white where it is transparent.

        Raises:
            ValueError: if nothing can be read as a picture.
        """
        picture: PIL.Image.Image = open_image(self.source, "white")
        return picture

    @cached_property
    def digest(self) -> str:
        """
        SHA-256 of the file's bytes, or of the pixels of a picture without a file.

        Raises:
            OSError: if the file cannot be read.
        """
        if isinstance(self.source, PIL.Image.Image):
            content = f"{self.source.mode} {self.source.size} ".encode() + self.source.tobytes()
        else:
            content = self.source if isinstance(self.source, bytes) else Path(self.source).read_bytes()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Question:
    """
    One thing that is asked about one picture.

    Args:
        picture: what it is about.
        prompt: the words.
        sampling: how to answer.
        choices: answers to choose from. A model tells the likelihood of each beside its reply.
        facts: what is true, for measures and judges. They are written down with the reply, so they have to be JSON.
    """

    picture: Picture
    prompt: str
    sampling: Sampling = Sampling()
    choices: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """What is asked, as one word: the same for the same picture, words, choices and sampling."""
        asked = [self.picture.digest, self.prompt, asdict(self.sampling), list(self.choices)]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
