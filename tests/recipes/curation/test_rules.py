"""Rules: what each catches, what it has to let pass, and which text a row goes on with."""

from collections import Counter

import pytest

from recipes_minigpt4.curation.rules import RULES, chosen_text, verdicts


DRAFT = (
    "The image shows a brown dog that runs over a green field. It has a red ball in its mouth. In the background "
    "there are tall trees and a wooden fence, and the sky is blue with a few white clouds."
)
GOOD = (
    "A brown dog runs over a green field with a red ball in its mouth. Tall trees and a wooden fence stand in the "
    "background, and a few white clouds are in the blue sky."
)


def caught(mended: str | None, draft: str = DRAFT) -> set[str]:
    """The rules that say something about one text, beside one that is good."""
    return set(verdicts({"a": (mended, draft), "b": (f"{GOOD} It is noon.", DRAFT)})["a"])


CAUGHT = {
    "unmended": [None, "", "  \n"],
    "apology": [
        f"I'm sorry I made a mistake. {GOOD}",
        f"I apologize for that. {GOOD}",
        f"{GOOD} My apologies for the error.",
        f"Sorry, the dog is brown. {GOOD}",
    ],
    "refusal": [
        "As an AI language model, I see no picture here, but there may well be a dog in it.",
        f"{GOOD} I cannot tell what the man does.",
        "Please provide the paragraph that you want me to fix, and I will gladly do it.",
        "I'm unable to see the image of the dog, the green field and the trees in the background.",
    ],
    "already_correct": [
        "The paragraph is already correct, but it has unnecessary repetition.",
        "There are no errors in the given paragraph, although some sentences are repeated.",
    ],
    "incomplete": [f"{GOOD} The last sentence is incomplete.", "The paragraph is incomplete."],
    "short": ["A brown dog runs over a green field.", "."],
    "marks": [
        f"{GOOD} ###",
        f"{GOOD} ###Human: Continue",
        f"{GOOD}\nAssistant: yes.",
        f"<s>{GOOD}",
        f"{GOOD}<|im_end|>",
        f"<Img><ImageHere></Img> {GOOD}",
        f"[INST] {GOOD}",
        f"{GOOD} \ufffd",
    ],
    "repetition": [
        f"{GOOD} A brown dog runs over a green field with a red ball in its mouth.",
        f"{GOOD} The dog is very very very big.",
        "On the left side of the image there is a brown dog, on the right side of the image there is a brown dog.",
    ],
    "unfinished": [GOOD.removesuffix("."), f"{GOOD} There is also a"],
    "language": [
        "Ein brauner Hund läuft über eine grüne Wiese und hat einen roten Ball im Maul. Im Hintergrund sind Bäume.",
        "一只棕色的狗叼着一个红色的球跑过绿色的田野。背景中有高大的树木和一道木栅栏,天空是蓝色的,有几朵白云。",
        f"{GOOD} Le chien est dans le champ avec une balle et il court sur la pelouse verte avec les enfants.",
    ],
    "preamble": [
        f"Sure! {GOOD}",
        f"Here is the corrected paragraph: {GOOD}",
        f"Corrected version:\n{GOOD}",
        f'"{GOOD}"',
        f"“{GOOD}”",
        f"'{GOOD}'",
        f"{GOOD}\n\nNote: two sentences were joined.",
        f"{GOOD} I have removed the repeated sentences.",
    ],
    "drifted": [
        "Paris is the capital of France and one of the most visited cities of the world, with many famous museums.",
        GOOD + " It is a lovely day, and he may well be happy about his walk with the whole family." * 3,
        "A brown dog runs, and the sky above it is blue.",
    ],
}


@pytest.mark.parametrize(("rule", "mended"), [(rule, text) for rule, texts in CAUGHT.items() for text in texts])
def test_a_rule_catches(rule: str, mended: str | None) -> None:
    assert rule in caught(mended)


