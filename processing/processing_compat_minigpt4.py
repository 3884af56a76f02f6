"""What differs between releases of transformers; no other file of this folder asks for a version."""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import transformers
from packaging.version import Version


# It can go when 4.57 is no longer supported.
IS_TRANSFORMERS_4 = transformers.__version__.startswith("4.")

# Before 5.24, where the marks of replies are is kept on a compiled template, which all threads share.
RENDERING: AbstractContextManager[Any] = (
    threading.RLock() if Version(transformers.__version__) < Version("5.24") else nullcontext()
)


__all__ = ["IS_TRANSFORMERS_4", "RENDERING"]
