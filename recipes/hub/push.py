"""Publish a trained adapter, or any saved MiniGPT-4, as a repository of the Hub.

    minigpt4 push runs/stage2 you/your-adapter --private

The folder is looked through before anything is sent, and arrives in one commit. The token is that of `hf auth login`,
or HF_TOKEN.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import logging
from transformers.dynamic_module_utils import get_relative_import_files

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from modeling_minigpt4.backbones import HERE, PARTS, Checkpoint, collect, is_local
from modeling_minigpt4.composition_minigpt4 import find_parts, read_adapter
from modeling_minigpt4.peft_minigpt4 import ADAPTER_CONFIG, ADAPTER_WEIGHTS, plain_names
from modeling_minigpt4.remote_code_minigpt4 import brings_any_code
from modeling_minigpt4.saving_minigpt4 import AUTO_MAP
from recipes_minigpt4.hub.card import NAMELESS, last_name, render_card
from recipes_minigpt4.hub.options import build_parser
from recipes_minigpt4.hub.publish import could_not_push, make_repository, published_files, upload
from recipes_minigpt4.utils.errors import RecipeError, one_line


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    return build_parser("push").parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    """
    Check a folder and push it.

    Raises:
        RecipeError: if it would not load, or cannot be pushed.
    """
    args = parse(arguments)
    message, trusted = args.commit_message, args.trust_remote_code
    print(push(args.folder, args.repo, args.private or None, args.revision, message, trusted))


def push(
    folder: Path,
    repo_id: str,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload",
    trusted: bool = False,
) -> str:
    """
    Check a folder and push it in one commit.

    Args:
        folder: a saved model with its processor.
        repo_id: repository, made if there is none.
        private: whether it has to be private. Default: whatever its owner's new ones are.
        revision: branch, made if there is none. Default: main.
        message: of the commit.
        trusted: whether the code that parts bring may run, with which the folder is looked through.

    Returns:
        What to tell: the address, and how to load it.

    Raises:
        RecipeError: if the folder would not load, or cannot be pushed.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RecipeError(
            f"{repo_id!r} is no name of a repository, such as you/your-adapter: {one_line(error)}."
        ) from error
    config = check_folder(folder, trusted)
    inside = [source["subfolder"] for source in config.backbones.values() if _is_inside(source)]
    try:
        repo = make_repository(repo_id, private)
        write_card(folder, config, repo.repo_id)  # which has the owner's name too
        upload(repo.repo_id, published_files(folder, inside), message, revision)
    except Exception as error:  # whatever huggingface_hub and the network say
        raise RecipeError(could_not_push(error, folder, repo_id, private, revision)) from error
    return how_to_load(config, repo.repo_id, str(repo), revision)


def how_to_load(config: MiniGPT4Config, repo_id: str, address: str, revision: str | None) -> str:
    """The address of a repository, and the line that loads it."""
    local = [part for part in PARTS if part in config.backbones and is_local(config.backbones[part])]
    options = [f'"{repo_id}"', *([f'revision="{revision}"'] if revision else [])]
    if brings_any_code(config):
        options.append("trust_remote_code=True")
    if local:
        options.append("backbones={" + ", ".join(f'"{part}": ...' for part in local) + "}")
    lines = [
        f"Uploaded to {address}" + (f"/tree/{revision}" if revision else ""),
        f"AutoModelForVision2Seq.from_pretrained({', '.join(options)})",
    ]
    if local:
        names = ", ".join(f"{part} ({last_name(config.backbones[part]['name_or_path'])})" for part in local)
        lines.append(
            f"Others have to fill in the same weights, for here they are folders of this machine: {names}. Backbones "
            "that are named by repository, or a folder saved with full=True, load without."
        )
    return "\n".join(lines)


# ---- is it whole? ---------------------------------------------------------------------------------------------------


def check_folder(folder: Path, trusted: bool = False) -> MiniGPT4Config:
    """
    Make sure that a folder will load from the Hub as it is: weights, processor and code.

    Returns:
        Its configuration.

    Raises:
        RecipeError: that tells what is missing or wrong, and what to do.
    """
    config = read_config(folder)
    try:
        backbones = copy.deepcopy(config.backbones)
        find_parts(config, {"name_or_path": str(folder)}, trusted=trusted)
        config.backbones = backbones  # as others see them
        check_weights(folder, config)
    except SafetensorError as error:
        raise RecipeError(
            f"A file of weights in {folder} cannot be read ({one_line(error)}); save it again."
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{one_line(error)}.") from error
    check_processor(folder, trusted)
    check_code(folder, config)
    return config


def read_config(folder: Path) -> MiniGPT4Config:
    if not folder.is_dir():
        raise RecipeError(f"There is no folder {folder}; name what training or save_pretrained wrote.")
    file = folder / "config.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8")).get("model_type")
        config = MiniGPT4Config.from_pretrained(folder) if kind == MiniGPT4Config.model_type else None
    except FileNotFoundError as error:
        found = sorted(folder.glob("checkpoint-*"))
        hint = f", such as {found[-1]}" if found else ""
        raise RecipeError(
            f"{folder} holds no model, for it has no config.json; name a folder that does{hint}."
        ) from error
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"{file} cannot be read ({one_line(error)}); save the model again.") from error
    if config is None:
        raise RecipeError(
            f"{folder} holds a {kind!r} model; this command pushes MiniGPT-4's, and `hf upload` any other."
        )
    return config


