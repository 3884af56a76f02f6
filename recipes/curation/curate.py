"""Make stage 2's data from pictures alone, as the paper did: describe, continue, mend, filter, pick.

    minigpt4 curate --config curate_cc3m --model runs/stage1 --mender openai:MODEL --output_dir curated
    minigpt4 curate --config curate_cc3m --model runs/stage1 --mender openai:MODEL --dry_run 20
    minigpt4 curate review curated
    minigpt4 curate export curated --to cc_sbu_align

Every step keeps what it has made (`store.py`), so a run that was stopped goes on where it was. The output folder also
gets `rows.jsonl`, one line per picture with its whole history, and `funnel.json`.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.curation.describe import Describer, Prompts, describe_all
from recipes_minigpt4.curation.funnel import Funnel, tell_funnel
from recipes_minigpt4.curation.gather import gather, gathered
from recipes_minigpt4.curation.mend import mend_all, mended_texts
from recipes_minigpt4.curation.options import PARSERS, build_parser
from recipes_minigpt4.curation.rows import CuratedRow, write_rows
from recipes_minigpt4.curation.rules import chosen_text, verdicts
from recipes_minigpt4.curation.scores import scored
from recipes_minigpt4.curation.source import Source
from recipes_minigpt4.curation.store import Step
from recipes_minigpt4.evaluation.questions import Sampling
from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions
from recipes_minigpt4.llm.client import Client, client_options, open_client
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import prepare_folder, write_json
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
    args = parse(arguments)
    return curate(args)


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


def curate(args: argparse.Namespace, client: Client | None = None) -> Funnel:
    """
    Do the steps, each for what it has not done yet.

    Args:
        args: what `parse` gives.
        client: who mends; default: whoever `--mender` names.
    """
    started = time.perf_counter()
    folder = prepare_folder(args.output_dir, parts=())
    prompts = {name: read_prompt(name, getattr(args, f"{name}_prompt")) for name in PROMPTS}
    client = client or open_client(args.mender, client_options(args, "mender_", cache=folder / "answers"))
    source = Source(
        args.dataset_name, args.images, args.dataset_split, args.dataset_revision, args.streaming, args.seed
    )
    count = args.dry_run or args.num_samples
    with quiet():
        left_out = gather(folder, source, count, args.max_hash_distance)
        rows = gathered(folder)
        options = SpeakerOptions(args.device, args.dtype, args.batch_size, args.trust_remote_code)
        sampling = Sampling(args.max_new_tokens, args.num_beams)
        speaker = ChatSpeaker.load(args.model, options)
        describer = Describer(speaker, Prompts(prompts["describe"], prompts["continue"]), sampling)
        made = describe_all(folder, rows, describer, args.batch_size)
        how: dict[str, Any] = {"model": speaker.revision, "sampling": asdict(sampling), "prompts": prompts}
        how |= {"mender": client.name, "mending": [args.mend_temperature, args.mend_max_tokens]}
        del speaker, describer  # before a local mender needs the room
        with Step(folder, "drafts") as step:
            drafts = {row["picture"]: step.get(row["picture"], made) or {} for row in rows}
        texts = {digest: draft["text"] for digest, draft in drafts.items()}
        mended = mended_texts(
            folder, mend_all(folder, texts, client, prompts["mend"], args.mend_temperature, args.mend_max_tokens)
        )
    told = verdicts({digest: (mended[digest], texts[digest]) for digest in texts})
    curated = [
        CuratedRow(
            picture=row["picture"], name=row["name"], file=row["file"], draft=texts[row["picture"]],
            continued=drafts[row["picture"]]["continued"], mended=mended[row["picture"]],
            text=chosen_text(mended[row["picture"]], texts[row["picture"]]), verdicts=told[row["picture"]],
        )
        for row in rows
    ]  # fmt: skip
    with quiet():
        curated, how["scores"] = scored(folder, curated, args, read_prompt)
    how["names"] = {"model": args.model, "dataset": args.dataset_name, "split": args.dataset_split}
    write_rows(folder, curated)
    write_json(folder / "made.json", how)
    funnel = Funnel.of(left_out, curated)
    write_json(folder / "funnel.json", asdict(funnel))
    tell_funnel(funnel)
    if args.dry_run:
        tell_extrapolation(folder, args, time.perf_counter() - started)
    return funnel


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


def tell_extrapolation(folder: Path, args: argparse.Namespace, seconds: float) -> None:
    """What all pictures will take, by what these few took."""
    with Step(folder, "mended") as step:
        records: Sequence[Mapping[str, Any]] = step.records()
    done = max(1, len(records))
    scale = (args.num_samples or done) / done
    tokens = sum((record.get("prompt_tokens") or 0) + (record.get("completion_tokens") or 0) for record in records)
    cost = sum(record["cost"] for record in records)
    print(
        f"\n{done} pictures took {seconds:.0f} s, {tokens:,} tokens of the mender and cost {cost:.4f}. "
        f"{args.num_samples or 'As many'} will take about {seconds * scale / 60:.0f} min, {tokens * scale:,.0f} tokens, "
        f"and cost about {cost * scale:.2f}. What was done is kept.",
        flush=True,
    )
