"""Files that are there whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Write a file so that whoever reads meanwhile finds the old text or the new one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that whoever reads meanwhile finds the old content or the new one."""
    replace_text(path, json.dumps(content, indent=2) + "\n")
