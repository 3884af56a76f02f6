"""A-OKVQA's multiple choice by generation: the question with lettered choices, and the choice that a reply names."""

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.evaluation.harness.served import checked


_ALONE = re.compile(r"\W*([A-Za-z])\W*")
_BRACKETS = re.compile(r"\(([A-Z])\)")
_IN_FRONT = re.compile(r"\A\W*([A-Z])[.):]\s")
_ANNOUNCED = re.compile(r"\b(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*\(?([B-Z]\b|A\b(?![ '’-]\w))")


def question(doc: Mapping[str, Any]) -> str:
    """The question, its choices, and how to answer; the picture stands in front (`with_picture`)."""
    choices = "\n".join(f"({letter}) {choice}" for letter, choice in _lettered(doc["choices"]).items())
    return f"{doc['question']}\n{choices}\nAnswer with the letter of the right choice."


def with_picture(doc: Mapping[str, Any]) -> str:
    """`question` as lm-evaluation-harness takes it, with the place of the picture."""
    return f"<image>{question(doc)}"


def pictures(doc: Mapping[str, Any]) -> list[Any]:
    """The picture of a row, which may stand there as a path."""
    return [open_image(doc["image"], keep_transparency=True)]


def right_letter(doc: Mapping[str, Any]) -> str:
    """The letter of the right choice."""
    return string.ascii_uppercase[doc["correct_choice_idx"]]


def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the reply names the right choice (`acc`), and whether it cannot be read (`unread`), which is wrong."""
    named = read_choice(checked(results[0]), doc["choices"])
    return {"acc": float(named == doc["correct_choice_idx"]), "unread": float(named is None)}


def read_choice(reply: str, choices: Sequence[str]) -> int | None:
    """
    The number of the choice that a reply names, by its letter or in its own words; None if that cannot be told.

    A letter counts where it can be no word: alone, in brackets, in front of a dot, or announced ("the answer is B").
    Two letters, or two choices of which neither is part of the other, are no answer.
    """
    letters = list(_lettered(choices))
    if alone := _ALONE.fullmatch(reply):
        found = [alone.group(1).upper()]
    else:
        found = _BRACKETS.findall(reply) or _IN_FRONT.findall(reply) or _ANNOUNCED.findall(reply)
    named = {letters.index(letter) for letter in found if letter in letters} or _in_words(reply, choices)
    return named.pop() if len(named) == 1 else None


def _in_words(reply: str, choices: Sequence[str]) -> set[int]:
    """The choices whose words are in the reply, without those that stand only inside a longer one."""
    text, named = reply, set()
    for number in sorted(range(len(choices)), key=lambda number: -len(choices[number])):
        pattern = rf"(?<!\w){re.escape(choices[number].strip())}(?!\w)"
        if choices[number].strip() and re.search(pattern, text, re.IGNORECASE):
            named.add(number)
            text = re.sub(pattern, " ", text, flags=re.IGNORECASE)
    return named


def _lettered(choices: Sequence[str]) -> dict[str, str]:
    return dict(zip(string.ascii_uppercase, choices, strict=False))
