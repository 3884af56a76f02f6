"""A dataset of the Hub on this machine: as much of its HTTP interface as listing and reading files takes."""

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve_dataset(repo_id: str, folder: Path) -> Iterator[str]:
    """Serve a folder as the dataset `repo_id`; gives the address that stands in `HF_ENDPOINT`."""

    def entry(path: Path) -> dict:
        size = path.stat().st_size if path.is_file() else 0
        kind = "file" if path.is_file() else "directory"
        return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": REVISION}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, content: object, status: int = 200, **headers: str) -> None:
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": REVISION, **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
            api, files = f"/api/datasets/{repo_id}", f"/datasets/{repo_id}/resolve/"
            if path in (api, f"{api}/revision/{REVISION}", f"{api}/revision/main"):
                self.answer({"id": repo_id, "sha": REVISION, "siblings": []})
            elif path.startswith(f"{api}/tree/"):
                below = folder / path.removeprefix(f"{api}/tree/").partition("/")[2]
                self.answer([entry(each) for each in sorted(below.iterdir())])
            elif path.startswith(files):
                content = (folder / path.removeprefix(files).partition("/")[2]).read_bytes()
                self.answer(content, ETag=f'"{len(content)}"')
            else:
                self.answer({"error": "not found"}, status=404)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            fields = json.loads(body) if body.startswith("{") else urllib.parse.parse_qs(body)
            found = [folder / path for path in fields["paths"]]
            self.answer([entry(path) for path in found if path.exists()])

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
