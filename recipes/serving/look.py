"""What a model gets to read and to see: the prompt with the places of its pictures, and maps over them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import Any

import PIL.Image

from modeling_minigpt4.checks_minigpt4 import max_positions
from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.speakers import BlipSpeaker
from recipes_minigpt4.serving.attention import Look, Maps, look_at
from recipes_minigpt4.serving.heat import draw_heat
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.utils.errors import RecipeError


THUMBNAIL = 192  # pixels of the longer side of a small map


@dataclass(frozen=True)
class Piece:
    """A piece of a prompt: text, or the place of a picture (counted from 1) and how many tokens it takes."""

    text: str = ""
    picture: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Prompt:
    """
    What a language model reads.

    Args:
        pieces: in their order.
        window: the most tokens that it takes, with its reply; None if that is not known.
    """

    pieces: Sequence[Piece]
    window: int | None

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def told(self) -> str:
        """How long it is, in a sentence."""
        pictures = [piece.tokens for piece in self.pieces if piece.picture]
        of_pictures = f"{sum(pictures):,} of {len(pictures)} picture{'s' * (len(pictures) != 1)}"
        text = f"{self.tokens:,} tokens: {of_pictures}, {self.tokens - sum(pictures):,} of text."
        if self.window is None:
            return text
        left = self.window - self.tokens
        rest = f"{left:,} are left for the reply" if left > 0 else "nothing is left for a reply"
        return f"{text} The model's window has {self.window:,}, so {rest}."


def look(talker: Talker, text: str, pictures: Sequence[PIL.Image.Image]) -> tuple[Prompt, list[Look]]:
    """
    See what a model would get, were it asked.

    Args:
        talker: the model, which need not be one that can be looked into: then there are no looks.
        text: what is asked.
        pictures: upright, in RGB.

    Raises:
        RecipeError: if there is no picture, or nobody knows where the tokens of its encoder lie.
        ValueError: what the processor raises.
    """
    if not pictures:
        raise RecipeError("There is no picture to look at; add one.")
    inputs = _inputs(talker, text, pictures)
    prompt = read_prompt(talker, inputs["input_ids"][0].tolist(), len(pictures))
    if not can_be_looked_into(talker):
        return prompt, []
    model = talker.speaker.model
    return prompt, [look_at(model, pixels[None]) for pixels in inputs["pixel_values"]]


def can_be_looked_into(talker: Talker) -> bool:
    """Whether there are maps of a model."""
    return talker.is_ours or talker.speaker.model.config.model_type == "blip-2"


def _inputs(talker: Talker, text: str, pictures: Sequence[PIL.Image.Image]) -> Any:
    """What the model is given; as in a chat, of which this is the first question."""
    speaker = talker.speaker
    if isinstance(speaker, BlipSpeaker):
        if len(pictures) > 1:
            raise RecipeError(f"{talker.label} takes one picture, and these are {len(pictures)}; leave some out.")
        return speaker.inputs([speaker.written(Question(Picture("", pictures[0]), text))], pictures)
    content: list[dict[str, Any]] = [{"type": "image", "image": picture} for picture in pictures]
    content += [{"type": "text", "text": text}] if text else []
    made = speaker.processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return speaker.on_device(made)


def read_prompt(talker: Talker, ids: Sequence[int], pictures: int) -> Prompt:
    """The pieces of a prompt, from its ids: what stands there is what the model gets."""
    config, tokenizer = talker.speaker.model.config, talker.speaker.processor.tokenizer
    image_token = getattr(config, "image_token_id", None)
    image_token = getattr(config, "image_token_index", None) if image_token is None else image_token
    each = sum(one == image_token for one in ids) // pictures or 1
    pieces: list[Piece] = []
    for is_picture, run in groupby(ids, lambda one: one == image_token):
        tokens = list(run)
        if is_picture:
            first = 1 + sum(1 for piece in pieces if piece.picture)
            pieces += [Piece(picture=first + number, tokens=each) for number in range(len(tokens) // each)]
        else:
            words = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append(Piece(words, tokens=len(tokens)))
    return Prompt(pieces, max_positions(config.get_text_config()))


# ---- what is shown --------------------------------------------------------------------------------------------------

STYLE = """
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; line-height: 1.9; }
.prompt mark { background: #0d7377; color: #fff; border-radius: .3rem; padding: .15rem .45rem; white-space: nowrap; }
"""


def prompt_html(prompt: Prompt) -> str:
    """The prompt with the places of its pictures, as HTML; what people wrote is text in it."""
    parts = [
        f"<mark>picture {piece.picture} · {piece.tokens} tokens</mark>" if piece.picture else escape(piece.text)
        for piece in prompt.pieces
    ]
    return f'<p>{escape(prompt.told)}</p><div class="prompt">{"".join(parts)}</div>'


def draw_maps(picture: PIL.Image.Image, maps: Maps) -> Iterator[tuple[PIL.Image.Image, str]]:
    """A small map for each image token, and what stands below it."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    for number, shares in enumerate(maps.patches, 1):
        yield draw_heat(small, shares.numpy()), str(number)


def draw_map(picture: PIL.Image.Image, maps: Maps, token: int) -> tuple[PIL.Image.Image, str]:
    """
    A large map, and what it says.

    Args:
        picture: what is below.
        maps: of all image tokens.
        token: which, from 1 on; 0 for the mean of all.
    """
    if token > len(maps.patches):
        raise RecipeError(f"There are {len(maps.patches)} image tokens, and no number {token}.")
    shares = maps.patches.mean(0) if token == 0 else maps.patches[token - 1]
    elsewhere = float(maps.elsewhere.mean() if token == 0 else maps.elsewhere[token - 1])
    rows, columns = shares.shape
    place = int(shares.argmax())
    told = (
        f"{rows} × {columns} patches. The brightest, in row {place // columns + 1} and column {place % columns + 1}, "
        f"has {float(shares.max()):.1%}."
    )
    if elsewhere > 0:
        told += f" {elsewhere:.1%} is on tokens of the encoder that are no patches, such as CLS."
    return draw_heat(picture, shares.numpy()), told
