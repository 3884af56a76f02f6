"""Import the common tests of transformers that `fetch.py` has put into the cache."""

import importlib
import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fetch import cached_tests
from PIL import Image


PACKAGE = "transformers_common_tests"  # the tests import each other relatively, so any name does


def load(name: str) -> ModuleType:
    """
    Import one of the common tests, such as `test_modeling_common`.

    Without the cache, the test module that asks for it is skipped as a whole.
    """
    folder = cached_tests()
    if not folder.is_dir():
        pytest.skip(
            "The common tests of transformers are no part of its wheel; run `python tests/common/fetch.py` once.",
            allow_module_level=True,
        )
    _prepare(folder)
    return importlib.import_module(f"{PACKAGE}.{name}")


@cache
def _prepare(folder: Path) -> None:
    """Make the cached folder a package, with stand-ins for the helpers that the source distribution lacks."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package

    def add(name: str, **members: Any) -> None:
        module = ModuleType(name)
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module

    # No generation or export test is in the source distribution, so there is nothing to inherit from these two.
    add(f"{PACKAGE}.generation")
    add(f"{PACKAGE}.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
    add(f"{PACKAGE}.exporters")
    add(f"{PACKAGE}.exporters.test_export", ExportTesterMixin=type("ExportTesterMixin", (), {}))
    add(f"{PACKAGE}.utils")  # its table is for configurations without parts, and ours has parts
    add(f"{PACKAGE}.utils.test_configuration_utils", config_common_kwargs={})
    for name in ("fetch_hub_objects_for_ci", "utils.fetch_hub_objects_for_ci"):  # its names in 5.x and in 4.57
        add(name, url_to_local_path=lambda url, **_: _local_file(url, folder.parent))


def _local_file(url: str, folder: Path) -> str:
    """A picture on this disk in place of one that transformers' tests download; other files stay addresses."""
    name = url.rsplit("/", 1)[-1]
    if not name.endswith((".png", ".jpg", ".jpeg")):
        return url
    path = folder / name
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
        unfinished = path.with_name(f"{os.getpid()}-{name}")  # tests run in several processes
        Image.fromarray(pixels).save(unfinished)
        os.replace(unfinished, path)
    return str(path)
