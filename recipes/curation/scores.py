"""Numbers about what came out. They drop nothing: the export picks by them if it is asked to.

length                              words of the text
match_mean, match_min               how well its sentences fit the picture, one by one (`--match`)
relevance, correctness, form        1 to 5 (`--score_judge`); `judge` is their mean
"""

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image

from recipes_minigpt4.curation.matching import Matcher, open_matcher
from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.curation.score_judge import ScoreJudge, judge_rows
from recipes_minigpt4.curation.store import Step, fingerprint
from recipes_minigpt4.evaluation.speakers import SpeakerOptions
from recipes_minigpt4.evaluation.words import sentences_of, words_of
from recipes_minigpt4.llm.client import client_options, open_client
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.progress import phase


STEP = "scores"
OTHERS = 2  # pictures that a model which describes is shown in the place of the right one
Scores = Mapping[str, Mapping[str, float]]  # digest → name → number


def scored(
    folder: Path, rows: Sequence[CuratedRow], args: argparse.Namespace, read_prompt: Callable[[str, Path | None], str]
) -> tuple[list[CuratedRow], dict[str, Any]]:
    """
    Give rows their scores, of which none is computed or asked for twice.

    Args:
        folder: of the curation.
        rows: the rows.
        args: what `minigpt4 curate` takes.
        read_prompt: gives the words of a file, or those that ship under a name.

    Returns:
        The rows, and what made the scores.

    Raises:
        RecipeError: for models and judges that cannot be had, and pictures that are gone.
    """
    with_text = [row for row in rows if row.text]
    told: list[Scores] = [{row.picture: {"length": float(len(words_of(row.text or "")))} for row in with_text}]
    made: dict[str, Any] = {}
    if args.match or args.score_judge:
        with Step(folder, STEP) as step:
            if args.match:
                options = SpeakerOptions(args.device, args.dtype, args.batch_size, args.trust_remote_code)
                others = sorted(rows, key=lambda row: row.picture)[:OTHERS]
                matcher = open_matcher(args.match, options, lambda: [_open(folder, row) for row in others])
                told.append(match_rows(folder, with_text, matcher, step, args.batch_size))
                made["match"] = {"name": args.match, "revision": matcher.revision}
                del matcher  # before a local judge needs the room
            if args.score_judge:
                shipped = "score_picture" if args.score_with_picture else "score_text"
                prompt = read_prompt("score" if args.score_prompt else shipped, args.score_prompt)
                client = open_client(args.score_judge, client_options(args, "score_", cache=folder / "score_answers"))
                judge = ScoreJudge(client, prompt, args.score_with_picture)
                told.append(judge_rows(folder, with_text, judge, step))
                made["judge"] = {"name": client.name, "prompt": prompt, "sees": judge.sees}
    joined = {row.picture: {name: one for of in told for name, one in of.get(row.picture, {}).items()} for row in rows}
    return [replace(row, scores=joined[row.picture]) for row in rows], made


# ---- the match ------------------------------------------------------------------------------------------------------


def match_rows(folder: Path, rows: Sequence[CuratedRow], matcher: Matcher, step: Step, batch_size: int) -> Scores:
    """
    How well the sentences of each text fit its picture, computed for texts that have no such number yet.

    Args:
        folder: of the curation.
        rows: those that have a text.
        matcher: who tells.
        step: where the numbers of every sentence are kept.
        batch_size: pictures at a time.

    Returns:
        Digest of a picture → `match_mean` and `match_min` over its sentences.
    """
    made = {row.picture: fingerprint(matcher=matcher.revision, text=row.text) for row in rows}
    left = [row for row in rows if step.get(row.picture, made[row.picture]) is None]
    with phase("Match", len(left)) as line:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            sentences = [sentences_to_match(row.text or "", matcher) for row in batch]
            told = matcher.match([_open(folder, row) for row in batch], sentences)
            for row, of_row in zip(batch, told, strict=True):
                step.put(row.picture, made[row.picture], kind="match", sentences=[round(one, 6) for one in of_row])
            line.reach(start + len(batch))
    found: dict[str, Mapping[str, float]] = {}
    for row in rows:
        of_row = (step.get(row.picture, made[row.picture]) or {})["sentences"]
        found[row.picture] = {"match_mean": sum(of_row) / len(of_row), "match_min": min(of_row)}
    return found


def sentences_to_match(text: str, matcher: Matcher) -> list[str]:
    """The sentences of a text; those that are longer than the model sees in parts, cut at commas or else at blanks."""
    whole = [part for part in sentences_of(text) if words_of(part)] or [text]
    return [piece for sentence in whole for piece in _pieces(sentence, matcher)]


def _pieces(sentence: str, matcher: Matcher) -> list[str]:
    if matcher.tokens(sentence) <= matcher.most_tokens:
        return [sentence]
    middle = len(sentence) / 2
    places = [found.end() for found in re.finditer(r"[,;:]\s+", sentence)]
    places = places or [found.end() for found in re.finditer(r"\s+", sentence)]
    places = [place for place in places if sentence[place:].strip()]
    if not places:
        return [sentence]  # one long word, which the tokenizer cuts
    cut = min(places, key=lambda place: abs(place - middle))
    return [piece for part in (sentence[:cut], sentence[cut:]) for piece in _pieces(part.strip(), matcher)]


def _open(folder: Path, row: CuratedRow) -> PIL.Image.Image:
    try:
        return PIL.Image.open(folder / row.file).convert("RGB")
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"The picture {folder / row.file} cannot be read ({one_line(error)}); put it back, or curate into another "
            "folder. What was done is kept."
        ) from error
