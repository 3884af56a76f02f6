"""Publish an adapter, and load it as everybody else does, by its name.

    python -m recipes_minigpt4.examples.publish_and_load runs/stage2 you/your-adapter

It needs the token of `hf auth login`. Only the few megabytes that were trained are pushed.
"""

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_minigpt4  # noqa: F401  # registers the model with the Auto classes
from recipes_minigpt4.hub.push import push


def main(folder: str, repo_id: str) -> None:
    """Push `folder` to `repo_id` in one commit, after a check that it loads; then load it from there."""
    print(push(Path(folder), repo_id))
    model = AutoModelForImageTextToText.from_pretrained(repo_id)
    processor = AutoProcessor.from_pretrained(repo_id)
    parts = {part: source["name_or_path"] for part, source in model.config.backbones.items()}
    print(f"{repo_id} answers in the chat template of {type(processor).__name__}; its frozen parts: {parts}")


if __name__ == "__main__":
    main(*sys.argv[1:])
