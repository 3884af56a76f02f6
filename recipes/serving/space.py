"""`minigpt4 app … --space OWNER/NAME`: the page as a Space of the Hub, in one commit.

A Space holds this project's code as it is here, the names of the models, and the files of small adapters. It holds no
token: whoever shows a private model gives the Space one in its settings.
"""

import argparse
import importlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id

from modeling_minigpt4 import MiniGPT4Config
from modeling_minigpt4.backbones import HERE, is_local
from recipes_minigpt4.evaluation.speakers import SpeakerOptions, config_named
from recipes_minigpt4.hub.publish import check_secrets, explain, make_repository, published_files, upload
from recipes_minigpt4.hub.push import check_folder
from recipes_minigpt4.serving.models import OURS, ModelOptions, check_labels, split_label
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.uploads import find_examples
from recipes_minigpt4.serving.votes import folder_names
from recipes_minigpt4.utils.errors import RecipeError, one_line


CODE = ("modeling_minigpt4", "processing_minigpt4", "recipes_minigpt4")
NEEDED = ("torch", "transformers", "safetensors", "accelerate", "pillow", "sentencepiece")  # beside gradio
QUANTIZERS = {"bnb": "bitsandbytes", "torchao": "torchao"}
MOST_BYTES = 100 << 20  # of an adapter that goes into the Space
EXAMPLE_SIDE = 1024  # pixels of the longer side
WRITTEN = ("app.py", "requirements.txt", "README.md")
# What an earlier version of the Space may have and a new one may not.
STALE = tuple(f"{folder}{'/*' * depth}" for folder in (*CODE, "models", "examples") for depth in range(1, 6))
APP = '''"""A page with models of MiniGPT-4. `minigpt4 app … --space` wrote it."""

import os

from recipes_minigpt4.cli import main


ARGUMENTS = {arguments}


if __name__ == "__main__":
    host = os.environ.get("GRADIO_SERVER_NAME", "0.0.0.0")
    port = os.environ.get("GRADIO_SERVER_PORT", "7860")
    raise SystemExit(main(["app", *ARGUMENTS, "--host", host, "--port", port]))
'''
README = """
# MiniGPT-4

{about}

{models}

Models have licences of their own. Votes of the tab Compare are kept in the folder `app` until the Space restarts.
"""


def make_space(args: argparse.Namespace) -> str:
    """
    Write a Space, and push it if it has a name.

    Args:
        args: of `minigpt4 app`: `space`, the name; `space_dir`, a folder to write and to keep; `private`.

    Returns:
        What to tell.

    Raises:
        RecipeError: if a model cannot be shown there, something holds a secret, or it cannot be pushed.
    """
    check_labels(args.models)
    if args.space:
        _check_name(args.space)
    if args.space_dir is not None:
        if args.space_dir.exists() and (not args.space_dir.is_dir() or any(args.space_dir.iterdir())):
            raise RecipeError(f"--space_dir {args.space_dir} is there already; name a folder that is new or empty.")
        return _make(args, args.space_dir)
    with tempfile.TemporaryDirectory(prefix="minigpt4-space-") as folder:
        return _make(args, Path(folder))


def _make(args: argparse.Namespace, folder: Path) -> str:
    needed = write_space(args, folder)
    files = files_of(folder)
    check_secrets(files)
    size = sum(path.stat().st_size for path in files.values()) / 2**20
    told = f"{len(files)} files, {size:.1f} MiB"
    if not args.space:
        return f"The Space is in {folder} ({told}); `--space OWNER/NAME` pushes it."
    try:
        repo = make_repository(args.space, args.private or None, kind="space")
        upload(repo.repo_id, files, "Show models with minigpt4 app", kind="space", stale=STALE)
    except Exception as error:  # whatever huggingface_hub and the network say
        raise RecipeError(
            f"The Space {args.space} was not pushed: {explain(error)}; then run the command again."
        ) from error
    hidden = _hidden(needed)
    hint = f"\nGive it a token in its settings, as the secret HF_TOKEN: {', '.join(hidden)} cannot be read without."
    return f"Pushed {told} to {repo}" + hint * bool(hidden)


def _check_name(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise RecipeError(
            f"--space {name} is no name of a Space, such as you/your-space: {one_line(error)}."
        ) from error
    if "/" not in name:
        raise RecipeError(f"--space {name} has no owner; write you/{name} or the like.")


def _hidden(names: list[str]) -> list[str]:
    """Repositories that not everybody can read."""
    found = []
    for name in names:
        try:
            info = HfApi().model_info(name)
        except Exception:  # nobody needs to know, who is asked for a hint
            continue
        if info.private or getattr(info, "gated", False):
            found.append(name)
    return found


# ---- the files ------------------------------------------------------------------------------------------------------


def write_space(args: argparse.Namespace, folder: Path) -> list[str]:
    """
    Write the files of a Space.

    Args:
        args: of `minigpt4 app`.
        folder: new or empty.

    Returns:
        The repositories that it will fetch.

    Raises:
        RecipeError: if a model cannot be shown there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = ModelOptions.of(args)
    arguments: list[str] = []
    repositories: list[str] = []
    packages: set[str] = set()
    models = dict(split_label(text) for text in args.models)
    places = folder_names(list(models))
    for label, name in models.items():
        if Path(name).expanduser().is_dir():
            config: Any = _copy_model(Path(name).expanduser(), folder / "models" / places[label])
            name = f"models/{places[label]}"
        else:
            config = config_named(name, SpeakerOptions(trust_remote_code=args.trust_remote_code, servers=False))
            repositories.append(name.partition("@")[0])
        arguments.append(f"{label}={name}")
        repositories += _backbones(label, config, options.backbones)
        packages |= {"peft"} if getattr(config, "language_model_adapter", None) else set()
    if args.quantization:
        packages.add(QUANTIZERS.get(args.quantization.partition("-")[0], args.quantization))
    if args.examples is not None:
        _copy_examples(args.examples, folder / "examples")
        arguments += ["--examples", "examples"]
    _copy_code(folder)
    arguments += _options(args, options)
    lines = "".join(f"    {json.dumps(one, ensure_ascii=False)},\n" for one in arguments)
    (folder / "app.py").write_text(APP.format(arguments=f"[\n{lines}]"), encoding="utf-8")
    (folder / "requirements.txt").write_text("".join(_requirements(packages)), encoding="utf-8")
    repositories = sorted(set(repositories))
    (folder / "README.md").write_text(_readme(args, arguments[: len(models)], repositories), encoding="utf-8")
    return repositories


def files_of(folder: Path) -> dict[str, Path]:
    """Path in the Space → path here."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _copy_model(source: Path, target: Path) -> MiniGPT4Config:
    """Copy an adapter, if it is whole and small."""
    config = check_folder(source)
    inside = [
        one["subfolder"] for one in config.backbones.values() if one["name_or_path"] == HERE and one.get("subfolder")
    ]
    files = published_files(source, inside)
    size = sum(path.stat().st_size for path in files.values())
    if size > MOST_BYTES:
        raise RecipeError(
            f"{source} has {size / 2**20:,.0f} MiB, too much for a Space; push it with `minigpt4 push {source} "
            "OWNER/NAME`, and name that repository here."
        )
    for name, path in files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)
    return config


def _backbones(label: str, config: Any, moved: Mapping[str, str]) -> list[str]:
    """The repositories of a model's frozen parts."""
    if config.model_type != OURS:
        return []
    names = {part: moved.get(part, source["name_or_path"]) for part, source in config.backbones.items()}
    for part, name in names.items():
        if is_local({"name_or_path": name}):
            raise RecipeError(
                f"{label} takes its {part} from {name}, a folder that a Space does not have; name a repository with "
                f"the same weights by --{part}, or push a folder saved with full=True."
            )
    return [name for name in names.values() if name != HERE]


def _copy_examples(source: Path, target: Path) -> None:
    """Copy pictures, smaller and without what cameras write into them."""
    target.mkdir()
    for number, (path, picture) in enumerate(find_examples(source), 1):
        picture.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        picture.info = {}
        name = target / f"{path.stem}.webp"
        picture.save(target / f"{path.stem}-{number}.webp" if name.exists() else name, quality=85)


def _copy_code(folder: Path) -> None:
    """Copy this project's packages, but for the backbones of the embedded world."""
    for name in CODE:
        source = Path(str(importlib.import_module(name).__file__)).parent
        for path in _code_files(source):
            place = folder / name / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _code_files(source: Path) -> Iterator[Path]:
    for path in sorted(source.rglob("*")):
        parts = path.relative_to(source).parts
        if path.suffix in {".py", ".jinja", ".txt", ".yaml"} and parts[:2] != ("tiny", "backbones"):
            yield path


def _options(args: argparse.Namespace, options: ModelOptions) -> list[str]:
    """The options of replies and of loading that are not as they are anyway."""
    usual = {**ModelOptions().__dict__, **ReplySettings().__dict__}
    del usual["backbones"]
    given = [word for part, place in options.backbones.items() for word in (f"--{part}", place)]
    for name, default in usual.items():
        value = getattr(args, name)
        if value != default:
            given += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return given


def _requirements(more: set[str]) -> Iterator[str]:
    """The versions that are installed here."""
    for name in (*NEEDED, *sorted(more)):
        try:
            yield f"{name}=={metadata.version(name).partition('+')[0]}\n"
        except metadata.PackageNotFoundError:
            continue  # it worked here without


def _readme(args: argparse.Namespace, models: list[str], repositories: list[str]) -> str:
    front: Mapping[str, Any] = {
        "title": args.space.partition("/")[2] if args.space else "MiniGPT-4",
        "sdk": "gradio",
        "sdk_version": metadata.version("gradio"),
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "models": repositories,
    }
    listed = "\n".join("- {}: {}".format(*text.split("=", 1)) for text in models)
    about = "Chat about pictures, compare models side by side, and see what a model looks at."
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False)}---\n{README.format(about=about, models=listed)}"
