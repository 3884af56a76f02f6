"""Scenes of coloured shapes: what they hold, how they look, and how people would describe them.

Everything is drawn from a seeded `random.Random`, so the same seed gives the same scenes, pictures and words. The
space of scenes is split once and for all: `is_reserved` scenes are shown to nothing that trains, backbones included,
and pictures with a `HELD_OUT_PAIRS` pair are in no training stage.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image, ImageDraw


COLOURS: dict[str, tuple[int, int, int]] = {  # name → RGB, 0–255
    "red": (212, 36, 36),
    "orange": (245, 140, 20),
    "yellow": (240, 215, 40),
    "green": (40, 155, 60),
    "blue": (35, 80, 205),
    "purple": (125, 45, 165),
    "pink": (245, 130, 185),
    "brown": (120, 72, 35),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (246, 246, 246),
    "grey": (150, 150, 150),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
SIZES: dict[str, float] = {"small": 0.085, "large": 0.145}  # radius, as a share of the picture's side
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
MAX_THINGS = 3

# Colour–shape pairs that no picture of stage 1 or stage 2 shows: the evaluation asks for them all the same.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "square"),
        ("yellow", "triangle"),
        ("green", "cross"),
        ("blue", "heart"),
        ("purple", "circle"),
    }
)
RESERVED_SHARE = 1 / 8  # of all scenes: kept for evaluation


@dataclass(frozen=True)
class Thing:
    """One coloured shape in one cell of the 3 × 3 grid."""

    size: str
    colour: str
    shape: str
    row: str
    column: str

    @property
    def position(self) -> str:
        """Where it is, in words: `"top left"`, `"middle right"`, `"centre"`."""
        return "centre" if (self.row, self.column) == ("middle", "centre") else f"{self.row} {self.column}"

    @property
    def pair(self) -> tuple[str, str]:
        """What the object score counts: (colour, shape)."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """One to `MAX_THINGS` things in reading order on a plain background.

    `jitter` seeds what words do not say: offsets inside the cell, and the exact size and tint.
    """

    things: tuple[Thing, ...]
    background: str
    jitter: int = 0

    @property
    def has_held_out_pair(self) -> bool:
        return any(thing.pair in HELD_OUT_PAIRS for thing in self.things)

    @property
    def is_reserved(self) -> bool:
        """Whether this content, whatever its jitter, is kept for evaluation (a fixed hash, no list to ship)."""
        digest = hashlib.sha256(repr(replace(self, jitter=0)).encode()).digest()
        return int.from_bytes(digest[:4], "big") < RESERVED_SHARE * 2**32


def sample_scene(rng: random.Random) -> Scene:
    """Draw any scene: number of things, cells and attributes all uniform."""
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), rng.randint(1, MAX_THINGS)))
    things = tuple(
        Thing(
            size=rng.choice(list(SIZES)),
            colour=rng.choice(list(COLOURS)),
            shape=rng.choice(SHAPES),
            row=ROWS[cell // len(COLUMNS)],
            column=COLUMNS[cell % len(COLUMNS)],
        )
        for cell in cells
    )
    return Scene(things, rng.choice(list(BACKGROUNDS)), jitter=rng.getrandbits(32))


def sample_scenes(rng: random.Random, count: int, wanted: Callable[[Scene], bool]) -> list[Scene]:
    """Draw `count` scenes for which `wanted` holds."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = sample_scene(rng)
        if wanted(scene):
            scenes.append(scene)
    return scenes


# --- pictures --------------------------------------------------------------------------------------------------------


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    radii = (1.0, inner)
    return [
        (radii[i % 2] * math.sin(math.pi * i / points), -radii[i % 2] * math.cos(math.pi * i / points))
        for i in range(2 * points)
    ]


def _heart(points: int = 40) -> list[tuple[float, float]]:
    outline = []
    for i in range(points):
        t = 2 * math.pi * i / points
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        outline.append((math.sin(t) ** 3, -(y + 2.5) / 15))
    return outline


