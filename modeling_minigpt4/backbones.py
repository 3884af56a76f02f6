"""Where frozen weights come from: find a repository's files, open only the shards that matter, rename, verify.

A backbone is an ordinary checkpoint, on the Hub or in a folder. Its tensors are picked by name for one part of
MiniGPT-4 (vision encoder, Q-Former or language model) and handed to transformers' own loader under our names.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file, extract_commit_hash

from .checks_minigpt4 import why_missing
from .quantization_minigpt4 import stored_quantization
from .remote_code_minigpt4 import brings_code, check_trust, pin_code, read_config
from .sources_minigpt4 import PARTS


logger = logging.get_logger(__name__)

# A backbone that holds less than one tensor in so many is none of the part; old names and fused ones are fewer.
FEW = 10

# As the name of a backbone: the repository or folder of the checkpoint itself, mostly with a `subfolder`.
HERE = "."

# Options of `from_pretrained` that say how files are fetched; they hold for backbones too.
HUB_OPTIONS = ("cache_dir", "force_download", "proxies", "local_files_only", "token")


def part_of(name: str) -> str | None:
    """The part that a tensor of MiniGPT4ForConditionalGeneration belongs to, or None (the projection)."""
    return next((part for part, prefixes in PARTS.items() if name.startswith(prefixes)), None)


def is_local(source: Mapping[str, Any]) -> bool:
    """Whether a backbone is a folder of this machine, which nobody else can load."""
    name = str(source["name_or_path"])
    if name == HERE:
        return False
    return os.path.isabs(name) or name.startswith((".", "~")) or os.path.isdir(name)


def hub_only(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `HUB_OPTIONS` that are given."""
    return {key: value for key, value in options.items() if key in HUB_OPTIONS and value is not None}


