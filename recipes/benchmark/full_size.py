"""Load and run MiniGPT-4 at full size, with random weights.

    python -m recipes_minigpt4.benchmark.full_size --output_dir DIR

Writes backbones as the Hub has them (shards of random weights with an index; BLIP-2's names for the vision side) and
an adapter-only folder that refers to them. A new process then loads the adapter, looks at one picture and generates 8
tokens. Time and memory are printed and saved in `result.json`; the weights are deleted afterwards.

The check fails if the peak of resident memory (VmHWM of the kernel, which counts memory-mapped files too) is above
1.15 times the weights. Vicuna-7B takes 16 GB of disk and of memory, and some minutes. Needs Linux, and no extra.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, Blip2Config, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4.benchmark.machine import read_status, surroundings
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE
from recipes_minigpt4.utils.command_line import SpellingParser
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.files import write_json
from recipes_minigpt4.utils.ranges import POSITIVE, in_range


LIMIT = 1.15  # peak memory ÷ bytes of the weights
NEW_TOKENS = 8
QUESTION = "Describe this image in detail."
GB = 1e9

# Sizes for trying the check itself; the interpreter and its libraries alone take several hundred MB.
SMALL_SIZES: dict[str, dict[str, dict[str, int]]] = {
    "small": {
        "vision": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
        "qformer": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
        "text": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
    "medium": {
        "vision": {"num_hidden_layers": 6},
        "qformer": {},
        "text": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16},
    },
}


def build_config(preset: str) -> MiniGPT4Config:
    """The configuration of a released model, or of a smaller one with its vocabulary."""
    if preset in PRESETS:
        return PRESETS[preset].config()
    sizes = SMALL_SIZES[preset]
    return MiniGPT4Config(
        vision_config=sizes["vision"],
        qformer_config=sizes["qformer"],
        text_config={"vocab_size": 32001, **sizes["text"]},
    )


# ---- folders --------------------------------------------------------------------------------------------------------


def write_folders(folder: Path, config: MiniGPT4Config, dtype: torch.dtype, shard_size: str) -> None:
    """Write `language_model/`, `vision/` and `adapter/`, unless an earlier run has kept them."""
    if (folder / "adapter" / "config.json").exists():
        print(f"Weights from {folder}", flush=True)
        return
    with torch.device("meta"):
        skeleton = MiniGPT4ForConditionalGeneration(config).to(dtype).state_dict()
    language = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in skeleton.items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    vision = {
        name.removeprefix("model."): tensor
        for name, tensor in skeleton.items()
        if name.startswith(("model.vision_model.", "model.qformer.", "model.query_tokens"))
    }
    check_disk(folder, sum(tensor.nbytes for tensor in [*language.values(), *vision.values()]))
    torch.manual_seed(0)
    write_language_model(folder / "language_model", config, language, shard_size)
    write_vision(folder / "vision", config, vision, shard_size)
    write_adapter(folder, config, dtype)


def check_disk(folder: Path, needed: int) -> None:
    """Raise a `RecipeError` if `needed` bytes do not fit on the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < needed * 1.02:
        raise RecipeError(
            f"The weights take {needed / GB:.1f} GB, but the disk of {folder} has {free / GB:.1f} GB left; make room, "
            "or name another --output_dir."
        )


def write_language_model(folder: Path, config: MiniGPT4Config, tensors: Mapping[str, Tensor], shard_size: str) -> None:
    write_shards(folder, tensors, shard_size)
    write_language_config(folder, config, next(iter(tensors.values())).dtype)
    GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0).save_pretrained(folder)
    # The weights are random, so any tokenizer with ids inside the vocabulary is as good as LLaMA's.
    AutoTokenizer.from_pretrained(LANGUAGE_BACKBONE).save_pretrained(folder)


def write_vision(folder: Path, config: MiniGPT4Config, tensors: Mapping[str, Tensor], shard_size: str) -> None:
    """A vision encoder and, if there is one, a Q-Former with its queries, under BLIP-2's names."""
    write_shards(folder, tensors, shard_size)
    write_vision_config(folder, config)


