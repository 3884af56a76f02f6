"""Pictures that strangers name: fetched with limits, and never from this machine or its network."""

import base64
import contextlib
import http.server
import io
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from recipes_minigpt4.utils import picture_fetching
from recipes_minigpt4.utils.picture_fetching import FetchLimits, PictureError, fetch_picture, is_public


ANYWHERE = FetchLimits(megabytes=0.1, seconds=5, allow_private=True)
PRIVATE = [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0.0.0.0", "10.0.0.1", "172.16.9.9",
    "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "[::1]", "[::]", "[::ffff:127.0.0.1]",
    "[::ffff:10.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::1]", "[fe80::1]", "[fd00::1]",
    "[fec0::1]",
]  # fmt: skip


def png(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(file, "PNG")
    return file.getvalue()


PNG = png()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))
        with contextlib.suppress(OSError):  # clients hang up
            path, _, query = self.path.partition("?")
            getattr(self, path[1:], self.picture)(query.removeprefix("to="))
        self.close_connection = True

    def head(self, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def picture(self, _: str) -> None:
        self.head(Content_Type="image/png", Content_Length=str(len(PNG)))
        self.wfile.write(PNG)

    def untyped(self, _: str) -> None:
        self.head()
        self.wfile.write(PNG)

    def page(self, _: str) -> None:
        self.head(Content_Type="text/html; charset=utf-8", Content_Length="4")
        self.wfile.write(b"<html")

    def missing(self, _: str) -> None:
        self.head(404, Content_Length="0")

    def leads(self, target: str) -> None:
        self.head(302, Location=target, Content_Length="0")

    def announced(self, _: str) -> None:
        self.head(Content_Type="image/png", Content_Length="1000000000")

    def endless(self, _: str) -> None:
        self.head(Content_Type="image/png", Transfer_Encoding="chunked")
        while True:
            self.wfile.write(b"2710\r\n" + b"x" * 10000 + b"\r\n")

    def short(self, _: str) -> None:
        self.head(Content_Type="image/png", Content_Length="5000")
        self.wfile.write(PNG)

    def drip(self, _: str) -> None:
        self.head(Content_Type="image/png", Content_Length="5000")
        self.slowly(b"x")

    def drip_and_close(self, _: str) -> None:
        self.head(Content_Type="image/png", Connection="close")
        self.slowly(b"x")

    def slow_head(self, _: str) -> None:
        self.slowly(b"HTTP/1.1 200 OK\r\nX-Slow: ")

    def slowly(self, first: bytes) -> None:
        self.wfile.write(first)
        for _ in range(200):
            if self.server.ended.wait(0.05):
                break
            self.wfile.write(b"x")


@pytest.fixture(scope="module")
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    opened = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    opened.daemon_threads, opened.ended = True, threading.Event()
    threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield opened
    opened.ended.set()
    opened.shutdown()
    opened.server_close()


@pytest.fixture
def address(server: http.server.ThreadingHTTPServer) -> str:
    """The address of the server, which has seen nothing yet."""
    server.seen = []
    return f"http://127.0.0.1:{server.server_port}"


def refusal(address: str, limits: FetchLimits | None = ANYWHERE) -> str:
    with pytest.raises(PictureError) as told:
        fetch_picture(address, limits)
    text = str(told.value)
    assert text.endswith(".") and "\n" not in text
    return text


# ---- what is fetched ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/picture", "/untyped", "/leads?to=/leads?to=/picture", "/a%20b/ä?q=1 2"])
def test_a_picture_is_fetched_from_where_its_address_leads(path: str, address: str) -> None:
    assert fetch_picture(f" {address}{path}\n", ANYWHERE) == PNG


def test_a_picture_that_stands_in_its_address_is_read() -> None:
    text = base64.b64encode(PNG).decode()
    for head in ("data:image/png;base64,", "DATA:image/PNG;base64,", "data:;base64,", "data:image/png;name=a;base64,"):
        assert fetch_picture(head + text) == PNG
    assert fetch_picture(f"data:image/png;base64,{text[:9]}\n {text[9:].replace('+', '%2B')}") == PNG
    assert fetch_picture("data:image/png,%89PNG") == b"\x89PNG"


@pytest.mark.parametrize(
    "uri, told",
    [
        ("data:image/png;base64,AAA!", "damaged"),
        ("data:image/png;base64", "without content"),
        ("data:text/html;base64,AAAA", "text/html and no picture"),
        ("data:image/png;base64," + "A" * 200_000, "larger than 0.1 MB"),
        ("data:image/png," + "A" * 400_000, "larger than 0.1 MB"),
    ],
)
def test_a_data_uri_that_holds_no_picture_is_told(uri: str, told: str) -> None:
    text = refusal(uri)
    assert told in text and "AAAA" not in text


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, told",
    [
        ("/page", "answers with text/html, which is no picture"),
        ("/missing", "answers 404"),
        ("/announced", "larger than 0.1 MB"),
        ("/endless", "larger than 0.1 MB"),
        ("/short", "ended before its end"),
        ("/leads?to=/leads", "answers 302"),
        ("/leads?to=file:///etc/passwd", "not from files"),
        ("/leads?to=ftp://127.0.0.1/a.png", "not from files"),
    ],
)
def test_what_is_no_picture_or_too_large_is_told(path: str, told: str, address: str) -> None:
    assert told in refusal(address + path)


