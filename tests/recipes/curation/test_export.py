"""`minigpt4 curate export`: what each form holds, that stage 2 reads it, and that nothing private is in it."""

import io
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from hub_server import HubServer
from PIL import Image
from transformers import AutoProcessor

from recipes_minigpt4 import cli
from recipes_minigpt4.curation import export_formats
from recipes_minigpt4.curation.data_card import histogram
from recipes_minigpt4.curation.decided import case_of
from recipes_minigpt4.curation.export import MARK
from recipes_minigpt4.curation.provenance import public_client, public_source
from recipes_minigpt4.curation.rows import read_rows, write_rows
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.formatting import INSTRUCTIONS
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.utils.redaction import holds_secret


FORMS = ("cc_sbu_align", "imagefolder", "parquet", "messages")
TEXTS = [f"In the picture there is one {name} shape on a plain background." for name in
         ("red", "blue", "green", "yellow", "pink", "brown")]  # fmt: skip
SERVER = "http://gpu-box-7.example.org:8000/v1"
PROMPT = "Fix the error in the given paragraph."


@pytest.fixture
def folder(curated: Callable, tmp_path: Path) -> Path:
    """What `minigpt4 curate` leaves of six scenes: one is refused, one has no text, one JPEG is named by its path."""
    folder, rows = curated(*TEXTS[:5], None)
    rows[1] = replace(rows[1], verdicts={"short": "9 characters", "drifted": "much"})
    rows[5] = replace(rows[5], verdicts={"unmended": "no answer"})
    rows = [replace(row, scores={"match_mean": place / 10}) for place, row in enumerate(rows)]
    picture = Image.open(folder / rows[2].file)
    picture.save(folder / "picture" / "jpeg.jpg", quality=80)
    rows[2] = replace(rows[2], file="picture/jpeg.jpg", name=str(tmp_path / "private" / "me.jpg"))
    write_rows(folder, rows)
    made = {
        "model": "0123456789abcdef", "sampling": {"max_new_tokens": 300, "num_beams": 1, "temperature": 0.0},
        "prompts": {"describe": "Describe this.", "mend": PROMPT}, "mender": f"openai:gpt-x at {SERVER}",
        "mending": {"temperature": 0.7, "max_tokens": 200},
        "names": {"model": str(tmp_path / "runs" / "stage1"), "dataset": str(tmp_path / "pictures")},
        "scores": {"match": {"name": "openai/clip-vit-base-patch32", "revision": "abc"}},
    }  # fmt: skip
    (folder / "made.json").write_text(json.dumps(made))
    funnel = {"drawn": 8, "left_out": {"the same file": 2}, "described": 6, "continued": 3, "mended": 5,
              "rules": {"short": 1, "unmended": 1}, "left": 4}  # fmt: skip
    (folder / "funnel.json").write_text(json.dumps(funnel))
    answer = {"digest": rows[0].picture, "made": "x", "cost": 0.5, "prompt_tokens": 1000, "completion_tokens": 234}
    (folder / "mended.jsonl").write_text(json.dumps(answer) + "\n")
    return folder


def export(folder: Path, form: str, *more: str) -> Path:
    assert cli.main(["curate", "export", str(folder), "--to", form, *more]) == 0
    return folder / "export" / form


def refused(capsys: pytest.CaptureFixture, folder: Path, *more: str) -> str:
    capsys.readouterr()
    assert cli.main(["curate", "export", str(folder), *more]) == 2
    return capsys.readouterr().err.strip()


LEFT = [TEXTS[0], *TEXTS[2:5]]  # without the one that a rule refuses


