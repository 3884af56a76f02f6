"""Mistakes of the user, told in one sentence."""

from recipes_minigpt4.utils.redaction import redact


class RecipeError(ValueError):
    """A mistake in the command, the configuration or the data, told in one sentence with its remedy and no secret."""

    def __init__(self, message: object) -> None:
        super().__init__(redact(str(message)))


class PreemptedError(Exception):
    """A run was told to end by SIGTERM, has saved a checkpoint, and can go on."""


def one_line(error: BaseException) -> str:
    """What an error says, on one line, without secrets and without a full stop."""
    return " ".join(redact(str(error)).split()).rstrip(".") or type(error).__name__
