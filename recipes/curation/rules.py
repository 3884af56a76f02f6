"""Rules with names: a mended text → why it is no good, or nothing.

A rule drops nothing by itself. What each says is kept with its row, and the export chooses which of them count.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from recipes_minigpt4.evaluation.words import is_finished, repeated_share, sentences_of, stutters, words_of


class Text(NamedTuple):
    """
    What a rule looks at.

    Args:
        mended: what the mender made of the draft; None if it gave no answer.
        draft: what the model said.
        others: under how many other pictures the same mended text stands.
    """

    mended: str | None
    draft: str
    others: int = 0


SHORTEST = 50  # characters of a description (the original's script)
REPEATED = 0.2  # share of repeated runs of four words
LENGTHS = (0.4, 2.0)  # words of the mended text, as a share of those of the draft
OVERLAP = 0.3  # share of the mended text's words that the draft has
_APOLOGY = re.compile(
    r"\b(i'?m|i am) (very |so |really )?sorry\b|\bi apologi[sz]e\b|\bapologies\b|\bmy mistake\b", re.I
)
_REFUSAL = re.compile(
    r"\bas an ai\b|\b(language model|ai assistant)\b|\bi (can(no|')t|am unable to|do not have access|don't have access)\b"
    r"|\bplease provide\b",
    re.I,
)
_CORRECT = re.compile(
    r"\balready (correct|accurate|grammatical|error[- ]free)|\b(no|without) (errors?|mistakes?|corrections?|changes?)\b"
    r"|\bparagraph is (correct|fine|error[- ]free)",
    re.I,
)
_MARKS = re.compile(
    r"###|<\|?/?(s|im_start|im_end|img|image|unk|pad|endoftext|user|assistant)\b[^>]*>|\[/?INST\]|\b(Human|Assistant|User|System):",
    re.I,
)
_PREAMBLE = re.compile(
    r"^\W*(sure|certainly|of course|okay|here('s| is| are)|the (corrected|revised|fixed|improved|edited|mended)|"
    r"(corrected|revised|fixed|improved|edited) (paragraph|version|text|description))\b[^.!?\n]*[:!]",
    re.I,
)
_QUOTED = re.compile(r"^\s*[\"“'‘`].*[\"”'’`]\s*$", re.S)


def unmended(text: Text) -> str | None:
    """The mender gave no answer, or an empty one."""
    return "no answer" if not (text.mended or "").strip() else None


def apology(text: Text) -> str | None:
    """It apologizes."""
    found = _APOLOGY.search(text.mended or "")
    return found and f"“{found.group()}”"


def refusal(text: Text) -> str | None:
    """It speaks of itself, or asks for something, instead of describing."""
    found = _REFUSAL.search(text.mended or "")
    return found and f"“{found.group()}”"


def already_correct(text: Text) -> str | None:
    """It says that nothing is to be mended, and speaks of repetition all the same. Without that the draft is kept."""
    found = _CORRECT.search(text.mended or "")
    return found and f"“{found.group()}”"


def incomplete(text: Text) -> str | None:
    """It says that something is incomplete."""
    return "“incomplete”" if re.search(r"\bincomplete\b", text.mended or "", re.I) else None


def short(text: Text) -> str | None:
    """It has fewer than 50 characters."""
    length = len((text.mended or "").strip())
    return f"{length} characters" if length < SHORTEST else None


def marks(text: Text) -> str | None:
    """Marks of a template or a chat stand in it."""
    found = _MARKS.search(text.mended or "")
    return found and f"“{found.group()}”"


def repetition(text: Text) -> str | None:
    """A sentence stands in it twice, one to four words stand three times in a row, or much stands again."""
    words = words_of(text.mended or "")
    parts = [tuple(words_of(part)) for part in sentences_of(text.mended or "")]
    counts = Counter(part for part in parts if len(part) > 3)
    if counts and counts.most_common(1)[0][1] > 1:
        return f"“{' '.join(counts.most_common(1)[0][0])}”"
    if stutters(words):
        return "words three times in a row"
    share = repeated_share(words)
    return f"{share:.0%} of its runs of four words stood before" if share > REPEATED else None


def unfinished(text: Text) -> str | None:
    """Its last sentence does not end."""
    mended = (text.mended or "").strip()
    return f"“{mended[-30:]}”" if mended and not is_finished(mended) else None


def language(text: Text) -> str | None:
    """It is not in the language of the draft: it has few letters of the same script, or hardly a word of it."""
    letters = [letter for letter in text.mended or "" if letter.isalpha()]
    other = sum(letter > "\u024f" for letter in letters)
    drafted = [letter for letter in text.draft if letter.isalpha()]
    foreign = sum(letter > "\u024f" for letter in drafted)
    if letters and other / len(letters) > 0.2 + (foreign / len(drafted) if drafted else 0):
        return "letters of another script"
    return None


def preamble(text: Text) -> str | None:
    """The mender speaks before the text, or puts it in quotes."""
    mended = text.mended or ""
    if found := _PREAMBLE.search(mended):
        return f"“{found.group().strip()}”"
    return "in quotes" if _QUOTED.match(mended) else None


def drifted(text: Text) -> str | None:
    """It says other things than the draft: it is much shorter or longer, or shares few words with it."""
    mended, draft = words_of(text.mended or ""), words_of(text.draft)
    if not mended or not draft:
        return None
    length = len(mended) / len(draft)
    if not LENGTHS[0] <= length <= LENGTHS[1]:
        return f"{length:.1f} times as many words"
    shared = sum((Counter(mended) & Counter(draft)).values()) / len(mended)
    return f"{shared:.0%} of its words are the draft's" if shared < OVERLAP else None


def shared(text: Text) -> str | None:
    """The same text stands under other pictures too."""
    return f"under {text.others} other pictures" if text.others else None


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
        Digest → rule → why; rules that have nothing to say are left out.
    """
    counts = Counter(" ".join(words_of(mended)) for mended, _ in texts.values() if mended)
    told = {}
    for digest, (mended, draft) in texts.items():
        others = counts[" ".join(words_of(mended))] - 1 if mended else 0
        text = Text(mended, draft, others)
        told[digest] = {name: why for name, rule in RULES.items() if (why := rule(text))}
    return told


def chosen_text(mended: str | None, draft: str) -> str | None:
    """
    The text that a row goes on with.

    An answer that only says that the draft is correct already keeps the draft, as the original's script does, unless
    it speaks of repetition too.
    """
    if mended is None:
        return None
    told = _CORRECT.search(mended)
    if told and not re.search(r"\brepetiti", mended, re.I) and len(words_of(mended)) < 30:
        return draft
    return mended.strip()


def broken(rules: Sequence[str], told: Mapping[str, str]) -> list[str]:
    """Those of the rules that count which a row breaks."""
    return [name for name in rules if name in told]
