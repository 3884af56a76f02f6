"""The review page on this machine alone, for one person who has its address: decisions are written at once.

The address has a token that nobody can guess. Requests under another host name are refused, which a page of the web
would make that has its name point at this machine. Pictures are found by their digest; no path comes from a request.
"""

import json
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from recipes_minigpt4.curation.review_page import CHOICES, EDIT, KEEP, case_of, shown_of
from recipes_minigpt4.curation.rows import CuratedRow
from recipes_minigpt4.utils.decision_page import ANSWER, CASE, SEAL, TEXT, TIME, seal_of
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal


HOST = "127.0.0.1"
OPEN = "open"  # the answer that takes one back
MOST = 200_000  # bytes of a decision
PATIENCE = 30  # seconds for a request
KINDS = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}  # as `gather` keeps pictures
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}


class ReviewServer(ThreadingHTTPServer):
    """
    Serves the page, the pictures and nothing else.

    Args:
        folder: of the curation.
        rows: its rows.
        journal: where decisions go.
        page: makes the page as it is now.
        port: 0 for a free one.

    Raises:
        RecipeError: if the port cannot be used.
    """

    def __init__(
        self, folder: Path, rows: Sequence[CuratedRow], journal: Journal, page: Callable[[], str], port: int = 0
    ) -> None:
        self.pictures = {row.picture: row.file for row in rows}
        self.rows = {case_of(row): row for row in rows}
        self.token = secrets.token_urlsafe(24)
        self.page, self._folder, self._journal, self._lock = page, folder.resolve(), journal, threading.Lock()
        try:
            super().__init__((HOST, port), Handler)
        except OSError as error:
            raise RecipeError(
                f"Port {port} of this machine cannot be used ({error.strerror}); name another with --port, or none."
            ) from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about a page that was closed before all of it had come."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/{self.token}/"

    def picture(self, digest: str) -> tuple[bytes, str] | None:
        """A picture and its kind; None if the curation has none of that digest."""
        path = (self._folder / self.pictures.get(digest, "")).resolve()
        if path.suffix not in KINDS or not path.is_relative_to(self._folder / "picture"):
            return None
        try:
            return path.read_bytes(), KINDS[path.suffix]
        except OSError:
            return None

    def decide(self, told: Any) -> str | None:
        """Write a decision down; returns why it is none."""
        row = self.rows.get(str(told.get(CASE))) if isinstance(told, Mapping) else None
        if row is None:
            return "no such row"
        case, answer, text = case_of(row), told.get(ANSWER), told.get(TEXT)
        if answer not in (OPEN, *(choice.answer for choice in CHOICES)) or (answer == KEEP and not row.text):
            return "no such answer"
        if (answer == EDIT) != (isinstance(text, str) and bool(text.strip())) or not _is_unicode(text):
            return "an edit has a text, and nothing else has"
        line = {**shown_of(row), CASE: case, ANSWER: answer, SEAL: seal_of(case, answer, text)}
        with self._lock:
            self._journal.append(line | ({} if text is None else {TEXT: text}) | {TIME: round(time.time(), 1)})
        return None


class Handler(BaseHTTPRequestHandler):
    """One request. Whatever is wrong with it, the answer is one line of text."""

    server: ReviewServer
    server_version, sys_version, timeout = "minigpt4", "", PATIENCE

    def do_GET(self) -> None:
        place = self._place()
        if place is None:
            return
        if place == "":
            try:
                self._answer(HTTPStatus.OK, self.server.page().encode(), "text/html; charset=utf-8")
            except RecipeError as error:  # somebody has changed the file of decisions
                self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))
        elif place.startswith("picture/") and (found := self.server.picture(place.removeprefix("picture/"))):
            self._answer(HTTPStatus.OK, *found)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "nothing is here")

    def do_POST(self) -> None:
        if (place := self._place()) is None:
            return
        kind, length = self.headers.get("Content-Type"), self.headers.get("Content-Length", "")
        if place != "decision" or kind != "application/json" or not length.isdecimal() or int(length) > MOST:
            self._refuse(HTTPStatus.BAD_REQUEST, "no decision")
            return
        try:
            reason = self.server.decide(json.loads(self.rfile.read(int(length))))
        except (ValueError, RecursionError):
            reason = "no JSON"
        except RecipeError as error:  # the disk is full
            self._refuse(HTTPStatus.INSUFFICIENT_STORAGE, str(error))
            return
        if reason:
            self._refuse(HTTPStatus.BAD_REQUEST, reason)
        else:
            self._answer(HTTPStatus.NO_CONTENT)

    def _place(self) -> str | None:
        """What is asked for, behind the token; None if the request was refused."""
        port = self.server.server_port
        hosts = [name if port == 80 else f"{name}:{port}" for name in (HOST, "localhost")]  # browsers leave 80 out
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts or origin not in (None, *(f"http://{host}" for host in hosts)):
            self._refuse(HTTPStatus.FORBIDDEN, f"open it as http://{HOST}:{port}, on this machine")
            return None
        token, _, place = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "open the whole address that the command has printed")
            return None
        return place

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        self._answer(status, f"{reason}\n".encode(), "text/plain; charset=utf-8")

    def _answer(self, status: HTTPStatus, content: bytes = b"", kind: str | None = None) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        if kind:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the address has the token in it."""


def _is_unicode(text: str | None) -> bool:
    """Whether it can be written: halves of a character cannot."""
    try:
        (text or "").encode()
    except UnicodeEncodeError:
        return False
    return True
