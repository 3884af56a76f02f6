"""The model describes every picture; a short reply is continued once, and both are joined (paper, section 3.2)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4.curation.features import encode_features
from recipes_minigpt4.curation.store import Step, fingerprint
from recipes_minigpt4.evaluation.questions import Sampling
from recipes_minigpt4.evaluation.speakers import ChatSpeaker
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


class Describer:
    """
    A chat model that describes pictures in two turns, whose vision side sees each picture once.

    Args:
        speaker: the model.
        prompts: the words.
        sampling: of each turn.
    """

    def __init__(self, speaker: ChatSpeaker, prompts: Prompts, sampling: Sampling) -> None:
        self.speaker, self.prompts, self.sampling = speaker, prompts, sampling
        self.made = fingerprint(
            model=speaker.revision, prompts=asdict(prompts), sampling=asdict(sampling), enough=ENOUGH_TOKENS
        )

    @torch.inference_mode()
    def describe(self, pictures: Sequence[PIL.Image.Image]) -> list[Draft]:
        """Descriptions of pictures that are open, in order."""
        seen = self._see(pictures)
        asked = [[_said("user", self.prompts.describe, picture=True)] for _ in pictures]
        first = self._turn(asked, seen, pictures)
        short = [place for place, (_, tokens) in enumerate(first) if tokens <= ENOUGH_TOKENS]
        longer = [
            [*asked[place], _said("assistant", first[place][0]), _said("user", self.prompts.continue_)]
            for place in short
        ]
        picked = None if seen is None else seen[short]
        more = dict(zip(short, self._turn(longer, picked, [pictures[place] for place in short]), strict=True))
        features: Sequence[str | None] = [None] * len(first) if seen is None else encode_features(seen)
        return [
            Draft(
                f"{text} {more[place][0]}".strip() if place in more else text, tokens, place in more, features[place]
            )
            for place, (text, tokens) in enumerate(first)
        ]

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


def describe_all(folder: Path, rows: Sequence[Mapping[str, Any]], describer: Describer, batch_size: int) -> str:
    """Describe the pictures that were not described in this way yet; returns the fingerprint of it."""
    made = describer.made
    with Step(folder, "drafts") as step:
        left = [row for row in rows if step.get(row["picture"], made) is None]
        if (old := step.made_otherwise(made)) and left:
            print(
                f"{old} pictures were described before, by another model or with other words; they are described anew, "
                "and the old descriptions are kept.",
                flush=True,
            )
        with phase("Describe", len(left)) as line:
            for done, batch in _batches(left, batch_size):
                pictures = [PIL.Image.open(folder / row["file"]).convert("RGB") for row in batch]
                for row, draft in zip(batch, describer.describe(pictures), strict=True):
                    step.put(row["picture"], made, **draft._asdict())
                line.reach(done)
    return made


def _batches(rows: Sequence[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    rest, done = iter(rows), 0
    while batch := list(islice(rest, size)):
        done += len(batch)
        yield done, batch
