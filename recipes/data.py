"""Image–text pairs: where they come from, how captions are cleaned, and the rows that TRL trains on.

A row is TRL's prompt–completion with `images`, so only the answer carries loss. Rows are made when they are asked for:
no picture is decoded ahead of its batch.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset, load_from_disk
from datasets.utils.file_utils import xopen

from processing_minigpt4 import load_chat_template
from processing_minigpt4.conversations_minigpt4 import LENGTH_MARK, protect_text, without_marks
from processing_minigpt4.segments_minigpt4 import tokenize_pieces
from recipes_minigpt4 import TINY, RecipeError, one_line


FILE_TYPES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}

# Stage 2 asks one of these (released code, `prompts/alignment.txt`).
INSTRUCTIONS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)


@dataclass
class DataArguments:
    """What to train on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A dataset on the Hub; a folder of pictures with metadata.csv or metadata.jsonl; a folder with "
            "filter_cap.json and image/ (cc_sbu_align); a .jsonl, .json, .csv, .tsv or .parquet file whose rows name "
            "pictures; or `tiny`, the embedded world."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of a dataset on the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on, slices allowed."})
    image_column: str = field(default="image", metadata={"help": "Column with the pictures or their paths."})
    text_column: str = field(default="caption", metadata={"help": "Column with the captions or answers."})
    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder that relative paths of pictures start from. Default: the folder of the file."},
    )
    num_samples: int | None = field(
        default=None, metadata={"help": "Use only so many samples, the first ones. Default: all."}
    )
    max_txt_len: int | None = field(
        default=None,
        metadata={
            "help": "Longest answer in tokens, end_sym included. Default: the original's 32 in stage 1 and 160 in "
            "stage 2."
        },
    )
    instruction_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template of the training text of stage 2: a name or Jinja. Default: the processor's own, "
            "but vicuna_v0_alignment where it chats in vicuna_v0."
        },
    )
    end_sym: str | None = field(
        default=None,
        metadata={
            "help": "Text that ends an answer. Default: a line break in stage 1; in stage 2 what ends a turn of the "
            "chat template, such as ### or the EOS token."
        },
    )


def clean_caption(text: str, max_words: int = 50) -> str:
    """
    Clean a caption of the web as BLIP does, whose cleaner stage 1 of the original uses.

    Lower case; each of `. ! " ( ) * # : ; ~` becomes a space; runs of white space collapse; the first `max_words`
    words, which only spaces part, are kept. A single tab or line break stays, except a line break at the end.
    """
    text = re.sub(r"[.!\"()*#:;~]", " ", text.lower())
    words = re.sub(r"\s{2,}", " ", text).removesuffix("\n").strip(" ").split(" ")
    return " ".join(words[:max_words])


# ---- loading --------------------------------------------------------------------------------------------------------


def load_pairs(args: DataArguments, stage: int) -> Dataset:
    """
    Open image–text pairs without decoding a picture.

    Args:
        args: where they are.
        stage: 1 or 2; tells which pairs of the embedded world are meant.

    Returns:
        Dataset with the columns `image` (decoded when asked for) and `text`.

    Raises:
        RecipeError: if there is no such dataset, file, column or picture.
    """
    if not args.dataset_name:
        raise RecipeError("No data: name a dataset, a folder or a file with --dataset_name.")
    path = Path(args.dataset_name).expanduser()
    if args.dataset_name == TINY:
        return _tiny_pairs(stage, args.num_samples)
    if path.is_file():
        dataset, folder = _open_file(path), path.parent
    elif (path / "filter_cap.json").is_file():
        dataset, folder = _open_curated(path), path
    else:
        dataset, folder = _open_dataset(path, args), path
    if not len(dataset):
        raise RecipeError(f"{args.dataset_name} holds no samples; write one row per picture into it.")
    dataset = _choose_columns(dataset, args)
    if args.num_samples is not None:
        if args.num_samples < 1:
            raise RecipeError(f"--num_samples is {args.num_samples}; it has to be 1 or more, or left out.")
        dataset = dataset.select(range(min(args.num_samples, len(dataset))))
    return _as_images(dataset, Path(args.image_folder or folder))


def _tiny_pairs(stage: int, count: int | None) -> Dataset:
    """Draw the training pairs of the embedded world, by default as many as its own stage has."""
    from recipes_minigpt4.tiny import scenes

    examples = scenes.stage1_examples if stage == 1 else scenes.stage2_examples
    pairs = examples() if count is None else examples(count)
    columns = {"image": [pair["image"] for pair in pairs], "text": [pair["caption"] for pair in pairs]}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "text": Value("string")}))


