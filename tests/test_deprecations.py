"""What is deprecated is an error where our lines have caused it, and nowhere else."""

import logging
import warnings
from collections.abc import Callable

import deprecations
import pytest


LIBRARY = """
import logging, warnings
log = logging.getLogger("library")
def logs(): log.warning("`old` is deprecated")
def logs_once(): log.warning_once("`%s` is deprecated", "old")
def logs_something_else(): log.warning("`old` is slow")
def warns(): warnings.warn("`old` goes", FutureWarning)
def warns_of_its_caller(): warnings.warn("`old` goes", DeprecationWarning, stacklevel=2)
def warns_of_something_else(): warnings.warn("`old` is slow")
def calls_itself(): warns_of_its_caller()
"""
OURS = ("modeling_minigpt4.backbones", "recipes_minigpt4", "transformers_modules.x.heads_minigpt4")
DEPRECATED = ("logs", "logs_once", "warns", "warns_of_its_caller")


@pytest.fixture(autouse=True)
def errors(monkeypatch: pytest.MonkeyPatch) -> None:
    if not deprecations.WANTED:
        deprecations.make_errors(monkeypatch)


def module(name: str, code: str, **names: object) -> dict:
    """What a module of this name would hold, were it imported."""
    space = {"__name__": name, **names}
    exec(code, space)
    return space


def caller(name: str) -> Callable:
    return module(name, "def call(other): other()")["call"]


@pytest.fixture
def library() -> dict:
    return module("library.deep.inside", LIBRARY)


@pytest.mark.parametrize("name", DEPRECATED)
@pytest.mark.parametrize(
    "ours", ["modeling_minigpt4.backbones", "recipes_minigpt4", "transformers_modules.x.heads_minigpt4"]
)
def test_our_lines_are_to_blame(name: str, ours: str, library: dict) -> None:
    with pytest.raises((DeprecationWarning, FutureWarning), match="old"):
        caller(ours)(library[name])


def test_it_is_an_error_every_time(library: dict) -> None:
    caller("trl.trainer")(library["logs_once"])
    for _ in range(2):
        with pytest.raises(DeprecationWarning):
            caller("modeling_minigpt4.heads")(library["logs_once"])


@pytest.mark.parametrize("name", DEPRECATED)
def test_what_others_do_is_left_alone(name: str, library: dict) -> None:
    """Also where we have called them."""
    through_trl = module("trl.trainer", "def train(): old()", old=library[name])["train"]
    with warnings.catch_warnings(record=True):
        caller("test_forward")(library[name])
        caller("recipes_minigpt4.training.arguments")(through_trl)


def test_a_library_that_uses_its_own_old_names_is_left_alone(library: dict) -> None:
    with warnings.catch_warnings(record=True):
        caller("modeling_minigpt4.heads")(library["calls_itself"])


def test_torch_calls_our_modules_and_theirs(library: dict) -> None:
    forward = module("torch.nn.modules.module", "def forward(): old()", old=library["logs"])["forward"]
    with pytest.raises(DeprecationWarning):
        caller("modeling_minigpt4.heads")(forward)


def test_warnings_of_other_kinds_stay_warnings(library: dict) -> None:
    ours = caller("modeling_minigpt4.heads")
    ours(library["logs_something_else"])
    with pytest.warns(UserWarning, match="slow"):
        ours(library["warns_of_something_else"])


def test_warnings_are_told_of_the_same_line_as_without_it(library: dict) -> None:
    with pytest.warns(DeprecationWarning) as caught:
        library["warns_of_its_caller"]()
    assert caught[0].filename == __file__


def test_logs_name_the_same_line_as_without_it(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("library").warning("`old` is slow")
    assert caplog.records[0].pathname == __file__
