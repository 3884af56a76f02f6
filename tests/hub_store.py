"""What a Hub of tests keeps: repositories with their commits, what goes wrong, and what was asked."""

import fnmatch
import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.bin", "*.pt", "*.tar")
)
REPO_ID = r"(?P<id>[\w.-]+/[\w.-]+|[\w.-]+)"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """SHA-256 of a large file; git's own of another."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(f"blob {len(self.content)}\0".encode() + self.content).hexdigest()

    def entry(self, path: str) -> dict[str, Any]:
        """As `tree` and `paths-info` list it."""
        size = len(self.content)
        lfs = {"lfs": {"oid": self.oid, "size": size, "pointerSize": 130}} if self.lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": self.oid[:40], **lfs}


@dataclass
class Repo:
    """A repository: commits by their names, each with all of its files, and what points to them."""

    id: str
    kind: str = "model"
    private: bool = False
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    history: list[tuple[str, str]] = field(default_factory=list)  # name and message, oldest first
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # SHA-256 → content

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def commit(self, branch: str, files: Mapping[str, Blob], message: str) -> str:
        sha = hashlib.sha1(f"{self.kind}{self.id}{len(self.history)}{message}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.history.append((sha, message))
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit name means."""
        known = {**self.tags, **self.branches}
        return known.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """Something that goes wrong with a request, so many times."""

    method: str
    pattern: str
    times: int
    status: int | None = None
    message: str = "Something went wrong"
    drop_after: int | None = None  # bytes of the request, or of the answer if the request has no body
    lose_answer: bool = False
    hold: threading.Event | None = None  # set when the answer may go on its way


@dataclass(frozen=True)
class Seen:
    """A request that was answered."""

    method: str
    path: str
    status: int
    authorization: str | None
    body: bytes


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def is_large(path: str, sample: bytes, size: int | None = None) -> bool:
    """Whether the Hub keeps a file as a large one: by its name, its size, or because it is no text."""
    patterns = [line.split()[0] for line in GITATTRIBUTES.splitlines()]
    size = len(sample) if size is None else size
    return any(fnmatch.fnmatch(path, one) for one in patterns) or size > 10 * 2**20 or b"\0" in sample