def _open_file(path: Path) -> Dataset:
    """Read a table of rows; of a JSON object, the list that it holds under `annotations`."""
    if path.suffix not in FILE_TYPES:
        raise RecipeError(f"{path} is no data file: its name has to end in {', '.join(FILE_TYPES)}.")
    if not path.stat().st_size:
        raise RecipeError(f"{path} is empty; write one row per picture into it.")
    try:
        if path.suffix == ".json":
            return Dataset.from_list(_read_annotations(path))
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
        return load_dataset(FILE_TYPES[path.suffix], data_files=str(path), split="train", **options)
    except RecipeError:
        raise
    except Exception as error:  # whatever pandas, pyarrow or json say about a damaged file
        raise RecipeError(f"{path} cannot be read as {path.suffix[1:]} ({_reason(error)}); mend the file.") from error


def _reason(error: BaseException) -> str:
    """What the error at the root of an error says; `datasets` hides it behind general ones."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)


def _read_annotations(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError(f'{path} must hold a list of objects, or {{"annotations": [...]}} with one.')
    return rows


def _open_curated(folder: Path) -> Dataset:
    """Read the layout of the original's stage 2 data: `filter_cap.json` and `image/ID.jpg`."""
    rows = _read_annotations(folder / "filter_cap.json")
    if rows and not {"image_id", "caption"} <= rows[0].keys():
        raise RecipeError(
            f"{folder / 'filter_cap.json'} needs `image_id` and `caption` in every annotation; it has "
            f"{', '.join(rows[0])}."
        )
    pictures = [f"image/{row['image_id']}.jpg" for row in rows]
    if missing := [picture for picture in pictures if not (folder / picture).is_file()]:
        raise RecipeError(
            f"{len(missing)} pictures of {folder} are missing, {missing[0]} among them; copy them there."
        )
    return Dataset.from_dict({"image": pictures, "caption": [str(row["caption"]) for row in rows]})


def _open_dataset(path: Path, args: DataArguments) -> Dataset:
    """Open a folder or a dataset of the Hub with `datasets`."""
    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            saved = load_from_disk(str(path))
            if isinstance(saved, DatasetDict) and args.dataset_split not in saved:
                raise KeyError(f"its splits are {', '.join(saved)}")
            return saved[args.dataset_split] if isinstance(saved, DatasetDict) else saved
        name = str(path) if path.is_dir() else args.dataset_name
        return load_dataset(name, args.dataset_config, split=args.dataset_split, revision=args.dataset_revision)
    except Exception as error:  # the many ways in which `datasets` says that something is not there
        raise RecipeError(
            f"{args.dataset_name} with the split {args.dataset_split} cannot be opened "
            f"({_reason(error)}); name a dataset of the Hub, a folder with pictures and metadata, or a "
            "file with --dataset_name."
        ) from error


def _choose_columns(dataset: Dataset, args: DataArguments) -> Dataset:
    """Keep the pictures and the text, as `image` and `text`."""
    found = dataset.column_names
    for option, column in (("image_column", args.image_column), ("text_column", args.text_column)):
        if column not in found:
            raise RecipeError(
                f"{args.dataset_name} has no column {column!r}; it has {', '.join(found) or 'none'}, so name the "
                f"right one with --{option}."
            )
    text = dataset.features[args.text_column]
    if not isinstance(text, Value) or "string" not in text.dtype:
        raise RecipeError(
            f"The column {args.text_column!r} of {args.dataset_name} holds no text but {text}; name another of "
            f"{', '.join(found)} with --text_column."
        )
    dataset = dataset.select_columns([args.image_column, args.text_column])
    # Away with both old names first, for the text may stand in a column called `image`.
    dataset = dataset.rename_columns({args.image_column: "0", args.text_column: "1"})
    return dataset.rename_columns({"0": "image", "1": "text"})


