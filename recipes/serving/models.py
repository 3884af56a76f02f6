"""Models that people talk to: ours, any chat model of transformers that sees, and BLIP-2 to compare with."""

from dataclasses import dataclass
from typing import Any

from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions, open_speaker
from recipes_minigpt4.utils.errors import RecipeError


@dataclass(frozen=True)
class ModelOptions:
    """
    How a model is loaded.

    Args:
        device: `cpu`, `cuda`, …; None for a GPU if there is one.
        dtype: that of the weights; `auto` for the one that is stored.
        quantization: a name that `training/quantization.py` knows, for the language model of ours.
        trust_remote_code: run code that comes with a model.
    """

    device: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Talker:
    """
    A model that people talk to.

    Args:
        label: what people call it.
        name: folder or repository.
        speaker: asks it in its own words; has `model` and `processor`.
    """

    label: str
    name: str
    speaker: ChatSpeaker

    @property
    def is_ours(self) -> bool:
        return bool(self.speaker.model.config.model_type == "minigpt4")


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
    if label is None and "=" in name:
        label, _, name = name.partition("=")
    if name.startswith("openai:"):
        raise RecipeError(f"{name} is a server, and this command loads the model itself; name a folder or repository.")
    speaker: Any = open_speaker(name, SpeakerOptions(options.device, options.dtype, 1, options.trust_remote_code))
    # The original's penalty counts words of the reply alone.
    if speaker.model.config.model_type == "minigpt4":
        speaker.model.generation_config.penalize_prompt = False
    return Talker(label or name.rstrip("/").rsplit("/", 1)[-1], name, speaker)