def test_a_circle_of_addresses_ends(address: str, server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "around", lambda self, _: self.leads("/around"), raising=False)
    assert "leads on more than 5 times" in refusal(f"{address}/around")
    assert len(server.seen) == 6


@pytest.mark.parametrize("path", ["/drip", "/drip_and_close", "/slow_head"])
def test_a_server_that_never_ends_is_left_in_time(path: str, address: str) -> None:
    start = time.monotonic()
    assert "takes longer than 0.4 seconds" in refusal(address + path, FetchLimits(seconds=0.4, allow_private=True))
    assert time.monotonic() - start < 3


def test_a_name_that_nobody_answers_for_is_left_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **options: answered.wait(30) and [])
    try:
        told = refusal("http://slow.example/a.png", FetchLimits(seconds=0.2))
    finally:
        answered.set()
    assert "takes longer than 0.2 seconds" in told


def test_hosts_that_are_not_there_are_told(address: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert "refuses the connection" in refusal(f"http://127.0.0.1:{port}/a.png")
    for host in ("no-such-host.invalid", "two..dots", "a" * 70):
        assert "host is unknown" in refusal(f"http://{host}/a.png")
    assert "connection failed" in refusal(address.replace("http:", "https:"))  # which speaks no TLS


@pytest.mark.parametrize(
    "name, told",
    [
        ("file:///etc/passwd", "not from files"),
        ("/etc/passwd", "not from files"),
        ("../picture.png", "not from files"),
        ("gopher://127.0.0.1/", "not from files"),
        ("", "not from files"),
        ("http://", "no host"),
        ("http://[::1", "cannot be read"),
        ("http://127.0.0.1:99999/", "cannot be read"),
        ("http://someone:secret@127.0.0.1/a.png", "has a password"),
    ],
)
def test_other_names_of_pictures_are_refused(name: str, told: str) -> None:
    text = refusal(name)
    assert told in text and "secret" not in text


def test_what_follows_a_path_is_not_told(address: str) -> None:
    assert "abcdef" not in refusal(f"{address}/missing?signature=abcdef")


# ---- where from -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", PRIVATE)
def test_this_machine_and_its_network_are_never_asked(host: str, server, address: str) -> None:
    assert "private network" in refusal(f"http://{host}:{server.server_port}/picture", FetchLimits())
    assert server.seen == []


def test_addresses_of_the_open_network_are_known() -> None:
    assert all(map(is_public, ("8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8")))


def test_every_hop_is_looked_at(address: str, server, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([True, True, False])
    monkeypatch.setattr(picture_fetching, "is_public", lambda _: next(answers))
    text = refusal(f"{address}/leads?to=/leads?to=/picture", FetchLimits())
    assert "private network" in text and [path for path, _ in server.seen] == [
        "/leads?to=/leads?to=/picture",
        "/leads?to=/picture",
    ]


def test_a_name_is_looked_up_once_and_the_connection_goes_there(
    address: str, server, monkeypatch: pytest.MonkeyPatch
) -> None:
    look_up, asked = socket.getaddrinfo, []

    def rebinding(host: str, *rest: object, **options: object):
        asked.append(host)
        if len(asked) > 1:
            pytest.fail("another look-up could lead elsewhere")
        return look_up("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(picture_fetching, "is_public", lambda ip: ip == "127.0.0.1")
    place = f"pictures.example:{server.server_port}"
    assert fetch_picture(f"http://{place}/picture", FetchLimits()) == PNG
    assert asked == ["pictures.example"] and server.seen == [("/picture", place)]


def test_a_name_with_one_private_address_among_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **o: look_up("8.8.8.8", *a, **o) + look_up("127.0.0.1", *a, **o)
    )
    assert "private network" in refusal("http://both.example/a.png", FetchLimits())
