"""What a whole curation will take, by what a few pictures of it took."""

from collections.abc import Mapping

from recipes_minigpt4.curation.gather import Gathered
from recipes_minigpt4.curation.mend import spent
from recipes_minigpt4.curation.store import Record
from recipes_minigpt4.utils.text import duration, format_table, heading


MANY = 1000  # pictures that are told of where nobody knows how many there are


def tell_dry_run(
    gathered: Gathered, drafts: Mapping[str, Record], mended: Mapping[str, Record], wanted: int | None, priced: bool
) -> None:
    """
    Print time, tokens and cost of these pictures and of all.

    What each step wrote down counts, whichever start it was of; loading the model does not.

    Args:
        gathered, drafts, mended: of the few.
        wanted: how many pictures are asked for; None for all that there are.
        priced: whether prices are known.
    """
    known = [number for number in (wanted, gathered.total) if number is not None]
    whole = min(known) if known else MANY
    many = whole / gathered.drawn
    seconds = {
        "look at pictures": gathered.seconds,
        "describe": sum(draft["seconds"] for draft in drafts.values()),
        "mend": sum(record["seconds"] for record in mended.values()),
    }
    seconds["all of it"] = sum(seconds.values())
    paid = spent(mended)
    tokens = paid["prompt_tokens"] + paid["completion_tokens"]
    rows = [[name, duration(took), duration(took * many)] for name, took in seconds.items()]
    rows.append(["tokens of the mender", f"{tokens:,}", f"{tokens * many:,.0f}"])
    rows.append(["cost", *([f"{paid['cost']:.4f}", f"{paid['cost'] * many:.2f}"] if priced else ["no prices"] * 2)])
    heading(f"Dry run: {gathered.drawn:,} of {whole:,} pictures\n")
    print(format_table(["", f"these {gathered.drawn:,}", f"all {whole:,}"], rows))
    print("\nWhat was done is kept: the same command without --dry_run goes on from here.", flush=True)
