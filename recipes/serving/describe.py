"""Describe pictures, in batches, into the terminal or a file.

minigpt4 describe photo.jpg --model runs/stage2
minigpt4 describe photos 'more/*.png' https://example.org/a.jpg --model runs/stage2 --output out.jsonl
find . -name '*.webp' | minigpt4 describe - --model runs/stage2 --output -
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recipes_minigpt4.evaluation.questions import Question, Sampling
from recipes_minigpt4.evaluation.replies import Said
from recipes_minigpt4.evaluation.speakers import revision_named
from recipes_minigpt4.serving.describe_output import Output, open_output
from recipes_minigpt4.serving.models import ModelOptions, Talker, open_talker
from recipes_minigpt4.serving.options import build_parser
from recipes_minigpt4.serving.picture_places import STANDARD_INPUT, Place, find_pictures
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.progress import Phase, phase
from recipes_minigpt4.utils.runs import quiet


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Read a command line.

    Raises:
        RecipeError: if it is wrong.
    """
    return build_parser("describe").parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run the command. A picture that cannot be read costs a line; who reads the output may stop to listen.

    Raises:
        RecipeError: for options, a model or a file that are not as they have to be, and if no picture can be read.
    """
    args = parse(arguments)
    places: Iterable[Place] = find_pictures(args.pictures, sys.stdin)
    total = None
    if STANDARD_INPUT in args.pictures:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # names of files are any bytes
    else:
        places = list(places)  # of names, not of pictures
        total = len(places)
        refuse_all_bad(places)
    try:
        with quiet(), open_output(args.output, alone=total == 1 and not os.path.isdir(args.pictures[0])) as output:
            with phase("Describing", total, sys.stderr, "pictures") as line:
                describe(args, places, output, line)
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # lest Python tells of it at its end
        return
    tell_bad(output.bad, output.count)


def refuse_all_bad(places: Sequence[Place]) -> None:
    """
    Stop before a model is loaded for nothing.

    Raises:
        RecipeError: if there is no picture at any place.
    """
    if all(place.error for place in places):
        others = f", nor at the {len(places) - 1} others" if len(places) > 1 else ""
        raise RecipeError(f"There is no picture at {places[0].name}{others}: {places[0].error}.")


def tell_bad(bad: Sequence[str], count: int) -> None:
    """
    Tell how many pictures could not be read.

    Raises:
        RecipeError: if none could.
    """
    if bad and len(bad) == count:
        raise RecipeError(f"None of the pictures could be read ({count}); see what is told of each.")
    if bad:
        which = "1 picture" if len(bad) == 1 else f"{len(bad)} pictures"
        print(f"minigpt4 describe: {which} of {count} could not be read.", file=sys.stderr)


# ---- pictures to lines ----------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """
    A picture on its way to a line.

    Args:
        name: of the picture.
        key: what is asked, of whom; empty if the picture cannot be read.
        question: None if the answer is known.
        error: why there will be none.
    """

    name: str
    key: str = ""
    question: Question | None = None
    error: str | None = None


class Asker:
    """
    Asks the model, which is loaded for the first question.

    Args:
        args: the command line.
        line: where to tell that it is loaded.

    Raises:
        RecipeError: if there is no such model.
    """

    def __init__(self, args: argparse.Namespace, line: Phase) -> None:
        self.args, self.line = args, line
        self.talker: Talker | None = None
        self.options = ModelOptions.of(args)
        self.sampling = Sampling(args.max_new_tokens, args.num_beams, args.temperature)
        self.revision = revision_named(args.model, self.options.for_speaker())

    def key(self, question: Question) -> str:
        """A question to this model, as one word: of picture, words, sampling, weights, and how they are loaded."""
        asked = [question.key, self.revision, self.options.dtype, self.options.quantization]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]

    def answer(self, questions: Sequence[Question], pictures: Sequence[Any]) -> list[Said]:
        """
        What it says, in order.

        Raises:
            RecipeError: if it cannot be loaded, or has not enough memory.
        """
        if self.talker is None:
            self.talker = open_talker(self.args.model, self.options)
            self.line.write(self.talker.about, file=sys.stderr)
            self.line.begin(self.line.total)
        try:
            return self.talker.speaker.answer(questions, pictures)
        except torch.OutOfMemoryError as error:
            raise RecipeError(
                f"{len(pictures)} pictures at once do not fit the memory; run it again with a lower --batch_size."
            ) from error


def describe(args: argparse.Namespace, places: Iterable[Place], output: Output, line: Phase) -> None:
    """Write a line for every picture that has none yet."""
    asker = Asker(args, line)
    for batch in batches(entries(places, asker, output), args.batch_size):
        said = ask(batch, asker, output)
        for entry in batch:
            told: dict[str, Any] = {"picture": entry.name, "prompt": args.prompt}
            if entry.error is None:
                told |= {"text": said[entry.key].text, "finished": said[entry.key].finished}
            else:
                told |= {"error": entry.error}
            told |= {"model": args.model, "revision": asker.revision} | ({"key": entry.key} if entry.key else {})
            output.write(told, line)
        line.reach(output.count)


def entries(places: Iterable[Place], asker: Asker, output: Output) -> Iterator[Entry]:
    """Pictures that have no line yet; each is looked at when its turn comes."""
    for place in places:
        try:
            question = Question(place.picture(), asker.args.prompt, asker.sampling)
            key = asker.key(question)
        except (ValueError, OSError) as error:
            yield Entry(place.name, error=_reason(error))
            continue
        if output.has(place.name, key):
            output.count += 1
        else:
            yield Entry(place.name, key, question if output.said(key) is None else None)


def batches(found: Iterator[Entry], size: int) -> Iterator[list[Entry]]:
    """Entries in their order, with `size` different questions at a time."""
    batch: list[Entry] = []
    for entry in found:
        batch.append(entry)
        if len({entry.key for entry in batch if entry.question}) == size:
            yield batch
            batch = []
    yield batch


def ask(batch: Sequence[Entry], asker: Asker, output: Output) -> dict[str, Said]:
    """Key → what was said, now or before; a picture that cannot be opened becomes an error of its entries."""
    said = {entry.key: told for entry in batch if (told := output.said(entry.key)) is not None}
    asked = {entry.key: entry.question for entry in batch if entry.question is not None}
    pictures, errors = {}, {}
    for key, question in asked.items():
        try:
            pictures[key] = question.picture.open()
        except (ValueError, OSError) as error:
            errors[key] = _reason(error)
    for entry in batch:
        entry.error = errors.get(entry.key, entry.error)
    if pictures:
        answers = asker.answer([asked[key] for key in pictures], list(pictures.values()))
        said |= dict(zip(pictures, answers, strict=True))
    return said


def _reason(error: Exception) -> str:
    """Why there is no picture, without what to do about it."""
    return one_line(error).partition("; pass a file")[0]
