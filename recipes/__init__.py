"""MiniGPT-4's recipes: both training stages with TRL, and what goes with them, from data to the Hub.

Importing this package is cheap; the stages need the extra `[train]`: `pip install "minigpt4-transformers[train]"`.
"""

from recipes_minigpt4.utils.errors import PreemptedError, RecipeError


__all__ = ["PreemptedError", "RecipeError"]
