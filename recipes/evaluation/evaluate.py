"""Judge models: ask them about pictures, keep what they say, and compute numbers from it.

    minigpt4 evaluate --models ours=runs/stage2 stage1=runs/stage1 --suites failures --data PICTURES
    minigpt4 evaluate --config tiny_evaluate

The output folder gets

    LABEL/SUITE/replies.jsonl   what each model said, one line per question; grows, and is never rewritten
    results.json                the numbers, with intervals and paired differences
    table.md                    the same to paste
    report.html                 the same beside the paper, with the worst and the best replies and their pictures
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from recipes_minigpt4.evaluation.evaluate_options import parse
from recipes_minigpt4.evaluation.evaluation_report import write_reports
from recipes_minigpt4.evaluation.examples import choose_examples
from recipes_minigpt4.evaluation.human import HUMAN, write_judge_page
from recipes_minigpt4.evaluation.model_index import card_folders, write_results
from recipes_minigpt4.evaluation.numbers import Answered, check_alike, suite_numbers
from recipes_minigpt4.evaluation.opening import open_judges, open_questions, place_of
from recipes_minigpt4.evaluation.paper import compare, focus_of, paper_labels
from recipes_minigpt4.evaluation.pictures import keep_pictures
from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.replies import Replies, Reply, ReplyStore, read_replies, reply_to
from recipes_minigpt4.evaluation.run_facts import keep_facts, read_facts
from recipes_minigpt4.evaluation.speakers import SpeakerOptions, open_speaker
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.evaluation.verdicts import cases_of, judge_replies, judges_told
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import prepare_folder
from recipes_minigpt4.utils.progress import phase
from recipes_minigpt4.utils.runs import quiet


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """
    Run the command.

    Returns:
        What `results.json` holds.

    Raises:
        RecipeError: for options, models, data and judges that are not as they have to be.
    """
    args = parse(arguments)
    folder = prepare_folder(args.output_dir, parts=())
    given = dict(text.split("=", 1) for text in args.models if "=" in text)
    cards = card_folders(args.write_card, {**read_facts(folder)["models"], **given})
    with quiet():
        told = stored_replies(args, folder) if args.from_replies else collect_replies(args, folder)
        for suite, replies in told.items():
            check_alike(suite, replies)
        results = compute(args, folder, told)
    write_reports(folder, results, told)
    for label, place in cards.items():
        print(write_results(place, label, results, told))
    return results


# ---- replies --------------------------------------------------------------------------------------------------------


def stored_replies(args: argparse.Namespace, folder: Path) -> dict[str, Replies]:
    """
    Suite → label → the replies that an earlier run left.

    Raises:
        RecipeError: if there are none.
    """
    wanted = [text.partition("=")[0] for text in args.models]
    found: dict[str, Replies] = {}
    for path in sorted(folder.glob("*/*/replies.jsonl")):
        label, suite = path.parent.parent.name, path.parent.name
        if suite in (args.suites or SUITES) and (not wanted or label in wanted):
            found.setdefault(suite, {})[label] = read_replies(path.parent)
    if not found:
        raise RecipeError(f"{folder} holds no replies of these models and suites; leave --from_replies out.")
    return {
        suite: {label: found[suite][label] for label in wanted or found[suite]} for suite in SUITES if suite in found
    }


def collect_replies(args: argparse.Namespace, folder: Path) -> dict[str, Replies]:
    """Suite → label → the replies of all models, of which those that are missing are asked for now."""
    models = labelled(args.models)
    if not args.suites:
        raise RecipeError(f"No suite; name some of {', '.join(SUITES)} with --suites.")
    asked = {name: open_questions(SUITES[name].from_options(args), args) for name in args.suites}
    places = {name: place_of(SUITES[name].from_options(args), args.data) for name in asked}
    keep_facts(folder, models, places, num_samples=args.num_samples, seed=args.seed)
    told: dict[str, Replies] = {name: {} for name in asked}
    for label, model in models.items():
        options = SpeakerOptions(args.device, args.dtype, args.batch_size, args.trust_remote_code)
        speaker = open_speaker(model, options)
        for name, questions in asked.items():
            store = ReplyStore(folder / label / name)
            try:
                ask(speaker, questions, store, f"{label}: {name}", args.batch_size)
                told[name][label] = [answer_in(store, question, speaker.revision) for question in questions]
            finally:
                store.close()
            refuse_bad(told[name][label], args.max_bad_share)
    keep_pictures(folder, [question for questions in asked.values() for question in questions])
    return told


def labelled(texts: Sequence[str]) -> dict[str, str]:
    """
    Label → model.

    Raises:
        RecipeError: for a model without a label, or a label that is there twice or is no name of a folder.
    """
    models: dict[str, str] = {}
    for text in texts:
        label, equals, model = text.partition("=")
        if not equals or not model or not label.replace("-", "").replace("_", "").replace(".", "").isalnum():
            raise RecipeError(f"--models {text} has no label; write ours={text} or the like, in letters and digits.")
        if label in models:
            raise RecipeError(f"--models names {label} twice; give each model a label of its own.")
        models[label] = model
    if not models:
        raise RecipeError("No model; name some with --models LABEL=FOLDER.")
    return models


def ask(speaker: Any, questions: Sequence[Question], store: ReplyStore, title: str, batch_size: int) -> None:
    """Ask what the store does not know yet; every reply is written down as soon as it is there."""
    left = {question.key: question for question in questions if store.get(question, speaker.revision) is None}
    with phase(f"{title:<32}", len(left)) as line:
        done = 0
        for batch in batches(list(left.values()), batch_size):
            pictures, readable = [], []
            for question in batch:
                try:
                    pictures.append(question.picture.open())
                    readable.append(question)
                except ValueError as error:
                    store.append(reply_to(question, speaker.revision, None, one_line(error)))
            for question, said in zip(readable, speaker.answer(readable, pictures) if readable else (), strict=True):
                store.append(reply_to(question, speaker.revision, said))
            done += len(batch)
            line.reach(done)


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions of the same sampling, `size` at a time."""
    groups: dict[Any, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.sampling, []).append(question)
    for group in groups.values():
        rest = iter(group)
        while batch := list(islice(rest, size)):
            yield batch