def write_language_config(folder: Path, config: MiniGPT4Config, dtype: torch.dtype) -> None:
    text_config = config.text_config
    text_config.architectures, text_config.dtype = ["LlamaForCausalLM"], dtype
    text_config.save_pretrained(folder)


def write_vision_config(folder: Path, config: MiniGPT4Config) -> None:
    qformer = {} if config.qformer_config is None else {"qformer_config": config.qformer_config.to_dict()}
    vision = config.vision_config.to_dict()
    Blip2Config(vision_config=vision, **qformer, num_query_tokens=config.num_query_tokens).save_pretrained(folder)


def write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_size: str) -> None:
    """
    Write random tensors in the shapes and dtypes of meta tensors; one shard at a time is in memory.

    What is written leaves the page cache, so that loading starts from the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    split = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=shard_size)
    for filename, names in split.filename_to_tensors.items():
        save_file({name: random_like(name, tensors[name]) for name in names}, folder / filename, {"format": "pt"})
        with (folder / filename).open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def random_like(name: str, tensor: Tensor) -> Tensor:
    """Values as models are initialized with, so that activations stay finite: N(0, 0.02²), norms 1, biases 0."""
    if tensor.ndim > 1:
        return torch.empty(tensor.shape, dtype=tensor.dtype).normal_(std=0.02)
    return torch.full(tensor.shape, float(name.endswith("weight")), dtype=tensor.dtype)


def write_adapter(folder: Path, config: MiniGPT4Config, dtype: torch.dtype) -> None:
    """
    Compose the backbones by a new projection and save what belongs to neither, with a processor.

    In the dtype that they are stored in the weights stay on the disk, memory-mapped and unread.
    """
    parts = {"vision": str(folder / "vision"), "language_model": str(folder / "language_model")}
    if config.qformer_config is not None:
        parts["qformer"] = parts["vision"]
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, separator=None, dtype=dtype)
    processor = MiniGPT4Processor.from_backbones(parts["vision"], parts["language_model"], config=model.config)
    processor.save_pretrained(folder / "adapter")
    model.save_pretrained(folder / "adapter")


# ---- the measured process -------------------------------------------------------------------------------------------


class TokenClock(BaseStreamer):
    """Notes when `generate` hands over the prompt, and then every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class MemoryWatch(threading.Thread):
    """Highest resident memory seen while it runs, in bytes: private, and pages of memory-mapped files."""

    def __init__(self, interval: float = 0.01) -> None:
        super().__init__(daemon=True)
        self.interval = interval
        self.peaks = {"RssAnon": 0, "RssFile": 0}
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(self.interval):
            status = read_status()
            self.peaks = {name: max(peak, status[name]) for name, peak in self.peaks.items()}

    def stop(self) -> None:
        self._stopped.set()
        self.join()


