"""Image–text pairs streamed from tar files in the layout of webdataset: the members of a sample share their name.

    00000.tar
      000000.jpg  000000.json     {"caption": "...", ...}, or 000000.txt
      000001.jpg  000001.json

A sample's columns are the endings of its members and the fields of its .json. Archives that break off, and members
that are no JSON, cost their own samples and nothing else.
"""

import glob
import itertools
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Features, IterableDataset
from datasets.data_files import resolve_pattern
from datasets.utils.file_utils import ArchiveIterable

from recipes_minigpt4.data.bad_samples import BROKEN_ARCHIVE, BROKEN_JSON, BadSampleError
from recipes_minigpt4.data.chats import read_chat
from recipes_minigpt4.data.columns import CHATS, IMAGE_ENDINGS, QUESTIONS, TEXTS, Columns, choose_columns, tell_columns
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.redaction import redact


ENDINGS = (".tar", ".tar.gz", ".tgz")
TEXT_ENDINGS = ("txt", "text", "caption")
# What the default columns of the recipes mean in an archive that has none of that name.
DEFAULTS = {"image": IMAGE_ENDINGS, "caption": TEXT_ENDINGS}


def tars_named(name: str) -> str | None:
    """What `expand` takes, if a name of a dataset means tar files: an address, a pattern, a file, or their folder."""
    if "://" in name:
        return name if name.split("?")[0].lower().endswith(ENDINGS) else None
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path) if _tars_in(path) and not any(path.glob("metadata.*")) else None
    return str(path) if name.lower().endswith(ENDINGS) else None