def answer_in(store: ReplyStore, question: Question, revision: str) -> Reply:
    """The reply to a question, with what the data say now, which may have become more."""
    reply = store.get(question, revision)
    assert reply is not None  # it was asked
    return replace(reply, facts=question.facts, picture=question.picture.name)


def refuse_bad(replies: Sequence[Reply], max_bad_share: float) -> None:
    """
    Stop where too many pictures cannot be read.

    Raises:
        RecipeError: that names the first.
    """
    errors = [reply for reply in replies if reply.error]
    if len(errors) > max_bad_share * len(replies):
        raise RecipeError(
            f"{len(errors)} of {len(replies)} pictures cannot be read, {errors[0].picture} among them "
            f"({errors[0].error}); replace them, or leave them out with a --max_bad_share above {max_bad_share}. All "
            "other replies are kept."
        )


# ---- numbers --------------------------------------------------------------------------------------------------------


def compute(args: argparse.Namespace, folder: Path, told: Mapping[str, Replies]) -> dict[str, Any]:
    """The numbers of all suites, and how far judges agree."""
    judges = open_judges(args, folder)
    results: dict[str, Any] = {"suites": {}, "skipped": {}, "to_judge": {}}
    names = paper_labels(args.paper_labels, [label for replies in told.values() for label in replies])
    for name, replies in told.items():
        suite = SUITES[name].from_options(args)
        if HUMAN in args.judge and (cases := cases_of(suite, replies)):
            results["to_judge"][name] = str(write_judge_page(folder, suite, cases, args.seed))
        verdicts = judge_replies(suite, replies, [judge for judge in judges if judge.knows(suite)])
        if suite.needs_judge and not verdicts:
            results["skipped"][name] = unjudged(name, results["to_judge"].get(name))
            continue
        first = next(iter(verdicts), None)
        answered = {
            label: Answered(said, verdicts[first][label] if first else [None] * len(said))
            for label, said in replies.items()
        }
        numbers = suite_numbers(suite, answered, args.resamples)
        numbers["judges"] = judges_told(suite, replies, verdicts, judges)
        numbers["examples"] = choose_examples(suite, answered, focus_of(list(answered), names))
        results["suites"][name] = numbers
    results["paper"] = compare(results["suites"], names)
    results["run"] = {**read_facts(folder), "judges": [judge.name for judge in judges]}
    return results


def unjudged(suite: str, page: str | None) -> str:
    """Why a suite that needs a judge has no numbers, and what to do."""
    if page is None:
        return "it needs a judge: name one with --judge"
    return f"nobody has judged it yet: open {page}, and name the file that it saves with --judge {HUMAN}:FILE"