# ---- read back ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_stage2_trains_on_what_is_exported(form: str, folder: Path, describing: str, tmp_path: Path) -> None:
    place = export(folder, form)
    pairs = load_pairs(DataArguments(dataset_name=[str(place)]), stage=2)
    rows = read_rows(folder)
    if form == "messages":
        chats = [json.loads(chat) for chat in pairs["chat"]]
        texts = [chat[-1]["content"][0]["text"] for chat in chats]
        pictures = [Image.open(io.BytesIO(images[0]["bytes"])) for images in pairs["images"]]
    else:
        texts, pictures = list(pairs["text"]), list(pairs["image"])
    assert texts == LEFT
    for picture, row in zip(pictures, [rows[0], *rows[2:5]], strict=True):
        assert difference(picture, folder / row.file) < (3 if form == "cc_sbu_align" else 1e-6)
    options = {"--model_name_or_path": describing, "--dataset_name": str(place), "--max_steps": "2",
               "--warmup_steps": "1", "--per_device_train_batch_size": "2",
               "--output_dir": str(tmp_path / "trained")}  # fmt: skip
    assert cli.main(["stage2", "--config", "tiny_stage2", *(text for pair in options.items() for text in pair)]) == 0
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def difference(picture: Image.Image, file: Path) -> float:
    one, other = (np.asarray(image.convert("RGB"), np.float32) for image in (picture, Image.open(file)))
    return float(np.abs(one - other).mean())


def test_cc_sbu_align_is_the_originals(folder: Path) -> None:
    place = export(folder, "cc_sbu_align")
    assert json.loads((place / "filter_cap.json").read_text()) == {
        "annotations": [
            {"image_id": number, "caption": text} for number, text in zip(("0", "2", "3", "4"), LEFT, strict=True)
        ]
    }
    assert sorted(path.name for path in (place / "image").iterdir()) == ["0.jpg", "2.jpg", "3.jpg", "4.jpg"]
    assert {Image.open(path).format for path in (place / "image").iterdir()} == {"JPEG"}
    assert (place / "image" / "2.jpg").read_bytes() == (folder / "picture" / "jpeg.jpg").read_bytes()
    assert {path.name for path in place.iterdir()} == {"filter_cap.json", "image", "README.md", MARK}


def test_a_picture_with_transparency_becomes_a_jpeg_on_white(folder: Path) -> None:
    rows = read_rows(folder)
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(folder / rows[0].file)
    picture = Image.open(export(folder, "cc_sbu_align") / "image" / "0.jpg")
    assert picture.size == (20, 10) and np.asarray(picture).min() > 250


@pytest.mark.parametrize("form", ["parquet", "imagefolder"])
def test_rows_tell_where_they_come_from(form: str, folder: Path, tmp_path: Path) -> None:
    place = export(folder, form, "--rules", "-all")
    table = datasets.load_dataset(str(place), split="train")
    assert isinstance(table.features["image"], datasets.Image) and len(table) == 5
    row = table[1]
    assert row["text"] == TEXTS[1] and row["draft"] == "Draft 1." and row["mended"] == TEXTS[1]
    assert json.loads(row["verdicts"]) == {"short": "9 characters", "drifted": "much"}
    assert row["score_match_mean"] == 0.1 and row["continued"] is False and row["decision"] is None
    assert row["picture_sha256"] == read_rows(folder)[1].picture
    assert (row["model"], row["model_revision"]) == ("stage1", "0123456789abcdef")
    assert row["mender"] == "openai:gpt-x, a server of its own"
    assert row["match_model"] == "openai/clip-vit-base-patch32, abc"
    assert set(json.loads(row["prompt_hashes"])) == {"describe", "mend"}
    assert table["id"][:] == ["0", "1", "2", "3", "4"]
    assert table["source"][:3] == ["0.png", "1.png", "me.jpg"]


def test_messages_fit_a_chat_template(folder: Path, describing: str) -> None:
    table = datasets.load_dataset(str(export(folder, "messages")), split="train")
    row = table[0]
    assert [image.size for image in row["images"]] == [Image.open(folder / read_rows(folder)[0].file).size]
    (question,) = [part["text"] for part in row["messages"][0]["content"] if part["type"] == "text"]
    assert question in INSTRUCTIONS
    text = AutoProcessor.from_pretrained(describing).apply_chat_template(row["messages"], tokenize=False)
    assert f"{question} ###Assistant: {TEXTS[0]}" in text


