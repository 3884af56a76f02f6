"""Runs that are planned and measured: their cases, and what their numbers are read with."""

import json
from pathlib import Path

from torch.profiler import profile

from recipes_minigpt4.planning.plan import Plan


TOLERANCE = 0.15
LORA = '{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}'


CASES = {
    "stage 1": (1, True, {}),
    "stage 1, checkpointing": (1, True, {"gradient_checkpointing": True}),
    "stage 1, bfloat16, checkpointing": (1, True, {"bf16": True, "gradient_checkpointing": True}),
    "stage 1, bfloat16, no Q-Former": (1, False, {"bf16": True}),
    "stage 2": (2, True, {"per_device_train_batch_size": 3, "max_txt_len": 60}),
    "stage 2, no Q-Former, checkpointing": (2, False, {"gradient_checkpointing": True}),
    "stage 2, bfloat16": (2, True, {"bf16": True}),
    "accumulation, cached features": (1, True, {"gradient_accumulation_steps": 2, "cache_features": "features"}),
    "adapter": (1, True, {"peft_config": LORA}),
    "stage 1, BatchNorm": (1, "ResNet", {"attn_implementation": "eager"}),
    "stage 1, BatchNorm, bfloat16, cached features": (
        1,
        "ResNet",
        {"bf16": True, "cache_features": "features", "attn_implementation": "eager"},
    ),
    "language model trains": (1, True, {"train_parts": "language_model"}),
    "Q-Former trains": (1, True, {"train_parts": "qformer"}),
}


def most_allocated(profiler: profile, path: Path) -> int:
    """The most bytes that were allocated at once, above what there was at the start."""
    profiler.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        most = max(most, now)
    return most


def told(plan: Plan, *names: str) -> int:
    """Bytes of these parts at the peak."""
    return sum(size for name, size, _ in plan.memory if name in names)


def named(arguments: list[str]) -> dict[str, str]:
    """Names and values of a command line."""
    return {name.removeprefix("--"): value for name, value in zip(arguments[::2], arguments[1::2], strict=True)}
