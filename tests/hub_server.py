"""A Hub on this machine: as much of its HTTP interface as huggingface_hub needs to publish, list and fetch.

    with HubServer() as hub:
        hub.add_user("you", "hf_secret")
        hub.fail("POST", "/commit/", status=503, times=2)
        ...  # a client whose HF_ENDPOINT is hub.endpoint
        assert hub.files("you/adapter")["config.json"]

Everything is in memory. Large files lie behind a second address, as on the Hub: they are put there with signed links,
and reading one is a redirect. There is no Xet, so clients have to be told HF_HUB_DISABLE_XET=1.
"""

import base64
import fnmatch
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in ("*.safetensors", "*.bin", "*.pt", "*.tar")
)
REPO_ID = r"(?P<id>[\w.-]+/[\w.-]+|[\w.-]+)"
KINDS = {"models": "model", "datasets": "dataset"}
TOKEN = "hf_" + "abcdefghijklmnop" * 2  # as long as real ones
MULTIPART_FROM = 5 * 2**30  # bytes from which a file is put in parts


# ---- what is stored -------------------------------------------------------------------------------------------------


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


class HubServer:
    """
    A Hub and its storage, each on a port of its own.

    Attributes:
        endpoint: address of the Hub, for `HF_ENDPOINT`.
        seen: every request, in order.
        multipart_from: bytes from which large files are put in parts.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.users: dict[str, dict[str, Any]] = {}  # by token
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.pauses: list[float] = []  # for a test that notes how long a client waits
        self.multipart_from = MULTIPART_FROM
        self.parts: dict[str, dict[int, bytes]] = {}
        self.lock = threading.RLock()

    def __enter__(self) -> "HubServer":
        handler = type("HubHandler", (Handler,), {"hub": self})
        self._servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    # What tests say and ask.

    def environment(self, home: object, token: str | None = None) -> dict[str, str]:
        """What a process needs in its environment to take this for the Hub, with a cache of its own in `home`."""
        settings = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return settings | ({} if token is None else {"HF_TOKEN": token})

    def connect(self, monkeypatch: Any, token: str) -> None:
        """
        Let this process take it for the Hub, with a token.

        huggingface_hub reads address and mode when it is imported, so both are changed where they are kept.
        """
        import huggingface_hub
        import transformers
        from huggingface_hub import file_download

        constants = huggingface_hub.constants
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(constants, "ENDPOINT", self.endpoint)
        template = self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.endpoint)
        monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        self.forget_connections()

    @staticmethod
    def forget_connections() -> None:
        """Those of this process, which are made for one mode."""
        from huggingface_hub.utils import _http

        (getattr(_http, "reset_sessions", None) or _http.close_session)()  # of 0.36 and of later ones

    def add_user(self, name: str, token: str, write: bool = True) -> None:
        """Somebody with a token."""
        self.users[token] = {"name": name, "write": write}

    def add_repo(
        self, repo_id: str, files: Mapping[str, bytes] | None = None, kind: str = "model", private: bool = False
    ) -> Repo:
        """A repository, with its first commit and perhaps a second one."""
        repo = self.repos[kind, repo_id] = Repo(repo_id, kind, private)
        blobs = {".gitattributes": Blob(GITATTRIBUTES.encode(), False)}
        repo.commit("main", blobs, "initial commit")
        if files:
            blobs |= {path: Blob(content, is_large(path, content)) for path, content in files.items()}
            repo.large |= {blob.oid: blob.content for blob in blobs.values() if blob.lfs}
            repo.commit("main", blobs, "Add files")
        return repo

    def fail(self, method: str, pattern: str, times: int = 1, **action: Any) -> None:
        """Let the next requests of a method whose path matches go wrong; see `Fault`."""
        self.faults.append(Fault(method, pattern, times, **action))

    def head(self, repo_id: str, branch: str = "main", kind: str = "model") -> str:
        """The commit at the top of a branch."""
        return self.repos[kind, repo_id].branches[branch]

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a revision, without .gitattributes."""
        repo = self.repos[kind, repo_id]
        sha = repo.find(revision)
        assert sha is not None, revision
        return {path: blob.content for path, blob in repo.commits[sha].items() if path != ".gitattributes"}

    def messages(self, repo_id: str, kind: str = "model") -> list[str]:
        """The messages of all commits but the first, oldest first."""
        return [message for _, message in self.repos[kind, repo_id].history[1:]]

    def requests(self, method: str, pattern: str) -> list[Seen]:
        """Requests that were answered so far."""
        return [one for one in self.seen if one.method == method and re.search(pattern, one.path)]

    # Who may do what.

    def user(self, authorization: str | None) -> dict[str, Any] | None:
        if authorization is None:
            return None
        user = self.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return user

    def repo(self, kind: str, repo_id: str, authorization: str | None, write: bool = False) -> Repo:
        """A repository that the sender may read, or write to."""
        user, repo = self.user(authorization), self.repos.get((kind, repo_id))
        visible = repo is not None and (not repo.private or (user is not None and user["name"] == repo.owner))
        if repo is None or not visible:
            # Whether there is one is nobody's business.
            raise RefusalError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise RefusalError(401, "Invalid username or password.")
        if write and not (user and user["write"] and user["name"] == repo.owner):
            raise RefusalError(403, "Forbidden: pass a token with write permission")
        return repo

    def fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str, sample: bytes, size: int | None = None) -> bool:
    """Whether the Hub keeps a file as a large one: by its name, its size, or because it is no text."""
    patterns = [line.split()[0] for line in GITATTRIBUTES.splitlines()]
    size = len(sample) if size is None else size
    return any(fnmatch.fnmatch(path, one) for one in patterns) or size > 10 * 2**20 or b"\0" in sample


