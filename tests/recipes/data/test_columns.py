"""Columns of one's own data: found by the names that people use, named where they are not, and told."""

import csv
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from coloured import COLOURS
from damaged import jpeg, write_tar
from hub_server import HubServer

from recipes_minigpt4 import stage1_pretrain
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.planning.data import measure_sources
from recipes_minigpt4.utils.errors import RecipeError


CAPTIONS = ["a red square", "a green square", "a blue square"]


pytestmark = pytest.mark.usefixtures("own_cache")


def jsonl(folder: Path, image: str, text: str, /, **others: object) -> Path:
    rows = [{image: f"{number}.png", text: caption, **others} for number, caption in enumerate(CAPTIONS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def metadata(folder: Path, text: str) -> Path:
    with open(folder / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", text), *((f"{n}.png", c) for n, c in enumerate(CAPTIONS))])
    return folder


def tar(folder: Path, **fields: str) -> Path:
    """A tar whose samples have the fields in their .json; `{}` stands for the caption."""
    texts = [{name: value.format(caption) for name, value in fields.items()} for caption in CAPTIONS]
    samples = [(str(n), {"png": (folder / f"{n}.png").read_bytes(), "json": json.dumps(text).encode()})
               for n, text in enumerate(texts)]  # fmt: skip
    return write_tar(folder / "pairs.tar", samples)


def read(processor: object, *sources: Path, count: int = 3, **fields: object) -> list[tuple]:
    args = DataArguments(dataset_name=list(map(str, sources)), shuffle_buffer=1, **fields)
    rows = list(itertools.islice(stage1_rows(load_pairs(args, stage=1), processor, args), count))
    assert [row["skipped"] for row in rows] == [None] * count
    return sorted((row["completion"].strip(), row["images"][0].getpixel((4, 3))) for row in rows)


EXPECTED = sorted(zip(CAPTIONS, COLOURS, strict=True))


@pytest.mark.parametrize(
    "image, text",
    [("image", "caption"), ("img", "text"), ("image_path", "txt"), ("file_name", "answer"), ("path", "description"),
     ("jpg", "TEXT"), ("Image", "Caption"), ("webp", "title")],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_of_files_are_found(image, text, streaming, folder: Path, compose: Callable, capsys) -> None:
    source = jsonl(folder, image, text, width=8, id="x")
    assert read(compose()[1], source, streaming=streaming) == EXPECTED
    assert f"data: {image} and {text} of {source}\n" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["text", "caption", "description"])
def test_columns_of_folders_are_found(text: str, folder: Path, compose: Callable, capsys) -> None:
    assert read(compose()[1], metadata(folder, text)) == EXPECTED
    assert f"data: image and {text} of {folder}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "fields, taken",
    [({"caption": "{}", "text": "other"}, "caption"), ({"text": "{}", "url": "x"}, "caption"),
     ({"answer": "{}", "key": "7"}, "answer"), ({"description": "{}"}, "description")],
    ids=["caption", "text", "answer", "description"],
)  # fmt: skip
def test_columns_of_tars_are_found(fields: dict, taken: str, folder: Path, compose: Callable, capsys) -> None:
    assert read(compose()[1], tar(folder, **fields)) == EXPECTED
    assert f"data: image and {taken} of " in capsys.readouterr().out


def test_what_holds_pictures_wins_over_paths_and_addresses(folder: Path, compose: Callable) -> None:
    source = jsonl(folder, "image", "caption", url="https://nowhere.invalid/1.png", path="elsewhere")
    assert read(compose()[1], source) == EXPECTED


def test_lists_of_one_picture_are_pictures(folder: Path, compose: Callable) -> None:
    rows = [{"images": [f"{number}.png"], "text": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(compose()[1], folder / "rows.jsonl") == EXPECTED
    rows[1]["images"].append("2.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refuse(folder / "rows.jsonl", "2 pictures", "messages")


def test_every_source_of_a_mixture_has_columns_of_its_own(folder: Path, compose: Callable) -> None:
    processor = compose()[1]
    sources = (jsonl(folder, "img", "text"), tar(folder, answer="{}"))
    assert set(read(processor, *sources, count=30)) == set(EXPECTED)
    rows = [{"a": f"{n}.png", "b": caption, "c": "no", "text": "no"} for n, caption in enumerate(CAPTIONS)]
    (folder / "others.jsonl").write_text("\n".join(map(json.dumps, rows)))
    named = {"image_column": ["img", "a"], "text_column": ["text", "b"]}
    found = read(processor, sources[0], folder / "others.jsonl", count=30, **named)
    assert set(found) == set(EXPECTED)


def test_captions_beside_pictures_are_read(folder: Path, compose: Callable, capsys) -> None:
    (folder / "more").mkdir()
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number}.txt").write_text(f"{caption}\n")
    (folder / "2.txt").rename(folder / "more" / "2.txt")
    (folder / "2.png").rename(folder / "more" / "2.png")
    assert read(compose()[1], folder) == EXPECTED
    assert f"data: image and text of {folder}\n" in capsys.readouterr().out
    args = DataArguments(dataset_name=str(folder))
    assert measure_sources(args, stage=1)[0].samples == 3
    (folder / "1.txt").unlink()
    skipped = [row["skipped"] for row in stage1_rows(load_pairs(args, stage=1), compose()[1], args)]
    assert [cause and cause["cause"] for cause in skipped] == [None, "no caption", None]
    assert "1.png" in skipped[1]["name"]


def test_only_the_split_that_is_wanted_is_read_beside_pictures(folder: Path, compose: Callable) -> None:
    for split, number in (("train", 0), ("test", 1)):
        (folder / split).mkdir()
        (folder / f"{number}.png").rename(folder / split / "a.png")
        (folder / split / "a.txt").write_text(CAPTIONS[number])
    assert read(compose()[1], folder, count=1) == [(CAPTIONS[0], COLOURS[0])]
    refuse(folder, "train[:1]", "--num_samples", dataset_split="train[:1]")


# ---- mistakes -------------------------------------------------------------------------------------------------------


def refuse(source: Path | Sequence[Path], *named: str, stage: int = 1, **fields: object) -> None:
    with pytest.raises(RecipeError) as told:
        load_pairs(DataArguments(dataset_name=str(source), **fields), stage=stage)
    sentence = str(told.value)
    assert "\n" not in sentence and sentence.endswith("."), sentence
    assert not [word for word in named if word not in sentence], sentence


def test_several_columns_that_fit_are_named(folder: Path) -> None:
    refuse(jsonl(folder, "image", "caption", text="x"), "caption and text", "--text_column")
    refuse(jsonl(folder, "image", "caption", img="x"), "image and img", "--image_column")
    refuse(tar(folder, answer="{}", output="x"), "answer and output", "--text_column")


def test_no_column_that_fits_gets_an_example(folder: Path) -> None:
    refuse(jsonl(folder, "image", "words"), "image, words", "--text_column", '{"image": "1.jpg", "caption"')
    refuse(jsonl(folder, "thing", "caption"), "thing, caption", "--image_column", '{"image": "1.jpg", "caption"')


def test_folders_without_captions_get_an_example(folder: Path) -> None:
    refuse(folder, "no captions", "metadata.csv", "`file_name,caption`", "1.txt")
    for name, number in (("cat", 0), ("dog", 1)):
        (folder / name).mkdir()
        (folder / f"{number}.png").rename(folder / name / "a.png")
    (folder / "2.png").unlink()
    refuse(folder, "class folders (cat, dog)", "metadata.csv", "`file_name,caption`")


def test_as_many_columns_as_datasets() -> None:
    with pytest.raises(RecipeError, match=r"--text_column names 3 columns for 2 dataset"):
        DataArguments(dataset_name=["a", "b"], text_column=["x", "y", "z"])
    with pytest.raises(RecipeError, match=r"--image_column is 3"):
        DataArguments(dataset_name=["a"], image_column=3)
    assert DataArguments(dataset_name=["a", "b"], text_column="x").text_column == ["x"]


def test_pictures_of_tars_are_any(folder: Path, compose: Callable) -> None:
    source = write_tar(
        folder / "a.tar", [("0", {"jpg": jpeg(1), "txt": b"one"}), ("1", {"png": jpeg(2), "txt": b"2"})]
    )
    assert [text for text, _ in read(compose()[1], source, count=2)] == ["2", "one"]


def test_columns_in_a_yaml_file(tmp_path: Path, folder: Path, compose: Callable) -> None:
    """As older files have them, and one for each dataset."""
    (tmp_path / "run.yaml").write_text("dataset_name: a.tar\nimage_column: image\ntext_column: caption\n")
    _, data, _ = stage1_pretrain.parse(["--config", str(tmp_path / "run.yaml")])
    assert (data.image_column, data.text_column) == (["image"], ["caption"])
    (tmp_path / "run.yaml").write_text("dataset_name: [a.tar, b]\ntext_column: [caption, text]\n")
    _, data, _ = stage1_pretrain.parse(["--config", str(tmp_path / "run.yaml")])
    assert (data.image_column, data.text_column) == (None, ["caption", "text"])
    assert read(compose()[1], tar(folder, text="{}"), image_column="image", text_column="caption") == EXPECTED


def test_columns_of_datasets_of_the_hub_are_found(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, because huggingface_hub reads the address of the Hub when it is imported."""
    rows = {"img": [str(folder / f"{n}.png") for n in range(3)], "text": CAPTIONS, "label": [0, 1, 1]}
    features = {
        "img": datasets.Image(),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["a", "b"]),
    }
    saved = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    saved.to_parquet(tmp_path / "train.parquet")
    code = """
from recipes_minigpt4.data.sources import DataArguments, load_pairs
for streaming in (False, True):
    pairs = load_pairs(DataArguments(dataset_name="someone/squares", streaming=streaming, shuffle_buffer=1), stage=1)
    print(sorted(pair["text"] for pair, _ in zip(pairs, range(3))))
"""
    with HubServer() as hub:
        content = (tmp_path / "train.parquet").read_bytes()
        hub.add_repo("someone/squares", {"data/train-00000-of-00001.parquet": content}, kind="dataset")
        settings = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["data: img and text of someone/squares", str(sorted(CAPTIONS))] * 2