def _as_images(dataset: Dataset, folder: Path) -> Dataset:
    """Let `datasets` decode the column `image`, whatever it holds: pictures, bytes or paths relative to `folder`."""
    kind = dataset.features["image"]
    if isinstance(kind, Image):
        return dataset
    if isinstance(kind, Value) and "string" in kind.dtype:
        dataset = dataset.map(_join_paths, batched=True, fn_kwargs={"folder": str(folder.absolute())})
        paths = list(dataset["image"])
        if nameless := sum(not path for path in paths):
            raise RecipeError(f"{nameless} of {len(paths)} rows have no picture; remove them from the dataset.")
        if missing := [path for path in paths if "://" not in path and not Path(path).is_file()]:
            raise RecipeError(
                f"{len(missing)} of {len(paths)} pictures are missing, {missing[0]} among them; say with "
                "--image_folder where relative paths start from."
            )
    elif not (isinstance(kind, Mapping) or (isinstance(kind, Value) and "binary" in kind.dtype)):
        raise RecipeError(
            f"The image column holds neither pictures nor paths but {kind}; name another with --image_column."
        )
    return dataset.cast_column("image", Image())


def _join_paths(batch: Mapping[str, Sequence[str | None]], folder: str) -> dict[str, list[str | None]]:
    paths = batch["image"]
    return {"image": [path if not path or "://" in path else str(Path(folder, path)) for path in paths]}


# ---- rows -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """
    Turns pairs into TRL's prompt–completion rows; applied to a batch when it is asked for.

    Args:
        tokenizer: the language model's.
        image_token: what marks a picture; in a caption it is text and stays so.
        prompts: texts with it; a pair's `prompt` says which it gets.
        start: text that the template puts between prompt and answer, mostly none.
        end: text that ends an answer.
        max_txt_len: longest answer in tokens, `end` included, or None.
        clean: whether captions pass `clean_caption`.
    """

    tokenizer: Any
    image_token: str
    prompts: tuple[str, ...]
    start: str
    end: str
    max_txt_len: int | None
    clean: bool

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        # Numbers of stored features stand in for pictures; see `with_features`.
        images = batch["feature"] if "feature" in batch else [self.picture(image) for image in batch["image"]]
        return {
            "prompt": [self.prompts[number] for number in batch["prompt"]],
            "completion": [self.completion(text) for text in batch["text"]],
            "images": [[image] for image in images],
        }

    def picture(self, stored: Mapping[str, Any] | None) -> Any:
        """Decode a picture, turned as its EXIF data say."""
        return _read(stored, Image().decode_example)

    def content(self, stored: Mapping[str, Any] | None) -> bytes:
        """The bytes of a picture's file, not decoded."""
        return bytes(_read(stored, lambda stored: stored["bytes"] or _file_content(stored["path"])))

    def completion(self, text: str) -> str:
        """An answer as it is trained: cleaned, ended, and cut to `max_txt_len` tokens."""
        if not isinstance(text, str):
            raise RecipeError(f"A caption is no text but {text!r}; remove such rows from the dataset.")
        text = without_marks(text)
        whole = self.start + (clean_caption(text) if self.clean else text) + self.end
        kept, *length = truncate(whole, self.tokenizer, self.max_txt_len).partition(LENGTH_MARK)
        return "".join((protect_text(kept, self.image_token), *length))


def _read(stored: Mapping[str, Any] | None, reader: Callable[[dict[str, Any]], Any]) -> Any:
    """What `reader` makes of a picture as `datasets` stores it."""
    if stored is None:
        raise RecipeError("A row has no picture; remove such rows from the dataset.")
    try:
        return reader(dict(stored))
    except Exception as error:  # whatever Pillow or the file system say about a damaged or missing file
        name = stored.get("path") or "A picture of the dataset"
        raise RecipeError(f"{name} cannot be read ({_reason(error)}); mend it, or remove its row.") from error


def _file_content(path: str) -> bytes:
    with xopen(path, "rb") as file:  # URLs too
        return bytes(file.read())


def truncate(text: str, tokenizer: Any, max_tokens: int | None) -> str:
    """
    Cut a text behind its first `max_tokens` tokens (released code: `end_sym` counts and can be cut off).

    Returns:
        The text of these tokens; where no text has just them (half a character, a lone dummy prefix), the whole text
        with a mark that tells the processor how many tokens to keep.
    """

    def ids_of(text: str) -> list[int]:
        return tokenize_pieces(tokenizer, [text], with_spans=False, options={})[0][0]

    ids = ids_of(text)
    if max_tokens is None or len(ids) <= max_tokens:
        return text
    shorter = str(tokenizer.decode(ids[:max_tokens], clean_up_tokenization_spaces=False))
    return shorter if ids_of(shorter) == ids[:max_tokens] else f"{text}{LENGTH_MARK}{max_tokens}"


