"""How the page tells people what went wrong."""

import contextlib
import sys
import traceback
from collections.abc import Iterator

import gradio as gr

from recipes_minigpt4.utils.errors import one_line
from recipes_minigpt4.utils.redaction import redact


@contextlib.contextmanager
def told_to_people() -> Iterator[None]:
    """Tell an error in one sentence, in a corner of the page; what nobody expected goes to the terminal too."""
    try:
        yield
    except gr.Error:
        raise
    except ValueError as error:
        raise gr.Error(f"{redact(one_line(error))}.", print_exception=False) from error
    except Exception as error:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        raise gr.Error(f"{type(error).__name__}: {redact(one_line(error))}.", print_exception=False) from error