def test_large_tables_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_formats, "SHARD", 1)
    place = export(folder, "parquet")
    assert sorted(path.name for path in (place / "data").iterdir()) == [
        f"train-0000{number}-of-00004.parquet" for number in range(4)
    ]
    assert datasets.load_dataset(str(place), split="train")["text"][:] == LEFT


def test_another_export_into_the_same_folder_is_what_is_read(folder: Path) -> None:
    """Libraries keep what they have read; the old rows may not come back."""
    for form in ("imagefolder", "parquet"):
        assert datasets.load_dataset(str(export(folder, form)), split="train")["text"][:] == LEFT
        place = export(folder, form, "--rules", "-all")
        assert datasets.load_dataset(str(place), split="train")["text"][:] == TEXTS[:5]
        assert list(load_pairs(DataArguments(dataset_name=[str(place)]), stage=2)["text"]) == TEXTS[:5]


# ---- options --------------------------------------------------------------------------------------------------------


def exported_texts(folder: Path, *more: str) -> list[str]:
    place = export(folder, "cc_sbu_align", *more)
    return [row["caption"] for row in json.loads((place / "filter_cap.json").read_text())["annotations"]]


def test_options_choose_rows_and_the_reasons_are_told(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert exported_texts(folder, "--rules", "-short", "-drifted") == TEXTS[:5]
    assert exported_texts(folder, "--rules", "+drifted") == LEFT
    assert exported_texts(folder, "--keep", "2", "--by", "score") == TEXTS[3:5]
    assert exported_texts(folder, "--min_score", "0.3", "--score", "match_mean") == TEXTS[3:5]
    capsys.readouterr()
    assert len(exported_texts(folder, "--keep_share", "0.5")) == 2
    told = capsys.readouterr().out
    assert "6 → 2" in told and "minigpt4 stage2 --dataset_name" in told
    for reason in ("no text", "rule: short", "not picked (random)"):
        assert reason in told


def test_people_decide(folder: Path, tmp_path: Path) -> None:
    rows = read_rows(folder)
    lines = [
        {"case": case_of(rows[0]), "answer": "drop"},
        {"case": case_of(rows[1]), "answer": "keep"},
        {"case": case_of(rows[2]), "answer": "edit", "text": "A better text about the picture."},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    wanted = [TEXTS[1], "A better text about the picture.", *TEXTS[3:5]]
    assert exported_texts(folder, "--decisions", str(tmp_path / "mine.jsonl")) == wanted
    assert exported_texts(folder) == LEFT
    shutil.copy(tmp_path / "mine.jsonl", folder / "decisions.jsonl")  # as `review --serve` leaves them
    assert exported_texts(folder) == wanted
    table = datasets.load_dataset(str(export(folder, "parquet")), split="train")
    assert table["decision"][:] == ["keep", "edit", None, None]


def test_what_is_curated_is_exported(curate_tiny: Callable) -> None:
    """From the first command to the last: the rule that one answer stands under all pictures is among those told."""
    folder = curate_tiny("--num_samples", "5")
    count = len(read_rows(folder))
    assert len(exported_texts(folder, "--rules", "-all", "--keep", "3", "--by", "diverse")) == 3 < count
    card = (folder / "export" / "cc_sbu_align" / "README.md").read_text()
    assert f"| shared | {count} |" in card and "coloured shapes" in card


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_only_an_export_is_overwritten(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert f"{mine} is there already and no export; name another folder with --output_dir" in refused(
        capsys, folder, "--output_dir", str(mine)
    )
    assert "is there already and no export" in refused(capsys, folder, "--output_dir", str(folder))
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]
    (mine / "thesis.txt").unlink()
    export(folder, "parquet", "--output_dir", str(mine))
    export(folder, "cc_sbu_align", "--output_dir", str(mine))
    assert not (mine / "data").exists() and (mine / "filter_cap.json").is_file()


def test_an_export_that_fails_leaves_the_one_before(folder: Path, capsys: pytest.CaptureFixture) -> None:
    place = export(folder, "parquet")
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    (folder / read_rows(folder)[3].file).unlink()
    assert "is gone; put it back" in refused(capsys, folder, "--to", "parquet")
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert [path.name for path in place.parent.iterdir()] == ["parquet"]


def test_mistakes_are_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "run `minigpt4 curate --output_dir" in refused(capsys, tmp_path / "nowhere")
    assert "--rules -shrot names no rule" in refused(capsys, folder, "--rules", "-shrot")
    assert "no score that tells how good they are" not in refused(capsys, folder, "--by", "score", "--score", "beauty")
    assert "no features" in refused(capsys, folder, "--by", "diverse", "--keep", "2")
    assert "name it with --push_to_hub" in refused(capsys, folder, "--private")
    assert "is no name of a repository" in refused(capsys, folder, "--push_to_hub", "a b")
    (folder / "made.json").write_text("{")
    assert "made.json cannot be read" in refused(capsys, folder)


# ---- nothing private ------------------------------------------------------------------------------------------------


def contents(place: Path) -> str:
    """All that an export says: texts, and the columns of tables."""
    texts = [path.read_text() for path in place.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    for path in place.rglob("*.parquet"):
        table = datasets.Dataset.from_parquet(str(path))
        names = [name for name in table.column_names if name not in ("image", "images")]
        texts += [json.dumps(table.select_columns(names)[:], ensure_ascii=False)]
        texts += [str(table._data.schema.metadata)]
        column = "images" if "images" in table.column_names else "image"
        kind = datasets.Image(decode=False)
        stored = table.cast_column(column, datasets.List(kind) if column == "images" else kind)[column]
        texts += [str(one["path"]) for images in stored for one in (images if column == "images" else [images])]
    return "\n".join(texts)


@pytest.mark.parametrize("form", FORMS)
def test_no_export_tells_of_this_machine(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "a-key-that-looks-like-nothing")
    told = contents(export(folder, form, "--rules", "-all"))
    assert TEXTS[0] in told
    private = (str(tmp_path), "private", "gpu-box", "8000", "a-key-that", os.path.expanduser("~/"), str(folder.parent))
    assert [text for text in (*private, f"{platform.node()}." if platform.node() else "\0") if text in told] == []
    assert holds_secret(told) is False


@pytest.mark.parametrize("form", FORMS)
def test_a_secret_in_a_text_is_refused(form: str, folder: Path, capsys: pytest.CaptureFixture) -> None:
    rows = read_rows(folder)
    rows[0] = replace(rows[0], text="The sign in the picture reads hf_" + "a1b2c3d4" * 4 + ", and a dog sits below.")
    write_rows(folder, rows)
    told = refused(capsys, folder, "--to", form)
    assert "holds a token or a password" in told and "a1b2c3d4" not in told
    assert not (folder / "export" / form).exists()


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("/home/me/pictures/1.jpg", "1.jpg"),
        ("C:\\Users\\me\\1.jpg", "1.jpg"),
        ("~/1.jpg", "1.jpg"),
        ("../secret/1.jpg", "1.jpg"),
        ("https://me:pass@host/a/1.jpg?X-Amz-Signature=abc", "1.jpg"),
        ("dogs/1.jpg", "dogs/1.jpg"),
        ("00001.tar/000010", "00001.tar/000010"),
        ("scene 3", "scene 3"),
    ],
)
def test_names_of_pictures_lose_their_folders(name: str, public: str) -> None:
    assert public_source(name) == public


@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("openai:gpt-4o-mini", "openai:gpt-4o-mini"),
        (f"openai:/models/qwen at {SERVER}", "openai:qwen, a server of its own"),
        ("openai:Qwen/Qwen3-8B at http://localhost:8000/v1", "openai:Qwen/Qwen3-8B, a server of its own"),
        ("local:HuggingFaceTB/SmolLM2-135M@12fd in float32", "local:HuggingFaceTB/SmolLM2-135M@12fd in float32"),
        ("stub:mender.jsonl@b36b", "stub:mender.jsonl@b36b"),
    ],
)
def test_names_of_menders_lose_their_servers(name: str, public: str) -> None:
    assert public_client(name) == public


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_was_done(folder: Path) -> None:
    text = (export(folder, "parquet", "--keep", "3", "--license", "cc-by-4.0") / "README.md").read_text()
    _, front, card = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "cc-by-4.0" and fields["size_categories"] == "n<1K" and fields["language"] == "en"
    for line in (
        "| pictures | a local folder or file (pictures) |",
        "| described by | stage1, revision `0123456789ab` |",
        "| mended by | openai:gpt-x, a server of its own |",
        "| matched by | openai/clip-vit-base-patch32, abc |",
        "| max new tokens | 300 |",
        "| mend temperature | 0.7 |",
        "| cost of mending and judging | 0.50, in the currency of the prices that were told, for 1,234 tokens |",
        "| drawn | 8 |",
        "| left out: the same file | 2 |",
        "| not here: rule: short | 1 |",
        "| not here: no text | 1 |",
        "| not here: not picked (random) | 1 |",
        "| here | 3 |",
        "| short | 1 |",
        PROMPT,
        "`words` of the rows here:",
        "`match_mean` of the rows here:",
        "may bind what it wrote",
        "For the collection, its maker named `cc-by-4.0`.",
        "No person has looked at these rows",
        "Scores are what a model thinks of a text.",
    ):
        assert line in card, line
    assert card.count("The description: ") == 3
    assert "{{" not in card and "{%" not in card and "\n\n\n" not in card


