"""The machine that measures: its processor, its memory and its versions."""

import os
import platform
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers


def read_status() -> dict[str, int]:
    """Memory of this process by the kernel's names, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("Vm", "Rss")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def surroundings() -> dict[str, Any]:
    """Versions, processor and memory of the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "threads": torch.get_num_threads(),
        "cpu": names[0] if names else platform.machine(),
        "machine_memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }
