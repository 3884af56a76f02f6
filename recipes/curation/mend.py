"""A language model mends what the model said: mistakes, repetition, unfinished sentences (paper, section 3.2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes_minigpt4.curation.store import Step, fingerprint
from recipes_minigpt4.llm.client import Answer, Client, Request
from recipes_minigpt4.utils.progress import phase


TEMPERATURE, MAX_TOKENS = 0.7, 200  # of the paper's mender
ATTEMPTS = 6


def mend_request(text: str, prompt: str, temperature: float, max_tokens: int) -> Request:
    """The prompt as system message, the paragraph as the user's, as the script that was used had it."""
    messages = ({"role": "system", "content": prompt}, {"role": "user", "content": text})
    return Request(messages, temperature=temperature, max_tokens=max_tokens, seed=0)


def mend_all(
    folder: Path,
    drafts: Mapping[str, str],
    client: Client,
    prompt: str,
    temperature: float = TEMPERATURE,
    max_tokens: int = MAX_TOKENS,
) -> dict[str, str]:
    """
    Mend the descriptions that were not mended in this way yet.

    Args:
        folder: of the curation.
        drafts: digest of a picture → what was said about it.
        client: who mends.
        prompt: what it is told.
        temperature, max_tokens: of its answers.

    Returns:
        Digest → the fingerprint under which its mended text is kept. A request without an answer has a record with
        `failure`, and is asked again by the next start.
    """
    settings = {"client": client.name, "prompt": prompt, "temperature": temperature, "max_tokens": max_tokens}
    made = {digest: fingerprint(**settings, draft=text) for digest, text in drafts.items()}
    with Step(folder, "mended") as step:
        left = [digest for digest in drafts if (step.get(digest, made[digest]) or {"failure": True}).get("failure")]
        requests = [mend_request(drafts[digest], prompt, temperature, max_tokens) for digest in left]
        cost = 0.0
        with phase("Mend", len(left)) as line:
            for done, (place, answer) in enumerate(client.ask(requests), 1):
                digest = left[place]
                cost += answer.cost
                if isinstance(answer, Answer):
                    step.put(digest, made[digest], text=answer.text, cost=answer.cost, failure=None, **_tokens(answer))
                else:
                    step.put(digest, made[digest], text=None, cost=answer.cost, failure=answer.reason)
                line.reach(done)
                line.set_description_str(f"Mend, cost so far {cost:.2f}" if cost else "Mend", refresh=False)
    return made


def _tokens(answer: Answer) -> dict[str, Any]:
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}


def mended_texts(folder: Path, made: Mapping[str, str]) -> dict[str, str | None]:
    """Digest → its mended text; None where the mender failed."""
    with Step(folder, "mended") as step:
        records = {digest: step.get(digest, how) for digest, how in made.items()}
    return {digest: None if record is None else record["text"] for digest, record in records.items()}


def failures(folder: Path, made: Mapping[str, str]) -> Sequence[str]:
    """Why requests had no answer."""
    with Step(folder, "mended") as step:
        records = [step.get(digest, how) for digest, how in made.items()]
    return [record["failure"] for record in records if record is not None and record["failure"]]
