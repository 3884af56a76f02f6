"""Make stage 2's data from pictures alone, as the paper did: describe, continue, mend, filter, pick.

    minigpt4 curate --config curate_cc3m --model runs/stage1 --mender openai:MODEL --output_dir curated
    minigpt4 curate --config curate_cc3m --model runs/stage1 --mender openai:MODEL --dry_run 20
    minigpt4 curate review curated
    minigpt4 curate export curated --to cc_sbu_align

Every step keeps what it has made (`store.py`), so a run that was stopped goes on where it was. The output folder also
gets

    rows.jsonl       one line per picture that was described, with its whole history
    left_out.jsonl   the pictures that were not, and why
    made.json        models, prompts, sampling, cost
    funnel.json      how many were left after each step
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.curation.describe import Describer, Describes, Prompts, describe_all
from recipes_minigpt4.curation.dry_run import tell_dry_run
from recipes_minigpt4.curation.funnel import Funnel, tell_funnel
from recipes_minigpt4.curation.gather import VANISHED, Gathered, gather
from recipes_minigpt4.curation.mend import Mending, mend_all, spent
from recipes_minigpt4.curation.options import PARSERS, build_parser
from recipes_minigpt4.curation.rows import CuratedRow, write_rows
from recipes_minigpt4.curation.rules import chosen_text, verdicts
from recipes_minigpt4.curation.scores import scored
from recipes_minigpt4.curation.scripted_mender import scripted_mender
from recipes_minigpt4.curation.source import SCENES, Source
from recipes_minigpt4.curation.store import Record, held
from recipes_minigpt4.evaluation.questions import Sampling
from recipes_minigpt4.evaluation.speakers import SpeakerOptions
from recipes_minigpt4.llm.client import Client, client_options, open_client
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import prepare_folder, replace_text, write_json, writing
from recipes_minigpt4.utils.runs import quiet
from recipes_minigpt4.utils.yaml_options import parse_with_config


PROMPTS = ("describe", "continue", "mend")


def main(arguments: Sequence[str]) -> Any:
    """
    Run the command, or `review` or `export`, which have modules of their own.

    Raises:
        RecipeError: for options, data and models that are not as they have to be.
    """
    if arguments and arguments[0] in PARSERS:
        from importlib import import_module

        return import_module(f"recipes_minigpt4.curation.{arguments[0]}").main(arguments[1:])
    return curate(parse(arguments))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """
    Read the arguments of the command, or of `review` or `export`.

    Raises:
        RecipeError: if they are not understood, or something is missing.
    """
    if arguments and arguments[0] in PARSERS:
        return PARSERS[arguments[0]]().parse_args(arguments[1:])
    args = parse_with_config(build_parser("curate"), arguments, shipped_configs())
    for name, what in (("model", "the model that describes"), ("dataset_name", "pictures"), ("mender", "who mends")):
        if not getattr(args, name):
            raise RecipeError(f"--{name} is missing; it names {what}.")
    return args


def curate(args: argparse.Namespace, client: Client | None = None, describer: Describes | None = None) -> Funnel:
    """
    Do the steps, each for what it has not done yet.

    Args:
        args: what `parse` gives.
        client: who mends; default: whoever `--mender` names.
        describer: who describes; default: what `--model` names.

    Raises:
        RecipeError: for options, pictures, models and menders that are not as they have to be, and for a disk that is
            full. What was done before is kept.
    """
    folder = prepare_folder(args.output_dir, parts=())
    with held(folder), quiet():
        prompts = {name: read_prompt(name, getattr(args, f"{name}_prompt")) for name in PROMPTS}
        client = client or open_mender(args, folder)
        describer = describer or open_describer(args, prompts)
        how = {
            "model": describer.revision,
            "sampling": asdict(sampling_of(args)),
            "continue_up_to": args.continue_up_to,
            "prompts": prompts,
            "mender": client.name,
            "mending": [args.mend_temperature, args.mend_max_tokens],
        }
        gathered = gather(folder, source_of(args), drawn_of(args), args.max_hash_distance)
        drafts = describe_all(folder, gathered.rows, describer, args.batch_size)
        del describer  # a local mender may need the room
        texts = {digest: draft["text"] for digest, draft in drafts.items()}
        mending = Mending(prompts["mend"], args.mend_temperature, args.mend_max_tokens)
        mended = mend_all(folder, texts, client, mending)
        rows, made_scores = scored(folder, curated_rows(folder, gathered, drafts, mended), args, read_prompt)
        funnel = Funnel.of(Counter(one["reason"] for one in gathered.left_out), rows)
        how |= {"scores": made_scores, "names": {"model": args.model, "dataset": args.dataset_name}}
        how |= {"spent": spent(mended), "dry_run": args.dry_run}
        write_all(folder, rows, gathered, how, funnel)
    tell_funnel(funnel)
    if args.dry_run:
        priced = args.mender_price_per_million_prompt_tokens is not None or not args.mender.startswith("openai:")
        tell_dry_run(gathered, drafts, mended, args.num_samples, priced)
    return funnel


# ---- what the options name ------------------------------------------------------------------------------------------


def source_of(args: argparse.Namespace) -> Source:
    """Where pictures come from."""
    return Source(
        args.dataset_name, args.images, args.dataset_split, args.dataset_config, args.dataset_revision,
        args.streaming, args.seed, args.num_samples or SCENES,
    )  # fmt: skip


def drawn_of(args: argparse.Namespace) -> int | None:
    """How many pictures are drawn; those of a dry run are the first of the whole run."""
    wanted = [number for number in (args.dry_run, args.num_samples) if number is not None]
    return min(wanted) if wanted else None


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How descriptions are made."""
    return Sampling(args.max_new_tokens, args.num_beams)


