"""The two training stages of MiniGPT-4 with TRL, and a world small enough to run both on a laptop.

Importing this package is cheap; the stages need the extra `[train]`: `pip install "minigpt4-transformers[train]"`.
"""


class RecipeError(ValueError):
    """A mistake in the command, the configuration or the data, told in one sentence with its remedy."""


__all__ = ["RecipeError"]