def mapped_files() -> list[str]:
    """Files of weights that are mapped into memory at the moment."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {Path(line.split(maxsplit=5)[-1]) for line in lines if line.endswith(".safetensors")}
    return sorted(f"{path.parent.name}/{path.name}" for path in paths)


def measure(adapter: Path) -> dict[str, Any]:
    """Load the adapter, describe one picture in `NEW_TOKENS` tokens, and tell times (s) and memory (bytes)."""
    before, watch = read_status()["VmRSS"], MemoryWatch()
    watch.start()
    start = time.perf_counter()
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter, dtype=torch.bfloat16).eval()
    loaded = time.perf_counter()
    peak_loading = read_status()["VmHWM"]
    processor = MiniGPT4Processor.from_pretrained(adapter)
    inputs = ask(processor)
    clock = TokenClock()
    output = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, streamer=clock,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    watch.stop()
    peak = read_status()["VmHWM"]
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return {
        "weights_bytes": weights,
        "peak_bytes": peak,
        "ratio": peak / weights,
        "before_loading_bytes": before,
        "peak_loading_bytes": peak_loading,
        "peak_anonymous_bytes": watch.peaks["RssAnon"],
        "peak_mapped_bytes": watch.peaks["RssFile"],
        "load_seconds": loaded - start,
        "first_token_seconds": clock.times[1] - clock.times[0],
        "seconds_per_further_token": (clock.times[-1] - clock.times[1]) / (len(clock.times) - 2),
        "prompt_tokens": inputs["input_ids"].shape[1],
        "new_tokens": output.sequences.shape[1] - inputs["input_ids"].shape[1],
        "finite": all(bool(logits.isfinite().all()) for logits in output.logits),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "mapped_files": mapped_files(),
        **surroundings(),
    }


def ask(processor: MiniGPT4Processor) -> dict[str, Tensor]:
    """The inputs for a question about one picture, in the chat template."""
    picture = Image.linear_gradient("L").convert("RGB")
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    inputs: dict[str, Tensor] = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    return inputs


# ---- the command ----------------------------------------------------------------------------------------------------


def check(result: Mapping[str, Any], limit: float) -> None:
    """Raise a `RecipeError` if the run took too much memory or did not do what it was asked for."""
    if result["new_tokens"] != NEW_TOKENS or not result["finite"]:
        numbers = "finite" if result["finite"] else "not finite"
        raise RecipeError(
            f"The model wrote {result['new_tokens']} tokens instead of {NEW_TOKENS}, and its logits were {numbers}."
        )
    if result["ratio"] > limit:
        raise RecipeError(
            f"Peak memory was {result['peak_bytes'] / GB:.2f} GB, {result['ratio']:.3f} times the weights of "
            f"{result['weights_bytes'] / GB:.2f} GB; at most {limit:g} times is allowed."
        )


def format_result(result: Mapping[str, Any]) -> str:
    """A table of two columns; bytes as GB."""
    rows = []
    for name, value in result.items():
        if name.endswith("_bytes"):
            value = f"{value / GB:.3f} GB"
        elif isinstance(value, bool | str):
            value = str(value)
        elif isinstance(value, list):
            value = ", ".join(value)
        else:
            value = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
        rows.append(f"  {name.removesuffix('_bytes').replace('_', ' '):27}{value}")
    return "\n".join(rows)


def measure_in_new_process(adapter: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "recipes_minigpt4.benchmark.full_size", "--measure", str(adapter)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode:
        raise RecipeError(
            f"The adapter in {adapter} could not be loaded and run (exit status {done.returncode}); the reason is "
            "above, or, if there is none, the memory did not suffice."
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = SpellingParser(prog="full_size", description="Load and run a model of full size.")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--output_dir", type=Path, help="folder for the weights and result.json")
    where.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=[*PRESETS, *SMALL_SIZES], default="vicuna-7b")
    parser.add_argument("--stored_dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16",
                        help="type of the backbones on the disk; they are loaded in bfloat16")  # fmt: skip
    parser.add_argument("--shard_size", default="2GB", help="largest size of one file")
    parser.add_argument("--limit", type=in_range(POSITIVE, float),
                        help=f"highest peak memory, as a multiple of the weights; default: {LIMIT}, and none for "
                        "small and medium, whose weights are small beside the interpreter")  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the weights for the next run")
    return parser.parse_args(arguments)


def run_check(args: argparse.Namespace) -> dict[str, Any]:
    """
    Write the folders, measure, report; returns what was measured.

    Raises:
        RecipeError: if the disk is too small, or the run took too much memory or failed.
    """
    if not Path("/proc/self/status").exists():
        raise RecipeError("Peak memory is read from /proc, which this system lacks; run the check on Linux.")
    folder = args.output_dir.resolve() / f"{args.preset}-{args.stored_dtype}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{folder} cannot be made ({error.strerror}); name another --output_dir.") from error
    try:
        start = time.perf_counter()
        write_folders(folder, build_config(args.preset), getattr(torch, args.stored_dtype), args.shard_size)
        written = time.perf_counter() - start
        measured = measure_in_new_process(folder / "adapter")
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    result = {"preset": args.preset, "stored_dtype": args.stored_dtype, "write_seconds": written, **measured}
    write_json(args.output_dir / "result.json", result)
    print(format_result(result), flush=True)
    full_size = args.preset in PRESETS
    check(result, args.limit if args.limit is not None else LIMIT if full_size else math.inf)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 1 after a failure, which is told on standard error in one sentence."""
    args = parse(arguments)
    if args.measure is not None:
        print(json.dumps(measure(args.measure)))
        return 0
    try:
        run_check(args)
    except RecipeError as error:
        print(f"full_size: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
