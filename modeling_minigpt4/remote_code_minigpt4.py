"""
Parts that bring their own code: where it lies, at which revision, and that it runs only where the caller trusts it.

The code of a part is in its backbone's repository or folder, as `auto_map` of its configuration says, or in another
repository that `auto_map` names. transformers fetches and imports it. Code is asked for where transformers has no
model of that type; its own always comes first.
"""

import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME
from transformers.utils.hub import cached_file, extract_commit_hash


# Configuration of a part → its name as a backbone, the Auto class whose code it needs, and one that is good to have.
PARTS_WITH_CODE: dict[str, tuple[str, tuple[Any, ...]]] = {
    "vision_config": ("vision", (AutoModel,)),
    "text_config": ("language_model", (AutoModelForCausalLM, AutoModel)),
}


class UnreadConfig(PretrainedConfig):
    """
    Stands for the configuration of a part whose class has not been loaded, and keeps its fields as they are.

    Args:
        **fields: of the part, with its `model_type` and `auto_map`.
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        known = set(dir(self)) - {"model_type"}
        self.__dict__.update((name, value) for name, value in fields.items() if name not in known)
        self.unread = fields

    def to_dict(self) -> dict[str, Any]:
        fields = copy.deepcopy(self.unread)
        if not fields:  # what transformers compares with, to leave out defaults; here nothing is known to be one
            fields = dict.fromkeys(super().to_dict(), object())
        return {"transformers_version": None, **fields}


def brings_code(fields: Mapping[str, Any]) -> bool:
    """Whether the fields of a configuration are those of a class that only its repository has."""
    known = fields.get("model_type") in CONFIG_MAPPING
    return not known and "AutoConfig" in (fields.get("auto_map") or {})


def is_unread(config: Any) -> bool:
    """Whether a configuration is an [`UnreadConfig`], also one of another copy of this file."""
    return hasattr(config, "unread")


def has_own_code(config: Any) -> bool:
    """Whether the configuration of a part is a class that its repository brings, loaded or not."""
    return is_unread(config) or type(config).__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.")


def brings_any_code(config: Any) -> bool:
    """Whether a part of a [`MiniGPT4Config`] brings its own code, so that loading it needs the option."""
    return any(has_own_code(getattr(config, name)) for name in PARTS_WITH_CODE)


def code_places(config: Any) -> dict[str, list[tuple[str, str | None]]]:
    """Part → repositories or folders whose code it runs, with revisions; `.` is where the checkpoint itself is."""
    found = {}
    for name, (part, _) in PARTS_WITH_CODE.items():
        if not has_own_code(getattr(config, name)):
            continue
        source = config.backbones.get(part)
        references = getattr(config, name).auto_map.values()
        elsewhere = {text.split("--")[0] for text in references if "--" in text and source}
        places = {(one, source.get("code_revision")) for one in elsewhere} if source else set()
        if not elsewhere or not all("--" in text for text in references):
            places.add((source["name_or_path"], source.get("revision")) if source else (".", None))
        found[part] = sorted(places, key=str)
    return found


def check_trust(what: str, trusted: Any) -> None:
    """Raise a `ValueError` that names the option, unless the caller trusts the code; nobody is asked on a terminal."""
    if not trusted:
        raise ValueError(
            f"The {what} brings its own code, which would run on this machine; look at it, and if you trust it, pass "
            "`trust_remote_code=True` (on the command line `--trust_remote_code true`)."
        )


def read_config(
    part: str, fields: Mapping[str, Any], source: Mapping[str, Any], options: Mapping[str, Any]
) -> PretrainedConfig:
    """
    Load the class of a configuration and fill it.

    Args:
        part: name of the backbone, for messages.
        fields: of the configuration, with an `auto_map`.
        source: where the backbone is, at a revision that is pinned.
        options: how files are fetched.
    """
    config_class = _load_class(part, fields["auto_map"]["AutoConfig"], source, options)
    config: PretrainedConfig = config_class.from_dict(copy.deepcopy(dict(fields)))
    return config


def take_code(
    name: str, config: PretrainedConfig, source: Mapping[str, Any], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """
    Make a part that has been read with its code ready to be built and saved.

    Args:
        name: key of `PARTS_WITH_CODE`.
        config: of the part. Its `auto_map` will tell where the code is.
        source, options: see `read_config`.

    Returns:
        The source with the revision of the code pinned.
    """
    if not has_own_code(config):
        return source
    kind = type(config)
    references = {
        "AutoConfig": f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}",  # parts of a whole do not always say
        **(getattr(config, "auto_map", None) or {}),
    }
    config.auto_map, source = pin_code(PARTS_WITH_CODE[name][0], references, source, options)
    register_classes(name, config, source, options)
    return source


def register_classes(
    name: str, config: PretrainedConfig, source: Mapping[str, Any], options: Mapping[str, Any]
) -> None:
    """
    Load the model of a part that brings its own code and make it known to the Auto classes, which build it then.

    Args:
        name: key of `PARTS_WITH_CODE`.
        config: of the part.
        source, options: see `read_config`.

    Raises:
        ValueError: if the part names no code for its model.
        OSError: if the code cannot be loaded.
    """
    part, auto_classes = PARTS_WITH_CODE[name]
    references = getattr(config, "auto_map", None) or {}
    for auto_class in auto_classes:
        if (reference := references.get(auto_class.__name__)) is not None:
            auto_class.register(type(config), _load_class(part, reference, source, options), exist_ok=True)
        elif auto_class is auto_classes[0]:
            raise ValueError(
                f"The {part} backbone {source['name_or_path']} brings code for its configuration, but none for "
                f"{auto_class.__name__}, in the `auto_map` of its config.json; name another."
            )


def _load_class(part: str, reference: str, source: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The class that an entry of `auto_map` names."""
    place = str(source["name_or_path"])
    if os.path.isdir(place) and source.get("subfolder"):
        place = os.path.join(place, source["subfolder"])
    elsewhere = "--" in reference
    revision = source.get("code_revision" if elsewhere else "revision")
    try:
        return get_class_from_dynamic_module(reference, place, revision=revision, code_revision=revision, **options)
    except (OSError, ImportError, AttributeError, ValueError, SyntaxError) as error:
        where = reference.split("--")[0] if elsewhere else place
        reason = " ".join(str(error).split()).rstrip(".")
        raise OSError(f"The code {reference} of the {part} backbone in {where} cannot be loaded: {reason}.") from error


