"""What the tabs of the page share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.page_chat import PageChats
from recipes_minigpt4.serving.settings import ReplySettings


@dataclass(frozen=True)
class AppState:
    """
    What the tabs of the page share.

    Args:
        talkers: the models by label, in the order of the command line.
        settings: what the controls of replies show at first.
        examples: pictures that people may begin with.
        output_dir: where votes are written.
        uploads: the folder of what people send and what the page shows; see `uploads.py`.
        chats: those of the people who look at the page.
    """

    talkers: Mapping[str, Talker]
    settings: ReplySettings
    examples: Sequence[Path]
    output_dir: Path
    uploads: Path
    chats: PageChats
