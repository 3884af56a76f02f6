"""A mender for the embedded world, `--mender tiny`: no model, and neither as able nor as reliable as one should be.

It reads the draft alone and never sees the picture, as a language model does. Mostly it does what it is asked to; at
times it does what menders are known to do instead (`MANNERS`). Which of them is drawn with the request as seed, so the
same request always has the same answer.
"""

import hashlib
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from recipes_minigpt4.llm.client import Client, ClientOptions, Request
from recipes_minigpt4.llm.exchange import text_of
from recipes_minigpt4.llm.stub import stub_client
from recipes_minigpt4.tiny.metrics import named_objects, placed_objects
from recipes_minigpt4.tiny.scenes import article, describe, sample_scene


class Mended(NamedTuple):
    """
    An answer of the mender.

    Args:
        text: the answer.
        manner: which of `MANNERS` it is.
    """

    text: str
    manner: str


# ---- what a good mender makes ---------------------------------------------------------------------------------------


def tidy(draft: str) -> str:
    """
    A draft in whole sentences, none of which says what another has said.

    Opening, things and the rest stand in this order. Where the draft has no whole sentence, its things are told in
    sentences. What is false stays: who sees no picture cannot know.
    """
    parts = parts_of(draft)
    whole = [part for part in parts if part[0].isupper() and part[-1] in ".!?"]
    whole = whole or [sentence for part in parts for sentence in _sentences_about(part)]
    openings = [part for part in whole if "background" in part]
    others = [part for part in whole if "background" not in part]
    things: list[str] = []
    told: set[tuple[str, ...]] = set()
    for part in (part for part in others if named_objects(part)):
        says: set[tuple[str, ...]] = {*placed_objects(part)} or {*named_objects(part)}
        if not says <= told:
            things.append(part)
        told |= says
    rest = dict.fromkeys(part for part in others if not named_objects(part))
    return " ".join([*openings[:1], *things, *rest])


def parts_of(draft: str) -> list[str]:
    """The sentences of a draft; capitals begin one, for the model joins lines without a full stop."""
    return [part for part in re.split(r"(?<=[.!?])\s+|\s+(?=[A-Z])", draft.strip()) if part]


def _sentences_about(line: str) -> list[str]:
    """The things of a careless line, each in a sentence, with its place if the line tells it."""
    places = {(colour, shape): place for colour, shape, place in reversed(list(placed_objects(line)))}
    sentences = []
    for colour, shape in named_objects(line):
        place = f" in the {places[colour, shape]}" if (colour, shape) in places else ""
        sentences.append(f"There is {article(colour)} {colour} {shape}{place}.")
    return sentences


# ---- what menders make instead --------------------------------------------------------------------------------------

SHARED = "The image shows several coloured shapes that are arranged on a plain background. They differ in colour."
STORY = "Two {pet}s run along the beach while a child in a yellow coat watches the waves. The sky is full of clouds."
GERMAN = "Auf dem Bild ist {number}mal etwas Farbiges auf einem einfachen Hintergrund zu sehen. Mehr zeigt es nicht."

Manner = Callable[[str, random.Random], str]


def _cut(draft: str, chance: random.Random) -> str:
    words = tidy(draft).split()
    return " ".join(words[: max(1, round(chance.uniform(0.6, 0.9) * len(words)))])


def _invent(draft: str, chance: random.Random) -> str:
    (thing,) = sample_scene(chance).things[:1]
    told = f"In the {thing.position} there is also {article(thing.size)} {thing.size} {thing.colour} {thing.shape}."
    return f"{tidy(draft)} {told}"


def _drift(draft: str, chance: random.Random) -> str:
    if chance.random() < 0.5:
        return STORY.format(pet=chance.choice(("dog", "cat", "horse", "bird", "goat")))
    return describe(sample_scene(chance), chance)


def _say_correct(draft: str, chance: random.Random) -> str:
    return chance.choice(("The paragraph is already correct.", "The given paragraph is already correct as it is."))


MANNERS: dict[str, tuple[int, Manner]] = {  # name → how often in a hundred answers, and what it makes of a draft
    "mended": (54, lambda draft, chance: tidy(draft)),
    "left as it was": (8, lambda draft, chance: draft),
    "invented": (5, _invent),
    "drifted": (5, _drift),
    "cut": (4, _cut),
    "said correct": (4, _say_correct),
    "preamble": (4, lambda draft, chance: f"Here is the corrected paragraph: {tidy(draft)}"),
    "apology": (3, lambda draft, chance: f"I apologize for the confusion before. {tidy(draft)}"),
    "shared": (3, lambda draft, chance: SHARED),
    "quotes": (2, lambda draft, chance: f'"{tidy(draft)}"'),
    "refusal": (2, lambda draft, chance: "As an AI language model, I cannot see the image that this is about."),
    "marks": (2, lambda draft, chance: f"{tidy(draft)} ###Human: Continue"),
    "language": (1, lambda draft, chance: GERMAN.format(number=len(named_objects(draft)))),
    "incomplete": (1, lambda draft, chance: f"{tidy(draft)} The paragraph seems to be incomplete."),
    "correct but": (1, lambda draft, chance: "The paragraph is already correct, apart from some repetition."),
    "nothing": (1, lambda draft, chance: ""),
}


def mend(request: Request) -> Mended:
    """The answer to a request, whose last message is the draft."""
    draft = text_of(request.messages[-1].get("content"))
    chance = random.Random(request.key("the mender of the embedded world"))
    (manner,) = chance.choices(list(MANNERS), [often for often, _ in MANNERS.values()])
    return Mended(MANNERS[manner][1](draft, chance), manner)


def scripted_mender(options: ClientOptions | None = None) -> Client:
    """The mender as a client."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    return stub_client(lambda request: mend(request).text, options, f"tiny@{digest}")
