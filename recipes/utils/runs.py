"""Short runs that a command makes by itself: the same digits every time, and nothing on the screen that is no news."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """The same digits for the same seed, whatever the machine's number of cores."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


@contextmanager
def quiet() -> Iterator[None]:
    """No bars while files are read and written, which takes no time here; the trainer's own stay.

    Nor what is no news to whoever tries the demo: names that transformers will drop one day, and, at every save, that
    backbones in folders of this machine are no use to others. The latter is said at the end.
    """
    with_bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    logger = logging.getLogger("modeling_minigpt4.saving_minigpt4")
    level = logger.level
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if with_bars:
            transformers_logging.enable_progress_bar()
