"""People as judges: a page on which they say yes or no, and the file of decisions that comes back."""

import random
from collections.abc import Sequence
from pathlib import Path

from recipes_minigpt4.evaluation.pictures import picture_uri
from recipes_minigpt4.evaluation.suite import Case, Suite, Verdict
from recipes_minigpt4.utils.decision_page import (
    SKIP,
    Choice,
    DecisionCase,
    DecisionPage,
    read_decisions,
    render_decisions,
)
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import replace_text


HUMAN = "human"  # the judge that writes pages; with a colon and a file behind it, the one that has judged
CHOICES = (Choice("1", "yes", "Yes"), Choice("2", "no", "No"), Choice("3", SKIP, "Skip"))
ANSWERS = {"yes": True, "no": False}
ABOUT = (
    "Answer with the keys 1, 2 and 3, or with the buttons; ← goes back. Which model spoke is not told. This browser "
    "keeps your answers, so you may close the page and go on later. Save the file at the end."
)


def decision_case(suite: Suite, case: Case, question: str) -> DecisionCase:
    """What a person is shown: the same for two models that said the same, and without any model's name."""
    reply = case.reply
    shown = {
        "suite": suite.name,
        "key": reply.key,
        "prompt": reply.prompt,
        "reply": reply.text,
        "question": question,
    }
    return DecisionCase(shown, reply.digest)


# ---- the page -------------------------------------------------------------------------------------------------------


def page_path(folder: Path, suite: Suite) -> Path:
    """Where the page of a suite is."""
    return folder / f"judge-{suite.name}.html"


def write_judge_page(folder: Path, suite: Suite, cases: Sequence[Case], seed: int) -> Path:
    """
    Write the page on which a person judges the replies of a suite.

    Args:
        folder: that of the replies, which has the pictures too.
        suite: whose replies.
        cases: of all models.
        seed: of the order in which replies are shown. The questions about one reply follow each other.

    Raises:
        RecipeError: if pictures are missing.
    """
    groups = {}
    for case in cases:
        if not case.reply.error:
            groups[case.reply.key, case.reply.text] = [decision_case(suite, case, text) for text in case.questions]
    order = sorted(groups)  # so that nothing tells whose reply stands where
    random.Random(seed).shuffle(order)
    shown = [one for group in order for one in groups[group]]
    found = {digest: picture_uri(folder, digest) for digest in {one.picture for one in shown}}
    pictures = {digest: uri for digest, uri in found.items() if uri is not None}
    if len(pictures) < len(found):
        raise RecipeError(
            f"--judge {HUMAN} shows the pictures, and {len(found) - len(pictures)} of {len(found)} are not in "
            f"{folder / 'pictures'}; run the command without --from_replies, with --models and --data, which asks "
            "nothing twice."
        )
    page = DecisionPage(
        f"Judge replies: {suite.title}",
        ABOUT,
        {"Prompt": "prompt", "Reply": "reply"},
        "question",
        CHOICES,
        f"decisions-{suite.name}.jsonl",
    )
    path = page_path(folder, suite)
    replace_text(path, render_decisions(page, shown, pictures))
    return path


# ---- the judge ------------------------------------------------------------------------------------------------------


class PersonJudge:
    """
    A person whose decisions are in a file.

    Args:
        path: what the page has saved, of one suite or of several.
        name: what tables call this judge.

    Raises:
        RecipeError: if it is no such file.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._decisions = read_decisions(path)

    def knows(self, suite: Suite) -> bool:
        """Whether the file has decisions on a suite, or lines that may have been such."""
        suites = {shown.get("suite") for shown in self._decisions.shown.values()}
        return suite.name in suites or not suites

    def verdicts(self, suite: Suite, cases: Sequence[Case]) -> list[Verdict]:
        """
        What the person said; None for what was skipped or is not in the file.

        Raises:
            RecipeError: if lines are about other replies, or were changed.
        """
        asked = [[decision_case(suite, case, text).id for text in case.questions] for case in cases]
        known = {one for of_case in asked for one in of_case}
        of_suite = [case for case, shown in self._decisions.shown.items() if shown.get("suite") == suite.name]
        self._refuse(len(of_suite), sum(case not in known for case in of_suite))
        answers = self._decisions.answers
        return [tuple(ANSWERS.get(answers.get(one, SKIP)) for one in of_case) for of_case in asked]

    def _refuse(self, whole: int, others: int) -> None:
        changed = self._decisions.changed
        if not others and not changed:
            return
        told = {"about other replies than those here": others, "changed after the page saved them": changed}
        reasons = ", ".join(f"{count} {text}" for text, count in told.items() if count)
        raise RecipeError(
            f"{others + changed} of the {whole + changed} decisions in {self.path} do not fit ({reasons}). Judge the "
            f"page that --judge {HUMAN} writes for these replies, or name the models and the folder that the file "
            "belongs to."
        )


def open_people(specs: Sequence[str]) -> list[PersonJudge]:
    """
    The judges `human:FILE`, each called as its file is.

    Raises:
        RecipeError: if a file is named twice, or is none that a page has saved.
    """
    paths = [Path(spec.partition(":")[2]).expanduser() for spec in specs]
    for place, path in enumerate(paths):
        if path.resolve() in {one.resolve() for one in paths[:place]}:
            raise RecipeError(f"--judge names {path} twice; a second judge needs a file of its own.")
    names = [path.name for path in paths]
    return [PersonJudge(path, f"{HUMAN}:{path.name if names.count(path.name) == 1 else path}") for path in paths]