PASSES = [
    GOOD,
    DRAFT,
    "The dog looks sorry, for the ball on the green field has been completely torn. There are tall trees and clouds.",
    "A sign on the fence says “no changes without notice”. Behind it, a brown dog runs over a green field in the sun.",
    "The dog, the field and the trees are brown, green and tall; the sky is blue, and the ball in its mouth is red!",
    'The word "Stop" stands on a red sign in the green field. Behind the brown dog are trees and a fence: "Beware".',
    "Here are three things in the green field: a brown dog, a red ball and a wooden fence. The sky above it is blue.",
    "Sure-footed goats and a brown dog run over the green field with a red ball. There are trees and a blue sky.",
    "In Zürich, a brown dog runs over a green field near a café with a red ball in its mouth. The sky is blue.",
    "The clock on the wooden fence is already correct. A brown dog runs over the green field with a red ball, past "
    "tall trees, while white clouds move over the blue sky in the background of the image.",
    "The dog's ball isn't big. It's red, and the dog that runs over the green field has got it in its mouth at last…",
]


@pytest.mark.parametrize("mended", PASSES)
def test_rules_let_descriptions_pass(mended: str) -> None:
    assert caught(mended) == set()
    assert chosen_text(f" {mended}\n", DRAFT) == mended


def test_every_rule_has_cases() -> None:
    assert {*CAUGHT, "shared"} == set(RULES)


# ---- already correct ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        "The paragraph is already correct.",
        "Already correct.",
        "The given paragraph is already grammatically correct.",
        "There are no errors in the paragraph.",
        "No changes needed.",
        "The input is correct, so nothing was changed.",
        f"The text is already correct: {GOOD}",
    ],
)
def test_an_answer_that_all_is_correct_keeps_the_draft(answer: str) -> None:
    assert chosen_text(answer, DRAFT) == DRAFT
    assert caught(answer) == set()


def test_the_draft_that_is_kept_is_judged_itself() -> None:
    assert caught("The paragraph is already correct.", "A dog runs") >= {"short", "unfinished"}


def test_that_many_drafts_are_correct_is_no_shared_text() -> None:
    drafts = {str(place): DRAFT.replace("brown", colour) for place, colour in enumerate(("black", "white", "yellow"))}
    told = verdicts({digest: ("The paragraph is already correct.", draft) for digest, draft in drafts.items()})
    assert told == {digest: {} for digest in drafts}


# ---- among others ---------------------------------------------------------------------------------------------------


def test_one_answer_under_4000_pictures_is_noticed() -> None:
    """What happened to the data of a stage 2 once: most pictures had the description of another one."""
    texts = {str(place): (GOOD, f"{DRAFT} It is number {place}.") for place in range(4000)}
    texts["other"] = (DRAFT, DRAFT)
    texts |= {"failed": (None, DRAFT), "failed too": (None, DRAFT)}
    told = verdicts(texts)
    counts = Counter(rule for of_text in told.values() for rule in of_text)
    assert counts == {"shared": 4000, "unmended": 2}
    assert told["0"]["shared"] == "under 3,999 other pictures"
    assert told["other"] == {}


def test_spaces_and_capitals_hide_no_shared_text() -> None:
    told = verdicts({"a": (GOOD, DRAFT), "b": (GOOD.upper().replace(" ", "  "), DRAFT)})
    assert set(told["a"]) == set(told["b"]) == {"shared"}


def test_a_draft_that_repeats_itself_may_become_much_shorter() -> None:
    draft = f"{DRAFT} " + "The sky is blue with a few white clouds. " * 20
    assert caught(GOOD, draft) == set()


def test_drafts_in_another_language_are_not_asked_to_be_english() -> None:
    draft = "Ein brauner Hund läuft über eine grüne Wiese. Er hat einen roten Ball im Maul, und die Bäume sind hoch."
    mended = "Ein brauner Hund läuft mit einem roten Ball im Maul über eine grüne Wiese, und die Bäume sind hoch."
    greek = "Ένα καφέ σκυλί τρέχει σε ένα πράσινο λιβάδι με μια κόκκινη μπάλα στο στόμα του, και τα δέντρα είναι ψηλά."
    told = verdicts({"a": (mended, draft), "b": (greek, draft)})
    assert told["a"] == {}
    assert told["b"]["language"] == "letters of another script"
