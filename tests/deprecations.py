"""
With `DEPRECATIONS=error` in the environment, which `make test` sets, what is deprecated is an error in our lines.

What other libraries do among themselves, and what a test does, is left alone. Python's own filters see less: they
blame the line that a warning names, which many do not set, and transformers logs most of its deprecations instead.
"""

import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import transformers  # noqa: F401  (it gives loggers their `warning_once`)


OURS = "_minigpt4"  # in the name of every module, also of those that travel with a checkpoint
WANTED = os.environ.get("DEPRECATIONS") == "error"
# What users hand over, or transformers itself, and our overrides only pass on; the warnings are meant for these.
PASSED_ON = (
    "Passing `generation_config` together with",
    "`label_smoothing_factor` is deprecated in `SFTTrainer`",
    "The `'keep_end'` truncation mode",
    "`torch_dtype` is deprecated",
)
BETWEEN = {"torch", "functools", "contextlib", "importlib"}  # they call what they are given


def filters() -> list[str]:
    """The same for pytest's `filterwarnings`, which also sees what does not go through `warnings.warn`."""
    kinds = ("DeprecationWarning", "FutureWarning")
    return [f"error::{kind}:.*{OURS}" for kind in kinds] + [f"ignore:{re.escape(text)}" for text in PASSED_ON]


def make_errors(patch: pytest.MonkeyPatch) -> None:
    """Raise, in the place of the warning, where our lines have caused it."""
    for name in ("warning", "warning_once"):
        patch.setattr(logging.Logger, name, _checked(getattr(logging.Logger, name)))
    warn = warnings.warn

    @functools.wraps(warn)
    def checked(message: Any, category: Any = None, stacklevel: int = 1, *args: Any, **kwargs: Any) -> None:
        kind = type(message) if isinstance(message, Warning) else category or UserWarning
        if issubclass(kind, (DeprecationWarning, FutureWarning)):
            blamed = _frame(stacklevel) if stacklevel > 1 else _cause(_frame(1))
            if _is_ours(blamed) and not str(message).startswith(PASSED_ON):
                raise kind(str(message))
        warn(message, category, stacklevel + 1, *args, **kwargs)

    patch.setattr(warnings, "warn", checked)


def _checked(log: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(log)
    def checked(logger: logging.Logger, message: Any, *args: Any, **kwargs: Any) -> None:
        text = str(message) % args if args else str(message)
        if "deprecat" in text.lower() and not text.startswith(PASSED_ON) and _is_ours(_cause(_frame(1))):
            raise DeprecationWarning(text)
        log(logger, message, *args, **{**kwargs, "stacklevel": kwargs.get("stacklevel", 1) + 1})

    if hasattr(log, "cache_clear"):  # `warning_once` remembers what it has said
        checked.cache_clear = log.cache_clear  # type: ignore[attr-defined]
    return checked


def _frame(level: int) -> FrameType | None:
    """The frame that a wrapper's caller means by a stack level, where imports do not count."""
    frame = sys._getframe(2)
    while frame and level > 1:
        frame = frame.f_back
        level -= not frame or _package(frame) != "importlib"
    return frame


def _cause(frame: FrameType | None) -> FrameType | None:
    """Who called the library that warns: the first frame that is neither its own nor one between."""
    passed = BETWEEN | {_package(frame)} if frame else BETWEEN
    while frame and _package(frame) in passed:
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]


def _is_ours(frame: FrameType | None) -> bool:
    return frame is not None and OURS in str(frame.f_globals.get("__name__", ""))


if WANTED:
    make_errors(pytest.MonkeyPatch())
