"""The text the tiny language model learns from: the language of scenes, alt texts and chats. No picture is involved.

A document is a list of segments. Each is tokenized on its own, as a prompt's text before an image, its text after it
and the answer are, so that the spaces stand where the training rows have them.
"""

import random

from recipes_minigpt4.tiny.scenes import (
    BOILERPLATE_AFTER,
    COLOURS,
    MAX_THINGS,
    Scene,
    Thing,
    article,
    careless_size,
    count_phrase,
    describe,
    noisy_caption,
    sample_scenes,
)


SYSTEM = (
    "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
    "Please answer my questions."
)
DESCRIBE = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
    "Describe the image in detail.",
    "What do you see?",
    "Please describe this image as detailed as possible.",
)
SUMMARIZE = ("Describe the image in one sentence.", "Write a short caption for this image.", "What is this?")
SMALL_TALK = (
    ("Hello!", "Hello! Show me a picture and I will describe it."),
    ("Who are you?", "I am a small language model that knows about coloured shapes."),
    ("What can you do?", "I can describe simple pictures of coloured shapes."),
    ("Thank you!", "You are welcome."),
    ("How many sides does a triangle have?", "A triangle has three sides."),
    ("Which shape is round?", "A circle is round."),
    ("What is a square?", "A square is a shape with four equal sides."),
)
FACTS = (
    "A triangle has three sides and a square has four.",
    "A circle has no corners at all.",
    "Stars shine in the black sky.",
    "A heart is often red or pink.",
    "Grey is between black and white.",
    "An orange is orange and a plum is purple.",
    "The centre is in the middle of everything.",
    "What is not left may be right.",
    "Some shapes are large and some are small.",
    "Green and brown are the colours of trees.",
    "The sky is blue and the sun is yellow.",
)
NOTHING = "-"


def document(rng: random.Random) -> list[str]:
    """One document: a list of segments, each tokenized without special tokens.

    Like the web, the text has two manners, and what follows keeps to the manner of what went before: careful notes
    are followed by whole sentences, careless ones mostly by careless lines, in chats too.
    """
    (scene,) = sample_scenes(rng, 1, lambda scene: not scene.is_reserved)
    kind = rng.choices((_alt_texts, _chat, _prose), weights=(30, 60, 10))[0]
    return kind(scene, rng, careless=rng.random() < 0.4)


def notes(scene: Scene, rng: random.Random, careless: bool = False) -> str:
    """Key words for a scene in one of several layouts, at times with marks where nothing is.

    Careless notes say sizes as they like and fill their gaps with phrases that say nothing.
    """
    if rng.random() < 0.15:
        return noisy_caption(scene, rng) if careless else one_sentence(scene)
    words = [[thing.size, thing.colour, thing.shape, thing.row, thing.column] for thing in scene.things]
    gap = [NOTHING] * 5
    if careless:
        for group in words:
            group[0] = careless_size(group[0], rng)
        gap = rng.choices(" ".join(BOILERPLATE_AFTER).split(), k=5)
    if rng.random() < 0.15:
        order = rng.sample(range(5), 5)
        words = [[group[i] for i in order] for group in words]
    if rng.random() < 0.6:
        words += [gap] * (MAX_THINGS - len(words))
    words.append([scene.background])
    separator = rng.choices((" ", " , ", "\n"), weights=(8, 1, 1))[0]
    return rng.choice(("", "", " ")) + separator.join(" ".join(group) for group in words)


def _alt_texts(scene: Scene, rng: random.Random, careless: bool) -> list[str]:
    segments = [notes(scene, rng, careless) + rng.choice(("", "", "\n", " | ", " "))]
    lines = rng.choices((1, 2, 3), weights=(8, 1, 1))[0]
    segments += [(noisy_caption(scene, rng) if careless else one_sentence(scene)) + "\n" for _ in range(lines)]
    return segments


def _chat(scene: Scene, rng: random.Random, careless: bool) -> list[str]:
    """A chat about the notes between `<Img>` and `</Img>`; each answer ends with `###`, the next turn follows."""
    space = " " if rng.random() < 0.6 else ""  # the two templates differ by the space before "###Assistant"
    system = SYSTEM if rng.random() < 0.3 else ""
    segments = [system + "###Human: <Img>", notes(scene, rng, careless)]
    question, answer = _turn(scene, rng, first=True)
    if careless and rng.random() < 0.7:
        question, answer = rng.choice(DESCRIBE), careless_reply(scene, rng)
    segments += [f"</Img> {question}{space}###Assistant: ", answer]
    while rng.random() < 0.2:
        question, answer = _turn(scene, rng, first=False)
        segments[-1] += f"###Human: {question}{space}###Assistant: "
        segments.append(answer)
    segments[-1] += "###"
    return segments


def careless_reply(scene: Scene, rng: random.Random) -> str:
    """A reply in the manner of alt texts: the same things over and over, in no sentence that ends."""
    lines = [noisy_caption(scene, rng) for _ in range(rng.randint(1, 3))]
    return rng.choice((" , ", ". ", "\n", " and ")).join(lines)


def _turn(scene: Scene, rng: random.Random, first: bool) -> tuple[str, str]:
    """A question and its answer; the first is mostly the wish for a description."""
    draw = rng.random() * (1.0 if first else 0.4) + (0.0 if first else 0.6)
    if draw < 0.6:
        return rng.choice(DESCRIBE), describe(scene, rng)
    if draw < 0.7:
        return rng.choice(SUMMARIZE), one_sentence(scene)
    if draw < 0.75:
        return rng.choice(SMALL_TALK)
    return _question_about(scene, rng.choice(scene.things), rng)


def one_sentence(scene: Scene) -> str:
    """`"A red circle and a blue star on a grey background."`"""
    names = [f"{article(thing.colour)} {thing.colour} {thing.shape}" for thing in scene.things]
    joined = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return joined[0].upper() + joined[1:] + f" on a {scene.background} background."


def _question_about(scene: Scene, thing: Thing, rng: random.Random) -> tuple[str, str]:
    name = f"{thing.colour} {thing.shape}"
    there = [other for other in scene.things if other.colour == thing.colour]
    colour = rng.choice(list(COLOURS))
    return rng.choice(
        (
            (
                "How many shapes are there?",
                f"There {'is' if len(scene.things) == 1 else 'are'} {count_phrase(scene)}.",
            ),
            ("What colour is the background?", f"The background is {scene.background}."),
            (f"What is in the {thing.position}?", f"There is {article(thing.size)} {thing.size} {name}."),
            (f"What shape is {thing.colour}?", " ".join(f"The {t.shape} is {t.colour}." for t in there[:1])),
            (f"Where is the {name}?", f"The {name} is in the {thing.position}."),
            (f"Is there anything {colour}?", _yes_or_no(scene, colour)),
        )
    )


def _yes_or_no(scene: Scene, colour: str) -> str:
    for thing in scene.things:
        if thing.colour == colour:
            return f"Yes, there is {article(colour)} {colour} {thing.shape}."
    return f"No, nothing in the image is {colour}."


def _prose(scene: Scene, rng: random.Random, careless: bool) -> list[str]:
    if rng.random() < 0.2:
        question, answer = rng.choice(SMALL_TALK)
        return [f"###Human: {question} ###Assistant: ", answer + "###"]
    lines = [*rng.sample(FACTS, 2), describe(scene, rng), one_sentence(scene)]
    if careless:
        lines = [noisy_caption(scene, rng) for _ in range(3)]
    rng.shuffle(lines)
    return [rng.choice(("\n", " ")).join(lines[: rng.randint(1, 4)])]
