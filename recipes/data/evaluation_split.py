"""The samples that a run is evaluated on while it trains: another dataset, another split, or another slice.

    minigpt4 stage1 --dataset_name pairs.jsonl --dataset_split "train[:95%]" --eval_split "train[95%:]" \\
        --eval_strategy steps --eval_steps 500 ...

They have a known length, whatever they come from: of a stream the first ones are read once. So the loss is that of
every answer token of the split, on any number of processes.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from recipes_minigpt4.data.arguments import EVALUATION, DataArguments, column_of
from recipes_minigpt4.data.files import captioned_pictures
from recipes_minigpt4.data.sources import open_source
from recipes_minigpt4.data.splits import overlap
from recipes_minigpt4.data.webdataset import tars_named
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.errors import RecipeError


VALIDATION = "validation"  # the split that is meant if none is named
FILLER = "filler"  # the cause of a row that only makes a batch full


def load_evaluation_pairs(args: DataArguments, stage: int, pairs: Any = None) -> Dataset | None:
    """
    Open the pairs to evaluate on without decoding a picture.

    Args:
        args: where they are.
        stage: 1 or 2.
        pairs: those of the training, if they are loaded.

    Returns:
        Pairs as `load_pairs` gives them, of known length; None if there is nothing to evaluate on.

    Raises:
        RecipeError: if they cannot be opened, are trained on as well, or are a stream of any length.
    """
    if not args.is_evaluated:
        return None
    own = evaluation_arguments(args)
    name = "".join(own.dataset_name or ())  # which is one
    _check_apart(args, name, own.dataset_split, pairs)
    try:
        source = open_source(name, own, stage)
    except RecipeError as error:
        raise RecipeError(_own_options(str(error))) from error
    if isinstance(source, Dataset):
        return source
    if own.num_samples is None:
        raise RecipeError(
            f"{name} is read as a stream; say with --eval_num_samples how many of its first samples to evaluate on."
        )
    return Dataset.from_list(list(source), features=source.features)


def evaluation_arguments(args: DataArguments) -> DataArguments:
    """The arguments with which `open_source` opens what is evaluated on."""
    trained = args.dataset_name or []
    if not args.eval_dataset_name and len(trained) != 1:
        raise RecipeError(
            f"--eval_split names a split of --dataset_name, which are {len(trained)} datasets; name the one to "
            "evaluate on with --eval_dataset_name."
        )
    name = args.eval_dataset_name or trained[0]
    is_trained = name in trained
    place = trained.index(name) if is_trained else 0

    def column(own: str | None, columns: list[str] | None) -> list[str] | None:
        known = column_of(columns, place) if is_trained or len(columns or ()) == 1 else None
        return [found] if (found := own or known) else None

    nothing: dict[str, Any] = dict.fromkeys(EVALUATION)
    return replace(
        args,
        dataset_name=[name],
        dataset_weights=None,
        dataset_split=args.eval_split or VALIDATION,
        dataset_config=args.dataset_config if is_trained else None,
        dataset_revision=args.dataset_revision if is_trained else None,
        image_column=column(args.eval_image_column, args.image_column),
        text_column=column(args.eval_text_column, args.text_column),
        image_folder=args.eval_image_folder or args.image_folder,
        num_samples=args.eval_num_samples,
        **nothing,
    )


def _own_options(sentence: str) -> str:
    """A sentence about data with the names of the options of evaluation."""
    sentence = sentence.replace("with --dataset_name", "with --eval_dataset_name, or another split with --eval_split")
    names = [name.removeprefix("eval_") for name in EVALUATION if name not in ("eval_split", "eval_dataset_name")]
    sentence = re.sub(rf"--({'|'.join(names)})\b", r"--eval_\1", sentence)
    return sentence.replace("--dataset_split", "--eval_split").replace("--dataset_name", "--eval_dataset_name")


def _check_apart(args: DataArguments, name: str, split: str, pairs: Any) -> None:
    """Refuse to evaluate on rows that the run trains on."""
    for trained in args.dataset_name or ():
        if _place(trained) == _place(name) and _is_same(name, args.dataset_split, split, pairs):
            what = f"the split {split} of {name}" if args.eval_split else name
            raise RecipeError(
                f"The run trains on {what}, so that its loss there would tell nothing new; evaluate on another "
                "dataset (--eval_dataset_name), another split (--eval_split), or a slice that is left out of the "
                'training, as with --dataset_split "train[:95%]" --eval_split "train[95%:]".'
            )


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.resolve()) if path.exists() else name


def _is_same(name: str, trained: str, split: str, pairs: Any) -> bool:
    """Whether two splits of a dataset have rows in common."""
    path = Path(name).expanduser()
    if name == TINY:
        return split != VALIDATION or trained == VALIDATION
    if tars_named(name) is not None:
        return True
    if path.is_file() or (path / "filter_cap.json").is_file():  # which have no splits
        return overlap(trained, split, pairs, any_name=True)
    if (
        path.is_dir()
        and captioned_pictures(path, split)
        and not all((path / one).is_dir() for one in (trained, split))
    ):
        return True  # the whole folder
    return overlap(trained, split, pairs)


class FilledUp:
    """
    Rows for which batches are full on every process, as a dataset of torch.

    What is missing is filled up with blank rows that the collator leaves out. accelerate would repeat rows in their
    place, and these would count twice.

    Args:
        rows: of `stage1_rows` or `stage2_rows`.
        multiple: rows of a batch on all processes together.
    """

    def __init__(self, rows: Dataset, multiple: int) -> None:
        self.rows, self.length = rows, -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        (row,) = self.__getitems__([place])
        return row

    def __getitems__(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """The rows at some places, as torch asks for those of a batch."""
        real = [place for place in places if place < len(self.rows)]
        found: list[dict[str, Any]] = self.rows.__getitems__(real or [0])
        blank = {**found[0], "skipped": {"cause": FILLER, "name": ""}}
        return found[: len(real)] + [blank] * (len(places) - len(real))
