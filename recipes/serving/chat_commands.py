"""What stands behind a slash in the terminal."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from recipes_minigpt4.serving.chat_file import load_chat, read_chat, save_chat
from recipes_minigpt4.serving.chat_session import Session
from recipes_minigpt4.serving.options import REPLY_FIELDS
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.ranges import is_in


HELP = """\
/image PICTURE…     files or addresses for your next question, or drag them
/retry              ask the last question once more
/undo [TURNS]       take the last question and its reply back
/reset              begin anew, without pictures
/set [NAME=VALUE…]  how replies are made: temperature=0.7 beams=4; alone: show
/stats              tell tokens and time behind each reply, or no longer
/save FILE          write the chat into a file of JSON
/load FILE          go on with a chat from a file
/help               show this
/exit               end, as Ctrl-D does
Ctrl-C stops a reply; what was said until then stays in the chat."""
ALIASES = {"beams": "num_beams", "length": "max_new_tokens"}
ADDRESSES = ("/", "~", "file://")


class Commands:
    """
    Reads lines that the user types.

    Attributes:
        names: command → what runs it, with what stands behind it.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.names: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/retry": lambda rest: session.retry(),
            "/undo": self._undo,
            "/reset": lambda rest: session.reset(),
            "/set": self._set,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda rest: print(HELP, flush=True),
        }

    def take(self, line: str) -> bool:
        """
        Do what a line says; False if it is time to end.

        Raises:
            ValueError: if that cannot be done.
        """
        name, _, rest = line.partition(" ")
        if name in ("/exit", "/quit"):
            return False
        if name in self.names:
            self.names[name](rest.strip())
        elif dropped := dropped_files(line):
            self.session.add_pictures(dropped)
        elif line.startswith("/"):
            raise RecipeError(f"There is no command {name}; /help lists all.")
        elif line:
            self.session.ask(line)
        return True

    def _image(self, rest: str) -> None:
        if not rest:
            raise RecipeError("Name a picture: /image photo.jpg; quote a name with spaces.")
        self.session.add_pictures(files_of(rest))

    def _undo(self, rest: str) -> None:
        if rest and not rest.isdecimal():
            raise RecipeError(f"/undo takes a number of turns, and {rest!r} is none.")
        self.session.undo(int(rest or 1))

    def _set(self, rest: str) -> None:
        settings = replace(self.session.settings, **dict(map(read_setting, rest.split())))
        self.session.settings = settings
        print(" ".join(f"{name}={value}" for name, value in asdict(settings).items()), flush=True)

    def _stats(self, rest: str) -> None:
        self.session.stats = not self.session.stats
        print(f"Tokens and time are told{'' if self.session.stats else ' no longer'}.", flush=True)

    def _save(self, rest: str) -> None:
        print(f"Saved in {save_chat(self.session, one_file(rest, '/save'))}.", flush=True)

    def _load(self, rest: str) -> None:
        load_chat(self.session, read_chat(one_file(rest, "/load")))
        turns = len(self.session.exchanges)
        print(f"{turns} {'turn' if turns == 1 else 'turns'} so far.", flush=True)


def read_setting(text: str) -> tuple[str, Any]:
    """
    A field of `ReplySettings` and its value, from `NAME=VALUE`.

    Raises:
        RecipeError: if it is none.
    """
    name, equals, value = text.partition("=")
    name = ALIASES.get(name, name)
    if not equals or name not in REPLY_FIELDS:
        known = ", ".join(REPLY_FIELDS)
        raise RecipeError(f"{text} sets nothing; write NAME=VALUE without spaces, where the names are {known}.")
    allowed, kind, default, _ = REPLY_FIELDS[name]
    if default is None and value.lower() == "none":
        return name, None
    try:
        number = kind(value)
    except ValueError:
        number = None
    if not is_in(allowed, number):
        raise RecipeError(f"{text}: it has to be {allowed.text}{', or none' if default is None else ''}.")
    return name, number


def files_of(text: str) -> list[str]:
    """Names of files as a shell reads them; a name with spaces that is there needs no quotes."""
    if os.path.isfile(os.path.expanduser(text)):
        return [text]
    try:
        return shlex.split(text)
    except ValueError:  # a quote that is part of a name
        return [text]


def one_file(text: str, command: str) -> str:
    """
    The name of one file.

    Raises:
        RecipeError: if there is none, or more.
    """
    names = files_of(text)
    if len(names) != 1:
        raise RecipeError(f"Name one file: {command} chat.json; quote a name with spaces.")
    return names[0]


def dropped_files(line: str) -> Sequence[str]:
    """The files that a line consists of, as terminals write those that are dragged into them; none for other lines."""
    if not line.lstrip("'\"").startswith(ADDRESSES):
        return ()
    names = [name.removeprefix("file://") for name in files_of(line)]
    return names if names and all(os.path.isfile(os.path.expanduser(name)) for name in names) else ()
