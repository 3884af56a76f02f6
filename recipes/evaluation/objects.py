"""Things that a text names: words of one part or several, their plurals, and the kinds of things they stand for."""

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from recipes_minigpt4.evaluation.words import words_of
from recipes_minigpt4.utils.errors import RecipeError, one_line


COCO_SYNONYMS = Path(__file__).with_name("coco_synonyms.txt")
NOTHING = "-"  # instead of a name: words that stand for no kind
_CLAUSE_END = re.compile(r"[^\w\s'’-]+|\n+")  # a name does not go on behind a comma
_IRREGULAR = {
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "human": "humans",
    "sheep": "sheep",
    "knife": "knives",
    "calf": "calves",
    "loaf": "loaves",
    "shelf": "shelves",
    "leaf": "leaves",
    "wolf": "wolves",
    "wife": "wives",
}


class Synonyms:
    """
    Words for kinds of things.

    Args:
        lines: per line a kind's name and other words for it; `-` for a name lists words that stand for no kind.
            Plurals follow by rule. Several lines may be about the same kind.
    """

    def __init__(self, lines: Iterable[Sequence[str]]) -> None:
        written: dict[tuple[str, ...], str | None] = {}
        for name, *others in lines:
            for words in others if name == NOTHING else (name, *others):
                written[tuple(words_of(words))] = None if name == NOTHING else name
        plurals = {plural: name for words, name in written.items() if words for plural in _plurals(words)}
        self._kinds = {**plurals, **written}  # what is written down counts more than what a rule makes
        self._longest = max(map(len, self._kinds), default=0)
        self.kinds = {kind for kind in self._kinds.values() if kind is not None}

    def named(self, text: str) -> list[str]:
        """
        The kinds of things that a text names, in order, as often as it does.

        Of the runs of words that begin at a place the longest counts, and what it has taken is read no more.
        """
        kinds: list[str] = []
        for clause in _CLAUSE_END.split(text):
            words = [re.sub(r"['’]s$|['’]$", "", word) for word in words_of(clause)]
            place = 0
            while place < len(words):
                run = self._run(words[place : place + self._longest])
                kind = self._kinds.get(run)
                kinds += [kind] if kind is not None else []
                place += max(1, len(run))
        return kinds

    def kind(self, name: str) -> str | None:
        """The kind that a name stands for as a whole, its own name first; None for a word that is not known."""
        return name if name in self.kinds else self._kinds.get(tuple(words_of(name)))

    def _run(self, words: Sequence[str]) -> tuple[str, ...]:
        """The longest run of words at the start that is known; empty if none is."""
        runs = (tuple(words[:length]) for length in range(len(words), 0, -1))
        return next((run for run in runs if run in self._kinds), ())


@cache
def open_synonyms(path: Path = COCO_SYNONYMS) -> Synonyms:
    """
    The words of a file: a line per kind, its name and other words, separated by commas; `#` begins a remark.

    The file that CHAIR's authors published has the same form.

    Raises:
        RecipeError: if it cannot be read, or says nothing.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"--synonyms {path} cannot be read ({one_line(error)}); name a file of text.") from error
    lines = [[words.strip() for words in line.split("#")[0].split(",") if words.strip()] for line in text.splitlines()]
    if not any(lines):
        raise RecipeError(f"--synonyms {path} is empty; write lines such as `person, man, woman` into it.")
    return Synonyms(line for line in lines if line)


def _plurals(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The same words with the last one in the plural, in each spelling that a rule makes."""
    *first, last = words
    return [(*first, plural) for plural in plurals_of(last)]


def plurals_of(word: str) -> list[str]:
    """The plural of a word; more than one where rules differ."""
    if word in _IRREGULAR:
        return [_IRREGULAR[word], *(["persons"] if word == "person" else [])]
    if word.endswith("man"):
        return [f"{word[:-2]}en"]
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return [f"{word}es"]
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return [f"{word[:-1]}ies"]
    return [f"{word}s", f"{word}es"] if word.endswith("o") else [f"{word}s"]