def fetch_options(source: Mapping[str, Any], hub_options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of transformers' `cached_file` for a file of a backbone."""
    return {**hub_only(hub_options), "revision": source.get("revision"), "subfolder": source.get("subfolder") or ""}


def describe(source: Mapping[str, Any]) -> str:
    """One readable name for a backbone, for messages."""
    where = str(source["name_or_path"])
    if source.get("subfolder"):
        where = f"{where}/{source['subfolder']}"
    return f"{where}@{source['revision']}" if source.get("revision") else where


def load_backbone_config(
    part: str, source: Mapping[str, Any], hub_options: Mapping[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """
    Read a backbone's configuration and pin its revision.

    Args:
        part: key of `PARTS`.
        source: see `normalize_source`.
        hub_options: how files are fetched, and `trust_remote_code`.

    Returns:
        The repository's whole configuration, and the source with `revision` set to the commit hash that was read
        (None for a folder).

    Raises:
        OSError: if there is no such repository or folder.
        ValueError: if its weights are stored quantized, or if it brings code that the caller does not trust.
    """
    options = fetch_options(source, hub_options)
    fields: dict[str, Any] = {}
    try:
        # The file first: its place in the cache tells the commit, and a missing repository fails here.
        config_file = cached_file(source["name_or_path"], "config.json", **options)
        fields = json.loads(Path(config_file).read_text(encoding="utf-8")) if config_file else {}
        own_code = brings_code(fields)
        config = None if own_code else AutoConfig.from_pretrained(source["name_or_path"], **options)
    except (OSError, ValueError) as error:
        if (kind := fields.get("model_type")) is not None and kind not in CONFIG_MAPPING:
            raise ValueError(
                f"The {part} backbone {describe(source)} is a {kind!r} model, which the installed transformers does "
                "not know and for which it brings no code; upgrade transformers, or name another."
            ) from error
        raise OSError(_not_found(part, source)) from error
    source = {**source, "revision": extract_commit_hash(config_file, None) or source.get("revision")}
    if own_code:
        check_trust(f"{part} backbone {describe(source)}", hub_options.get("trust_remote_code"))
        _, source = pin_code(part, fields["auto_map"], source, hub_only(hub_options))
        config = read_config(part, fields, source, hub_only(hub_options))
    if (method := stored_quantization(config)) is not None:
        raise ValueError(
            f"The {part} backbone {describe(source)} holds weights that are quantized already ({method}); name the "
            "repository that they were made from, and pass `quantization_config` to quantize the language model."
        )
    return config, source


def _not_found(part: str, source: Mapping[str, Any]) -> str:
    if part not in PARTS:
        return f"The {part} {describe(source)} has no weights; save it again, or check the name, network and access."
    remedy = "name another folder or repository"
    if source.get("fingerprint"):  # a checkpoint names it
        remedy = (
            f'if it has moved, name the new place with `backbones={{"{part}": "folder or repository"}}`, or with '
            f"--{part} on the command line"
        )
    reason = why_missing(str(source["name_or_path"]))
    network = "; check its name, the network and your access, or " if "reached" in reason else "; "
    return f"The {part} backbone {describe(source)} cannot be opened: {reason}{network}{remedy}."


class StoredTensor(torch.Tensor):
    """
    A tensor of a safetensors file that is read anew by every operation, and so takes no memory in between.

    It is for weights that transformers converts to another dtype. Views of a memory-mapped file keep every page that
    was read resident until the whole model is loaded: beside its bfloat16 weights also all of the float16 or float32
    ones that they were made from.
    """

    _place: tuple[str, str]  # file, and name in the file

    @staticmethod
    def __new__(cls, path: str, key: str, like: torch.Tensor) -> "StoredTensor":
        tensor: StoredTensor = torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype)
        tensor._place = path, key
        return tensor

    def read(self) -> torch.Tensor:
        """The tensor as a view of a mapping of its own, which ends with it."""
        path, key = self._place
        with safe_open(path, framework="pt", device="cpu") as file:
            tensor: torch.Tensor = file.get_tensor(key)
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(cls, cls.read, (args, kwargs or {}))
        return func(*args, **kwargs)


class Checkpoint:
    """
    The tensors of one checkpoint by name; a file is opened only when one of its tensors is asked for.

    Reads `model.safetensors`, sharded safetensors and, where a repository has nothing else, `pytorch_model.bin`
    (whole or sharded, opened with `weights_only=True`).
    """

    def __init__(self, source: Mapping[str, Any], part: str, hub_options: Mapping[str, Any] | None = None) -> None:
        self.source = source
        self.part = part
        self._options = fetch_options(source, hub_options or {})
        self._open_files: dict[str, Any] = {}
        self._paths: dict[str, str] = {}
        self._file_of = self._list_tensors()

    def keys(self) -> Iterable[str]:
        return self._file_of.keys()

    def __contains__(self, key: str) -> bool:
        return key in self._file_of

    def file_of(self, key: str) -> str:
        """Path of the file that holds a tensor."""
        return self._path(self._file_of[key])

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its values."""
        file = self._open(self._file_of[key])
        return tuple(file[key].shape if isinstance(file, dict) else file.get_slice(key).get_shape())

    def tensor(self, key: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """
        A tensor, on the CPU in the dtype it is stored in; memory-mapped where the file allows it.

        Args:
            dtype: what it will be converted to, if that is known; see [`StoredTensor`].
        """
        file = self._open(self._file_of[key])
        tensor: torch.Tensor = file[key] if isinstance(file, dict) else file.get_tensor(key)
        if dtype in (None, tensor.dtype) or not tensor.is_floating_point() or isinstance(file, dict):
            return tensor
        return StoredTensor(self._paths[self._file_of[key]], key, tensor)

    def _list_tensors(self) -> dict[str, str]:
        # In the order of transformers: a file that was saved over shards comes before their index.
        for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
            if self._find(single) is not None:
                file = self._open(single)
                return dict.fromkeys(file if isinstance(file, dict) else file.keys(), single)
            if (path := self._find(index)) is not None:
                weight_map: dict[str, str] = json.loads(Path(path).read_text())["weight_map"]
                return weight_map
        raise OSError(_not_found(self.part, self.source))

    def _find(self, filename: str) -> str | None:
        try:
            path: str | None = cached_file(
                self.source["name_or_path"],
                filename,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_gated_repo=True,
                **self._options,
            )
        except (OSError, ValueError) as error:  # transformers takes a folder that is gone for a repository
            raise OSError(_not_found(self.part, self.source)) from error
        return path

    def _path(self, filename: str) -> str:
        path = self._find(filename)
        if path is None:
            raise OSError(
                f"The {self.part} backbone {describe(self.source)} lacks its file {filename}, which its index names; "
                "download or copy the folder again."
            )
        return path

    def _open(self, filename: str) -> Any:
        if filename not in self._open_files:
            path = self._paths[filename] = self._path(filename)
            try:
                if filename.endswith(".safetensors"):
                    self._open_files[filename] = safe_open(path, framework="pt", device="cpu")
                else:
                    self._open_files[filename] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (SafetensorError, RuntimeError, EOFError) as error:
                raise OSError(
                    f"{path} cannot be read ({error}); it is truncated or damaged, so download or save it again."
                ) from error
        return self._open_files[filename]


def match_names(
    part: str, expected: Iterable[str], checkpoint: Checkpoint, head: str, base_prefix: str
) -> dict[str, str]:
    """
    Find the tensors of one part in a checkpoint that may hold other things too.

    The same encoder is stored under different prefixes (`vision_model.` in BLIP-2, none when saved alone, `model.` in
    a causal language model), so the prefix under which most of the expected names are found is taken.

    Args:
        part: key of `PARTS`.
        expected: names in MiniGPT4ForConditionalGeneration, of this part only.
        checkpoint: where to look.
        head: name of the LM head in the language model's own class, such as `lm_head` or `embed_out`.
        base_prefix: name of the decoder in the language model's own class, such as `model` or `transformer`.

    Returns:
        Our name → the checkpoint's name. Names that the checkpoint holds under that prefix and nobody expects are
        included only if something is missing: transformers' loader may then convert them (fused experts, old names).
    """
    main = PARTS[part][0]
    inner = [name.removeprefix(main) for name in expected if name.startswith(main)]
    available = set(checkpoint.keys())
    wrapper = "timm_model."  # of transformers, in which timm's own repositories do not wrap their models
    if inner and all(name.startswith(wrapper) for name in inner) and not any(wrapper in key for key in available):
        main, inner = main + wrapper, [name.removeprefix(wrapper) for name in inner]
    prefix = _find_prefix(inner, available)
    names = {main + name: prefix + name for name in inner if prefix + name in available}
    if len(names) < len(inner):
        roots = {name.split(".")[0] for name in inner}
        rest = {key.removeprefix(prefix) for key in available if key.startswith(prefix)}
        names.update({main + name: prefix + name for name in rest if name.split(".")[0] in roots})

    for name in expected:
        if name == "model.query_tokens":
            key = next((key for key in available if key.split(".")[-1] == "query_tokens"), None)
            if key is not None:
                names[name] = key
        elif name.startswith("lm_head."):
            root = prefix.removesuffix(f"{base_prefix}.") if prefix.endswith(f"{base_prefix}.") else ""
            key = root + head + name.removeprefix("lm_head")
            if key in available:
                names[name] = key
    return names


def _find_prefix(names: list[str], available: set[str]) -> str:
    """The prefix under which most of `names` are `available`; ties go to the shortest."""
    probe = max(names, key=lambda name: name.count(".")) if names else ""
    candidates = {key.removesuffix(name) for name in {probe, *names[:3]} for key in available if key.endswith(name)}
    candidates = {prefix for prefix in candidates if not prefix or prefix.endswith(".")} | {""}
    found = Counter({prefix: sum(prefix + name in available for name in names) for prefix in candidates})
    return min(candidates, key=lambda prefix: (-found[prefix], len(prefix)))


def check_shapes(
    names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint, remedy: str
) -> None:
    """Raise a `ValueError` that names tensor, file and remedy if a stored shape is not the one the model needs."""
    for name, key in names.items():
        if name in shapes and checkpoint.shape(key) != shapes[name]:
            raise ValueError(
                f"{key} in {checkpoint.file_of(key)} has the shape {checkpoint.shape(key)}, but {name} needs "
                f"{shapes[name]}; {remedy}"
            )


def fingerprint(part: str, names: Mapping[str, str], checkpoint: Checkpoint) -> str:
    """
    A short digest that tells two backbones of the same shape apart.

    Covers the name, the shape and the first 64 values of every matrix of the part, as stored, so it is the same with
    every release of transformers and takes milliseconds on memory-mapped files. It guards against mix-ups only.
    """
    digest = hashlib.sha256()
    main = PARTS[part][0]
    for key in sorted(key for name, key in names.items() if name.startswith(main) and key.endswith(".weight")):
        if len(shape := checkpoint.shape(key)) >= 2:
            first = checkpoint.tensor(key).flatten()[:64].to(torch.float32)
            digest.update(f"{key}{shape}".encode() + first.numpy().tobytes())
    return digest.hexdigest()[:16]


def collect(
    part: str,
    source: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    head: str,
    base_prefix: str,
    hub_options: Mapping[str, Any],
    skip: Iterable[str] = (),
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, torch.Tensor], str]:
    """
    Read one part of the model from its backbone.

    Args:
        part: key of `PARTS`.
        source: where it is; see `normalize_source`. If it has a `fingerprint`, the weights must match it.
        shapes: name → shape of every tensor of MiniGPT4ForConditionalGeneration that is wanted.
        head, base_prefix: names inside the language model's own class; see `match_names`.
        hub_options: how files are fetched.
        skip: names that are not needed from there.
        dtype: what the tensors will be converted to, if that is known.

    Returns:
        Our name → tensor (see `Checkpoint.tensor`), and the backbone's fingerprint.

    Raises:
        OSError: if the backbone or one of its files is missing or damaged.
        ValueError: if a shape or the fingerprint is not what the model was trained with.
    """
    wanted = {name: shape for name, shape in shapes.items() if part_of(name) == part}
    checkpoint = Checkpoint(source, part, hub_options)
    names = match_names(part, wanted, checkpoint, head, base_prefix)
    if (found_here := len(names.keys() & wanted.keys())) * FEW < len(wanted):
        raise ValueError(
            f"{describe(source)} holds {found_here} of the {len(wanted)} tensors of the {part}, so it is a model of "
            f"another kind; name the {part} backbone that is meant."
        )
    needed = {name: key for name, key in names.items() if name not in set(skip)}
    check_shapes(needed, wanted, checkpoint, f"name the {part} backbone that this checkpoint was made with.")
    found = fingerprint(part, names, checkpoint)
    if source.get("fingerprint") not in (None, found):
        raise ValueError(
            f"The weights of the {part} backbone {describe(source)} are not those this checkpoint was trained with "
            f"(fingerprint {found}, expected {source['fingerprint']}); point `backbones` at the original, or accept "
            f'others knowingly with `backbones={{"{part}": {{"name_or_path": ..., "fingerprint": None}}}}`.'
        )
    return {name: checkpoint.tensor(key, dtype) for name, key in needed.items()}, found


__all__ = [
    "HERE",
    "HUB_OPTIONS",
    "PARTS",
    "Checkpoint",
    "StoredTensor",
    "check_shapes",
    "collect",
    "describe",
    "fetch_options",
    "hub_only",
    "is_local",
    "load_backbone_config",
    "match_names",
    "part_of",
]