def pin_code(
    part: str, references: Mapping[str, str], source: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """
    Find out where the code of a part is.

    Args:
        part: name of the backbone, for messages.
        references: its `auto_map`.
        source, options: see `read_config`.

    Returns:
        `auto_map`, in which only code of another repository names that one; and the source, with `code_revision` set
        to the commit of that other repository, if there is one.

    Raises:
        ValueError: if the code is spread over several other repositories.
    """
    own = f"{source['name_or_path']}--"
    names = {"AutoConfig", *(one.__name__ for _, classes in PARTS_WITH_CODE.values() for one in classes)}
    references = {name: text.removeprefix(own) for name, text in references.items() if name in names}
    elsewhere = {text.split("--")[0]: text.split("--")[1] for text in references.values() if "--" in text}
    if len(elsewhere) > 1:
        raise ValueError(
            f"The {part} backbone {source['name_or_path']} takes its code from several repositories "
            f"({', '.join(elsewhere)}), whose revisions cannot all be pinned; copy the code into one."
        )
    pinned = {name: value for name, value in source.items() if name != "code_revision"}
    for repository, text in elsewhere.items():
        file = cached_file(
            repository, f"{text.split('.')[0]}.py", revision=source.get("code_revision"), **dict(options)
        )
        pinned["code_revision"] = extract_commit_hash(file, None) or source.get("code_revision")
    return references, pinned


def read_parts(config: Any, whole: Mapping[str, Any], options: Mapping[str, Any], trusted: Any) -> None:
    """
    Load the code of the parts of a configuration that has been read without.

    Args:
        config: a [`MiniGPT4Config`], which is changed in place.
        whole: where the checkpoint itself is, for parts that no backbone provides.
        options: how files are fetched.
        trusted: `trust_remote_code` of the caller.

    Raises:
        ValueError: that names the option, if the caller does not trust the code.
        OSError: if the code cannot be loaded.
    """
    for name, (part, _) in PARTS_WITH_CODE.items():
        unread = getattr(config, name)
        if not is_unread(unread):
            continue
        source = config.backbones.get(part, whole)
        place = str(source["name_or_path"]) + (f"@{source['revision']}" if source.get("revision") else "")
        check_trust(f"{part} backbone {place}" if part in config.backbones else f"{part} in {place}", trusted)
        read = read_config(part, unread.unread, source, options)
        if (attention := getattr(unread, "_attn_implementation", None)) is not None:
            read._attn_implementation = attention
        setattr(config, name, read)
        register_classes(name, read, source, options)
        config.settle()


def parts_without_place(config: Any) -> Iterator[tuple[str, Any]]:
    """The configurations of parts with code of their own that no backbone provides, by the names of their fields."""
    for name, (part, _) in PARTS_WITH_CODE.items():
        if part not in config.backbones and has_own_code(getattr(config, name)):
            yield name, getattr(config, name)


def local_references(references: Mapping[str, str]) -> dict[str, str]:
    """The `auto_map` of a part whose code lies beside the checkpoint."""
    return {name: text.rpartition("--")[2] for name, text in references.items()}


def copy_code(config: Any, folder: "str | os.PathLike[str]") -> None:
    """
    Put the code of parts that no backbone provides into a folder, as transformers puts that of a model.

    Raises:
        ValueError: if two parts have different files of one name.
    """
    written: dict[str, bytes] = {}
    for name, part_config in parts_without_place(config):
        if is_unread(part_config):
            continue
        classes = [one._model_mapping.get(type(part_config), None) for one in PARTS_WITH_CODE[name][1]]
        for one in (type(part_config), *classes):
            if one is None or not one.__module__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
                continue
            for file in map(Path, custom_object_save(one, folder)):
                if written.setdefault(file.name, file.read_bytes()) != file.read_bytes():
                    raise ValueError(
                        f"Two parts bring a file {file.name} each, and they differ, so that no folder can hold both; "
                        "save without `full=True`."
                    )


__all__ = [
    "PARTS_WITH_CODE",
    "UnreadConfig",
    "brings_any_code",
    "brings_code",
    "check_trust",
    "code_places",
    "copy_code",
    "has_own_code",
    "is_unread",
    "local_references",
    "parts_without_place",
    "pin_code",
    "read_config",
    "read_parts",
    "take_code",
]