def open_mender(args: argparse.Namespace, folder: Path) -> Client:
    """Who mends; answers are kept in the folder, unless another one is named."""
    options = client_options(args, "mender_", cache=args.mender_cache or folder / "answers")
    return scripted_mender(options) if args.mender == TINY else open_client(args.mender, options)


def open_describer(args: argparse.Namespace, prompts: Mapping[str, str]) -> Describer:
    """Who describes."""
    options = SpeakerOptions(args.device, args.dtype, args.batch_size, args.trust_remote_code)
    words = Prompts(prompts["describe"], prompts["continue"])
    return Describer(args.model, options, words, sampling_of(args), args.continue_up_to)


def read_prompt(name: str, path: Path | None) -> str:
    """
    The words of a file, or the paper's.

    Raises:
        RecipeError: if the file cannot be read or is empty.
    """
    if path is None:
        return (resources.files("recipes_minigpt4.curation") / "prompts" / f"{name}.txt").read_text("utf-8").strip()
    try:
        text = path.expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise RecipeError(f"--{name}_prompt {path} cannot be read ({reason}).") from error
    if not text:
        raise RecipeError(f"--{name}_prompt {path} is empty; write the words into it.")
    return text


# ---- what comes out -------------------------------------------------------------------------------------------------


def curated_rows(
    folder: Path, gathered: Gathered, drafts: Mapping[str, Record], mended: Mapping[str, Record]
) -> list[CuratedRow]:
    """The rows of all pictures that were described and are still there; the others are left out from now on."""
    there = []
    for row in gathered.rows:
        if row["picture"] in drafts and (folder / row["file"]).is_file():
            there.append(row)
        else:
            gathered.leave_out(row, VANISHED, row["file"])
    gathered.rows = there
    texts = {row["picture"]: (mended.get(row["picture"]) or {}).get("text") for row in there}
    said = {row["picture"]: drafts[row["picture"]]["text"] for row in there}
    told = verdicts({digest: (text, said[digest]) for digest, text in texts.items()})
    return [
        CuratedRow(
            **row,
            draft=said[digest],
            continued=drafts[digest]["continued"],
            mended=texts[digest],
            text=chosen_text(texts[digest], said[digest]),
            verdicts=told[digest],
        )
        for row in there
        for digest in [row["picture"]]
    ]


def write_all(
    folder: Path, rows: Sequence[CuratedRow], gathered: Gathered, how: Mapping[str, Any], funnel: Funnel
) -> None:
    """
    Write what came out. A dry run leaves a whole one's alone.

    Raises:
        RecipeError: if there is no room.
    """
    before = folder / "made.json"
    if how["dry_run"] and before.is_file() and json.loads(before.read_text(encoding="utf-8")).get("dry_run") is None:
        return
    lines = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in gathered.left_out)
    with writing(folder):
        write_rows(folder, rows)
        replace_text(folder / "left_out.jsonl", lines)
        write_json(folder / "funnel.json", asdict(funnel))
        write_json(before, how)
