"""Pairs and rows: cleaning, cutting, loading, and what TRL's collator makes of them."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import (
    INSTRUCTIONS,
    clean_caption,
    instruction_format,
    stage1_rows,
    stage2_rows,
    truncate,
)
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.utils.errors import RecipeError


CAPTIONS = ["A red square.", "A green square.", "A blue square."]
COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


pytestmark = pytest.mark.usefixtures("own_cache")


# ---- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, cleaned",
    [
        ("A Dog", "a dog"),
        ("Wow! (A dog): #1; *best* ~ever~.", "wow a dog 1 best ever"),
        ('He said "hi".', "he said hi"),
        ("  many   spaces  here ", "many spaces here"),
        ("it's a well-known, place?", "it's a well-known, place?"),
        ("two: one; e.g. #3 ~ (4)", "two one e g 3 4"),
        ("a.b!c", "a b c"),
        ("a . b", "a b"),
        ("either/or 3-4 [x] {y} <z> 5% & $6 + 7 = 8 @ 9_10 ^", "either/or 3-4 [x] {y} <z> 5% & $6 + 7 = 8 @ 9_10 ^"),
        ("“so” ‘called’ «words» … done", "“so” ‘called’ «words» … done"),
        ("ÜBER CAFÉ ΣΑΣ İ 日本。", "über café σας i\u0307 日本。"),
        ("a 🐎 runs", "a 🐎 runs"),
        # White space counts as one run whatever it is made of, but a single character of it stays what it is.
        ("tab\t\tand\n\nline", "tab and line"),
        ("one\ttab and\none line", "one\ttab and\none line"),
        ("wide\u00a0and\u3000 wide", "wide\u00a0and wide"),
        ("line\n", "line"),
        ("line.\n", "line"),
        ("line\r\n", "line"),
        ("\nline", "\nline"),
        ("tab\t", "tab\t"),
        # Words are what spaces part.
        (" ".join(f"w{i}" for i in range(60)), " ".join(f"w{i}" for i in range(50))),
        (".".join(f"w{i}" for i in range(60)), " ".join(f"w{i}" for i in range(50))),
        ("\t".join(f"w{i}" for i in range(60)), "\t".join(f"w{i}" for i in range(60))),
        (" ".join(["w"] * 50), " ".join(["w"] * 50)),
        ("...", ""),
        (" \n", ""),
        ("\n", ""),
        ("", ""),
    ],
)
def test_captions_are_cleaned_as_blip_does(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned


class Slow:
    """A tokenizer that knows no offsets, as those in pure Python."""

    is_fast = False

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode

    def __call__(self, text: str, **options):
        assert "return_offsets_mapping" not in options
        return self.tokenizer(text, **options)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("text", ["a red square\n", "a small zebra crosses###", "één paard 🐎 loopt\n"])
def test_truncation_counts_end_sym(compose: Callable, text: str, slow: bool) -> None:
    processor = compose()[1]
    tokenizer = processor.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for limit in range(1, len(ids) + 3):
        cut = truncate(text, Slow(tokenizer) if slow else tokenizer, limit)
        assert processor(text=cut, add_special_tokens=False)["input_ids"] == [ids[:limit]]
        if text.isascii():  # one token of other text can be half a character, which no text has
            assert text.startswith(cut) and tokenizer(cut, add_special_tokens=False)["input_ids"] == ids[:limit]
    assert truncate(text, tokenizer, len(ids)) == text
    assert truncate(text, tokenizer, None) == text
    if text.isascii():
        assert truncate(text, tokenizer, len(ids) - 1) == text[:-1]  # its last token is one character of end_sym


def test_the_four_instructions_are_the_original_s() -> None:
    assert set(INSTRUCTIONS) == {
        "Describe this image in detail.",
        "Take a look at this image and describe what you notice.",
        "Please provide a detailed description of the picture.",
        "Could you describe the contents of this image for me?",
    }


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of one colour each."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (8, 6), colour).save(folder / f"{number}.png")
    return folder


def table(column: str = "caption") -> list[dict[str, str]]:
    return [{"image": f"{number}.png", column: caption} for number, caption in enumerate(CAPTIONS)]


def write_jsonl(folder: Path) -> Path:
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, table())))
    return folder / "pairs.jsonl"


def write_json_list(folder: Path) -> Path:
    (folder / "pairs.json").write_text(json.dumps(table()))
    return folder / "pairs.json"


def write_json_annotations(folder: Path) -> Path:
    (folder / "pairs.json").write_text(json.dumps({"annotations": table()}))
    return folder / "pairs.json"


def write_table(folder: Path, name: str, separator: str) -> Path:
    lines = [separator.join(("image", "caption")), *(separator.join(row.values()) for row in table())]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def write_csv(folder: Path) -> Path:
    return write_table(folder, "pairs.csv", ",")


def write_tsv(folder: Path) -> Path:
    return write_table(folder, "pairs.tsv", "\t")


def write_parquet(folder: Path) -> Path:
    datasets.Dataset.from_list(table()).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


def write_parquet_with_bytes(folder: Path) -> Path:
    rows = [{**row, "image": {"bytes": (folder / row["image"]).read_bytes(), "path": None}} for row in table()]
    datasets.Dataset.from_list(rows).to_parquet(folder / "pairs.parquet")
    for picture in folder.glob("*.png"):
        picture.unlink()
    return folder / "pairs.parquet"


def write_metadata(folder: Path) -> Path:
    rows = [{"file_name": row["image"], "caption": row["caption"]} for row in table()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_curated(folder: Path) -> Path:
    (folder / "image").mkdir()
    annotations = []
    for number, row in enumerate(table()):
        Image.new("RGB", (8, 6), COLOURS[number]).save(folder / "image" / f"{number}.jpg", quality=100)
        annotations.append({"image_id": str(number), "caption": row["caption"]})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


def as_dataset(folder: Path) -> datasets.Dataset:
    rows = {"image": [str(folder / row["image"]) for row in table()], "caption": CAPTIONS}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def write_saved_dataset(folder: Path) -> Path:
    as_dataset(folder).save_to_disk(folder / "saved")
    return folder / "saved"


def write_saved_splits(folder: Path) -> Path:
    datasets.DatasetDict({"train": as_dataset(folder)}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    "write",
    [
        write_jsonl,
        write_json_list,
        write_json_annotations,
        write_csv,
        write_tsv,
        write_parquet,
        write_parquet_with_bytes,
        write_metadata,
        write_curated,
        write_saved_dataset,
        write_saved_splits,
    ],
)
def test_pairs_come_from_every_layout(write: Callable, folder: Path, compose: Callable) -> None:
    args = DataArguments(dataset_name=str(write(folder)))
    rows = stage1_rows(load_pairs(args, stage=1), compose()[1], args)
    assert [row["completion"] for row in rows] == [f"{clean_caption(caption)}\n" for caption in CAPTIONS]
    for row, colour in zip(rows, COLOURS, strict=True):
        (picture,) = row["images"]
        pixel = picture.convert("RGB").getpixel((4, 3))
        assert picture.size == (8, 6) and max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) <= 3


def test_columns_folder_and_number_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.jsonl"
    rows = [{"image": text, "picture": row["image"]} for text, row in zip(CAPTIONS, table(), strict=True)]
    elsewhere.write_text("\n".join(map(json.dumps, rows)))
    args = DataArguments(
        dataset_name=str(elsewhere),
        image_column="picture",
        text_column="image",
        image_folder=str(folder),
        num_samples=2,
    )
    pairs = load_pairs(args, stage=1)
    assert pairs["text"][:] == CAPTIONS[:2]
    assert [picture.getpixel((0, 0)) for picture in pairs["image"]] == COLOURS[:2]


def test_absolute_paths_need_no_folder(folder: Path, tmp_path: Path) -> None:
    rows = [{**row, "image": str(folder / row["image"])} for row in table()]
    (tmp_path / "absolute.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = load_pairs(DataArguments(dataset_name=str(tmp_path / "absolute.jsonl")), stage=1)
    assert [picture.getpixel((0, 0)) for picture in pairs["image"]] == COLOURS


def test_more_samples_than_there_are_is_all(folder: Path) -> None:
    assert len(load_pairs(DataArguments(dataset_name=str(write_jsonl(folder)), num_samples=99), stage=1)) == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_the_embedded_world_is_drawn(stage: int) -> None:
    first, again = (load_pairs(DataArguments(dataset_name="tiny", num_samples=3), stage) for _ in range(2))
    assert first["text"][:] == again["text"][:] and len(first) == 3
    assert all(picture.mode == "RGB" for picture in first["image"])


# ---- mistakes -------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def file(name: str, text: str) -> Callable[[Path], str]:
    """A data file of that text, ready to be written."""
    return lambda folder: write(folder, name, text)


def lines(*rows: dict) -> Callable[[Path], str]:
    """A .jsonl file of these rows, ready to be written."""
    return file("pairs.jsonl", "\n".join(map(json.dumps, rows)))


def curated(**annotation) -> Callable[[Path], str]:
    """The folder of stage 2 data with one annotation and no picture, ready to be written."""
    text = json.dumps({"annotations": [annotation]})
    return lambda folder: str(Path(write(folder, "filter_cap.json", text)).parent)


# What is written, which arguments it needs beside, and what the sentence has to name: what was found and the remedy.
MISTAKES: dict[str, tuple[Callable[[Path], object], dict, tuple[str, ...]]] = {
    "nothing named": (lambda folder: None, {}, ("--dataset_name",)),
    "no such dataset": (lambda folder: folder / "nowhere", {}, ("nowhere", "--dataset_name")),
    "no data file": (file("pairs.txt", "x"), {}, ("pairs.txt", ".jsonl")),
    "damaged json": (file("pairs.json", "{"), {}, ("pairs.json", "line 1", "fix")),
    "damaged jsonl": (file("pairs.jsonl", '{"a": 1}\nnonsense'), {}, ("pairs.jsonl", "fix")),
    "damaged parquet": (file("pairs.parquet", "nonsense"), {}, ("pairs.parquet", "fix")),
    "json of something else": (file("pairs.json", '{"a": 1}'), {}, ("pairs.json", "list")),
    "no rows": (file("pairs.json", "[]"), {}, ("pairs.json", "no samples")),
    "empty file": (file("pairs.jsonl", ""), {}, ("pairs.jsonl", "empty")),
    "no such text column": (write_jsonl, {"text_column": "words"}, ("words", "caption", "--text_column")),
    "no such image column": (write_jsonl, {"image_column": "photo"}, ("photo", "image", "--image_column")),
    "text of numbers": (lines({"image": "0.png", "caption": 3}), {}, ("caption", "int64", "--text_column")),
    "pictures of numbers": (lines({"image": 3, "caption": "a"}), {}, ("int64", "--image_column")),
    "missing picture": (
        lines(*table(), {"image": "9.png", "caption": "a"}),
        {},
        ("1 of 4", "9.png", "--image_folder"),
    ),
    "row without a picture": (lines(*table(), {"caption": "a"}), {}, ("1 of 4", "no picture", "remove")),
    "missing curated picture": (curated(image_id=7, caption="a"), {}, ("image/7.jpg", "copy")),
    "other curated fields": (curated(id=7, text="a"), {}, ("filter_cap.json", "image_id", "text")),
    "no such split": (write_metadata, {"dataset_split": "best"}, ("best", "train")),
    "no such saved split": (write_saved_splits, {"dataset_split": "best"}, ("best", "train")),
    "no samples wanted": (write_jsonl, {"num_samples": 0}, ("--num_samples", "0")),
    "weight of nothing": (write_jsonl, {"dataset_weights": [1, 2]}, ("1, 2", "1 dataset", "--dataset_name")),
    "weight of nought": (write_jsonl, {"dataset_weights": [0]}, ("above 0",)),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_wrong_data_is_told_in_one_sentence(name: str, folder: Path) -> None:
    write_it, fields, named = MISTAKES[name]
    written = write_it(folder)
    with pytest.raises(RecipeError) as told:
        load_pairs(DataArguments(dataset_name=None if written is None else str(written), **fields), stage=1)
    check_sentence(str(told.value), named)


def check_sentence(sentence: str, named: tuple[str, ...]) -> None:
    assert "\n" not in sentence and sentence.endswith("."), sentence
    assert not [word for word in named if word not in sentence], sentence


@pytest.mark.parametrize(
    "template, named",
    [
        ("vicuna_v9", ("vicuna_v9", "vicuna_v0")),
        ("wrapped", ("no chat template",)),
        (
            "{{ 'short' if messages[-1].role == 'assistant' else 'long prompt' }}{{ messages[-1].content }}",
            ("prompt", "--instruction_template"),
        ),
    ],
)
def test_templates_that_cannot_be_trained_are_refused(template: str, named, compose: Callable) -> None:
    with pytest.raises(RecipeError) as told:
        instruction_format(compose()[1], template)
    check_sentence(str(told.value), named)


# ---- rows -----------------------------------------------------------------------------------------------------------


def collate(rows, processor, **options):
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, **options)
    return collator([rows[index] for index in range(len(rows))])


def ids_of(processor, *pieces: str) -> list[int]:
    """Ids of pieces that are tokenized one by one; `<image>` stands for all placeholders of a picture."""
    ids: list[int] = []
    for piece in pieces:
        if piece == "<image>":
            ids += [processor.image_token_id] * 3
        else:
            ids += processor.tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


def check_row(batch, index: int, prompt: list[int], answer: list[int]) -> None:
    """Prompt without loss, answer with loss, pads on the right without attention and loss."""
    length, pads = len(prompt) + len(answer), batch["input_ids"].shape[1] - len(prompt) - len(answer)
    assert pads >= 0
    assert batch["input_ids"][index, :length].tolist() == prompt + answer
    assert batch["labels"][index].tolist() == [-100] * len(prompt) + answer + [-100] * pads
    assert batch["attention_mask"][index].tolist() == [1] * length + [0] * pads


@pytest.fixture
def pairs(folder: Path) -> datasets.Dataset:
    """Pairs of answers of different lengths."""
    rows = {"image": [str(folder / f"{n}.png") for n in range(3)], "text": ["A cat!", "A (very) long DOG.", "Ox"]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_stage1_rows_are_bos_image_caption_and_line_break(pairs, compose: Callable) -> None:
    processor = compose()[1]
    batch = collate(stage1_rows(pairs, processor, DataArguments()), processor)
    for index, caption in enumerate(("a cat\n", "a very long dog\n", "ox\n")):
        check_row(batch, index, ids_of(processor, "<s>", "<image>"), ids_of(processor, caption))
    assert batch["pixel_values"].shape == (3, 3, 28, 28)


def test_stage2_rows_follow_the_original_s_template(pairs, compose: Callable) -> None:
    processor = compose(chat_template="vicuna_v0")[1]
    rows = stage2_rows(pairs, processor, DataArguments())
    batch = collate(rows, processor)
    for index, answer in enumerate(("A cat!###", "A (very) long DOG.###", "Ox###")):
        (instruction,) = [text for text in INSTRUCTIONS if text in rows[index]["prompt"]]
        prompt = ("<s>", "###Human: <Img>", "<image>", f"</Img> {instruction} ###Assistant: ")
        check_row(batch, index, ids_of(processor, *prompt), ids_of(processor, answer))


def test_stage2_rows_of_llama2_end_with_eos(pairs, compose: Callable) -> None:
    processor = compose(chat_template="llama2")[1]
    rows = stage2_rows(pairs, processor, DataArguments())
    batch = collate(rows, processor)
    for index, answer in enumerate(("A cat!", "A (very) long DOG.", "Ox")):
        (instruction,) = [text for text in INSTRUCTIONS if text in rows[index]["prompt"]]
        prompt = ("<s>", "[INST] <Img>", "<image>", f"</Img> {instruction} [/INST] ")
        check_row(batch, index, ids_of(processor, *prompt), ids_of(processor, f"{answer}</s>"))


def test_stage2_rows_of_another_template_end_as_its_turns_do(pairs, compose: Callable) -> None:
    processor = compose()[1]
    processor.tokenizer.chat_template = CHATML.replace("<|im_end|>", "</s>")
    rows = stage2_rows(pairs, processor, DataArguments(instruction_template="wrapped"))
    for row in rows:
        assert row["prompt"].startswith("<|im_start|>user\n<image>")
        assert row["prompt"].endswith("</s>\n<|im_start|>assistant\n")
        assert row["completion"].endswith("</s>")


def test_instructions_are_drawn_from_the_seed(folder: Path, compose: Callable) -> None:
    processor = compose()[1]
    rows = {"image": [str(folder / "0.png")] * 40, "text": ["a"] * 40}
    pairs = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    first, again, other = (
        [row["prompt"] for row in stage2_rows(pairs, processor, DataArguments(), seed=seed)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {text for text in INSTRUCTIONS for prompt in first if text in prompt} == set(INSTRUCTIONS)


@pytest.mark.parametrize("make, limit", [(stage1_rows, 32), (stage2_rows, 160)])
@pytest.mark.parametrize("chosen", [None, 5])
def test_answers_are_cut_and_pictures_never(make, limit, chosen, folder: Path, compose: Callable) -> None:
    processor = compose()[1]
    text = " ".join("xyz"[n % 3] for n in range(49)) + " " + "q" * 300
    pairs = datasets.Dataset.from_dict({"image": [str(folder / "0.png")], "text": [text]})
    pairs = pairs.cast_column("image", datasets.Image())
    batch = collate(make(pairs, processor, DataArguments(max_txt_len=chosen)), processor)
    assert int((batch["labels"] != -100).sum()) == (chosen or limit)
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 3


def test_end_sym_can_be_chosen(pairs, compose: Callable) -> None:
    processor = compose()[1]
    for make in (stage1_rows, stage2_rows):
        rows = make(pairs, processor, DataArguments(end_sym=" END"))
        assert all(row["completion"].endswith(" END") for row in rows)
        rows = make(pairs, processor, DataArguments(end_sym=""))
        assert rows[2]["completion"] in ("ox", "Ox")


def test_rows_decode_a_picture_only_when_asked_for(folder: Path, compose: Callable) -> None:
    args = DataArguments(dataset_name=str(write_jsonl(folder)))
    rows = stage1_rows(load_pairs(args, stage=1), compose()[1], args)
    (folder / "2.png").unlink()
    assert [rows[index]["completion"] for index in (0, 1)] == ["a red square\n", "a green square\n"]
    assert rows[2]["skipped"] == {"cause": "missing file", "name": str(folder / "2.png")}


def test_placeholder_in_a_caption_is_text(folder: Path, compose: Callable) -> None:
    processor = compose()[1]
    pairs = datasets.Dataset.from_dict({"image": [str(folder / "0.png")], "text": ["an <image> tag"]})
    pairs = pairs.cast_column("image", datasets.Image())
    for make, end in ((stage1_rows, "\n"), (stage2_rows, "###")):
        batch = collate(make(pairs, processor, DataArguments()), processor)
        labels = batch["labels"][0]
        assert processor.tokenizer.decode(labels[labels != -100]) == f"an <image> tag{end}"
        assert int((batch["input_ids"] == processor.image_token_id).sum()) == 3


def test_pads_stay_on_the_right(pairs, compose: Callable) -> None:
    processor = compose()[1]
    processor.tokenizer.padding_side = "left"
    batch = collate(stage1_rows(pairs, processor, DataArguments()), processor)
    assert torch.all(batch["attention_mask"].diff(dim=1) <= 0)
