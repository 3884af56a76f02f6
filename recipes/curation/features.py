"""What the describing model saw in each picture, as one short vector: to pick pictures that differ from each other."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import read_journal


def encode_features(seen: torch.Tensor) -> list[str]:
    """
    The mean over the tokens of each picture, of length 1, in half precision and base64.

    Args:
        seen: features of the vision side, (pictures, tokens, channels).
    """
    pooled = torch.nn.functional.normalize(seen.float().mean(1), dim=-1).cpu().numpy().astype("<f2")
    return [base64.b64encode(one.tobytes()).decode() for one in pooled]


def read_features(folder: Path, rows: Sequence[CuratedRow]) -> np.ndarray:
    """
    The vectors of rows, (rows, channels), each of length 1.

    Raises:
        RecipeError: if some have none.
    """
    path = folder / "drafts.jsonl"
    found: Mapping[tuple[str, str], str] = {
        (line["digest"], line["text"]): line["features"]
        for line in (read_journal(path) if path.is_file() else ())
        if line.get("features")
    }
    told = [found.get((row.picture, row.draft)) for row in rows]
    if missing := sum(one is None for one in told):
        raise RecipeError(
            f"{missing} of {len(rows)} pictures have no features, which only a MiniGPT-4 leaves that describes; "
            "choose --by score or --by random."
        )
    vectors = np.stack([np.frombuffer(base64.b64decode(one or ""), "<f2").astype(np.float32) for one in told])
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-6)
    return unit