# ---- requests -------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request after the other of a connection."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which would hold back the second half of an answer

    def handle_one_request(self) -> None:
        with suppress(ConnectionError):  # a client that has gone
            super().handle_one_request()

    def log_message(self, *args: object) -> None:
        pass

    def do(self) -> None:
        """Find out what is asked for, let go wrong what has to, and answer."""
        place = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(place.query))
        fault = self.hub.fault(self.command, place.path)
        if fault is not None and fault.hold is not None:
            fault.hold.wait(60)
        self.cut = None if fault is None else fault.drop_after
        body = b"".join(self.chunks())
        if self.cut is not None and "Content-Length" in self.headers:
            self.hang_up()
            return
        try:
            if fault is not None and fault.status is not None:
                raise RefusalError(fault.status, fault.message)
            status, headers, content = self.route(place.path, body)
        except RefusalError as refusal:
            status, content = refusal.status, json.dumps({"error": refusal.message}).encode()
            headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        authorization = self.headers.get("Authorization")
        self.hub.seen.append(Seen(self.command, place.path, status, authorization, body))
        if fault is not None and fault.lose_answer:
            self.hang_up()
        else:
            self.answer(status, headers, content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do  # noqa: N815

    def chunks(self) -> Iterator[bytes]:
        """The body of the request; only its beginning if the connection is to break."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif length := int(self.headers.get("Content-Length") or 0):
            yield self.rfile.read(length if self.cut is None else min(self.cut, length))

    def hang_up(self) -> None:
        """Break the connection as a cable does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()  # which holds the socket too
        self.connection.close()
        self.close_connection = True

    def answer(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        ranged = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        whole = len(content)
        if ranged and status == 200 and any(ranged.groups()):
            first = int(ranged[1]) if ranged[1] else max(whole - int(ranged[2]), 0)
            last = min(int(ranged[2]), whole - 1) if ranged[1] and ranged[2] else whole - 1
            status, content = 206, content[first : last + 1]
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{whole}"}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), "Accept-Ranges": "bytes", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut is not None:
            self.wfile.write(content[: self.cut])
            self.wfile.flush()
            self.hang_up()
        else:
            self.wfile.write(content)

    # Where a request goes.

    def route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                with self.hub.lock:
                    named = {key: urllib.parse.unquote(value or "") for key, value in match.groupdict().items()}
                    return getattr(self, name)(body, **named)
        raise RefusalError(404, "Sorry, we can't find the page you are looking for.")

    def json(self, content: Any, status: int = 200) -> tuple[int, dict[str, str], bytes]:
        return status, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def open(self, kind: str, id: str, write: bool = False) -> Repo:
        return self.hub.repo(KINDS[kind or "models"], id, self.headers.get("Authorization"), write)

    def at(self, repo: Repo, revision: str) -> tuple[str, dict[str, Blob]]:
        sha = repo.find(revision)
        if sha is None:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # Accounts and repositories.

    def whoami(self, body: bytes) -> Any:
        user = self.hub.user(self.headers.get("Authorization"))
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        role = "write" if user["write"] else "read"
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return self.json({"type": "user", "name": user["name"], "fullname": user["name"], "orgs": [], "auth": auth})

    def create_repo(self, body: bytes) -> Any:
        fields, user = json.loads(body), self.hub.user(self.headers.get("Authorization"))
        if user is None:
            raise RefusalError(401, "Invalid username or password.")
        owner, kind = fields.get("organization") or user["name"], fields.get("type") or "model"
        repo_id = f"{owner}/{fields['name']}"
        if owner != user["name"] or not user["write"]:
            raise RefusalError(403, f'You don\'t have the rights to create a {kind} under the namespace "{owner}"')
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}"
        if (kind, repo_id) in self.hub.repos:
            return self.json({"error": f"You already created this {kind} repo: {repo_id}", "url": url}, status=409)
        private = bool(fields.get("private")) or fields.get("visibility") == "private"
        self.hub.add_repo(repo_id, kind=kind, private=private)
        return self.json({"url": url, "name": repo_id, "id": repo_id, "private": private})

    def repo_info(self, body: bytes, kind: str, id: str, revision: str = "") -> Any:
        repo = self.open(kind, id)
        sha, files = self.at(repo, revision or "main")
        siblings = [{"rfilename": path, "size": len(blob.content)} for path, blob in sorted(files.items())]
        return self.json(
            {
                "_id": "0", "id": id, "modelId": id, "author": repo.owner, "sha": sha, "private": repo.private,
                "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": [], "siblings": siblings,
                "lastModified": "2025-01-01T00:00:00.000Z", "createdAt": "2025-01-01T00:00:00.000Z",
            }
        )  # fmt: skip

    def refs(self, body: bytes, kind: str, id: str) -> Any:
        repo = self.open(kind, id)
        listed = {
            name: [{"name": key, "ref": f"refs/{where}/{key}", "targetCommit": sha} for key, sha in known.items()]
            for name, where, known in (("branches", "heads", repo.branches), ("tags", "tags", repo.tags))
        }
        return self.json({**listed, "converts": []})

    def create_branch(self, body: bytes, kind: str, id: str, name: str) -> Any:
        repo = self.open(kind, id, write=True)
        if name in repo.branches:
            raise RefusalError(409, "Reference already exists")
        repo.branches[name], _ = self.at(repo, json.loads(body or b"{}").get("startingPoint") or "main")
        return self.json({})

    def create_tag(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        repo, name = self.open(kind, id, write=True), json.loads(body)["tag"]
        if name in repo.tags:
            raise RefusalError(409, "Tag already exists")
        repo.tags[name], _ = self.at(repo, revision)
        return self.json({})

    # Publishing.

    def validate_yaml(self, body: bytes) -> Any:
        """A few of the Hub's own rules about the metadata of a card."""
        content = json.loads(body)["content"]
        if not content.startswith("---\n"):
            return self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        metadata = content.split("---\n")[1]
        errors = []
        for key, kind in (("base_model", "model"), ("datasets", "dataset")):
            found = re.search(rf"^{key}:(.*(?:\n- .*)*)", metadata, re.MULTILINE)
            for name in re.findall(r"[^\s'\"-][^\s'\"]*", found[1]) if found else []:
                if not re.fullmatch(REPO_ID, name):
                    errors.append({"message": f'"{key}" with value "{name}" is not valid. Use a {kind} id.'})
        return self.json({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def preupload(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        _, files = self.at(self.open(kind, id, write=True), revision)
        answers = []
        for file in json.loads(body)["files"]:
            large = is_large(file["path"], base64.b64decode(file["sample"]), file["size"])
            there = {"oid": files[file["path"]].oid} if file["path"] in files else {}
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **there})
        return self.json({"files": answers})

    def lfs_batch(self, body: bytes, kind: str, id: str) -> Any:
        repo, fields = self.open(kind, id, write=True), json.loads(body)
        transfer = "multipart" if "multipart" in fields["transfers"] else "basic"
        answers = []
        for one in fields["objects"]:
            answer = {"oid": one["oid"], "size": one["size"], "authenticated": True}
            if one["oid"] not in repo.large:
                place = f"{self.hub.storage}/{repo.kind}s/{id}/{one['oid']}"
                signed = "X-Amz-Signature=5ec4e7"
                upload: dict[str, Any] = {"href": f"{place}?{signed}", "header": {}}
                if transfer == "multipart" and one["size"] > self.hub.multipart_from:
                    chunk = self.hub.multipart_from
                    links = range(1, -(-one["size"] // chunk) + 1)
                    header = {f"{number:05d}": f"{place}?part={number}&{signed}" for number in links}
                    upload = {"href": f"{place}/complete?{signed}", "header": {"chunk_size": str(chunk), **header}}
                verify = {"href": f"{self.hub.endpoint}/{kind}{id}.git/info/lfs/objects/verify", "header": {}}
                answer["actions"] = {"upload": upload, "verify": verify}
            answers.append(answer)
        return self.json({"transfer": transfer, "objects": answers})

    def put_large(self, body: bytes, kind: str, id: str, oid: str) -> Any:
        if "part" in self.query:
            self.hub.parts.setdefault(oid, {})[int(self.query["part"])] = body
        else:
            self._keep(kind, id, oid, body)
        return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""

    def complete(self, body: bytes, kind: str, id: str, oid: str) -> Any:
        parts = self.hub.parts.pop(oid)
        told = {part["partNumber"]: part["etag"].strip('"') for part in json.loads(body)["parts"]}
        if told != {number: hashlib.md5(part).hexdigest() for number, part in parts.items()}:
            raise RefusalError(400, "Parts do not match")
        self._keep(kind, id, oid, b"".join(part for _, part in sorted(parts.items())))
        return self.json({})

    def _keep(self, kind: str, id: str, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, "The content does not match its digest")
        self.hub.repos[KINDS[kind], id].large[oid] = content

    def lfs_verify(self, body: bytes, kind: str, id: str) -> Any:
        repo, fields = self.open(kind, id, write=True), json.loads(body)
        if len(repo.large.get(fields["oid"], b"")) != fields["size"]:
            raise RefusalError(404, "Object not found")
        return self.json({})

    def commit(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        repo = self.open(kind, id, write=True)
        if revision not in repo.branches:
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head, files = self.at(repo, revision)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, head):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in repo.large:
                    raise RefusalError(
                        400, f"Your push was rejected because an LFS pointer pointed to nothing: {path}"
                    )
                files[path] = Blob(repo.large[value["oid"]], True)
            elif line["key"] == "deletedFile":
                if path not in files:
                    raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
                del files[path]
        sha = repo.commit(revision, files, header["summary"])
        url = f"{self.hub.endpoint}/{id}/commit/{sha}"
        return self.json({"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    # Listing and fetching.

    def tree(self, body: bytes, kind: str, id: str, revision: str, path: str = "") -> Any:
        sha, files = self.at(self.open(kind, id), revision)
        below = f"{path}/" if path else ""
        if path and not any(name.startswith(below) for name in files):
            raise RefusalError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        deep = self.query.get("recursive", "").lower() in ("true", "1")
        found: dict[str, Any] = {}
        for name, blob in files.items():
            if not name.startswith(below):
                continue
            steps = name.removeprefix(below).split("/")
            for depth in range(1, len(steps) if deep else min(2, len(steps))):
                folder = below + "/".join(steps[:depth])
                found[folder] = {"type": "directory", "path": folder, "size": 0, "oid": sha}
            if deep or len(steps) == 1:
                found[name] = blob.entry(name)
        return self.json([entry for _, entry in sorted(found.items())])

    def paths_info(self, body: bytes, kind: str, id: str, revision: str) -> Any:
        sha, files = self.at(self.open(kind, id), revision)
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else urllib.parse.parse_qs(text)["paths"]
        found = [files[path].entry(path) for path in paths if path in files]
        folders = [path for path in paths if path and any(name.startswith(f"{path}/") for name in files)]
        return self.json([*found, *({"type": "directory", "path": path, "size": 0, "oid": sha} for path in folders)])

    def resolve(self, body: bytes, kind: str, id: str, revision: str, path: str) -> Any:
        sha, files = self.at(self.open(kind.strip("/"), id), revision)
        if path not in files:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Content-Type": "application/octet-stream"}
        if not blob.lfs:
            return 200, headers, blob.content
        place = f"{self.hub.storage}/{kind.strip('/') or 'models'}/{id}/{blob.oid}?X-Amz-Signature=5ec4e7"
        linked = {"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.oid}"', "Location": place}
        return 302, {**headers, **linked}, b""

    def get_large(self, body: bytes, kind: str, id: str, oid: str) -> Any:
        content = self.hub.repos[KINDS[kind], id].large[oid]
        return 200, {"ETag": f'"{oid}"', "Content-Type": "binary/octet-stream"}, content


API = rf"/api/(?P<kind>models|datasets)/{REPO_ID}"
GIT = rf"/(?P<kind>(?:datasets/)?){REPO_ID}\.git/info/lfs/objects"
STORED = rf"/(?P<kind>models|datasets)/{REPO_ID}/(?P<oid>[0-9a-f]{{64}})"
ROUTES = (
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create_repo"),
    ("POST", "/api/validate-yaml", "validate_yaml"),
    ("GET", API, "repo_info"),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", "repo_info"),
    ("GET", rf"{API}/refs", "refs"),
    ("POST", rf"{API}/branch/(?P<name>[^/]+)", "create_branch"),
    ("POST", rf"{API}/tag/(?P<revision>[^/]+)", "create_tag"),
    ("POST", rf"{API}/preupload/(?P<revision>.+)", "preupload"),
    ("POST", rf"{API}/commit/(?P<revision>.+)", "commit"),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", "tree"),
    ("POST", rf"{API}/paths-info/(?P<revision>.+)", "paths_info"),
    ("POST", rf"{GIT}/batch", "lfs_batch"),
    ("POST", rf"{GIT}/verify", "lfs_verify"),
    ("GET", rf"(?P<kind>(?:/datasets)?)/{REPO_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("PUT", STORED, "put_large"),
    ("POST", rf"{STORED}/complete", "complete"),
    ("GET", STORED, "get_large"),
)
