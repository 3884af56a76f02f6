"""What `minigpt4 plan` says of the steps that are measured on a GPU: it runs beside, on the processors."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recipes_minigpt4.benchmark.full_size import write_language_config, write_vision_config
from recipes_minigpt4.benchmark.measure import device
from recipes_minigpt4.benchmark.models import build_config, size_of


PLANNED = ("pixels", "cached")  # sides that are runs of the recipes
ASSUMED = "CUDA context"  # a line of the plan that torch's allocator knows nothing of
GB = 1e9


class Plans:
    """
    Plans of steps, made in processes of their own.

    Args:
        size: name of a size.
        rows: of the steps; none, and nothing is planned.
        answer_tokens: of a row.
        dtype: of mixed precision and of the frozen weights.
        folder: for configurations; no weights are written.
    """

    def __init__(self, size: str, rows: Sequence[int], answer_tokens: int, dtype: torch.dtype, folder: Path) -> None:
        self.folder, self.found = folder, dict[tuple[int, str], int | None]()
        self._running: dict[tuple[int, str], subprocess.Popen[str]] = {}
        self._wanted = [(count, side) for count in rows for side in PLANNED]
        config = build_config(size_of(size))
        write_language_config(folder / "language_model", config, dtype)
        write_vision_config(folder / "vision", config)
        name = str(dtype).removeprefix("torch.")
        self._options: dict[str, Any] = {
            "vision": folder / "vision", "qformer": folder / "vision", "language_model": folder / "language_model",
            "dataset_name": "tiny", "max_steps": 1, "warmup_steps": 1, "max_txt_len": answer_tokens,
            "dtype": name, "bf16": True, "gradient_checkpointing": False, "use_cpu": device().type != "cuda",
            "output_dir": folder / "planned",
        }  # fmt: skip

    def __enter__(self) -> "Plans":
        # Without the GPU, which they do not need and whose memory is measured.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        for rows, side in self._wanted:
            command = [sys.executable, "-m", "recipes_minigpt4.cli", *self.command(rows, side)]
            self._running[rows, side] = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        return self

    def command(self, rows: int, side: str) -> list[str]:
        """What `minigpt4` takes to plan a step."""
        options = {**self._options, "per_device_train_batch_size": rows}
        if side == "cached":
            options["cache_features"] = self.folder / "features"
        return ["plan", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]

    def __exit__(self, *_: object) -> None:
        for process in self._running.values():
            process.kill()
            process.wait()

    def wait(self) -> None:
        """Wait until all are made."""
        for key, process in self._running.items():
            printed, _ = process.communicate()
            self.found[key] = planned_bytes(printed) if process.returncode == 0 else None
        self._running.clear()

    def bytes_of(self, rows: int, side: str) -> int | None:
        """What a step is planned to take at its peak; None if there is no such plan."""
        return self.found.get((rows, side))


def planned_bytes(plan: str) -> int | None:
    """Bytes of tensors at the peak, as a printed plan tells them; None if it tells none."""
    _, found, table = plan.partition("\nmemory per ")
    lines = re.findall(r"^  (\S.*?) {2,}([\d.]+) +[\d.]+$", table.partition("\n  total")[0], re.MULTILINE)
    sizes = [float(size) for name, size in lines if not name.startswith(ASSUMED)]
    return round(sum(sizes) * GB) if found and sizes else None
