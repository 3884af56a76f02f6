"""Pictures that several tests of data read."""

from pathlib import Path

import pytest
from coloured import COLOURS
from PIL import Image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of one colour each."""
    (folder := tmp_path / "data").mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (8, 6), colour).save(folder / f"{number}.png")
    return folder
