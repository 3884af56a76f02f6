"""Which models were asked about which data, kept beside their replies for reports and cards that are made later."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes_minigpt4.utils.files import write_json
from recipes_minigpt4.utils.redaction import redact


FILE = "run.json"


def keep_facts(folder: Path, models: Mapping[str, str], data: Mapping[str, str], **others: Any) -> None:
    """
    Add to what is known of a folder.

    Args:
        folder: that of the replies.
        models: label → what was asked.
        data: suite → place of its data.
        others: facts about all of it, such as the seed.
    """
    known = read_facts(folder)
    models = {label: redact(model) for label, model in models.items()}
    data = {suite: redact(place) for suite, place in data.items()}
    write_json(
        folder / FILE,
        {**known, **others, "models": {**known["models"], **models}, "data": {**known["data"], **data}},
    )


def read_facts(folder: Path) -> dict[str, Any]:
    """What is known: `models`, `data` and more; nothing for a folder that an older version wrote."""
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = None
    return {"models": {}, "data": {}, **(known if isinstance(known, dict) else {})}
