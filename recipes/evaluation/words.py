"""Words and sentences of a text, as the measures count them."""

import re
from collections.abc import Sequence


_WORD = re.compile(r"\w+(?:['’]\w+)*")
_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])[\"'”’)\]]*\s+|\n+")
FINISHED = ".!?…。！？"
_EMPTY = frozenset(  # words without content
    _WORD.findall(
        """a an and are as at be been being but by for from has have he her him his in into is it its of off on onto or
        out over she some that the their them there they this to under up was were while which who with"""
    )
)
_ANSWER = re.compile(r"\banswer\b(?:\s+is)?\W{0,4}\b(yes|no)\b", re.IGNORECASE)
_CLOSING = "\"'”’)]* "


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.lower() for word in _WORD.findall(text)]


def sentences_of(text: str) -> list[str]:
    """The sentences and lines of a text, without surrounding spaces."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def is_finished(text: str) -> bool:
    """Whether a text ends as sentences do; quotes and brackets may follow."""
    return text.rstrip(_CLOSING)[-1:] in tuple(FINISHED)


def ngrams(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    """Every `length` words in a row."""
    return [tuple(words[place : place + length]) for place in range(len(words) - length + 1)]


def repeated_share(words: Sequence[str], length: int = 4) -> float:
    """Share of the runs of `length` words, 0 to 1, that stood in the text before."""
    runs = ngrams(words, length)
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def stutters(words: Sequence[str]) -> bool:
    """Whether one to four words are said three times in a row."""
    text = " ".join(words)
    return re.search(r"(?<!\S)(\S+(?: \S+){0,3})(?: \1){2}(?!\S)", text) is not None


def content_share(wanted: str, text: str) -> float:
    """Share, 0 to 1, of the different content words of one text that another has too."""
    content = set(words_of(wanted)) - _EMPTY
    return len(content & set(words_of(text))) / len(content) if content else 1.0


def yes_or_no(text: str) -> bool | None:
    """
    What a text answers to a question, by its first word, its last word, and what it calls its answer.

    None if none of them is yes or no, or if they differ: a "no" somewhere in a sentence is no answer.
    """
    words = words_of(text)
    said = {*words[:1], *words[-1:], *map(str.lower, _ANSWER.findall(text))} & {"yes", "no"}
    return said == {"yes"} if len(said) == 1 else None
