"""A server on this machine that speaks as much of OpenAI's language as chats need, and misbehaves when told to.

    with ChatServer() as server:
        server.next(status=429, headers={"Retry-After": "7"})
        ...  # a client of server.url
        assert len(server.seen) == 2

It counts what is under way, and can hold answers back until enough requests are there.
"""

import http.server
import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any


def echo(asked: dict[str, Any]) -> str:
    """The last message, in capitals."""
    return str(asked["messages"][-1]["content"]).upper()


class ChatServer:
    """
    Attributes:
        url: the address for `--base_url`.
        seen: the body of every request, in order; `headers` and `query` those of the last one.
        most_at_once: the most requests that were under way together.
        together: as many requests as have to be there before any is answered.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], str] = echo) -> None:
        self.answer, self.together = answer, 1
        self.seen: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.query = ""
        self.most_at_once = self._at_once = 0
        self._plans: deque[dict[str, Any]] = deque()
        self.changed = threading.Condition()
        self.ended = threading.Event()

    def next(self, times: int = 1, **plan: Any) -> None:
        """
        Do something else with the next requests: answer with `status`, `headers`, `body` (bytes, or what is put in
        JSON) and `kind` of body; `hang`; `close` the connection; or `call` a function first.
        """
        self._plans.extend([plan] * times)

    def __enter__(self) -> "ChatServer":
        handler = type("ChatHandler", (Handler,), {"chat": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def begin(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Count a request, wait for the others that have to be there, and tell what to do with it."""
        with self.changed:
            self.seen.append(asked)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self.changed.notify_all()
            self.changed.wait_for(lambda: len(self.seen) >= self.together, timeout=10)
            return self._plans.popleft() if self._plans else {}

    def end(self) -> None:
        with self.changed:
            self._at_once -= 1


def completion(asked: dict[str, Any], text: Any, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of an answer; a token is a word."""
    words = sum(len(str(one["content"]).split()) for one in asked["messages"])
    said = {"role": "assistant", "content": text, **message}
    usage = {"prompt_tokens": words, "completion_tokens": len(str(text).split())}
    choice = {"index": 0, "message": said, "finish_reason": finish}
    return {"object": "chat.completion", "model": asked["model"], "choices": [choice], "usage": usage}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body leave together
    chat: ChatServer

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path, _, self.chat.query = self.path.partition("?")
        if path != "/v1/chat/completions":
            self.reply(404, {"error": {"message": f"there is no {path}"}}, "application/json", {})
            return
        self.chat.headers = {name.lower(): value for name, value in self.headers.items()}
        plan = self.chat.begin(asked)
        try:
            if "call" in plan:
                plan["call"]()
            if plan.get("hang"):
                self.chat.ended.wait(20)
            if plan.get("hang") or plan.get("close"):
                self.close_connection = True
                return
            body = plan["body"] if "body" in plan else completion(asked, self.chat.answer(asked))
            self.reply(plan.get("status", 200), body, plan.get("kind", "application/json"), plan.get("headers", {}))
        finally:
            self.chat.end()

    def reply(self, status: int, body: Any, kind: str, headers: dict[str, str]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
