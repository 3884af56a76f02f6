"""What to train on: the arguments that both stages share."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import check_ranges


@dataclass
class DataArguments:
    """What to train on."""

    # Where the pairs are
    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Dataset of the Hub, folder, file, tar files or `tiny`; several are mixed. Exactly: a dataset "
            "on the Hub; a folder of pictures with metadata.csv or metadata.jsonl; a folder with "
            "filter_cap.json and image/ (cc_sbu_align); a .jsonl, .json, .csv, .tsv or .parquet file whose rows name "
            "pictures or hold them (as base64, for example); tar files of webdataset, streamed from a path, hf:// or "
            "https:// with * and {000..099}; or `tiny`, the embedded world."
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How often each of several datasets is drawn from, such as 115 14. Default: equally."},
    )
    image_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column with pictures or their paths. Of several datasets one for each, or one for all. "
            "Default: found by its name; such as image, jpg, file_name or url."
        },
    )
    text_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column with captions, answers or chats. Of several datasets one for each, or one for all. "
            "Default: found by its name; such as caption, text, answer, conversations or messages."
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths of pictures start from. Default: the folder of the file."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on, slices allowed."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})

    # How they are read
    num_samples: int | None = field(
        default=None, metadata={"help": "Use only so many samples, the first ones. Default: all."}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read a dataset of the Hub while training instead of fetching it first. Tars always are."},
    )
    shuffle_buffer: int = field(
        default=1000,  # released code, `wds.shuffle(1000)`
        metadata={"help": "Samples of the blocks in which each worker shuffles a stream. They are not decoded yet."},
    )
    max_bad_share: float = field(
        default=0.1,
        metadata={"help": "Share of samples, 0 to 1, that may be damaged before the run stops. They are skipped."},
    )

    # What is evaluated on while training
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset to evaluate on, as dataset_name. Default: that one, and its eval_split."},
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on, slices allowed. Default: validation."}
    )
    eval_num_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on only so many samples, the first ones. Default: all."}
    )
    eval_image_column: str | None = field(
        default=None, metadata={"help": "Column with pictures to evaluate on. Default: as in training."}
    )
    eval_text_column: str | None = field(
        default=None, metadata={"help": "Column with text to evaluate on. Default: as in training."}
    )
    eval_image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths of pictures to evaluate on start from. Default: image_folder."},
    )

    # What becomes of a row
    max_txt_len: int | None = field(
        default=None,
        metadata={"help": "Longest answer in tokens, end_sym included. Default: 32 in stage 1 and 160 in stage 2."},
    )
    instruction_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of the training text of stage 2: a name or Jinja. Default: the processor's; "
            "vicuna_v0_alignment in the place of vicuna_v0."
        },
    )
    end_sym: str | None = field(
        default=None,
        metadata={
            "help": "Text that ends an answer. Default: a line break in stage 1; in stage 2 what ends a turn of the "
            "chat template, such as ### or the EOS token."
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):  # as a YAML file may have it
            self.dataset_name = [self.dataset_name]
        self.image_column = _columns("image_column", self.image_column, self.dataset_name)
        self.text_column = _columns("text_column", self.text_column, self.dataset_name)
        if self.dataset_weights is not None:
            self.dataset_weights = _numbers("dataset_weights", self.dataset_weights)
        check_ranges(self)

    @property
    def is_evaluated(self) -> bool:
        """Whether there are data to evaluate on."""
        return bool(self.eval_dataset_name or self.eval_split)


EVALUATION = tuple(one.name for one in fields(DataArguments) if one.name.startswith("eval_"))


def _columns(option: str, value: Any, names: list[str] | None) -> list[str] | None:
    """Names of columns as a YAML file may have them; one stands for all datasets."""
    columns = [value] if isinstance(value, str) else value
    if columns is None:
        return None
    if not isinstance(columns, (list, tuple)) or not columns or not all(isinstance(name, str) for name in columns):
        raise RecipeError(f"--{option} is {value!r}; it has to be the name of a column, or one for each dataset.")
    if len(columns) not in (1, len(names or columns)):
        raise RecipeError(
            f"--{option} names {len(columns)} columns for {len(names or [])} dataset(s); give one for all, or one for "
            "each --dataset_name."
        )
    return list(columns)


def _numbers(option: str, values: Any) -> list[float]:
    """Numbers as a YAML file may have them, in which `1e2` is a text."""
    try:
        return [float(value) for value in (values if isinstance(values, (list, tuple)) else [values])]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{option} are {values}; give numbers, one for each --dataset_name.") from error


def column_of(columns: list[str] | None, place: int) -> str | None:
    """The column that is named for the dataset at a place of `dataset_name`, or None if it is to be found."""
    return None if columns is None else columns[place if len(columns) > 1 else 0]


def check_dataset_weights(args: DataArguments) -> list[float] | None:
    """`dataset_weights` as probabilities."""
    names, weights = args.dataset_name or [], args.dataset_weights
    if weights is None:
        return None
    if len(weights) != len(names) or not all(0 < weight < math.inf for weight in weights):
        raise RecipeError(
            f"dataset_weights are {', '.join(f'{weight:g}' for weight in weights)} for {len(names)} dataset(s); give "
            "one number above 0 for each --dataset_name."
        )
    return [weight / sum(weights) for weight in weights]