def _tars_in(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar") if not path.name.startswith("."))


def expand(pattern: str) -> list[str]:
    """
    The tar files that a pattern names, in order.

    Args:
        pattern: a path or a URL (`https://`, `hf://datasets/owner/name/*.tar`), with `{00000..00099}` and `{a,b}` as
            shells have them, and with `*` except in https; or a folder, for all in it. Of a path, the part that
            exists is no pattern, whatever characters it has.

    Raises:
        RecipeError: if there are none, or one that is named without `*` is missing on disk.
    """
    found: list[str] = []
    missing: list[str] = []
    start, rest = ("", pattern) if "://" in pattern else _existing(pattern)
    for name in expand_braces(rest):
        name = os.path.join(start, name) if name else start
        try:
            if name.startswith(("http://", "https://")):
                found.append(name)  # not asked for one by one: there may be thousands
            elif "://" in name:
                found += sorted(resolve_pattern(name, base_path=""))
            elif tars := _on_disk(name):
                found += tars
            elif not glob.has_magic(_existing(name)[1]):
                missing.append(name)
        except Exception as error:  # whatever the Hub or a file system says
            raise RecipeError(
                f"{name} cannot be listed ({one_line(error)}); fix the address, or log in if it is private."
            ) from error
    if missing and found:
        raise RecipeError(
            f"{len(missing)} of the tar files {pattern} are missing, {missing[0]} among them; fix --dataset_name."
        )
    if not found:
        raise RecipeError(f"There is no tar file {pattern}; fix --dataset_name.")
    return found


def _existing(path: str) -> tuple[str, str]:
    """The longest beginning of a path that exists, and the rest."""
    parts = Path(path).parts
    for count in range(len(parts), 0, -1):
        if os.path.exists(start := os.path.join(*parts[:count])):
            return start, os.path.join("", *parts[count:])
    return "", path


def _on_disk(name: str) -> list[str]:
    """The files of a path, of a folder, or of a pattern behind what exists."""
    start, rest = _existing(name)
    if not rest:
        return _tars_in(Path(start)) if os.path.isdir(start) else [start]
    return sorted(os.path.join(start, path) for path in glob.glob(rest, root_dir=start or None, recursive=True))


def expand_braces(pattern: str) -> list[str]:
    """`{08..11}.tar` → `08.tar`, `09.tar`, `10.tar`, `11.tar`; `{a,b}.tar` → `a.tar`, `b.tar`; several as well."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = span.groups()
        width = len(first) if len(first) == len(last) or first.startswith("0") else 0
        parts = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        parts = match[1].split(",")
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + part + end for part in parts for end in rest]


def stream_tars(
    pattern: str,
    image_column: str | None,
    text_column: str | None,
    stage: int,
    features: Callable[[Columns], Features | None],
    seed: int | None = None,
) -> IterableDataset:
    """
    One pass over the samples of tar files, which are its shards.

    Args:
        pattern: see `expand`.
        image_column: ending of a member; None, or `image`, is any picture.
        text_column: ending of a member or field of the .json; `caption` is the .txt where there is no such field. None
            finds it.
        stage: 1 or 2; questions and chats are read for 2.
        features: tells those of the columns that are read: of pairs `image` (`bytes` and `path`, not decoded), `text`,
            `name`, and `cause`, which tells why there is neither picture nor text; None leaves the stream without
            types.
        seed: of the order of the tars; None leaves them in theirs.

    Raises:
        RecipeError: if there is no such file, nothing in the first, or no such column in its first sample.
    """
    tars = expand(pattern)
    columns = check_columns(tars[0], image_column, text_column, stage)
    tell_columns(pattern, columns.names)
    if seed is not None:
        random.Random(seed).shuffle(tars)
    kwargs = {"tars": tars, "columns": columns}
    return IterableDataset.from_generator(samples_of, features=features(columns), gen_kwargs=kwargs)


def check_columns(tar: str, image_column: str | None, text_column: str | None, stage: int) -> Columns:
    """
    Look at the first samples of an archive, as many as it takes to find a picture and a text; returns their columns.

    Raises:
        RecipeError: if there are none.
    """
    image_column = image_column or "image"
    pictures: dict[str, None] = {}  # names of what could be one
    texts: dict[str, None] = {}
    try:
        for members in itertools.islice(groups_of(tar), 20):
            pictures.update(dict.fromkeys(ending for ending in members if ending != "__key__"))
            try:
                texts.update(dict.fromkeys(columns_of(members)))
            except BadSampleError:
                continue  # one that is skipped when it is its turn
            text = text_column or _text_of(texts)
            if _has(pictures, image_column) and text and _has(texts, text):
                found = [text, *(name for name in texts if name.lower() in (*QUESTIONS[0], *CHATS))]
                return replace(choose_columns(["image", *found], tar, "image", text_column, stage), image=image_column)
    except BadSampleError as error:
        if not pictures:
            raise RecipeError(f"{tar} cannot be read ({error.detail}); fix or remove it.") from error
    if not pictures:
        raise RecipeError(f"{tar} holds no samples; put pictures and texts of the same name into it, or remove it.")
    if not _has(pictures, image_column):
        choose_columns(list(pictures), tar, image_column, None, stage)
    found = ["image", *(name for name in texts if name not in ("image", *IMAGE_ENDINGS))]
    return replace(choose_columns(found, tar, "image", text_column, stage), image=image_column)


def _has(columns: Mapping[str, None], name: str) -> bool:
    return find(dict.fromkeys(columns, True), name) is not None


def _text_of(columns: Mapping[str, None]) -> str | None:
    """The column that holds the text of samples: `caption` for what it stands for, or another that is known."""
    if _has(columns, "caption"):
        return "caption"
    found = [[name for name in columns if name.lower() in names] for names in TEXTS]
    (fitting, *_) = [*filter(None, found), []]
    return fitting[0] if len(fitting) == 1 else None


def samples_of(tars: list[str], columns: Columns) -> Iterator[dict[str, Any]]:
    """The samples of archives, one after the other; what is wrong with one is told in its place."""
    for tar in tars:
        shown = redact(tar)
        try:
            for members in groups_of(tar):
                Outage.broken = 0
                yield sample_of(shown, members, columns)
        except BadSampleError as error:
            Outage.count(shown, error)
            yield _broken(shown, error, columns)


class Outage:
    """Archives in a row that this process could not read: so many that it is their source that is gone."""

    ENOUGH = 5
    broken = 0

    @classmethod
    def count(cls, tar: str, error: BadSampleError) -> None:
        """
        Count one.

        Raises:
            RecipeError: if it is one too many.
        """
        cls.broken += 1
        if cls.broken == cls.ENOUGH:
            cls.broken = 0
            raise RecipeError(
                f"{cls.ENOUGH} tar files in a row cannot be read, {tar} the last ({error.detail}); see whether their "
                "source can be reached."
            )


def sample_of(tar: str, members: Mapping[str, bytes], columns: Columns) -> dict[str, Any]:
    """Picture and text of a sample, and its question; or its chat."""
    name = f"{tar}/{members['__key__'].decode('utf-8', 'replace')}"
    try:
        fields = columns_of(members)
        picture, text = find(members, columns.image or "image"), find(fields, columns.text)
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        ending = next((ending for ending, content in members.items() if content is picture), "")
        image = None if picture is None else {"bytes": picture, "path": f"{name}.{ending}"}
        if columns.is_chat:
            chat, images = read_chat(text, image)
            return {"images": images, "chat": json.dumps(chat, ensure_ascii=False), "name": name, "cause": None}
    except BadSampleError as error:
        return _broken(name, error, columns)
    asked = {} if columns.question is None else {"question": _as_text(fields.get(columns.question))}
    return {"image": image, "text": _as_text(text), **asked, "name": name, "cause": None}


def _as_text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _broken(name: str, error: BadSampleError, columns: Columns) -> dict[str, Any]:
    if columns.is_chat:
        return {"images": [], "chat": None, **error.record(name)}
    asked = {} if columns.question is None else {"question": None}
    return {"image": None, "text": None, **asked, **error.record(name)}


def groups_of(tar: str) -> Iterator[dict[str, bytes]]:
    """
    The members of every sample, ending → content, with the name that they share as `__key__`.

    Raises:
        BadSampleError: where the archive breaks off or cannot be opened, behind the members that could be read.
    """
    group: dict[str, bytes] = {}
    try:
        for path, file in _members(tar):
            folder, slash, name = path.rpartition("/")
            stem, dot, ending = name.partition(".")
            if not dot or not stem:
                continue
            key = (folder + slash + stem).encode("utf-8", "surrogateescape")
            if group and group["__key__"] != key:
                whole, group = group, {}
                yield whole
            content = file.read()
            group |= {"__key__": key, ending.lower(): content}
    except Exception as error:  # tarfile's own, zlib's, and what file systems and networks raise
        if group:
            yield group
        reason = "not found" if isinstance(error, FileNotFoundError) else one_line(error)
        raise BadSampleError(BROKEN_ARCHIVE, reason) from error
    if group:
        yield group


def _members(tar: str) -> Iterator[tuple[str, Any]]:
    if "://" in tar:
        yield from ArchiveIterable.from_urlpath(tar)
        return
    with open(tar, "rb") as file:  # and not by its name, in which `::` would mean an archive's member
        yield from ArchiveIterable.from_buf(file)


def columns_of(members: Mapping[str, bytes]) -> dict[str, Any]:
    """
    Members and the fields of the .json by name.

    Raises:
        BadSampleError: if that is no JSON.
    """
    columns: dict[str, Any] = {ending: content for ending, content in members.items() if ending != "__key__"}
    if "json" in columns:
        try:
            fields = json.loads(columns["json"])
        except (ValueError, RecursionError) as error:  # the latter of one that is nested without end
            raise BadSampleError(BROKEN_JSON, one_line(error)) from error
        if isinstance(fields, Mapping):
            columns = {**fields, **columns}
    return columns


def find(columns: Mapping[str, Any], name: str) -> Any:
    """The column of a name, or the first that its default stands for; None if there is none."""
    return next(
        (columns[column] for column in (name, *DEFAULTS.get(name, ())) if columns.get(column) is not None), None
    )
