"""Chats on disk: JSON, with the messages as transformers' chat templates take them, and the places of pictures."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes_minigpt4.serving.chat_session import Exchange, Session, open_picture
from recipes_minigpt4.serving.picture_places import is_address
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.files import write_json


FORMAT = "minigpt4 chat"


def save_chat(session: Session, name: str) -> Path:
    """
    Write what was said into a file; one that holds a chat is replaced.

    Raises:
        RecipeError: if it cannot be written, or holds something else.
    """
    path = Path(name).expanduser()
    if path.exists():
        try:
            read_chat(name)
        except RecipeError as error:
            raise RecipeError(f"{path} is there already, and no chat; name another file.") from error
    content = {
        "format": FORMAT,
        "settings": asdict(session.settings),
        "turns": [{"pictures": exchange.pictures, "models": exchange.labels} for exchange in session.exchanges],
        "models": [
            {
                "label": label,
                "model": talk.talker.name,
                "revision": talk.talker.speaker.revision,
                "messages": _messages(session, label),
            }
            for label, talk in session.talks.items()
        ],
    }
    try:
        write_json(path, content)
    except OSError as error:
        raise RecipeError(f"{path} cannot be written ({error.strerror or error}); name another file.") from error
    return path


def _messages(session: Session, label: str) -> list[dict[str, Any]]:
    """What was said to and by a model, with the places of pictures instead of the pictures."""
    asked = iter([exchange for exchange in session.exchanges if label in exchange.labels])
    messages = []
    for message in session.talks[label].conversation.messages:
        content = list(message["content"])
        if message["role"] == "user":
            names = next(asked).pictures
            content = [_part(name) for name in names] + content[len(names) :]
        messages.append({**message, "content": content})
    return messages


def _part(name: str) -> dict[str, str]:
    if is_address(name):
        return {"type": "image", "url": name}
    return {"type": "image", "path": os.path.abspath(os.path.expanduser(name))}


def read_chat(name: str) -> dict[str, Any]:
    """
    What `save_chat` has written.

    Raises:
        RecipeError: if there is no such file, or it holds no chat.
    """
    path = Path(name).expanduser()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(
            f"{path} cannot be read ({error.strerror or error}); name a file that /save wrote."
        ) from error
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise RecipeError(f"{path} holds no chat; name a file that /save wrote.")
    return content


def load_chat(session: Session, chat: Mapping[str, Any]) -> None:
    """
    Go on with a chat that was saved; its models are those of the session, in their order. Settings stay.

    Raises:
        RecipeError: if there are more or fewer of them, a picture is gone, or the file is damaged.
    """
    try:
        saved, turns = list(chat["models"]), list(chat["turns"])
        if len(saved) != len(session.talks):
            raise RecipeError(
                f"The chat was with {len(saved)} {'model' if len(saved) == 1 else 'models'}, and here "
                f"{'is one' if len(session.talks) == 1 else f'are {len(session.talks)}'}; name as many, those behind "
                "the first with --compare."
            )
        labels = dict(zip([model["label"] for model in saved], session.talks, strict=True))
        messages = [[_opened(message) for message in model["messages"]] for model in saved]
        exchanges = [
            Exchange(tuple(turn["pictures"]), tuple(labels[label] for label in turn["models"])) for turn in turns
        ]
    except RecipeError:
        raise
    except (KeyError, TypeError, AttributeError) as error:
        raise RecipeError("The file of the chat is damaged; name another one that /save wrote.") from error
    except ValueError as error:
        raise RecipeError(f"A picture of the chat is gone: {one_line(error)}.") from error
    session.reset()
    session.exchanges = exchanges
    for talk, own in zip(session.talks.values(), messages, strict=True):
        talk.conversation.messages = own


def _opened(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its pictures."""
    content = [
        {"type": "image", "image": open_picture(part.get("path") or part["url"])} if part["type"] == "image" else part
        for part in message["content"]
    ]
    return {**message, "content": content}
