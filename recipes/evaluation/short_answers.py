"""Short answers to questions about pictures: how they are asked for, and when two of them are the same."""

import re

from recipes_minigpt4.evaluation.words import sentences_of, words_of


ASKED = "{} Answer in one word or a short phrase."
MAX_TOKENS = 24  # of a reply
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    word: str(number) for number, word in enumerate(words_of("zero one two three four five six seven eight nine"))
}
_NUMBERS |= {"ten": "10", "none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS = words_of(
    """ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shouldn't
    wasn't weren't won't wouldn't could've might've must've should've would've i've you've they've who've i'm you're
    they're he's she's that's there's what's where's who's how's it'd he'd they'd you'd who'd you'll they'll somebody's
    someone's something's o'clock y'all"""
)
_CONTRACTED = {word.replace("'", ""): word for word in _CONTRACTIONS}  # as people write them → with the apostrophe


def normalized(answer: str) -> str:
    """
    An answer as the VQA evaluation compares it (Antol et al., 2015).

    Lower case, without articles and punctuation, numbers up to ten in digits, contractions with their apostrophe. A
    mark between two letters becomes a space, one beside a space nothing; commas in numbers and full stops go, points
    in numbers stay.
    """
    text = whole = " ".join(answer.split())
    for mark in _MARKS:
        beside_a_space = f"{mark} " in whole or f" {mark}" in whole
        text = text.replace(mark, "" if beside_a_space or re.search(r"\d,\d", whole) else " ")
    text = re.sub(r"\.(?!\d)", "", text).lower()
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def chosen(text: str, choices: list[str]) -> int | None:
    """
    Which of several answers a reply chooses: it says that one in its first sentence and no other.

    A choice inside of a longer one that is said as well, "dog" in "hot dog", is not said. None if none is said, or
    several, or a "no" or "not" stands beside it.
    """
    first = normalized((sentences_of(text) or [""])[0])
    wanted = [normalized(choice) for choice in choices]
    if first in wanted:
        return wanted.index(first)
    said, rest = [], f" {first} "
    for place in sorted(range(len(wanted)), key=lambda place: -len(wanted[place])):
        if wanted[place] and f" {wanted[place]} " in rest:
            said.append(place)
            rest = rest.replace(f" {wanted[place]} ", " | ")
    denies = re.search(r"\b(?:no|not|neither|nor)\b|n't\b", rest)
    return said[0] if len(said) == 1 and not denies else None
