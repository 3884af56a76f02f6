"""
An adapter of PEFT (LoRA, IA3, …) on the language model, which trains and travels beside the projection.

transformers' own support puts it into the model in place, so the model stays what it is for `generate`, the Trainer
and `save_pretrained`. This module keeps it to the language model and saves both parts in one folder.
"""

import copy
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import cached_file

from .backbones import HUB_OPTIONS
from .compat_minigpt4 import installed_peft


# Where the adapter lies in a checkpoint. In a folder of its own, because transformers takes a repository with an
# `adapter_config.json` of its own for an adapter to some other model, and goes looking for that one.
ADAPTER_FOLDER = "peft"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."

# Options of `from_pretrained` that say which of a repository's files are meant.
PLACE = ("revision", "subfolder")

# PEFT picks layers by the ends of their names, and vision encoders have a `q_proj` too.
OUTSIDE_LANGUAGE_MODEL = r"(?!(model\.)?language_model\.).*"

# Names between a wrapped layer and its wrapper.
INNER_NAMES = ("base_layer", "original_module", "token_adapter")


def import_peft(what: str) -> Any:
    """The package PEFT, or an `ImportError` that says what needs it."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"{what} needs PEFT, which is not installed; run `pip install peft`.") from error
    return peft


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is one that PEFT has put around another."""
    return isinstance(getattr(type(module), "adapter_layer_names", None), tuple)


