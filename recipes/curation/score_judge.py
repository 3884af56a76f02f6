"""A judge gives each description 1 to 5 for relevance, correctness and form; what cannot be read is no score."""

import base64
import mimetypes
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.curation.store import Step, fingerprint
from recipes_minigpt4.llm.client import Answer, Client, Request
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.progress import phase


MARKS = ("relevance", "correctness", "form")
MAX_TOKENS = 256  # of an answer, which is a few words
_MARK = re.compile(rf"\b({'|'.join(MARKS)})\b[\"'*]*\s*[:=–-]?\s*[\"'*]*\s*([1-5])(?:\s*/\s*5)?(?!\s*/|\d|\.\d)", re.I)


@dataclass(frozen=True)
class ScoreJudge:
    """
    Who judges, and how.

    Args:
        client: who is asked.
        prompt: what it is told.
        sees: whether it is shown the picture; else it reads the draft.
    """

    client: Client
    prompt: str
    sees: bool = False

    def request(self, folder: Path, row: CuratedRow) -> Request:
        """
        What it is asked about a row.

        Raises:
            RecipeError: if it is to see a picture that is gone.
        """
        if self.sees:
            content: Any = [
                {"type": "image_url", "image_url": {"url": _data_url(folder / row.file)}},
                {"type": "text", "text": f"Description: {row.text}"},
            ]
        else:
            content = f"Draft: {row.draft}\n\nDescription: {row.text}"
        messages = ({"role": "system", "content": self.prompt}, {"role": "user", "content": content})
        return Request(messages, temperature=0.0, max_tokens=MAX_TOKENS)

    def made(self, row: CuratedRow) -> str:
        """What the scores of a row depend on, beside its picture."""
        asked = {"judge": self.client.name, "prompt": self.prompt, "sees": self.sees, "text": row.text}
        return fingerprint(**asked, draft=None if self.sees else row.draft)


def read_marks(answer: str) -> dict[str, float] | None:
    """The three marks of an answer; None if one is missing, is no whole number from 1 to 5, or is told twice."""
    found: dict[str, set[str]] = {name: set() for name in MARKS}
    for name, mark in _MARK.findall(answer):
        found[name.lower()].add(mark)
    if any(len(told) != 1 for told in found.values()):
        return None
    return {name: float(*told) for name, told in found.items()}


def judge_rows(
    folder: Path, rows: Sequence[CuratedRow], judge: ScoreJudge, step: Step
) -> dict[str, Mapping[str, float]]:
    """
    Ask about the rows that were not judged in this way yet.

    Args:
        folder: of the curation.
        rows: those that have a text.
        judge: who is asked.
        step: where answers are kept.

    Returns:
        Digest of a picture → its marks, and `judge`, their mean. Unreadable answers and failures are told, and are
        no scores; failures are asked again by the next start.
    """
    left = [row for row in rows if step.get(row.picture, judge.made(row)) is None]
    failures: list[str] = []
    with phase("Judge", len(left)) as line:
        requests = [judge.request(folder, row) for row in left]
        for done, (place, answer) in enumerate(judge.client.ask(requests), 1):
            if isinstance(answer, Answer):
                told = {"answer": answer.text, "marks": read_marks(answer.text), "cost": answer.cost}
                told |= {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
                step.put(left[place].picture, judge.made(left[place]), kind="judge", **told)
            else:
                failures.append(answer.reason)
            line.reach(done)
    found = {row.picture: step.get(row.picture, judge.made(row)) for row in rows}
    unread = sum(record is not None and record["marks"] is None for record in found.values())
    if unread or failures:
        reason = f" ({failures[0]})" if failures else ""
        print(
            f"{unread} answers of the judge could not be read and {len(failures)} did not come{reason}; these rows "
            "have no marks.",
            flush=True,
        )
    marks = {digest: record["marks"] for digest, record in found.items() if record is not None and record["marks"]}
    return {digest: {**told, "judge": sum(told.values()) / len(told)} for digest, told in marks.items()}


def _data_url(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RecipeError(
            f"The picture {path} is gone ({error.strerror}); put it back, or curate into another folder."
        ) from error
    return f"data:{mimetypes.guess_type(path.name)[0]};base64,{base64.b64encode(content).decode()}"
