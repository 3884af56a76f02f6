"""A language model mends what the model said: mistakes, repetition, unfinished sentences (paper, section 3.2)."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes_minigpt4.curation.store import Record, Step, fingerprint
from recipes_minigpt4.llm.client import Answer, Client, Failure, Request
from recipes_minigpt4.utils.progress import phase


TEMPERATURE, MAX_TOKENS = 0.7, 200  # of the paper's mender


@dataclass(frozen=True)
class Mending:
    """
    What the mender is told.

    Args:
        prompt: the system message, as the script that was used had it; a description is the user's.
        temperature, max_tokens: of its answers.
    """

    prompt: str
    temperature: float = TEMPERATURE
    max_tokens: int = MAX_TOKENS

    def request(self, text: str) -> Request:
        """What is asked about a description."""
        messages = ({"role": "system", "content": self.prompt}, {"role": "user", "content": text})
        return Request(messages, temperature=self.temperature, max_tokens=self.max_tokens, seed=0)


def mend_all(folder: Path, drafts: Mapping[str, str], client: Client, mending: Mending) -> dict[str, Record]:
    """
    Mend the descriptions that were not mended in this way yet.

    Args:
        folder: of the curation.
        drafts: digest of a picture → what was said about it. Nothing is asked about an empty one.
        client: who mends.
        mending: what it is told.

    Returns:
        Digest → `text`; or None in its place and `failure`, which the next start asks again. Also `cost` and tokens.

    Raises:
        RecipeError: as `client.ask` does; what was answered before is kept.
    """
    told = {"client": client.name, **asdict(mending)}
    made = {digest: fingerprint(**told, draft=text) for digest, text in drafts.items() if text.strip()}
    with Step(folder, "mended") as step:
        left = [digest for digest, how in made.items() if (step.get(digest, how) or {}).get("text") is None]
        known = [record for digest, how in made.items() if (record := step.get(digest, how)) is not None]
        cost = sum(record["cost"] for record in known if record["text"] is not None)
        with phase("Mend", len(left), unit="answers") as line:
            last = time.perf_counter()
            asked = client.ask([mending.request(drafts[digest]) for digest in left])
            for done, (place, answer) in enumerate(asked, 1):
                now = time.perf_counter()
                record = {**_record(answer), "seconds": round(now - last, 4)}  # of all of them, the time that it took
                step.put(left[place], made[left[place]], **record)
                cost, last = cost + answer.cost, now
                line.note = f", cost so far {cost:.2f}" if cost else ""
                line.reach(done)
        records = {digest: record for digest, how in made.items() if (record := step.get(digest, how)) is not None}
    tell_failures(list(records.values()))
    return records


def _record(answer: Answer | Failure) -> dict[str, Any]:
    if isinstance(answer, Failure):
        return {"text": None, "failure": answer.reason, "cost": answer.cost}
    tokens = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    return {"text": answer.text, "failure": None, "cost": answer.cost, **tokens}


def tell_failures(records: Sequence[Record]) -> None:
    """Say which requests had no answer, and what to do."""
    failed = Counter(record["failure"] for record in records if record["failure"] is not None)
    if failed:
        ((reason, _),) = failed.most_common(1)
        print(
            f"{failed.total()} of {len(records)} descriptions were not mended, most of them for this: {reason}. The "
            "same command asks again.",
            flush=True,
        )


def spent(records: Mapping[str, Record]) -> dict[str, Any]:
    """What mending took: cost and tokens, as far as servers tell them."""
    names = ("cost", "prompt_tokens", "completion_tokens")
    return {name: sum(record.get(name) or 0 for record in records.values()) for name in names}