def stage1_rows(pairs: Dataset, processor: Any, args: DataArguments) -> Dataset:
    """Rows of stage 1, `[BOS][image][caption][line break]`, with cleaned captions of at most 32 tokens."""
    rows = Rows(
        tokenizer=processor.tokenizer,
        image_token=processor.image_token,
        prompts=((processor.tokenizer.bos_token or "") + processor.image_token,),
        start="",
        end="\n" if args.end_sym is None else args.end_sym,
        max_txt_len=args.max_txt_len or 32,
        clean=True,
    )
    return _with_rows(pairs, rows, [0] * len(pairs))


def stage2_rows(pairs: Dataset, processor: Any, args: DataArguments, seed: int = 42) -> Dataset:
    """
    Rows of stage 2: an instruction about the picture, and an answer of at most 160 tokens.

    Each row has one of the four `INSTRUCTIONS`, drawn once from `seed`; the original draws one per batch.

    Raises:
        RecipeError: if the chat template cannot be used for training.
    """
    prompts, start, end = instruction_format(processor, args.instruction_template)
    rows = Rows(
        tokenizer=processor.tokenizer,
        image_token=processor.image_token,
        prompts=prompts,
        start=start,
        end=end if args.end_sym is None else args.end_sym,
        max_txt_len=args.max_txt_len or 160,
        clean=False,
    )
    draw = random.Random(seed)
    return _with_rows(pairs, rows, [draw.randrange(len(prompts)) for _ in range(len(pairs))])


def _with_rows(pairs: Dataset, rows: Rows, prompts: list[int]) -> Dataset:
    """Number the prompt of every pair, which costs no copy of the pictures, and make rows on access."""
    # `rows` decodes by itself, so that it can say which picture cannot be read.
    return pairs.cast_column("image", Image(decode=False)).add_column("prompt", prompts).with_transform(rows)


def rows_of(rows: Dataset) -> tuple[Rows, Dataset]:
    """What makes the rows of `stage1_rows` or `stage2_rows`, and their pictures as stored, in the column `image`."""
    return rows.format["format_kwargs"]["transform"], rows.with_format(None).select_columns("image")


def with_features(rows: Dataset, numbers: list[int]) -> Dataset:
    """The same rows with numbers of stored features in `images`; the pictures are neither read nor decoded."""
    make, _ = rows_of(rows)
    return rows.with_format(None).remove_columns("image").add_column("feature", numbers).with_transform(make)


def instruction_format(processor: Any, template: str | None = None) -> tuple[tuple[str, ...], str, str]:
    """
    What a chat template puts around a picture, an instruction and an answer.

    Args:
        processor: the model's processor.
        template: name or Jinja text of the template; None is the processor's own, except that a processor that chats
            in `vicuna_v0` trains in `vicuna_v0_alignment`, as the original does.

    Returns:
        One prompt per instruction, with the image token in its place; the text between prompt and answer, mostly
        none; the text that ends an answer: a separator, the end-of-turn token, or EOS.

    Raises:
        RecipeError: if there is no such template, or if it writes another prompt once the answer is there.
    """
    own = processor.chat_template
    try:
        if template is None:
            template = "vicuna_v0_alignment" if own == load_chat_template("vicuna_v0") else own
        text = template if "{" in template else load_chat_template(template, processor.tokenizer)
    except ValueError as error:
        raise RecipeError(f"{one_line(error)}.") from error
    # The system text of `llama2` is for chats; the original trains without.
    system = [{"role": "system", "content": ""}] if text == load_chat_template("llama2") else []

    def render(instruction: str, *answer: dict[str, Any]) -> str:
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        chat = [*system, {"role": "user", "content": content}, *answer]
        return str(
            processor.apply_chat_template(chat, chat_template=text, tokenize=False, add_generation_prompt=not answer)
        )

    prompts = tuple(render(instruction) for instruction in INSTRUCTIONS)
    answer = "ANSWER"
    whole = render(INSTRUCTIONS[0], {"role": "assistant", "content": [{"type": "text", "text": answer}]})
    start, found, end = whole.removeprefix(prompts[0]).partition(answer)
    if not whole.startswith(prompts[0]) or not found:
        raise RecipeError(
            "The chat template writes another prompt once the answer is there, so it cannot be trained; choose one "
            "with --instruction_template."
        )
    eos = processor.tokenizer.eos_token or ""
    end = end.partition(eos)[0] + eos if eos and eos in end else end.strip() or eos
    return prompts, start, end
