"""Data on disk under any name and ending, pictures inside of tables, and errors that keep pictures to themselves."""

import base64
import bz2
import gzip
import io
import itertools
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
from damaged import jpeg, sample, write_tar
from PIL import Image

from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.data import bad_samples
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import stage1_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.data.webdataset import expand
from recipes_minigpt4.planning.data import measure_sources
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.redaction import redact


CAPTIONS = ["a red square", "a green square", "a blue square"]
COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
# Characters that mean something to a shell, to glob, to fsspec, to an address, or to `datasets`.
NAMES = [
    "data [v2] {a,b}", "[0-9]{0..3}", "[", "{", "star * what?", "**", "[!a]#b 50%41 $5",
    "ü 日本 🐎 it's a\"b", "~x [x]",
]  # fmt: skip


@pytest.fixture
def processor(compose: Callable) -> object:
    return compose()[1]


pytestmark = pytest.mark.usefixtures("own_cache")


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), COLOURS[number]).save(buffer, "PNG")
    return buffer.getvalue()


def fill(folder: Path, endings: str = "png") -> list[dict[str, str]]:
    """Three pictures in a folder, and their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        (folder / f"{number} [x].{endings}").write_bytes(picture(number))
    return [{"image": f"{number} [x].{endings}", "caption": caption} for number, caption in enumerate(CAPTIONS)]


def lines_of(rows: list[dict]) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def table_of(rows: list[dict], separator: str) -> str:
    return "\n".join([separator.join(rows[0]), *(separator.join(map(str, row.values())) for row in rows)]) + "\n"


# ---- sources: each writes into a folder and returns what to name ----------------------------------------------------


def write_jsonl(folder: Path) -> Path:
    (folder / "rows.jsonl").write_text(lines_of(fill(folder)))
    return folder / "rows.jsonl"


def write_json(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(fill(folder)))
    return folder / "rows.json"


def write_csv(folder: Path) -> Path:
    (folder / "rows.csv").write_text(table_of(fill(folder), ","))
    return folder / "rows.csv"


def write_tsv(folder: Path) -> Path:
    (folder / "rows.tsv").write_text(table_of(fill(folder), "\t"))
    return folder / "rows.tsv"


def write_gz(folder: Path) -> Path:
    rows = fill(folder)
    with gzip.open(folder / "rows.jsonl.gz", "wt") as file:
        file.write(lines_of(rows))
    return folder / "rows.jsonl.gz"


def write_parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(fill(folder)), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_structs(folder: Path) -> Path:
    """Paths, relative ones, in the form in which `datasets` stores pictures."""
    rows = [{**row, "image": {"bytes": None, "path": row["image"]}} for row in fill(folder)]
    schema = pyarrow.schema(
        {"image": pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}), "caption": pyarrow.string()}
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "rows.parquet")
    return folder / "rows.parquet"


def write_metadata(folder: Path, name: str = "metadata.jsonl") -> Path:
    rows = [{"file_name": row["image"], "caption": row["caption"]} for row in fill(folder)]
    (folder / name).write_text(lines_of(rows) if name.endswith("jsonl") else table_of(rows, ","))
    return folder


def write_metadata_csv(folder: Path) -> Path:
    return write_metadata(folder, "metadata.csv")


def write_splits(folder: Path) -> Path:
    write_metadata(folder / "train")
    write_metadata(folder / "test")
    return folder


def write_folder_of_rows(folder: Path) -> Path:
    rows = [
        {**row, "image": str(folder / "elsewhere" / row["image"])} for row in fill(folder / "elsewhere" / ".hidden")
    ]
    rows = [{**row, "image": row["image"].replace("elsewhere", f"elsewhere{os.sep}.hidden")} for row in rows]
    (folder / "part-0.jsonl").write_text(lines_of(rows[:2]))
    (folder / "part-1.jsonl").write_text(lines_of(rows[2:]))
    return folder


def write_curated(folder: Path) -> Path:
    fill(folder / "image", "jpg")
    rows = [{"image_id": f"{number} [x]", "caption": caption} for number, caption in enumerate(CAPTIONS)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": rows}))
    return folder


def write_saved(folder: Path) -> Path:
    rows = fill(folder)
    columns = {"image": [str(folder / row["image"]) for row in rows], "caption": CAPTIONS}
    saved = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    datasets.DatasetDict(train=saved).save_to_disk(folder / "saved")
    return folder / "saved"


def write_one_tar(folder: Path) -> Path:
    samples = [
        (f"{number}", {"png": picture(number), "txt": caption.encode()}) for number, caption in enumerate(CAPTIONS)
    ]
    return write_tar(folder / "pairs.tar", samples)


def write_folder_of_tars(folder: Path) -> Path:
    return write_one_tar(folder).parent


def write_pattern_of_tars(folder: Path) -> Path:
    write_one_tar(folder)
    return folder / "p*.tar"


FILES = [
    write_jsonl, write_json, write_csv, write_tsv, write_gz, write_parquet, write_structs, write_metadata,
    write_metadata_csv, write_splits, write_folder_of_rows, write_curated, write_saved,
]  # fmt: skip
TARS = [write_one_tar, write_folder_of_tars, write_pattern_of_tars]


def read(processor: object, **fields: object) -> list[tuple[str, tuple[int, int, int]]]:
    """Caption and colour of the first three rows of stage 1."""
    args = DataArguments(shuffle_buffer=1, **fields)
    rows = list(itertools.islice(stage1_rows(load_pairs(args, stage=1), processor, args), 3))
    assert [row["skipped"] for row in rows] == [None] * 3
    return sorted((row["completion"].strip(), row["images"][0].getpixel((4, 3))) for row in rows)


EXPECTED = sorted(zip(CAPTIONS, COLOURS, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_files_are_found_under_any_name(name: str, tmp_path: Path, processor) -> None:
    """Every kind of source at once, to be quick."""
    for write in (*FILES, *TARS):
        source = write(folder := tmp_path / write.__name__ / name)
        assert read(processor, dataset_name=str(source)) == EXPECTED, source
        (measured,) = measure_sources(DataArguments(dataset_name=str(source)), stage=1)
        assert measured.samples in (3, None) and measured.nbytes, source
        assert folder.is_dir()


@pytest.mark.parametrize("name", ["a::b", "$HOME", "back\\slash"])
def test_names_that_datasets_takes_for_something_else(name: str, tmp_path: Path, processor) -> None:
    for write in (write_json, write_curated, *TARS):  # which need it for nothing
        assert read(processor, dataset_name=str(write(tmp_path / write.__name__ / name))) == EXPECTED, write
    for write in (write_jsonl, write_csv, write_gz, write_parquet, write_metadata):
        args = DataArguments(dataset_name=str(write(tmp_path / write.__name__ / name)))
        check_sentence(lambda args=args: load_pairs(args, stage=1), "rename it, or name a link")
    saved = tmp_path / "saved" / name
    write_saved(tmp_path).rename(saved.parent.parent / "moved")
    saved.parent.mkdir()
    (tmp_path / "moved").rename(saved)
    check_sentence(lambda: load_pairs(DataArguments(dataset_name=str(saved)), stage=1), "rename it, or name a link")


@pytest.mark.parametrize("name", ["data [v2]", "{a,b} *?"])
@pytest.mark.parametrize("write", FILES)
def test_streams_find_files_under_any_name(name: str, write: Callable, tmp_path: Path, processor) -> None:
    source = write(tmp_path / name)
    assert read(processor, dataset_name=str(source), streaming=True) == EXPECTED


def test_sources_of_any_name_are_mixed(tmp_path: Path, processor) -> None:
    sources = [str(write(tmp_path / f"{number} [x]")) for number, write in enumerate((write_jsonl, write_one_tar))]
    args = DataArguments(dataset_name=sources, dataset_weights=[1, 1])
    rows = list(itertools.islice(stage1_rows(load_pairs(args, stage=1), processor, args), 30))
    assert {row["completion"].strip() for row in rows} == set(CAPTIONS) and not any(row["skipped"] for row in rows)


def test_pictures_are_found_in_a_folder_of_any_name(tmp_path: Path, processor) -> None:
    rows = fill(tmp_path / "pictures [v2] {a} *?")
    (tmp_path / "rows.jsonl").write_text(lines_of(rows))
    fields = {"dataset_name": str(tmp_path / "rows.jsonl"), "image_folder": str(tmp_path / "pictures [v2] {a} *?")}
    assert read(processor, **fields) == EXPECTED


def test_a_relative_name_is_no_pattern_either(tmp_path: Path, processor, monkeypatch) -> None:
    (home := tmp_path / "run [1]").mkdir()
    monkeypatch.chdir(home)
    for write in (write_jsonl, write_metadata, write_one_tar):
        source = write(home / write.__name__).relative_to(home)
        assert read(processor, dataset_name=str(source)) == EXPECTED


def test_what_exists_wins_over_what_it_would_match(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar", "[01].tar", "{0,1}.tar", "a/0.tar", "{a,b}/0.tar", "{a,b}/1.tar"):
        write_tar(tmp_path / name, [sample(0)])
    for pattern, found in {
        "[01].tar": ["[01].tar"],
        "{0,1}.tar": ["{0,1}.tar"],
        "[0-1].tar": ["0.tar", "1.tar"],
        "{0..1}.tar": ["0.tar", "1.tar"],
        "{a,b}/*.tar": ["{a,b}/0.tar", "{a,b}/1.tar"],
        "{a,b}/{0..1}.tar": ["{a,b}/0.tar", "{a,b}/1.tar"],
        "?/*.tar": ["a/0.tar"],
        "**/0.tar": ["0.tar", "a/0.tar", "{a,b}/0.tar"],
    }.items():
        assert expand(str(tmp_path / pattern)) == [str(tmp_path / name) for name in found], pattern


def test_a_run_writes_everything_under_any_name(stage: Callable, tmp_path: Path) -> None:
    """Checkpoints, resumption, features, the panel and the adapter."""
    name = "run [v2] {a,b} *? #1 50%41 ü"
    (tmp_path / name / "pictures").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / name / "pictures" / "a.png")
    fields = {
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 3,
        "cache_features": tmp_path / name / "features", "panel_steps": 1,
        "panel_images": tmp_path / name / "pictures",
    }  # fmt: skip
    stage1_pretrain.main(stage(name, **fields))
    folder = tmp_path / name
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert (folder / "panel.html").is_file() and (folder / "model.safetensors").is_file()
    trainer = stage1_pretrain.main(stage(name, **{**fields, "max_steps": 4, "resume_from_checkpoint": "latest"}))
    assert trainer.state.global_step == 4
    fresh = {"cache_features": None, "panel_steps": None, "panel_images": None}
    again = stage1_pretrain.main(stage("next", model_name_or_path=folder, **fresh))
    assert again.state.global_step == 2


# ---- endings --------------------------------------------------------------------------------------------------------


ENDINGS = {
    "rows.JSONL": lambda rows: lines_of(rows).encode(),
    "rows.ndjson": lambda rows: lines_of(rows).encode(),
    "rows.Json": lambda rows: json.dumps(rows).encode(),
    "rows.CSV": lambda rows: table_of(rows, ",").encode(),
    "rows.TSV": lambda rows: table_of(rows, "\t").encode(),
    "rows.jsonl.gz": lambda rows: gzip.compress(lines_of(rows).encode()),
    "rows.JSONL.GZ": lambda rows: gzip.compress(lines_of(rows).encode()),
    "rows.json.gz": lambda rows: gzip.compress(json.dumps({"annotations": rows}).encode()),
    "rows.csv.gz": lambda rows: gzip.compress(table_of(rows, ",").encode()),
    "rows.tsv.bz2": lambda rows: bz2.compress(table_of(rows, "\t").encode()),
    "rows.jsonl.xz": lambda rows: lzma.compress(lines_of(rows).encode()),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_endings_in_capitals_and_of_compressed_files(name: str, tmp_path: Path, processor) -> None:
    (tmp_path / name).write_bytes(ENDINGS[name](fill(tmp_path)))
    assert read(processor, dataset_name=str(tmp_path / name)) == EXPECTED
    (measured,) = measure_sources(DataArguments(dataset_name=str(tmp_path / name)), stage=1)
    assert measured.samples == 3


def test_parquet_and_tar_in_capitals(tmp_path: Path, processor) -> None:
    for source, name in ((write_parquet(tmp_path), "ROWS.PARQUET"), (write_one_tar(tmp_path), "PAIRS.TAR")):
        assert read(processor, dataset_name=str(source.rename(tmp_path / name))) == EXPECTED
    assert read(processor, dataset_name=str(write_one_tar(tmp_path / "folder.tar").parent)) == EXPECTED


@pytest.mark.parametrize(
    "name, content",
    [("a.jsonl.gz", b"nonsense"), ("a.csv.gz", gzip.compress(b"", mtime=0)), ("a.gz", b"")],
    ids=["nonsense", "nothing", "empty"],
)
def test_damaged_compressed_files_get_a_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    check_sentence(lambda: load_pairs(DataArguments(dataset_name=str(tmp_path / name)), stage=1), name)


def check_sentence(act: Callable, *named: str, without: str = "0x") -> str:
    with pytest.raises(RecipeError) as told:
        act()
    sentence = str(told.value)
    assert "\n" not in sentence and sentence.endswith(".") and without not in sentence, sentence[:500]
    assert not [word for word in named if word not in sentence], sentence[:500]
    assert len(sentence) < 700
    return sentence


# ---- pictures inside of tables --------------------------------------------------------------------------------------


def inline(number: int, kind: str) -> str:
    text = base64.b64encode(picture(number)).decode()
    forms = {
        "base64": text,
        "long base64": base64.b64encode(picture(number) + bytes(5000)).decode(),
        "without padding": text.rstrip("="),
        "for URLs": text.replace("+", "-").replace("/", "_"),
        "data URI": f"data:image/png;base64,{text}",
    }
    return forms[kind]


INLINE: dict[str, Callable[[Path, list[dict]], Path]] = {}


def inline_source(write: Callable[[Path, list[dict]], object]) -> None:
    def written(folder: Path, rows: list[dict]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, rows)
        return next(iter(sorted(folder.iterdir())))

    INLINE[write.__name__ if write.__name__ != "<lambda>" else str(len(INLINE))] = written


def saved(folder: Path, rows: list[dict]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")


def jsonl(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.jsonl").write_text(lines_of(rows))


def json_list(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.json").write_text(json.dumps(rows))


def csv_rows(folder: Path, rows: list[dict]) -> None:
    quoted = [{"image": f'"{row["image"]}"', "caption": row["caption"]} for row in rows]
    (folder / "rows.csv").write_text(table_of(quoted, ","))


def tsv_rows(folder: Path, rows: list[dict]) -> None:
    (folder / "rows.tsv").write_text(table_of(rows, "\t"))


def parquet(folder: Path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")


def large_strings(folder: Path, rows: list[dict]) -> None:
    schema = pyarrow.schema({"image": pyarrow.large_string(), "caption": pyarrow.string()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), folder / "rows.parquet")


def folder_of_rows(folder: Path, rows: list[dict]) -> None:
    jsonl_folder = folder / "folder"
    jsonl_folder.mkdir()
    jsonl(jsonl_folder, rows)


for write in (saved, jsonl, json_list, csv_rows, tsv_rows, parquet, large_strings, folder_of_rows):
    inline_source(write)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("source", INLINE)
def test_pictures_inside_of_every_table_are_read(source: str, streaming: bool, tmp_path, processor) -> None:
    for kind in ("base64", "long base64", "without padding", "for URLs", "data URI"):
        rows = [{"image": inline(number, kind), "caption": caption} for number, caption in enumerate(CAPTIONS)]
        name = INLINE[source](tmp_path / kind, rows)
        assert read(processor, dataset_name=str(name), streaming=streaming) == EXPECTED, kind


def test_paths_addresses_and_pictures_may_stand_in_one_column(tmp_path: Path, processor) -> None:
    rows = fill(tmp_path)
    rows[1]["image"], rows[2]["image"] = inline(1, "base64"), (tmp_path / rows[2]["image"]).as_uri()
    jsonl(tmp_path, rows)
    assert read(processor, dataset_name=str(tmp_path / "rows.jsonl")) == EXPECTED
    pairs = load_pairs(DataArguments(dataset_name=str(tmp_path / "rows.jsonl")), stage=1)
    assert [image.getpixel((0, 0)) for image in pairs["image"]] == COLOURS


NOISE = base64.b64encode(jpeg(size=(640, 480))).decode()
BROKEN = {
    "cut": (NOISE[: len(NOISE) // 2], bad_samples.TRUNCATED),
    "cut data URI": (f"data:image/jpeg;base64,{NOISE[: len(NOISE) // 2]}", bad_samples.TRUNCATED),
    "other base64": ("QUJD" * 2000, bad_samples.NO_IMAGE),
    "damaged data URI": (f"data:image/jpeg;base64,{NOISE}!", bad_samples.NO_IMAGE),
    "empty data URI": ("data:image/jpeg;base64,", bad_samples.EMPTY_FILE),
    "stray character": (f"{NOISE}!", bad_samples.UNREADABLE),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_picture_in_a_table_is_skipped_unprinted(
    kind: str, streaming: bool, tmp_path: Path, processor
) -> None:
    text, cause = BROKEN[kind]
    jsonl(tmp_path, [{"image": text, "caption": NOISE if kind == "cut" else "a"}])
    args = DataArguments(
        dataset_name=str(tmp_path / "rows.jsonl"), max_bad_share=1, streaming=streaming, shuffle_buffer=1
    )
    row = next(iter(stage1_rows(load_pairs(args, stage=1), processor, args)))
    assert row["skipped"]["cause"] == cause
    assert len(row["skipped"]["name"]) < 300 and (text[30:60] or "no text") not in row["skipped"]["name"]


def test_missing_pictures_are_told_without_what_is_no_path(tmp_path: Path) -> None:
    jsonl(tmp_path, [{"image": f"{NOISE}!", "caption": "a"}, {"image": "no.png", "caption": "a"}])
    args = DataArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    check_sentence(lambda: load_pairs(args, stage=1), "2 of 2 pictures are missing", without=NOISE[:30])


def test_a_column_of_mixed_values_is_told_without_them(tmp_path: Path) -> None:
    for rows in ([{"image": 3}, {"image": NOISE}], [{"image": [1]}, {"image": f"data:image/jpeg;base64,{NOISE}"}]):
        json_list(tmp_path, [{**row, "caption": "a"} for row in rows])
        args = DataArguments(dataset_name=str(tmp_path / "rows.json"))
        check_sentence(lambda args=args: load_pairs(args, stage=1), "rows.json", without=NOISE[:30])


@pytest.mark.parametrize(
    "text", [NOISE, f"data:image/jpeg;base64,{NOISE}", repr(jpeg()), repr(jpeg())[:200], repr(bytearray(jpeg()))]
)
def test_no_sentence_of_the_recipes_prints_a_picture(text: str) -> None:
    told = str(RecipeError(f"Before {text} behind."))
    assert told.startswith("Before ") and len(told) < 60 and text[20:40] not in told
    for kept in ("/a/" + "folder/" * 20 + "b.png", "0" * 64, "b'short'", "data: 1, 2"):
        assert redact(kept) == kept


# ---- what is no data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, named",
    [
        ("https://example.com/page", ("https://example.com/page is an address", "owner/name")),
        ("http://example.com/rows.jsonl?token=hf_abcdefghijklmnopqrstuv", ("is an address", "fetch")),
        ("s3://bucket/rows.parquet", ("is an address",)),
        ("https://huggingface.co/datasets/owner/name", ("name it owner/name",)),
        ("https://huggingface.co/datasets/owner/name/tree/main", ("name it owner/name",)),
        ("hf://datasets/owner/name", ("name it owner/name",)),
    ],
)
def test_an_address_is_no_data_set(name: str, named: tuple[str, ...]) -> None:
    args = DataArguments(dataset_name=name)
    for act in (lambda: load_pairs(args, stage=1), lambda: measure_sources(args, stage=1)):
        check_sentence(act, *named, without=os.getcwd())


@pytest.mark.parametrize("write", [write_jsonl, write_metadata, write_csv])
def test_a_cache_that_cannot_be_written_is_told_with_its_remedy(write: Callable, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "home" / ".cache" / "datasets")
    args = DataArguments(dataset_name=str(write(tmp_path)))
    check_sentence(lambda: load_pairs(args, stage=1), "HF_HOME", "home", "Not a directory", without="--dataset_name")


@pytest.mark.parametrize(
    "weights, named",
    [(["1e2", "x"], "x"), ([None, 1], "None"), ([1, float("nan")], "above 0"), (["inf", 1], "above 0")],
)
def test_weights_that_are_no_numbers_get_a_sentence(weights: list, named: str) -> None:
    check_sentence(
        lambda: load_pairs(DataArguments(dataset_name=["a", "b"], dataset_weights=weights), stage=1),
        "dataset_weights",
        named,
    )


def test_weights_of_yaml_are_numbers(stage: Callable, tmp_path: Path, capsys) -> None:
    tars = [write_tar(tmp_path / f"{number}.tar", [sample(number)]) for number in range(2)]
    arguments = stage(dataset_name=None, max_steps=1)
    config = tmp_path / "weights.yaml"
    config.write_text(f"dataset_name: {json.dumps([str(tar) for tar in tars])}\ndataset_weights: [1e2, 14]\n")
    assert cli.main(["stage1", "--config", str(config), *arguments]) == 0, capsys.readouterr().err


# ---- all of it skipped ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"max_bad_share": 1}, {"logging_strategy": "no", "logging_steps": None}])
def test_a_short_run_of_which_all_is_skipped_is_an_error(fields: dict, stage: Callable, tmp_path, capsys) -> None:
    rows = fill(tmp_path)
    jsonl(tmp_path, [{"image": rows[0]["image"], "caption": " "} for _ in range(240)])
    arguments = stage(dataset_name=tmp_path / "rows.jsonl", max_steps=2, per_device_train_batch_size=4, **fields)
    assert cli.main(["stage1", *arguments]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "None of 8 samples can be used: 8 × no caption" in told and told.endswith("fix the data.")
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_the_share_counts_at_the_end_of_a_short_run(stage: Callable, tmp_path: Path, capsys) -> None:
    rows = fill(tmp_path)
    jsonl(tmp_path, [{"image": rows[0]["image"], "caption": "a" if number % 4 else ""} for number in range(240)])
    arguments = stage(dataset_name=tmp_path / "rows.jsonl", max_steps=20, per_device_train_batch_size=4)
    assert cli.main(["stage1", *arguments]) == 2
    assert "of 80 samples cannot be used" in capsys.readouterr().err


def test_features_of_which_all_is_skipped_are_an_error(stage: Callable, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    jsonl(tmp_path, [{"image": "a.png", "caption": "a"}] * 4)
    fields = {"max_bad_share": 1, "cache_features": tmp_path / "features"}
    assert cli.main(["stage1", *stage(dataset_name=tmp_path / "rows.jsonl", **fields)]) == 2
    assert "None of 4 samples can be used" in capsys.readouterr().err