def plain_names(module: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """Names of tensors → their names without the adapter, None for those that belong to it."""
    wrappers = {name for name, child in module.named_modules() if is_wrapper(child)}
    return {name: _plain_name(name, wrappers) if wrappers else name for name in names}


def _plain_name(name: str, wrappers: set[str]) -> str | None:
    parts, plain = name.split("."), []
    for depth, part in enumerate(parts):
        if ".".join(parts[:depth]) not in wrappers:
            plain.append(part)
        elif part not in INNER_NAMES:
            return None
    return ".".join(plain)


def trains_itself(module: nn.Module) -> bool:
    """Whether anything of a module trains, apart from an adapter on it."""
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return bool(trained) and any(name is not None for name in plain_names(module, trained).values())


def adapter_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The adapter's own layers, whose dropout works in training while that of the frozen layers does not."""
    for wrapper in module.modules():
        if is_wrapper(wrapper):
            yield wrapper
            for name, child in wrapper.named_children():
                if name not in INNER_NAMES:
                    yield from child.modules()


def keep_to_language_model(peft_config: Any) -> Any:
    """A copy of a PEFT configuration that leaves everything but the language model alone."""
    config = copy.deepcopy(peft_config)
    if not hasattr(config, "exclude_modules"):
        raise ValueError(f"PEFT's {type(config).__name__} cannot be kept to the language model; use LORA or IA3.")
    targets = getattr(config, "target_modules", None) or ()
    if not isinstance(targets, str) and any(name.split(".")[-1] == "lm_head" for name in targets):
        raise ValueError(
            "Trainers use the weights of `lm_head` without its adapter, so it can have none; leave it out of "
            "`target_modules`."
        )
    excluded = config.exclude_modules or ()
    if not isinstance(excluded, str):
        excluded = "|".join(rf"(.*\.)?{name.replace('.', chr(92) + '.')}" for name in sorted(excluded))
    if not excluded.startswith(OUTSIDE_LANGUAGE_MODEL):
        config.exclude_modules = "|".join(filter(None, (OUTSIDE_LANGUAGE_MODEL, excluded)))
    _leave_projection_out(config)
    return config


def _leave_projection_out(config: Any) -> None:
    """The projection trains and is saved by itself, so PEFT need not copy it."""
    if names := getattr(config, "modules_to_save", None):
        config.modules_to_save = [name for name in names if not name.endswith("language_projection")] or None


def find_peft_folder(path: Any, options: dict[str, Any]) -> tuple[tuple[Any, dict[str, Any]] | None, Any]:
    """
    Tell what PEFT itself has saved, e.g. for TRL's `peft_config`, from the model that it names as its base.

    Args:
        path: what `from_pretrained` was given; the Auto classes have put the base there already.
        options: those of `from_pretrained`. `adapter_kwargs`, which the Auto classes add, is taken out, and what
            holds for the adapter's repository and not for the base's.

    Returns:
        The adapter's repository or folder with how its files are fetched (None if there is none), and the model's.

    Raises:
        OSError: if the adapter names no base.
    """
    theirs: dict[str, Any] = dict(options.pop("adapter_kwargs", None) or {})
    found = theirs.pop("_adapter_model_path", None)
    shared: dict[str, Any] = {name: options[name] for name in HUB_OPTIONS if name in options}
    if path is None or (found is not None and found != path):
        return (None if found is None else (found, {**shared, **theirs})), path
    where = shared | {name: options[name] for name in PLACE if name in options}
    config = find_file(path, ADAPTER_CONFIG, where)
    if config is None:
        return None, path
    if find_file(path, "config.json", where) is not None:
        return (path, where), path
    base = json.loads(Path(config).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if base in (None, "", "None"):  # the last is what PEFT makes of a model that was never saved
        raise OSError(
            f"The adapter in {path} names no base model: save a model with `save_pretrained` and load it from there "
            "before PEFT wraps it. This adapter fits a model of the same backbones, by its `load_adapter`."
        )
    for name in PLACE:
        options.pop(name, None)
    return (path, where), base


def find_file(path: Any, filename: str, hub_options: Mapping[str, Any], subfolder: str = "") -> str | None:
    """Path of a file of a repository or folder, None if there is none; a broken connection counts as none."""
    folder = "/".join(filter(None, (hub_options.get("subfolder"), subfolder)))
    try:
        options = {**hub_options, "subfolder": folder, "_raise_exceptions_for_missing_entries": False}
        found: str | None = cached_file(path, filename, **options)
    except (OSError, ValueError):
        return None
    return found


def _of_transformers(name: str) -> Callable[..., Any]:
    """A method that transformers' models have, for adapters of the installed PEFT."""

    @functools.wraps(getattr(PeftAdapterMixin, name))
    def method(self: "PeftMixin", *args: Any, **kwargs: Any) -> Any:
        with installed_peft():
            return getattr(super(PeftMixin, self), name)(*args, **kwargs)

    return method


class PeftMixin(PreTrainedModel):
    """An adapter on the language model, in the way transformers has them (`add_adapter`, `disable_adapters`, …)."""

    load_adapter = _of_transformers("load_adapter")
    set_adapter = _of_transformers("set_adapter")
    disable_adapters = _of_transformers("disable_adapters")
    enable_adapters = _of_transformers("enable_adapters")
    active_adapters = _of_transformers("active_adapters")
    get_adapter_state_dict = _of_transformers("get_adapter_state_dict")
    delete_adapter = _of_transformers("delete_adapter")

    @property
    def has_adapter(self) -> bool:
        """Whether there is an adapter of PEFT on the language model."""
        return bool(getattr(self, "_hf_peft_config_loaded", False))

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """
        Put a new adapter (LoRA, IA3, …) on the language model, to train beside the projection.

        See [`~transformers.integrations.PeftAdapterMixin.add_adapter`]. Layers of the vision side that have the same
        names are left alone. The language model's own weights are frozen; the adapter's are float32, as the
        projection's are. `save_pretrained` saves both, and `from_pretrained` loads both.

        Args:
            adapter_config (`peft.PeftConfig`): such as `LoraConfig(target_modules=["q_proj", "v_proj"])`.
            adapter_name: `"default"` if left out.

        Raises:
            ImportError: if PEFT is not installed.
            ValueError: if no layer of the language model has such a name.
        """
        import_peft("An adapter on the language model")
        config, had_one = keep_to_language_model(adapter_config), self.has_adapter
        trained = [parameter for _, parameter in self._outside_language_model() if parameter.requires_grad]
        try:
            with self._marked(), installed_peft():
                super().add_adapter(config, adapter_name)
        except Exception as error:
            self._hf_peft_config_loaded = had_one
            if "target" not in str(error) or not isinstance(error, ValueError):
                raise
            raise ValueError(self._describe_targets(config)) from error
        for parameter in trained:  # PEFT freezes all but its own
            parameter.requires_grad_(True)
        self._after_injection(adapter_name or "default")

    def _describe_targets(self, config: Any) -> str:
        layers = self.get_decoder().named_modules()
        names = {name.split(".")[-1] for name, layer in layers if type(layer).__name__ in ("Linear", "Conv1D")}
        targets = config.target_modules
        targets = sorted(targets) if isinstance(targets, (set, list)) else targets
        return (
            f"No layer of the language model is meant by target_modules={targets!r}, less those excluded; it has "
            f"{', '.join(sorted(names))}."
        )

    def _outside_language_model(self) -> list[tuple[str, nn.Parameter]]:
        inside = ("model.language_model.", "language_model.", "lm_head.")
        return [(name, tensor) for name, tensor in self.named_parameters() if not name.startswith(inside)]

    def _after_injection(self, adapter_name: str) -> None:
        from_peft = import_peft("An adapter").tuners.tuners_utils
        from_peft.cast_adapter_dtype(self, adapter_name)  # steps of 1e-4 and less vanish in bfloat16
        self.peft_config[adapter_name].base_model_name_or_path = None  # the folder it is saved in
        self.train(self.training)
        self._choose_what_to_save()

    def _load_adapter(self, path: Any, hub_options: Mapping[str, Any], subfolder: str = "") -> None:
        """
        Put a saved adapter on the language model, as trainable as it was.

        Args:
            path: repository or folder of the checkpoint.
            hub_options: how files are fetched.
            subfolder: where in it the adapter lies.
        """
        if self.has_adapter:
            raise ValueError(f"{path} is an adapter to a model that has one already; merge or delete that one first.")
        peft = import_peft(f"{path} has an adapter on the language model, which")
        config, tensors = _read_adapter_files(peft, path, hub_options, subfolder)
        _leave_projection_out(config)
        config.inference_mode = False
        with self._marked():
            peft.inject_adapter_in_model(config, self)
        self._hf_peft_config_loaded = True
        self._after_injection("default")
        self._fill_adapter(tensors, path)
        self.freeze_backbones()
        self._choose_what_to_save()

    def _fill_adapter(self, tensors: dict[str, torch.Tensor], path: Any) -> None:
        """Copy an adapter's tensors, in the names of PEFT's file, into the one that is there."""
        peft = import_peft("An adapter")
        outer = f"{self.base_model_prefix}."
        tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
        if not hasattr(self, self.base_model_prefix):  # the model without a head
            tensors = {name.removeprefix(outer): tensor for name, tensor in tensors.items()}
        projection = {name for name in self.state_dict() if "language_projection." in name}
        own = {name: tensors.pop(name) for name in projection & tensors.keys()}
        result = peft.set_peft_model_state_dict(self, tensors, self.active_adapters()[0])
        plain = plain_names(self, result.missing_keys)
        wrong = sorted({name for name in result.missing_keys if plain[name] is None} | set(result.unexpected_keys))
        if wrong:
            raise ValueError(
                f"The adapter in {path} does not fit its own {ADAPTER_CONFIG}: {len(wrong)} tensors are missing or "
                f"unknown, {wrong[0]} among them; save or download it again."
            )
        self.load_state_dict(own, strict=False)

    def _save_adapter(self, folder: "str | os.PathLike[str]", state_dict: dict[str, torch.Tensor] | None) -> None:
        """Write the active adapter in PEFT's own format."""
        peft = import_peft("An adapter")
        names = self.active_adapters()
        if len(names) > 1:
            raise ValueError(
                f"{len(names)} adapters are active ({', '.join(names)}), and a checkpoint holds one; choose it with "
                "`model.set_adapter(name)`."
            )
        tensors = peft.get_peft_model_state_dict(
            self, state_dict=state_dict, adapter_name=names[0], save_embedding_layers=False
        )
        config = copy.deepcopy(self.peft_config[names[0]])
        config.base_model_name_or_path, config.inference_mode = None, True
        config.save_pretrained(str(folder))
        tensors = {PEFT_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, Path(folder) / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    def check_adapter_is_apart(self) -> None:
        """
        Refuse what a folder cannot hold: an adapter that is part of the weights already, or one that PEFT looks after.

        Raises:
            ValueError: saying what to do first.
        """
        wrappers = [child for child in self.modules() if is_wrapper(child)]
        if any(getattr(wrapper, "merged", False) for wrapper in wrappers):
            raise ValueError(
                "The adapter is merged into the weights and still there, so it would count twice when it is loaded; "
                "unmerge it (`unmerge_adapter()` of the PeftModel, `unmerge()` of each layer), or have it merged for "
                "good with `merge_and_unload()`."
            )
        names = self.state_dict() if wrappers and not self.has_adapter else {}
        if any(name is None for name in plain_names(self, names).values()):
            raise ValueError(
                "PEFT has wrapped this model, and saves the adapter by `save_pretrained` of the PeftModel; use that, "
                "or `merge_and_unload()` first. Adapters of `model.add_adapter` are saved with the model."
            )

    def stored_names(self) -> dict[str, str]:
        """Names of the active adapter's tensors in PEFT's file → their names in the model."""
        tensors = self.state_dict()
        names = {id(tensor): name for name, tensor in tensors.items()}
        stored = import_peft("An adapter").get_peft_model_state_dict(
            self, state_dict=tensors, adapter_name=self.active_adapters()[0], save_embedding_layers=False
        )
        return {PEFT_PREFIX + key: names[id(tensor)] for key, tensor in stored.items()}

    @contextmanager
    def _adapter_aside(
        self, folder: "str | os.PathLike[str]", args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """
        Save the adapter, and let transformers save the model as if there were none, under its plain names.

        By itself transformers would save the adapter and nothing else.

        Args:
            folder: folder of the checkpoint.
            args, kwargs: options of `save_pretrained`, of which the first two are `is_main_process` and `state_dict`.

        Yields:
            The options with the tensors to save.
        """
        if not any(is_wrapper(child) for child in self.modules()):
            yield args, kwargs
            return
        kwargs = {**kwargs, **dict(zip(("is_main_process", "state_dict"), args[:2], strict=False))}
        is_main_process, tensors = kwargs.pop("is_main_process", True), kwargs.pop("state_dict", None)
        if is_main_process and self.has_adapter:
            self._save_adapter(Path(folder) / ADAPTER_FOLDER, tensors)
        tensors = self.state_dict() if tensors is None else tensors
        kept = {name: plain for name, plain in plain_names(self, tensors).items() if plain is not None}
        tensors = {plain: tensors[name] for name, plain in kept.items() if name not in self._keys_to_ignore_on_save}
        had_one = self.has_adapter
        self._hf_peft_config_loaded = False
        if had_one:
            self.config.language_model_adapter = ADAPTER_FOLDER
        try:
            yield (is_main_process, tensors, *args[2:]), kwargs
        finally:
            self._hf_peft_config_loaded = had_one
            self.config.__dict__.pop("language_model_adapter", None)

    def _get_files_timestamps(self, working_dir: "str | os.PathLike[str]") -> Any:
        """Files that an upload may leave out if they have not changed; the adapter is written before this is asked."""
        found = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in found.items() if name != ADAPTER_FOLDER}

    def reload_adapter(self, folder: "str | os.PathLike[str]") -> None:
        """Set the adapter back to what it is in a checkpoint's folder, such as one of the Trainer's."""
        file = Path(folder) / ADAPTER_FOLDER / ADAPTER_WEIGHTS
        if not file.is_file():
            raise OSError(
                f"{folder} has no {ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}, so it was saved without an adapter; choose a "
                "checkpoint of a run with the same adapter."
            )
        self._fill_adapter(load_file(file), folder)


def _read_adapter_files(
    peft: Any, path: Any, hub_options: Mapping[str, Any], subfolder: str
) -> tuple[Any, dict[str, torch.Tensor]]:
    files = [find_file(path, name, hub_options, subfolder) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    if files[0] is None or files[1] is None:
        missing = ADAPTER_CONFIG if files[0] is None else ADAPTER_WEIGHTS
        raise OSError(
            f"{'/'.join(filter(None, (str(path), subfolder)))} lacks {missing}, the adapter on the language model; "
            "download or save the checkpoint again."
        )
    return peft.PeftConfig.from_pretrained(os.path.dirname(files[0])), load_file(files[1])
