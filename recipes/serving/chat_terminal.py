"""Editing and history of what is typed, where Python has readline."""

import glob
import os
import sys
from collections.abc import Sequence


def edit_lines(words: Sequence[str]) -> None:
    """
    Let `input` edit lines, go through those of before with the arrow keys, and complete words and files.

    Args:
        words: that a line may begin with.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    try:
        import readline
    except ImportError:  # Python without it reads lines as they are
        return

    def complete(text: str, state: int) -> str | None:
        return dict(enumerate(completions(text, readline.get_line_buffer(), words))).get(state)

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")


def completions(text: str, line: str, words: Sequence[str]) -> list[str]:
    """What the last word of a line may become: commands at its beginning, files behind one."""
    if line == text:
        return [word for word in words if word.startswith(text)]
    if not line.startswith("/"):
        return []
    start = os.path.expanduser(text)
    found = sorted(glob.glob(f"{glob.escape(start)}*"))
    return [text + path[len(start) :] + ("/" if os.path.isdir(path) else "") for path in found]
