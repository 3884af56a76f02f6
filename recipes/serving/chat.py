"""Talk to a model about pictures, in the terminal.

minigpt4 chat runs/stage2 --image photo.jpg
minigpt4 chat runs/stage2 --compare runs/stage1 --stats
minigpt4 chat runs/stage2 --image photo.jpg --prompt "What is this?"
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import PIL.Image

from recipes_minigpt4.serving.chat_commands import Commands
from recipes_minigpt4.serving.chat_file import load_chat, read_chat
from recipes_minigpt4.serving.chat_session import Session, open_picture
from recipes_minigpt4.serving.chat_terminal import edit_lines
from recipes_minigpt4.serving.models import ModelOptions, check_labels, open_talker
from recipes_minigpt4.serving.options import build_parser
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.runs import quiet


PROMPT = "> "


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Read a command line.

    Raises:
        RecipeError: if it is wrong.
    """
    return build_parser("chat").parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Load the models and talk until the user ends it; with `--prompt`, or where text is piped in, ask once.

    Raises:
        RecipeError: for options, models and pictures that are not as they have to be.
    """
    args = parse(arguments)
    names = [args.model, *args.compare]
    check_labels(names)
    pictures = {name: _picture(name) for name in args.image}
    asked = question(args)
    chat = None if args.load is None else read_chat(args.load)
    options, talks = ModelOptions.of(args), {}
    with quiet():
        for name in names:
            print(f"Loading {name} …", file=sys.stderr, flush=True)
            talker = open_talker(name, options)
            print(talker.about, file=sys.stderr, flush=True)
            talks[talker.label] = Talk(talker)
        session = Session(talks, ReplySettings.of(args), args.stats)
        if chat is not None:
            load_chat(session, chat)
        session.waiting.update(pictures)
        if asked is None:
            converse(session)
        else:
            once(session, asked)


def _picture(name: str) -> PIL.Image.Image:
    """A picture of the command line, before a model is loaded for nothing."""
    try:
        return open_picture(name)
    except ValueError as error:
        raise RecipeError(f"--image {one_line(error)}.") from error


def question(args: argparse.Namespace) -> str | None:
    """
    What is asked once: `--prompt`, or all of standard input if it is no terminal; None if the user will type.

    Raises:
        RecipeError: if it is empty.
    """
    if args.prompt is None and sys.stdin.isatty():
        return None
    text = (sys.stdin.read() if args.prompt is None else args.prompt).strip()
    if not text:
        where = "Standard input" if args.prompt is None else "--prompt"
        raise RecipeError(f"{where} is empty; give a question, or start the command in a terminal to type there.")
    return text


def once(session: Session, asked: str) -> None:
    """
    Ask one question.

    Raises:
        RecipeError: if a model cannot answer it.
    """
    session.notes = sys.stderr
    session.ask(asked)
    if session.failed and len(session.talks) > 1:
        raise RecipeError(f"{' and '.join(session.failed)} could not answer; why is told above.")
    for reason in session.failed.values():
        raise RecipeError(reason)


def converse(session: Session, read: Callable[[str], str] = input) -> None:
    """
    Take what the user types until Ctrl-D, a second Ctrl-C, or /exit.

    Args:
        read: shows a prompt and gives a line; raises `EOFError` at the end, and `KeyboardInterrupt`.
    """
    commands = Commands(session)
    edit_lines(list(commands.names))
    session.tell_waiting()
    print("Ask, or type /help. Ctrl-C stops a reply; Ctrl-D ends.", flush=True)
    interrupted = False
    while True:
        try:
            line = read(PROMPT).strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            if interrupted:
                return
            interrupted = True
            print("Ctrl-C once more ends; so do Ctrl-D and /exit.", flush=True)
            continue
        interrupted = False
        try:
            if not commands.take(line):
                return
        except KeyboardInterrupt:
            print()
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{one_line(error)}.", flush=True)
