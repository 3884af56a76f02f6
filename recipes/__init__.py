"""The two training stages of MiniGPT-4 with TRL, and a world small enough to run both on a laptop.

Importing this package is cheap; the stages need the extra `[train]`: `pip install "minigpt4-transformers[train]"`.
"""

from recipes_minigpt4.utils.errors import PreemptedError, RecipeError


__all__ = ["PreemptedError", "RecipeError"]
