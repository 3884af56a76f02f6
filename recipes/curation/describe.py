"""The model describes every picture; a short reply is continued once, and both are joined (paper, section 3.2)."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import PIL.Image
import torch

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4.curation.features import encode_features
from recipes_minigpt4.curation.gather import reason_of
from recipes_minigpt4.curation.store import Record, Step, fingerprint
from recipes_minigpt4.evaluation.questions import Picture, Sampling
from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions, revision_named
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.progress import phase


ENOUGH_TOKENS = 80  # a reply of no more is continued


class Draft(NamedTuple):
    """
    What the model said about a picture.

    Args:
        text: both replies, joined.
        tokens: of the first reply, by the model's own tokenizer.
        continued: whether it was asked to go on.
        features: of the picture, see `encode_features`; None for a model whose vision side is not known.
    """

    text: str
    tokens: int
    continued: bool
    features: str | None = None


@dataclass(frozen=True)
class Prompts:
    """The words of both turns."""

    describe: str
    continue_: str


class Describes(Protocol):
    """
    Whoever describes pictures.

    Attributes:
        revision: what tells its weights from others.
        made: how it describes, as one word.
    """

    revision: str
    made: str

    def load(self) -> None:
        """Get ready, which may take a while."""

    def describe(self, pictures: Sequence[PIL.Image.Image]) -> list[Draft]:
        """Descriptions of pictures that are open, in order."""


class Describer:
    """
    A chat model that describes pictures in two turns. If it is one of ours, its vision side sees each picture once.

    It is loaded when there is something to describe.

    Args:
        name: folder or repository.
        options: how it is loaded.
        prompts: the words.
        sampling: of each turn.
        enough: tokens of a first reply of which no more are continued.

    Raises:
        RecipeError: if there is no such model.
    """

    def __init__(
        self, name: str, options: SpeakerOptions, prompts: Prompts, sampling: Sampling, enough: int = ENOUGH_TOKENS
    ) -> None:
        if name.startswith("openai:"):
            raise RecipeError(f"--model {name} is a server; name a folder or a repository of a model that describes.")
        self.name, self.options = name, options
        self.prompts, self.sampling, self.enough = prompts, sampling, enough
        self.revision = revision_named(name, options)
        self.made = fingerprint(model=self.revision, prompts=asdict(prompts), sampling=asdict(sampling), enough=enough)

    @cached_property
    def speaker(self) -> ChatSpeaker:
        """The model."""
        return ChatSpeaker.load(self.name, self.options)

    def load(self) -> None:
        """Load the model."""
        _ = self.speaker

    @torch.inference_mode()
    def describe(self, pictures: Sequence[PIL.Image.Image]) -> list[Draft]:
        """
        Descriptions of pictures that are open, in order.

        Raises:
            RecipeError: if the device has not enough memory.
        """
        try:
            return self._describe(pictures)
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"{len(pictures)} pictures at a time do not fit into the device's memory; lower --batch_size. What "
                "was described is kept."
            ) from error

    def _describe(self, pictures: Sequence[PIL.Image.Image]) -> list[Draft]:
        seen = self._see(pictures)
        asked = [[_said("user", self.prompts.describe, picture=True)] for _ in pictures]
        first = self._turn(asked, seen, pictures)
        short = [place for place, (_, tokens) in enumerate(first) if tokens <= self.enough]
        longer = [
            [*asked[place], _said("assistant", first[place][0]), _said("user", self.prompts.continue_)]
            for place in short
        ]
        picked = None if seen is None else seen[short]
        more = dict(zip(short, self._turn(longer, picked, [pictures[place] for place in short]), strict=True))
        drafts = [
            Draft(f"{text} {more[place][0]}".strip() if place in more else text, tokens, place in more)
            for place, (text, tokens) in enumerate(first)
        ]
        if seen is None:
            return drafts
        return [draft._replace(features=one) for draft, one in zip(drafts, encode_features(seen), strict=True)]

    def _see(self, pictures: Sequence[PIL.Image.Image]) -> torch.Tensor | None:
        """Features of the frozen vision side, which both turns use; None for a model that takes pictures alone."""
        model = self.speaker.model
        if not isinstance(model, MiniGPT4ForConditionalGeneration):
            return None
        pixels = self.speaker.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        features: torch.Tensor = model.model.encode_images(pixels.to(model.device, model.dtype)).last_hidden_state
        return features

    def _turn(
        self, chats: Sequence[Any], seen: torch.Tensor | None, pictures: Sequence[PIL.Image.Image]
    ) -> list[tuple[str, int]]:
        """A reply to each chat, and how many tokens it has by the model's own tokenizer."""
        if not chats:
            return []
        processor = self.speaker.processor
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        replies = [text for text, _ in self.speaker.complete(texts, pictures, self.sampling, seen)]
        return [(text, len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])) for text in replies]


def _said(role: str, text: str, picture: bool = False) -> dict[str, Any]:
    parts = [{"type": "image"}] if picture else []
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def describe_all(
    folder: Path, rows: Sequence[Mapping[str, Any]], describer: Describes, batch_size: int
) -> dict[str, Record]:
    """
    Describe the pictures that were not described in this way yet.

    Returns:
        Digest → its draft. A picture whose copy is gone has none; that is told, and the next start tries again.
    """
    made = describer.made
    with Step(folder, "drafts") as step:
        left = [row for row in rows if step.get(row["picture"], made) is None]
        if old := step.made_otherwise({row["picture"] for row in left}, made):
            print(
                f"{old} pictures were described before, by another model or with other words; they are described "
                "anew, and the old descriptions are kept.",
                flush=True,
            )
        gone = _describe(folder, left, describer, batch_size, step) if left else []
        if gone:
            print(
                f"{len(gone)} of {len(rows)} pictures cannot be read any more, {gone[0]}; the others go on, and the "
                "same command tries again.",
                flush=True,
            )
        records = {row["picture"]: step.get(row["picture"], made) for row in rows}
    return {digest: record for digest, record in records.items() if record is not None}


def _describe(
    folder: Path, rows: Sequence[Mapping[str, Any]], describer: Describes, batch_size: int, step: Step
) -> list[str]:
    """Describe pictures in batches; returns those whose copies are gone, with the reason."""
    gone: list[str] = []
    with phase("Load the model", 1):
        describer.load()
    with phase("Describe", len(rows), unit="pictures") as line:
        for done, batch in _batches(rows, batch_size):
            pictures: dict[str, PIL.Image.Image] = {}
            for row in batch:
                try:
                    pictures[row["picture"]] = Picture(row["name"], folder / row["file"]).open()
                except ValueError as error:
                    gone.append(f"{row['name']} ({reason_of(error)})")
            started = time.perf_counter()
            drafts = describer.describe(list(pictures.values())) if pictures else []
            seconds = (time.perf_counter() - started) / max(1, len(pictures))
            for digest, draft in zip(pictures, drafts, strict=True):
                step.put(digest, describer.made, **draft._asdict(), seconds=round(seconds, 4))
            line.reach(done)
    return gone


def _batches(rows: Sequence[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    rest, done = iter(rows), 0
    while batch := list(islice(rest, size)):
        done += len(batch)
        yield done, batch
