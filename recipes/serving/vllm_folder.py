"""The folder that vLLM reads: every weight in one place, written once for an adapter whose backbones lie elsewhere."""

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError
from transformers.utils.hub import extract_commit_hash

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor, __version__
from modeling_minigpt4.peft_minigpt4 import ADAPTER_CONFIG, ADAPTER_FOLDER, find_file, is_wrapper
from recipes_minigpt4.utils.errors import RecipeError, one_line


# What of a folder decides what is written; reports, checkpoints and states of training do not.
DECISIVE = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.txt", f"{ADAPTER_FOLDER}/*")
BESIDE = ("trainer_state.json", "results.json", "training_args.bin")


@dataclass(frozen=True)
class Whole:
    """
    A folder or repository with every weight.

    Args:
        name: what vLLM is told.
        revision: of a repository.
        separator: text at which replies end beside EOS.
        dtype: that of the language model, as stored: `float32`, `bfloat16`, …
    """

    name: str
    revision: str | None
    separator: str | None
    dtype: str | None


def whole_folder(
    name: str,
    trust_remote_code: bool = False,
    cache: Path | None = None,
    backbones: Mapping[str, str] | None = None,
) -> Whole:
    """
    Find a model with every weight, and write it if it is an adapter alone.

    Args:
        name: folder, or repository (`owner/name@revision`).
        trust_remote_code: run code that its parts bring.
        cache: where folders are kept; `minigpt4/whole` in Hugging Face's own if left out.
        backbones: where parts are now, if they have moved, by their names.

    Raises:
        RecipeError: if there is no such model, or it cannot be written.
    """
    place, revision = name, None
    if not Path(name).is_dir() and "@" in name:
        place, revision = name.rsplit("@", 1)
    trusted: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = MiniGPT4Config.from_pretrained(place, **trusted)
        processor = MiniGPT4Processor.from_pretrained(place, **trusted)
        separator = processor.separator
    except Exception as error:  # transformers and the Hub say in many ways that something is not there
        raise RecipeError(f"{name} cannot be served by vLLM ({one_line(error)}).") from error
    if (file := find_file(place, "config.json", {"revision": revision})) is not None:
        revision = extract_commit_hash(file, None) or revision  # of now, whatever becomes of the branch
    if (
        not (config.backbones or backbones)
        and find_file(place, ADAPTER_CONFIG, {"revision": revision}, ADAPTER_FOLDER) is None
    ):
        return Whole(place, revision, separator, _dtype(config))
    target = (cache or Path(HF_HOME) / "minigpt4" / "whole") / _key(place, revision, backbones or {})
    moved = {"backbones": dict(backbones)} if backbones else {}
    if not target.is_dir():
        with _told(target), _lock(target):
            _write(place, processor, target, {**trusted, "revision": revision, **moved})
    return Whole(str(target), None, separator, _dtype(MiniGPT4Config.from_pretrained(target)))


def _key(place: str, revision: str | None, backbones: Mapping[str, str]) -> str:
    """A name that tells a model, as it is now, from others."""
    digest = hashlib.sha256(f"{__version__}\n{revision}\n{sorted(backbones.items())}\n".encode())
    folder = Path(place)
    if folder.is_dir():
        for path in sorted({path for pattern in DECISIVE for path in folder.glob(pattern)}):
            if path.is_file() and path.name not in BESIDE:
                digest.update(f"{path.relative_to(folder)}\n{path.stat().st_size}\n".encode())
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    else:
        digest.update(place.encode())
    return f"{(folder.resolve() if folder.is_dir() else folder).name}-{digest.hexdigest()[:16]}"


def _write(place: str, processor: MiniGPT4Processor, target: Path, options: dict[str, Any]) -> None:
    """Write a model, whole or not at all."""
    draft = target.with_name(f".{target.name}")
    shutil.rmtree(draft, ignore_errors=True)  # of somebody who was killed: we hold the lock
    if target.is_dir():
        return  # somebody else was faster
    try:
        model = MiniGPT4ForConditionalGeneration.from_pretrained(place, dtype="auto", **options)
    except Exception as error:
        raise RecipeError(f"The model {place} cannot be loaded ({one_line(error)}).") from error
    merge_adapter(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if (free := shutil.disk_usage(target.parent).free) < size * 1.01:
        raise RecipeError(
            f"vLLM needs all weights of {place} in one folder, {_gigabytes(size)}, and {target.parent} has room for "
            f"{_gigabytes(free)}; make room, or set HF_HOME to a folder of another disk."
        )
    print(f"Writing all weights to {target}, once ({_gigabytes(size)}).", flush=True)
    try:
        model.save_pretrained(draft, full=True)
        processor.save_pretrained(draft)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def merge_adapter(model: Any) -> None:
    """
    Merge an adapter of PEFT into the language model, for good.

    Raises:
        RecipeError: if it is of a kind that cannot be merged.
    """
    if not model.has_adapter:
        return
    for name, module in list(model.named_modules()):
        if not is_wrapper(module):
            continue
        if not hasattr(module, "get_base_layer") or not hasattr(module, "merge"):
            raise RecipeError(
                f"The model has a PEFT adapter whose layers ({type(module).__name__}) cannot be merged into its "
                "weights, which vLLM needs; serve it without `--engine vllm`."
            )
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module.get_base_layer())
    model._hf_peft_config_loaded = False


def _dtype(config: Any) -> str | None:
    """The stored dtype of the language model, or of the whole where that is not told."""
    dtype = getattr(config.text_config, "dtype", None) or getattr(config, "dtype", None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


@contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Let one process write at a time; the others wait and find what it wrote."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """
    Tell that a folder cannot be written.

    Raises:
        RecipeError: in place of errors of the disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"{target} cannot be written ({one_line(error)}); make room, or set HF_HOME to a folder that can be "
            "written into."
        ) from error
