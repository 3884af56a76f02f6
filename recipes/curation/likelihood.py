"""A model that describes pictures tells how well sentences fit them: how much likelier each is with its picture."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import PIL.Image
import torch

from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.speakers import ChatSpeaker


PROMPT = "Describe this image in detail."  # a sentence is taken as the answer to it
MOST_TOKENS = 512  # of a sentence


class LikelihoodMatcher:
    """
    Log-likelihood per token of a sentence behind its picture, less the mean of those behind other pictures: what the
    model likes to say about anything counts nothing.

    Args:
        speaker: the model. It may be the one that has described: no other has to be had.
        others: pictures of the same kind, at least one.
    """

    most_tokens = MOST_TOKENS

    def __init__(self, speaker: ChatSpeaker, others: Sequence[PIL.Image.Image]) -> None:
        self.speaker, self.others = speaker, others
        digest = hashlib.sha256(b"".join(picture.tobytes() for picture in others)).hexdigest()[:16]
        self.revision = f"{speaker.revision}, against {digest}"

    def tokens(self, text: str) -> int:
        """How many tokens a text has."""
        return len(self.speaker.processor.tokenizer(text)["input_ids"])

    @torch.inference_mode()
    def match(self, pictures: Sequence[PIL.Image.Image], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """For every picture, how much likelier each of its texts is with it than with others."""
        prompts = [self.speaker.written(Question(Picture("", Path()), PROMPT))] * len(pictures)
        seen = self.speaker.likelihoods(texts, prompts, pictures)
        against = [self.speaker.likelihoods(texts, prompts, [other] * len(pictures)) for other in self.others]
        return [
            [one - fmean(of_others) for one, *of_others in zip(*of_picture, strict=True)]
            for of_picture in zip(seen, *against, strict=True)
        ]
