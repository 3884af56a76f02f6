"""What libraries say on a command's way to its work, and nobody can act upon: the one list of it.

A command calls `silence_libraries` before it imports them. It is precise: any other message of the same logger is
shown as ever. Importing this file is cheap.
"""

import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path


# Logger → the beginning of what is left out.
LOG_LINES = {
    "transformers.cli.serving.chat_completion": "[Request received]",  # the line of the access log comes anyway
    "torchao": "Failed to load ",  # kernels for other processors and releases of Python
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",  # a faster kernel, of a package that it does without
    "torch.utils._pytree": "<enum '",  # torchao registers enumerations as it did for older torch
    "transformers.trainer": "The tokenizer has new PAD/BOS/EOS tokens",  # 4.57, of a model in parts
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
# Packages that transformers and PEFT import wherever they are installed, and the options that can ask for them.
UNASKED = ("torchao", "bitsandbytes")
ASKING = re.compile(r"^(?:--)?(?:quantization|optim|variants)\b", re.MULTILINE)


def silence_libraries(arguments: Sequence[str]) -> None:
    """
    Leave out what is listed above, and hide packages that these arguments, and the YAML file among them, do not need.

    Args:
        arguments: those of a command.
    """
    for name, beginning in LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _LeaveOut) for known in logger.filters):
            logger.addFilter(_LeaveOut(beginning))
    warnings.filterwarnings("ignore", ".*set_vital", UserWarning)  # of torchdata 0.11, for its data loader
    # Tokenizers would warn, past Python, when a data loader forks; they are given one text at a time.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if "transformers" not in sys.modules and not _asks(arguments):
        for name in UNASKED:
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # for Python, a module that is not there


class _LeaveOut(logging.Filter):
    """Drops records that begin in one way."""

    def __init__(self, beginning: str) -> None:
        super().__init__()
        self.beginning = beginning

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginning)


def _asks(arguments: Sequence[str]) -> bool:
    """Whether arguments or a YAML file among them may ask for a package that is hidden otherwise."""
    for text in arguments:
        place = Path(text.removeprefix("--config="))
        if ASKING.search(text):
            return True
        if place.suffix in (".yaml", ".yml") and place.is_file() and ASKING.search(place.read_text(errors="replace")):
            return True
    return False