def test_ten_examples_from_all_over(curated: Callable, folder: Path) -> None:
    place, rows = curated(*[f"{text} It is number {number}." for number in range(5) for text in TEXTS])
    write_rows(place, rows)
    card = (export(place, "messages") / "README.md").read_text()
    assert card.count("The description: ") == 10
    assert "It is number 0." in card and "It is number 4." in card


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ([3, 3, 3], ["3: 3"]),
        (
            [1, 2, 2, 4],
            ["1  1  ███████████████", "2  2  ██████████████████████████████", "3  0", "4  1  ███████████████"],
        ),
        ([0.0, 0.5, 1.0], ["0.000–0.125  1", "0.125–0.250  0", "0.500–0.625  1", "0.875–1.000  1"]),
        (list(range(100)), [" 0–12  13", "13–25  13", "91–99   9"]),
    ],
)
def test_histograms(values: list, lines: list[str]) -> None:
    told = histogram(values).split("\n")
    assert all(any(one.startswith(line) for one in told) for line in lines)
    assert len(told) <= 8


# ---- the Hub --------------------------------------------------------------------------------------------------------


ID = "you/curated"


def test_an_export_is_pushed_in_one_commit(folder: Path, hub: HubServer, capsys: pytest.CaptureFixture) -> None:
    place = export(folder, "imagefolder", "--push_to_hub", ID, "--private")
    assert f"Uploaded to {hub.endpoint}/datasets/{ID}" in capsys.readouterr().out
    files = hub.files(ID, kind="dataset")
    kept = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    del kept[MARK]
    assert {name: content for name, content in files.items() if name != ".gitattributes"} == kept
    assert hub.messages(ID, kind="dataset") == ["Upload 4 curated descriptions"]
    assert hub.repos["dataset", ID].private
    assert "# curated\n" in files["README.md"].decode()

    export(folder, "parquet", "--push_to_hub", ID, "--keep", "3")
    files = hub.files(ID, kind="dataset")
    assert set(files) - {".gitattributes"} == {"README.md", "data/train-00000-of-00001.parquet"}
    assert hub.messages(ID, kind="dataset") == ["Upload 4 curated descriptions", "Upload 3 curated descriptions"]


def test_a_push_that_fails_leaves_a_whole_folder(folder: Path, hub: HubServer, capsys: pytest.CaptureFixture) -> None:
    hub.fail("POST", "/commit/", status=403)
    told = refused(capsys, folder, "--to", "parquet", "--push_to_hub", ID)
    assert "is whole but not on the Hub: your token may not write there (403)" in told
    assert (folder / "export" / "parquet" / "data" / "train-00000-of-00001.parquet").is_file()
    assert cli.main(["curate", "export", str(folder), "--to", "parquet", "--push_to_hub", ID]) == 0