def _cross(arm: float = 0.32) -> list[tuple[float, float]]:
    a = arm
    return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]


# Outlines in units of the radius, y pointing down; the circle is drawn as what it is.
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)],
    "star": _star(points=5, inner=0.42),
    "heart": _heart(),
    "cross": _cross(),
}


def draw_scene(scene: Scene, size: int = 96) -> Image.Image:
    """Draw a scene as an RGB picture of `size` × `size` pixels, the same for the same scene."""
    rng = random.Random(scene.jitter)
    side = 3 * size  # drawn larger and shrunk, for smooth edges
    image = Image.new("RGB", (side, side), _tinted(BACKGROUNDS[scene.background], rng))
    canvas = ImageDraw.Draw(image)
    for thing in scene.things:
        x = (COLUMNS.index(thing.column) + 0.5) / len(COLUMNS) + rng.uniform(-0.015, 0.015)
        y = (ROWS.index(thing.row) + 0.5) / len(ROWS) + rng.uniform(-0.015, 0.015)
        radius = SIZES[thing.size] * rng.uniform(0.94, 1.06)
        colour = _tinted(COLOURS[thing.colour], rng)
        if thing.shape == "circle":
            box = (x - 0.95 * radius, y - 0.95 * radius, x + 0.95 * radius, y + 0.95 * radius)
            canvas.ellipse([side * edge for edge in box], fill=colour)
        else:
            outline = [(side * (x + radius * dx), side * (y + radius * dy)) for dx, dy in OUTLINES[thing.shape]]
            canvas.polygon(outline, fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def _tinted(colour: tuple[int, int, int], rng: random.Random, spread: int = 9) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


# --- words -----------------------------------------------------------------------------------------------------------

NUMBERS = ("no", "one", "two", "three")
CARELESS_SIZES = {"small": ("little", "tiny", "little", "small"), "large": ("big", "huge", "big", "large")}
BOILERPLATE_BEFORE = ("image of ", "picture of ", "stock photo of ", "clip art ", "vector of ", "free image , ")
BOILERPLATE_AFTER = (" stock photo", " free download", " clip art", " icon set", " for kids", " wallpaper")


def article(word: str) -> str:
    """`"a"` or `"an"`, whichever goes before `word`."""
    return "an" if word[0] in "aeiou" else "a"


def noisy_caption(scene: Scene, rng: random.Random) -> str:
    """One short line such as the web's alt texts: lower case, no full stop, and not to be trusted.

    Things are left out, sizes and places told half of the time, one colour and one shape in twenty are wrong, phrases
    that say nothing come before or after, and one line in eight is cut short.
    """
    things = [thing for thing in scene.things if rng.random() > 0.1] or [rng.choice(scene.things)]
    if rng.random() < 0.2:
        rng.shuffle(things)
    told = {"article": rng.random() < 0.6, "size": rng.random() < 0.5, "place": rng.random() < 0.5}
    phrases = [_noisy_phrase(thing, told, rng) for thing in things]
    joined = rng.choice((" and ", " , ", " with ")) if len(phrases) == 2 else rng.choice((" , ", " and ", " "))
    caption = joined.join(phrases)
    if rng.random() < 0.3:
        caption += f" on {scene.background}" + rng.choice((" background", "", " backdrop"))
    if rng.random() < 0.1:
        caption = rng.choice(BOILERPLATE_BEFORE) + caption
    elif rng.random() < 0.1:
        caption += rng.choice(BOILERPLATE_AFTER)
    words = caption.split(" ")
    if rng.random() < 0.125 and len(words) > 3:
        words = words[: len(words) - rng.randint(1, 3)]
    return " ".join(words)


def _noisy_phrase(thing: Thing, told: dict[str, bool], rng: random.Random) -> str:
    colour = thing.colour if rng.random() > 0.05 else rng.choice(list(COLOURS))
    shape = thing.shape if rng.random() > 0.05 else rng.choice(SHAPES)
    if (colour, shape) in HELD_OUT_PAIRS:  # no stage may read of such a pair by mistake either
        colour, shape = thing.pair
    words = [careless_size(thing.size, rng), colour, shape] if told["size"] else [colour, shape]
    if told["article"]:
        words.insert(0, article(words[0]))
    if told["place"]:
        words.append(rng.choice((f"at the {thing.position}", f"in the {thing.position}", thing.position)))
    return " ".join(words)


def careless_size(size: str, rng: random.Random) -> str:
    """The size as alt texts have it."""
    return rng.choice(CARELESS_SIZES[size])


OPENINGS = (
    "The image shows {count} on a {background} background.",
    "In this image there {be} {count} on a {background} background.",
    "This is a simple picture of {count} in front of a {background} background.",
    "The picture has a {background} background with {count} on it.",
)
SENTENCES = (
    "There is {thing} in the {place}.",
    "In the {place} there is {thing}.",
    "In the {place} we can see {thing}.",
    "{thing} can be seen in the {place}.",
    "{thing} sits in the {place} of the image.",
    "In the {place} of the image you will find {thing}.",
)
CLOSINGS = (
    "The rest of the image is empty.",
    "Nothing else can be seen.",
    "The edges are sharp and the colours are plain.",
    "Overall the image looks tidy and clear.",
    "There is plenty of empty space around.",
)


def count_phrase(scene: Scene) -> str:
    """`"one coloured shape"`, `"three coloured shapes"`."""
    return f"{NUMBERS[len(scene.things)]} coloured shape" + ("s" if len(scene.things) > 1 else "")


def describe(scene: Scene, rng: random.Random) -> str:
    """A careful description: an opening, one sentence per thing in reading order, a closing remark."""
    opening = rng.choice(OPENINGS).format(
        count=count_phrase(scene), be="is" if len(scene.things) == 1 else "are", background=scene.background
    )
    templates = rng.sample(SENTENCES, len(scene.things))
    sentences = [
        template.format(thing=f"{article(thing.size)} {thing.size} {thing.colour} {thing.shape}", place=thing.position)
        for template, thing in zip(templates, scene.things, strict=True)
    ]
    return " ".join(_capitalized(sentence) for sentence in (opening, *sentences, rng.choice(CLOSINGS)))


def _capitalized(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]


# --- data ------------------------------------------------------------------------------------------------------------


def stage1_examples(count: int = 8000, seed: int = 0, size: int = 96, reserved: bool = False) -> list[dict[str, Any]]:
    """
    Pairs of a picture and a short noisy caption: `{"image": PIL.Image, "caption": str}`.

    Those of `reserved` scenes are for evaluation: training never draws their content.
    """
    return _examples(count, f"stage 1, seed {seed}", noisy_caption, size, reserved)


def stage2_examples(count: int = 400, seed: int = 0, size: int = 96, reserved: bool = False) -> list[dict[str, Any]]:
    """Pairs of a picture and a careful long description, otherwise as `stage1_examples`."""
    return _examples(count, f"stage 2, seed {seed}", describe, size, reserved)


def _examples(
    count: int, seed: str, caption: Callable[[Scene, random.Random], str], size: int, reserved: bool
) -> list[dict[str, Any]]:
    rng = random.Random(f"evaluation of {seed}" if reserved else seed)
    scenes = sample_scenes(rng, count, lambda scene: scene.is_reserved == reserved and not scene.has_held_out_pair)
    return [{"image": draw_scene(scene, size), "caption": caption(scene, rng)} for scene in scenes]


def evaluation_scenes(
    count: int = 240, held_out: int = 80, seed: int = 0, size: int = 96
) -> list[tuple[Image.Image, Scene]]:
    """Pictures and the truth about them, of scenes never shown; `held_out` of them show a held-out pair."""
    rng = random.Random(f"evaluation, seed {seed}")
    scenes = sample_scenes(rng, count - held_out, lambda scene: scene.is_reserved and not scene.has_held_out_pair)
    scenes += sample_scenes(rng, held_out, lambda scene: scene.is_reserved and scene.has_held_out_pair)
    return [(draw_scene(scene, size), scene) for scene in scenes]
