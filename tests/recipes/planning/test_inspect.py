"""`minigpt4 inspect`: what the model will see of data, printed and as a page."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
from damaged import jpeg, write_tar
from PIL import Image

from recipes_minigpt4 import cli
from recipes_minigpt4.data.arguments import DataArguments
from recipes_minigpt4.data.collator import StageCollator
from recipes_minigpt4.data.formatting import stage2_rows
from recipes_minigpt4.data.sources import load_pairs
from recipes_minigpt4.planning import inspect_data
from recipes_minigpt4.training.arguments import ModelArguments
from recipes_minigpt4.utils.errors import RecipeError


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures with captions, one of which is damaged, one has no caption, and one a caption that is too long."""
    (folder := tmp_path / "data").mkdir()
    captions = ["A red square!", "a blue <b>circle</b>", "star " * 40, "", "a line"]
    rows = []
    for number, caption in enumerate(captions):
        (folder / f"{number}.jpg").write_bytes(jpeg(number)[: -60 if number == 4 else None])
        rows.append({"file_name": f"{number}.jpg", "text": caption})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def inspect(*arguments: object) -> list[inspect_data.Inspection]:
    return inspect_data.main([str(argument) for argument in arguments])


def test_rows_are_printed_as_the_model_will_see_them(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (found,) = inspect(folder)
    printed = capsys.readouterr().out
    assert f"== {folder}, as stage 1 sees it" in printed and f"data: image and text of {folder}" in printed
    assert "    <s><image>⟦a red square↵⟧\n" in printed
    tokens, learned = found.tokens[0], found.learned[0]
    assert f" 1  {tokens} tokens, {learned} with loss; picture of 64 × 48 pixels\n" in printed
    assert "cut at max_txt_len 32: 1 of 3 rows (33.3%)" in printed
    assert re.search(rf"what carries loss +{sorted(found.learned)[1]} +32\n", printed)
    assert "5 drawn, 2 skipped: 1 × no caption, such as " in printed and "3.jpg" in printed
    assert "1 × truncated picture, such as " in printed and "4.jpg" in printed


def test_rows_are_those_of_the_training(folder: Path) -> None:
    (found,) = inspect(folder, "--stage", 2, "--seed", 7)
    processor = inspect_data.load_processor(ModelArguments())
    args = DataArguments(dataset_name=[str(folder)])
    rows = list(stage2_rows(load_pairs(args, stage=2, seed=7), processor, args, seed=7))
    good = [row for row in rows if not row["skipped"]]
    assert len(good) == len(found.shown) == 3
    for row, shown in zip(good, found.shown, strict=True):
        batch = StageCollator(processor, completion_only_loss=True)([row])
        assert shown.tokens == batch["input_ids"].shape[1]
        assert shown.learned == int((batch["labels"] != -100).sum())
        assert "".join(text for text, _ in shown.stretches) == processor.decode(batch["input_ids"][0])


def test_chats_show_every_answer_with_loss(folder: Path, capsys: pytest.CaptureFixture) -> None:
    turns = ("<image>\nThis?", "A square.", "And <image>?", "A circle.")
    said = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(turns)]
    rows = [{"image": ["0.jpg", "1.jpg"], "conversations": said}, {"image": "0.jpg", "conversations": said}]
    (folder / "chats.json").write_text(json.dumps(rows))
    (found,) = inspect(folder / "chats.json", "--stage", 2)
    printed = capsys.readouterr().out
    assert "Assistant: ⟦A square.###⟧Human: And <Img><image></Img> ? ###Assistant: ⟦A circle.###⟧" in printed
    assert "2 pictures of 64 × 48, 64 × 48 pixels" in printed and found.cut == 0
    assert "1 × broken chat" in printed and "1 pictures for 2 places" in printed


def test_a_page_has_thumbnails_and_marks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    inspect(folder, "--output", tmp_path / "pages" / "inspect.html", "--rows", 2)
    page = (tmp_path / "pages" / "inspect.html").read_text(encoding="utf-8")
    assert f"written: {tmp_path / 'pages' / 'inspect.html'}" in capsys.readouterr().out
    assert "&lt;s&gt;&lt;image&gt;<mark>a red square\n</mark>" in page
    assert "<mark>a blue &lt;b&gt;circle&lt;/b&gt;\n</mark>" in page and "<b>" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [Image.open(io.BytesIO(base64.b64decode(one))).size for one in pictures] == [(64, 48)] * 2
    assert "1 × no caption" in page and "http" not in page


def test_pads_are_told_for_batches_of_a_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"file_name": "0.jpg", "text": "star " * (1 + number % 8)} for number in range(64)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for size in (1, 4):
        options = ("--per_device_train_batch_size", size, "--output", tmp_path / "page.html")
        inspect(folder, *options)
        (line,) = re.findall(r"^pads in batches of .*$", capsys.readouterr().out, re.MULTILINE)
        told = re.fullmatch(rf"pads in batches of {size}: (\S+)%; with --train_sampling_strategy (\w+) (\S+)%", line)
        assert told and told[2] == "group_by_length" and line in (tmp_path / "page.html").read_text(encoding="utf-8")
        any_order, grouped = float(told[1]), float(told[3])
        assert any_order == grouped == 0 if size == 1 else (any_order > 5 and grouped < 1)


def test_every_dataset_is_passed_once(folder: Path, capsys: pytest.CaptureFixture) -> None:
    tar = write_tar(folder / "tars" / "a.tar", [(str(n), {"jpg": jpeg(n), "txt": b"number"}) for n in range(7)])
    first, second = inspect(tar, folder, "--num_samples", 4, "--rows", 1)
    assert (first.samples.drawn, second.samples.drawn) == (4, 4)
    assert len(first.shown) == len(second.shown) == 1
    (whole,) = inspect(tar)
    assert whole.samples.drawn == 7 and not whole.samples.skipped


def test_tokens_are_those_of_the_model_that_is_named(folder: Path, parts: dict[str, str]) -> None:
    (tiny,) = inspect(folder)
    (own,) = inspect(folder, "--language_model", parts["language_model"])
    assert own.learned != tiny.learned
    (whole,) = inspect(folder, *(text for name in parts for text in (f"--{name}", parts[name])))
    assert whole.learned == own.learned and whole.tokens[0] != own.tokens[0]  # a picture of these parts has 3 tokens
    (configured,) = inspect("--config", "tiny_stage1", "--num_samples", 3)
    assert configured.name == "tiny" and len(configured.tokens) == 3


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([], "No data: name a dataset"),
        (["tiny", "--stage", "3"], "--stage is 3"),
        (["tiny", "--rows", "0"], "--rows is 0"),
        (["tiny", "--language_model", "/nowhere"], "/nowhere"),
        (["tiny", "--output", "/dev/null/page.html", "--num_samples", "1"], "--output /dev/null/page.html"),
    ],
)
def test_mistakes_are_told_in_one_sentence(arguments, told, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["inspect", *arguments]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("minigpt4 inspect: ") and told in printed and printed.endswith(".")


def test_data_that_the_stage_refuses_are_refused(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"no captions; write a metadata\.csv"):
        inspect(folder)