def check_weights(folder: Path, config: MiniGPT4Config) -> None:
    """
    Look through all tensors of a folder: that they are those of the configuration, and numbers.

    Raises:
        RecipeError: if one holds NaN or infinity.
        OSError: if a file is missing or damaged.
        ValueError: if a tensor is missing, unknown or of another shape.
    """
    checkpoint = Checkpoint({"name_or_path": str(folder)}, "adapter")
    if getattr(config, "quantization_config", None) is None:  # which changes names and shapes
        skeleton = MiniGPT4ForConditionalGeneration._skeleton(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        if config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        read_adapter(checkpoint, shapes, config)
        for part, source in config.backbones.items():
            if source["name_or_path"] == HERE:
                names = skeleton.lm_head_name, skeleton.decoder_name
                collect(part, {**source, "name_or_path": str(folder)}, shapes, *names, {})
    for file, name, tensor in _tensors(folder, checkpoint, config):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RecipeError(
                f"{name} in {file} holds NaN or infinity, so the training went wrong; push an earlier checkpoint."
            )


def _tensors(folder: Path, checkpoint: Checkpoint, config: MiniGPT4Config) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Every tensor that is published: file, name and values."""
    for key in sorted(checkpoint.keys()):
        yield checkpoint.file_of(key), key, checkpoint.tensor(key)
    for part, source in config.backbones.items():
        if source["name_or_path"] == HERE:
            inner = Checkpoint({**source, "name_or_path": str(folder)}, part)
            for key in sorted(inner.keys()):
                yield inner.file_of(key), key, inner.tensor(key)
    if subfolder := getattr(config, "language_model_adapter", None):
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
            if not (folder / subfolder / name).is_file():
                raise OSError(f"{folder / subfolder} lacks {name}, the adapter on the language model; save it again")
        file = folder / subfolder / ADAPTER_WEIGHTS
        for key, tensor in load_file(file).items():
            yield str(file), key, tensor


def check_processor(folder: Path, trusted: bool = False) -> None:
    """Make sure that the processor is there and loads."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))  # 4.57 would make one up
        MiniGPT4Processor.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # of the tokenizer, in all its kinds
        raise RecipeError(
            f"{folder} has no processor that loads ({one_line(error)}); put it there with "
            "`processor.save_pretrained(...)`, for nobody can use the model without."
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def check_code(folder: Path, config: MiniGPT4Config) -> None:
    """Make sure that the code is there with which the model loads where this package is not installed."""
    processor = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    named = {**AUTO_MAP, **(getattr(config, "auto_map", None) or {}), **processor.get("auto_map", {})}
    modules = {str(name).rpartition("--")[2].split(".")[0] for name in named.values()}
    missing = []
    for module in sorted(modules):
        try:
            missing += [file for file in _code_of(folder / f"{module}.py") if not Path(file).is_file()]
        except FileNotFoundError as error:
            missing.append(str(error.filename))
    if missing:
        raise RecipeError(
            f"{folder} lacks {Path(missing[0]).name}, the code that `trust_remote_code=True` loads it with; save it "
            "again with `save_pretrained`."
        )


def _code_of(file: Path) -> list[str]:
    return [str(file), *map(str, get_relative_import_files(file))]


def _is_inside(source: Any) -> bool:
    return source["name_or_path"] == HERE and bool(source.get("subfolder"))


def write_card(folder: Path, config: MiniGPT4Config, repo_id: str | None = None) -> None:
    """Name the repository in the card; a folder of `save_pretrained` alone has none, and gets one without numbers."""
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        if repo_id and NAMELESS in text:
            card.write_text(text.replace(NAMELESS, repo_id), encoding="utf-8")
        return
    skeleton = MiniGPT4ForConditionalGeneration._skeleton(config)
    if subfolder := getattr(config, "language_model_adapter", None):
        from peft import PeftConfig

        skeleton.add_adapter(PeftConfig.from_pretrained(str(folder / subfolder)))
    checkpoint = Checkpoint({"name_or_path": str(folder)}, "adapter")
    kept = set(checkpoint.keys()) if config.backbones else set()
    parameters = dict(skeleton.named_parameters())
    for name, plain in plain_names(skeleton, parameters).items():
        parameters[name].requires_grad_(plain is None or plain in kept or ".language_projection." in name)
    card.write_text(render_card(skeleton, repo_id=repo_id, title=str(folder.absolute())), encoding="utf-8")
