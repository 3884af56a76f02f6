"""Folders that can be written into, and files that are there whole or not at all."""

import json

import pytest

from recipes_minigpt4.utils import files
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import prepare_folder, write_json


@pytest.mark.parametrize(
    ("file", "folder"), [("out", "out"), ("out", "out/below"), ("out/adapter", "out"), ("out/stage1", "out")]
)
def test_an_output_folder_where_a_file_is_in_the_way(file, folder, tmp_path):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("precious")
    with pytest.raises(RecipeError, match=r"--output_dir .* cannot be used .*; name a folder"):
        prepare_folder(tmp_path / folder, parts=("stage1", "adapter"))
    assert (tmp_path / file).read_text() == "precious"


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)  # root may write everywhere
    with pytest.raises(RecipeError, match=r"cannot be used \(Permission denied"):
        prepare_folder(tmp_path / "out", parts=("stage1", "adapter"))


def test_what_lies_in_the_output_folder_stays(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    prepare_folder(tmp_path, parts=("stage1", "adapter"))
    prepare_folder(tmp_path, parts=("stage1", "adapter"))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "stage1", "adapter"}


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"seed": 0})
    with pytest.raises(TypeError):
        write_json(path, {"seed": object()})
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError):
        write_json(path, {"seed": 1})
    assert json.loads(path.read_text()) == {"seed": 0}
