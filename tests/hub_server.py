"""A Hub on this machine: as much of its HTTP interface as huggingface_hub needs to publish, list and fetch.

    with HubServer() as hub:
        hub.add_user("you", "hf_secret")
        hub.fail("POST", "/commit/", status=503, times=2)
        ...  # a client whose HF_ENDPOINT is hub.endpoint
        assert hub.files("you/adapter")["config.json"]

Everything is in memory. Large files lie behind a second address, as on the Hub: they are put there with signed links,
and reading one is a redirect. There is no Xet, so clients have to be told HF_HUB_DISABLE_XET=1.
"""

import http.server
import json
import re
import socket
import struct
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from hub_answers import Answers
from hub_store import GITATTRIBUTES, Blob, Fault, RefusalError, Repo, Seen, is_large


TOKEN = "hf_" + "abcdefghijklmnop" * 2  # as long as real ones
MULTIPART_FROM = 5 * 2**30  # bytes from which a file is put in parts


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


class Handler(Answers, http.server.BaseHTTPRequestHandler):
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
