"""What a Hub of tests answers: accounts and repositories, publishing, listing and fetching."""

import base64
import hashlib
import json
import re
import urllib.parse
from typing import Any

from hub_store import KINDS, REPO_ID, Blob, RefusalError, Repo, is_large


class Answers:
    """The answers of a Hub, each status, headers and content; mixed into a handler of requests."""

    # What the handler brings.
    hub: Any
    command: str
    headers: Any
    query: dict[str, str]

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
        return self.hub.repo(KINDS[kind.strip("/") or "models"], id, self.headers.get("Authorization"), write)

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
        if kind == "space" and fields.get("sdk") not in ("gradio", "docker", "static"):
            raise RefusalError(400, "A Space needs an sdk")
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
        sha, files = self.at(self.open(kind, id), revision)
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


API = rf"/api/(?P<kind>models|datasets|spaces)/{REPO_ID}"
GIT = rf"/(?P<kind>(?:(?:datasets|spaces)/)?){REPO_ID}\.git/info/lfs/objects"
STORED = rf"/(?P<kind>models|datasets|spaces)/{REPO_ID}/(?P<oid>[0-9a-f]{{64}})"
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
    ("GET", rf"(?P<kind>(?:/datasets|/spaces)?)/{REPO_ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ("PUT", STORED, "put_large"),
    ("POST", rf"{STORED}/complete", "complete"),
    ("GET", STORED, "get_large"),
)
