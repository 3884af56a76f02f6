"""How replies are made, with the numbers of the original's demo."""

import argparse
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class ReplySettings:
    """
    How a reply is made. The numbers are those of the original's demo (released code, `minigpt4/conversation`).

    Args:
        temperature: 0 for the likeliest token every time; above, tokens are drawn.
        top_p: share of the likeliest tokens that are drawn from.
        num_beams: beams of the search.
        repetition_penalty: what a word of the reply that comes again loses.
        length_penalty: what beams gain by length.
        max_new_tokens: the most tokens of a reply.
        seed: of the draws; None for others every time.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    num_beams: int = 1
    repetition_penalty: float = 1.05
    length_penalty: float = 1.0
    max_new_tokens: int = 300
    seed: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> "ReplySettings":
        """Those of a command line (`options.add_reply_options`)."""
        return cls(**{field.name: getattr(args, field.name) for field in fields(cls)})

    @property
    def draws(self) -> bool:
        """Whether chance has a say."""
        return self.temperature > 0

    def options(self) -> dict[str, Any]:
        """What `generate` is told for one reply, whatever the model's own generation configuration says."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "repetition_penalty": float(self.repetition_penalty),
            "do_sample": False,
            "top_k": None,
            "top_p": None,
            "temperature": None,
        }
        if self.num_beams > 1:
            options["length_penalty"] = float(self.length_penalty)
        if self.draws and self.num_beams > 1:
            drawn = {"do_sample": True, "top_k": 0, "top_p": float(self.top_p), "temperature": float(self.temperature)}
            return options | drawn
        return options | ({"logits_processor": [Draws(self)]} if self.draws else {})


class Draws(LogitsProcessor):
    """
    Makes the likeliest token one that is drawn, with random numbers of its own, so that replies may be made at once.

    The likeliest of logits with Gumbel noise is distributed as a token that is drawn from their softmax. So a reply is
    generated greedily, and torch's own random numbers, which the whole process shares, have no part in it.
    """

    def __init__(self, settings: ReplySettings) -> None:
        self._shape = (TemperatureLogitsWarper(float(settings.temperature)), TopPLogitsWarper(float(settings.top_p)))
        self._numbers = torch.Generator()
        if settings.seed is None:
            self._numbers.seed()
        else:
            self._numbers.manual_seed(settings.seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores of shape (1, vocabulary) with noise."""
        for warper in self._shape:
            scores = warper(input_ids, scores)
        noise = -torch.empty(scores.shape).exponential_(generator=self._numbers).log()
        return scores + noise.to(scores)  # type: ignore[return-value]
