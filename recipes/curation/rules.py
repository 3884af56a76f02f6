"""Rules with names: a text → why it is no good, or nothing.

A rule drops nothing by itself. What each says is kept with its row, and the export chooses which of them count.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from recipes_minigpt4.evaluation.languages import is_english
from recipes_minigpt4.evaluation.words import (
    content_share,
    is_finished,
    repeated_share,
    sentences_of,
    stutters,
    words_of,
)


class Text(NamedTuple):
    """
    What a rule looks at.

    Args:
        mended: what the mender answered; None if it did not.
        draft: what the model said.
        text: what the row goes on with, see `chosen_text`; empty if there is none.
        others: under how many other pictures the same text stands.
        in_english: whether the drafts, taken together, are in English.
    """

    mended: str | None
    draft: str
    text: str
    others: int = 0
    in_english: bool = True


SHORTEST = 50  # characters of a description (the original's script)
REPEATED = 0.2  # share of repeated runs of four words
LENGTHS = (0.4, 2.0)  # words of the text, as a share of those of the draft without its repetitions
OVERLAP = 0.3  # share of the text's content words that the draft has
OTHER_SCRIPT = 0.2  # share of letters outside of the Latin script that a text may have more than its draft
REMARK = 30  # words of an answer that is a remark and no description

_APOLOGY = re.compile(
    r"\b(i'?m|i am|we'?re|we are) (very |so |really |truly )?sorry\b|^\W*sorry\b|\b(i|we) apologi[sz]e\b"
    r"|\b(my|our) (sincere |deepest )?apologies\b|\bapologies for\b|\b(my mistake|i made a mistake)\b",
    re.I,
)
_REFUSAL = re.compile(
    r"\bas an? (ai|artificial intelligence|language model)\b|\b(language model|ai assistant)\b"
    r"|\bi (can ?not|can't|could not|couldn't|do not have|don't have|do not see|don't see)\b"
    r"|\bi(?:'m| am) (unable|not able)\b|\b(please|could you|can you) (please )?(provide|share|upload)\b"
    r"|\bno (paragraph|text|input|image) (is|was|has been) (given|provided)\b",
    re.I,
)
_CORRECT = re.compile(
    r"\balready (grammatically )?(correct|accurate|grammatical|error[- ]free|well[- ]written|fine)\b"
    r"|\b(no|without( any)?) (grammatical |further |spelling )?(errors?|mistakes?|corrections?|changes?|edits?)\b"
    r"|\b(is|are|seems|appears|looks) (to be )?(grammatically )?(correct|error[- ]free)\b"
    r"|\b(does not|doesn't|do not|don't) (need|require|contain|have) (any )?(errors?|mistakes?|corrections?|changes?)",
    re.I,
)
_BARE = re.compile(r"\W*((it|this|all|everything) is )?(already|no|there (are|is) no)\b", re.I)
_ABOUT_TEXT = re.compile(r"\b(paragraph|text|input|passage|sentences?|description|given|grammar)\b", re.I)
_MARKS = re.compile(
    r"###|<\|[^<>|\s]+\|>|</?(s|img|image|imagehere|imagefeature|unk|pad|bos|eos)>|<0x[0-9a-f]{2}>|\[/?INST\]|<</?SYS>>"
    r"|\ufffd|```|(^|[.!?\n])\s*(human|assistant|user|system|input|output|paragraph)\s*:",
    re.I,
)
_MENDED = r"(corrected|revised|fixed|improved|edited|mended|rewritten|polished|cleaned)([- ]up)?"
_VERSION = r"(paragraph|text|version|description|passage|revision|rewrite|result)"
_PREAMBLE = re.compile(
    r"^\W*(sure|certainly|of course|okay|ok|absolutely|gladly)( thing)?\s*[,!:.]"
    rf"|^\W*(here('s|’s| is| are)|below is) (the|your|an?|my) (\w+[ -]){{0,3}}{_VERSION}\b"
    rf"|^\W*((the|my|your) )?{_MENDED} {_VERSION}\b[^.!?\n]*:",
    re.I,
)
_AFTERWORD = re.compile(
    r"(^|\n|[.!?]\s|\()\s*(note|explanation|changes( made)?|corrections?)\s*:"
    rf"|\bi(?:'ve|’ve| have)? (also )?({_MENDED}|removed|replaced|changed) (the|a|any|all|some|this|your|it)\b",
    re.I,
)
_QUOTED = re.compile(r'^\s*(["“”„«][^"“”„«»]*["”“»]|[\'‘].*[\'’]|`.*`)\s*$', re.S)


def chosen_text(mended: str | None, draft: str) -> str | None:
    """
    The text that a row goes on with; None if the mender gave no answer.

    An answer that says that nothing is to be mended keeps the draft, as the original's script has it.
    """
    if mended is None:
        return None
    return draft.strip() if says_correct(mended) else mended.strip()


def says_correct(mended: str) -> str | None:
    """The words of an answer by which it says that nothing is to be mended; None if it does not."""
    short = len(words_of(mended)) < REMARK
    for sentence in sentences_of(mended):
        found = _CORRECT.search(sentence)
        if found and (_ABOUT_TEXT.search(sentence) or (short and _BARE.match(sentence))):
            return found.group()
    return None


# ---- the rules ------------------------------------------------------------------------------------------------------


def unmended(text: Text) -> str | None:
    """The mender gave no answer, or an empty one."""
    return None if (text.mended or "").strip() else "no answer"


def apology(text: Text) -> str | None:
    """It apologizes."""
    return _quote(_APOLOGY.search(text.text))


def refusal(text: Text) -> str | None:
    """It speaks of what it cannot do, or asks for something, instead of describing."""
    return _quote(_REFUSAL.search(text.text))


def already_correct(text: Text) -> str | None:
    """The mender says that nothing is to be mended, and speaks of repetition all the same."""
    mended = text.mended or ""
    return _quote(re.search(r"\brepetiti\w+|\brepeat\w*", mended, re.I)) if says_correct(mended) else None


def incomplete(text: Text) -> str | None:
    """The mender says that something is incomplete."""
    return _quote(re.search(r"\bincomplete\b", text.mended or "", re.I))


def short(text: Text) -> str | None:
    """It has fewer than 50 characters."""
    length = len(text.text)
    return f"{length} characters" if length < SHORTEST else None


def marks(text: Text) -> str | None:
    """Marks of a template or a chat stand in it."""
    return _quote(_MARKS.search(text.text))


def repetition(text: Text) -> str | None:
    """A sentence stands in it twice, one to four words stand three times in a row, or much stands again."""
    words = words_of(text.text)
    parts = [tuple(words_of(part)) for part in sentences_of(text.text)]
    counts = Counter(part for part in parts if len(part) > 3)
    if counts and counts.most_common(1)[0][1] > 1:
        return f"“{' '.join(counts.most_common(1)[0][0])}”"
    if stutters(words):
        return "words three times in a row"
    share = repeated_share(words)
    return f"{share:.0%} of its runs of four words stood before" if share > REPEATED else None


def unfinished(text: Text) -> str | None:
    """Its last sentence does not end."""
    return f"“{text.text[-30:]}”" if text.text and not is_finished(text.text) else None


def language(text: Text) -> str | None:
    """It is in another language than the drafts: not in English where they are, or in letters of another script."""
    if text.in_english:
        return None if is_english(text.text) else "not in English"
    return "letters of another script" if _foreign(text.text) > OTHER_SCRIPT + _foreign(text.draft) else None


def preamble(text: Text) -> str | None:
    """The mender speaks of its work before or behind the text, or puts it in quotes."""
    if found := _PREAMBLE.search(text.text) or _AFTERWORD.search(text.text):
        return _quote(found)
    return "in quotes" if _QUOTED.match(text.text) else None


def drifted(text: Text) -> str | None:
    """It says other things than the draft: it is much shorter or longer, or shares few words with it."""
    words, before = words_of(text.text), words_of(" ".join(dict.fromkeys(sentences_of(text.draft))))
    if not words or not before:
        return None
    length = len(words) / len(before)
    if not LENGTHS[0] <= length <= LENGTHS[1]:
        return f"{length:.1f} times as many words"
    same = content_share(text.text, text.draft)
    return f"{same:.0%} of its words are the draft's" if same < OVERLAP else None


def shared(text: Text) -> str | None:
    """The same text stands under other pictures too."""
    return f"under {text.others:,} other pictures" if text.others else None


RULES: dict[str, Callable[[Text], str | None]] = {
    rule.__name__: rule
    for rule in (
        unmended, apology, refusal, already_correct, incomplete, short, marks, repetition, unfinished, language,
        preamble, drifted, shared,
    )
}  # fmt: skip


def verdicts(texts: Mapping[str, tuple[str | None, str]]) -> dict[str, dict[str, str]]:
    """
    What the rules say about every text.

    Args:
        texts: digest of a picture → its mended text and its draft.

    Returns:
        Digest → rule → why; rules that have nothing to say are left out. Of a text that is not there, only that.
    """
    chosen = {digest: chosen_text(*pair) or "" for digest, pair in texts.items()}
    same = {digest: " ".join(words_of(text)) for digest, text in chosen.items()}
    counts = Counter(filter(None, same.values()))
    in_english = 2 * sum(is_english(draft) for _, draft in texts.values()) >= len(texts)
    told: dict[str, dict[str, str]] = {}
    for digest, (mended, draft) in texts.items():
        text = Text(mended, draft, chosen[digest], max(0, counts[same[digest]] - 1), in_english)
        rules = RULES if unmended(text) is None else {unmended.__name__: unmended}
        told[digest] = {name: why for name, rule in rules.items() if (why := rule(text))}
    return told


def _quote(found: re.Match[str] | None) -> str | None:
    return f"“{' '.join(found.group().split())}”" if found else None


def _foreign(text: str) -> float:
    """Share of letters, 0 to 1, outside of the Latin script."""
    letters = [letter for letter in text if letter.isalpha()]
    return sum(letter > "\u024f" for letter in letters) / len(letters) if letters else 0.0
