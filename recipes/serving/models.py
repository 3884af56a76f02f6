"""Models that people talk to: ours, any chat model of transformers that sees, and BLIP-2 to compare with."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions, open_speaker
from recipes_minigpt4.serving.options import PARTS
from recipes_minigpt4.utils.errors import RecipeError


OURS = "minigpt4"  # our models' type


@dataclass(frozen=True)
class ModelOptions:
    """
    How a model is loaded.

    Args:
        device: `cpu`, `cuda`, …; None for a GPU if there is one.
        dtype: that of the weights; `auto` for the one that is stored.
        quantization: a name that `training/quantization.py` knows, for the language model of ours.
        trust_remote_code: run code that comes with a model.
        backbones: where parts of ours are now, if they have moved, by their names.
    """

    device: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    trust_remote_code: bool = False
    backbones: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ModelOptions":
        """Those of a command line (`options.add_model_options`)."""
        moved = {part: place for part in PARTS if (place := getattr(args, part)) is not None}
        return cls(args.device, args.dtype, args.quantization, args.trust_remote_code, moved)

    def for_speaker(self, batch_size: int = 1) -> SpeakerOptions:
        """The same for `open_speaker`."""
        return SpeakerOptions(
            self.device, self.dtype, batch_size, self.trust_remote_code, self.quantization, self.backbones, False
        )


@dataclass(frozen=True)
class Talker:
    """
    A model that people talk to.

    Args:
        label: what people call it.
        name: folder or repository.
        speaker: asks it in its own words; has `model` and `processor`.
        seconds: that loading took.
    """

    label: str
    name: str
    speaker: ChatSpeaker
    seconds: float = 0.0

    @property
    def is_ours(self) -> bool:
        """Whether it is a MiniGPT-4 of this package."""
        return bool(self.speaker.model.config.model_type == OURS)

    @property
    def about(self) -> str:
        """What it is, in a line: its label, parts, type of weights, device, and the time that loading took."""
        model = self.speaker.model
        kind = f"{self.name}, a {model.config.model_type}"
        if backbones := getattr(model.config, "backbones", None):
            places = {words: backbones[part]["name_or_path"] for part, words in PARTS.items() if part in backbones}
            named = [f"{words} {_short(place)}" for words, place in places.items()]
            kind = f"{self.name} on {', '.join(named)}"
        dtype = str(model.dtype).removeprefix("torch.")
        return f"{self.label}: {kind}; {dtype} on {model.device}, loaded in {self.seconds:.1f} s"


def open_talker(name: str, options: ModelOptions, label: str | None = None) -> Talker:
    """
    Load a model.

    Args:
        name: folder, or repository (`owner/name@revision`); `LABEL=NAME` tells what people call it.
        options: see `ModelOptions`.
        label: what people call it; default: that in the name, or the last part of the name.

    Raises:
        RecipeError: if it cannot be loaded, or cannot be talked to.
    """
    start = time.perf_counter()
    if label is None:
        label, name = split_label(name)
    if name.startswith("openai:"):
        raise RecipeError(f"{name} is a server, and this command loads the model itself; name a folder or repository.")
    speaker: Any = open_speaker(name, options.for_speaker())
    # The original's penalty counts words of the reply alone.
    if speaker.model.config.model_type == OURS:
        speaker.model.generation_config.penalize_prompt = False
    speaker.processor.tokenizer("")  # switches off what its file says of pads, before threads share it
    return Talker(label, name, speaker, time.perf_counter() - start)


def split_label(name: str) -> tuple[str, str]:
    """What people call a model, and its folder or repository, from `LABEL=NAME` or `NAME`."""
    path = Path(name).expanduser()
    if not path.exists():
        label, equals, rest = name.partition("=")
        if equals and label and rest and "/" not in label:
            return label, rest
    return (path.resolve().name if path.exists() else name.rstrip("/").rpartition("/")[2]) or name, name


def client_name(model: str) -> str:
    """What clients call a model: as the person said, a repository's name, or a folder's last part."""
    label, name = split_label(model)
    is_repository = name == model and not Path(name).expanduser().exists()
    return name if is_repository else label


def check_labels(names: Sequence[str]) -> None:
    """
    See that people can tell models apart, before any is loaded.

    Raises:
        RecipeError: if two are called the same.
    """
    labels = [split_label(name)[0] for name in names]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise RecipeError(
            f"Two models are called {twice[0]}; write LABEL={names[labels.index(twice[0])]} to call one otherwise."
        )


def _short(name: str) -> str:
    """A repository as it is, and the last part of a folder."""
    return Path(name).name if Path(name).is_absolute() else name
