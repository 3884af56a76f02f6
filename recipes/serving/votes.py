"""What people prefer: votes on comparisons, in files that `minigpt4 evaluate` reads."""

import datetime
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.pictures import keep_pictures
from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.replies import Reply, ReplyStore
from recipes_minigpt4.evaluation.run_facts import keep_facts
from recipes_minigpt4.evaluation.suites.votes import ALL_BAD, BEST, TIE, Votes
from recipes_minigpt4.serving.compare import Comparison
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal
from recipes_minigpt4.utils.redaction import redact


FILE = "votes.jsonl"
ANSWERS = (BEST, TIE, ALL_BAD)


class BallotBox:
    """
    The votes of all who look at a page.

    They are in a folder for these very models, so that no number is about several: `votes.jsonl`, a line for each
    vote, and made from it `LABEL/votes/replies.jsonl` and small copies of the pictures, which
    `minigpt4 evaluate --from_replies --output_dir FOLDER` reads. The folder is made with the first vote.

    Args:
        parent: where the folder is made.
        talkers: label → model, of all that are compared.
    """

    def __init__(self, parent: Path, talkers: Mapping[str, Talker]) -> None:
        self._models = {label: (talker.name, str(talker.speaker.revision)) for label, talker in talkers.items()}
        self._places = folder_names(list(self._models))
        told = hashlib.sha256(repr(sorted((label, one[1]) for label, one in self._models.items())).encode())
        self.folder = parent / "-".join(["votes", *self._places.values(), told.hexdigest()[:8]])
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._stores: dict[str, ReplyStore] = {}
        self._known: set[str] = set()

    def add(self, comparison: Comparison, answer: str, best: str | None = None) -> bool:
        """
        Write a vote down, at once.

        Args:
            comparison: what was asked and said.
            answer: `best`, `tie` or `bad`.
            best: label of the best one.

        Returns:
            False if somebody has voted on this comparison before: one vote counts.

        Raises:
            RecipeError: if some model has not replied, or the vote cannot be written.
        """
        if not comparison.is_whole:
            raise RecipeError("Not all models have replied to their end, so there is nothing to vote on; ask again.")
        if answer not in ANSWERS or (best in comparison.order) != (answer == BEST):
            raise RecipeError(f"{answer} is no vote; name the best one, or say tie or bad.")
        with self._lock:
            journal = self._open()
            if comparison.id in self._known:
                return False
            keep_pictures(self.folder, [Question(comparison.picture, comparison.prompt)])
            journal.append(_line(comparison, answer, best, self._models))
            self._known.add(comparison.id)
            self._tell_evaluation(journal.lines[-1])
            return True

    def close(self) -> None:
        """Let others write."""
        with self._lock:
            for one in (self._journal, *self._stores.values()):
                if one is not None:
                    one.close()
            self._journal, self._stores = None, {}

    def _open(self) -> Journal:
        if self._journal is None:
            journal = Journal(self.folder / FILE)
            try:
                stores = {label: ReplyStore(self.folder / place / Votes.name) for label, place in self._places.items()}
                names = {place: self._models[label][0] for label, place in self._places.items()}
                keep_facts(self.folder, names, {Votes.name: "minigpt4 app"})
            except BaseException:
                journal.close()
                raise
            self._journal, self._stores = journal, stores
            self._known = {str(line["id"]) for line in journal.lines}
            for line in journal.lines:
                self._tell_evaluation(line)  # what a kill kept from being told
        return self._journal

    def _tell_evaluation(self, line: Mapping[str, Any]) -> None:
        """Write the replies of a vote down, each once."""
        for label, said in line["models"].items():
            reply = Reply(
                line["id"],
                said["revision"],
                line["picture"],
                line["digest"],
                line["prompt"],
                line["settings"],
                facts={"vote": _seen_from(label, line), "blind": line["blind"]},
                text=said["text"],
            )
            if not self._stores[label].has(reply):
                self._stores[label].append(reply)


def _line(
    comparison: Comparison, answer: str, best: str | None, models: Mapping[str, tuple[str, str]]
) -> dict[str, Any]:
    """A vote, with all that was shown."""
    return {
        "id": comparison.id,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "vote": answer,
        "best": best,
        "blind": comparison.blind,
        "order": list(comparison.order),
        "picture": comparison.picture.name,
        "digest": comparison.picture.digest,
        "prompt": comparison.prompt,
        "settings": asdict(comparison.settings),
        "models": {
            label: {"name": redact(name), "revision": revision, "text": comparison.told[label].text}
            for label, (name, revision) in models.items()
        },
    }


def _seen_from(label: str, line: Mapping[str, Any]) -> str:
    """What a vote says about one model; a reply that is the best one's to the letter is as good."""
    if line["vote"] != BEST:
        return str(line["vote"])
    texts = {one: said["text"] for one, said in line["models"].items()}
    return BEST if texts[label] == texts[line["best"]] else "other"


def folder_names(labels: list[str]) -> dict[str, str]:
    """Label → a name that every disk takes, different for each."""
    names: dict[str, str] = {}
    for label in labels:
        name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in label)[:60].lstrip(".")
        names[label] = name if name and name not in names.values() else f"{name}_{len(names)}"
    return names
