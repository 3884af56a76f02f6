"""Where the frozen parts of a model are: the names that a configuration has for them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# Parts that can come from a repository of their own, and where their tensors are in MiniGPT4ForConditionalGeneration.
PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("model.vision_model.",),
    "qformer": ("model.qformer.", "model.query_tokens"),
    "language_model": ("model.language_model.", "lm_head."),
}

# What a dict that names a backbone may hold.
SOURCE_KEYS = ("name_or_path", "revision", "subfolder", "fingerprint", "code_revision")


def normalize_source(source: "str | os.PathLike[str] | Mapping[str, Any]") -> dict[str, Any]:
    """
    Spell out where a backbone is: `{"name_or_path", "revision", "subfolder"}`.

    Args:
        source: repository id, `"repository@revision"`, folder, or a dict with `name_or_path` and, optionally,
            `revision`, `subfolder`, `fingerprint` and `code_revision` (that of another repository which has its
            code). A folder becomes absolute, so that it is found from anywhere.

    Raises:
        TypeError: for a model, or anything else that is no name.
        ValueError: for a dict without a name or with unknown keys, for a None that became a text, and for `"tiny"`.
    """
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(
            f"A backbone is a repository, a folder or a dict with `name_or_path`, and not a {type(source).__name__}; "
            "save a model with `save_pretrained`, and name that folder."
        )
    spec = dict(source) if isinstance(source, Mapping) else {"name_or_path": os.fspath(source)}
    if not spec.get("name_or_path"):
        raise ValueError(f"A backbone needs a `name_or_path`: a repository id or a folder. Got {source!r}.")
    if unknown := sorted(map(str, spec.keys() - SOURCE_KEYS)):
        raise ValueError(f"A backbone has no {', '.join(unknown)}; its keys are {', '.join(SOURCE_KEYS)}.")
    name = str(spec["name_or_path"])
    if name.lower() in ("none", "null") and not os.path.isdir(name):
        raise ValueError(
            f"A backbone is called {name!r}, which is a text; leave the part out, or write None in Python and null in "
            "YAML."
        )
    if name == "tiny" and not os.path.isdir(name):
        raise ValueError(
            "`tiny` is a name of the commands' for the shipped parts; in Python, name their folders: `from "
            "recipes_minigpt4.tiny import VISION_BACKBONE, LANGUAGE_BACKBONE` (the first has the Q-Former too)."
        )
    if os.path.isdir(name):
        name = str(Path(name).resolve())
    elif "@" in name and "revision" not in spec:
        name, spec["revision"] = name.rsplit("@", 1)
    spec["name_or_path"] = name
    return spec


def check_parts(backbones: Mapping[str, Any]) -> None:
    """Raise a `ValueError` for a name of a part that there is not."""
    if unknown := sorted(set(map(str, backbones)) - set(PARTS)):
        raise ValueError(f"`backbones` names {', '.join(unknown)}; the parts are {', '.join(PARTS)}.")


def moved_backbones(known: Mapping[str, Any], moved: Mapping[str, Any]) -> dict[str, Any]:
    """
    The places of parts, some of which have moved. Of where one was, only what tells its weights apart still holds.

    Args:
        known: part → source, as in a configuration.
        moved: part → source, as `normalize_source` takes it.

    Raises:
        TypeError, ValueError: see `normalize_source` and `check_parts`.
    """
    check_parts(moved)
    prints = {part: {"fingerprint": known.get(part, {}).get("fingerprint")} for part in moved}
    return {**known, **{part: {**prints[part], **normalize_source(source)} for part, source in moved.items()}}


__all__ = ["PARTS", "SOURCE_KEYS", "check_parts", "moved_backbones", "normalize_source"]
