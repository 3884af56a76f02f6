"""How replies are made, with the numbers of the original's demo."""

from dataclasses import dataclass
from typing import Any


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

    @property
    def draws(self) -> bool:
        """Whether chance has a say."""
        return self.temperature > 0

    def options(self) -> dict[str, Any]:
        """What `generate` is told, whatever the model's own generation configuration says."""
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.draws,
            "top_k": 0 if self.draws else None,
            "top_p": self.top_p if self.draws else None,
            "temperature": self.temperature if self.draws else None,
        }
        return options | ({"length_penalty": self.length_penalty} if self.num_beams > 1 else {})
