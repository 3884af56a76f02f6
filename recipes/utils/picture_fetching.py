"""Fetches pictures from addresses that strangers name, with limits, and never from this machine or its network.

A name is looked up once per hop, and the connection goes to the address that was checked: an answer that changes in
between leads nowhere. Proxies of the environment are not used.
"""

import base64
import binascii
import contextlib
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
import urllib.parse
from dataclasses import dataclass
from typing import Any

from recipes_minigpt4.utils.redaction import redact


MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
PIECE = 1 << 16  # bytes
DATA = "A picture in a data URI"
NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Content types of servers that do not tell what they send.
UNTOLD = ("", "application/octet-stream", "binary/octet-stream")


class PictureError(ValueError):
    """A picture that is not to be had, told in one sentence without secrets."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


@dataclass(frozen=True)
class FetchLimits:
    """
    What a picture may cost.

    Args:
        megabytes: the most that is read of one (10⁶ bytes).
        seconds: for all of it: looking up names, redirects, and the last byte.
        allow_private: whether addresses of this machine and its network are fetched too.
    """

    megabytes: float = 20.0
    seconds: float = 10.0
    allow_private: bool = False

    @property
    def bytes(self) -> int:
        return int(self.megabytes * 1e6)


def fetch_picture(address: str, limits: FetchLimits | None = None) -> bytes:
    """
    The bytes behind `http:`, `https:` or `data:`.

    Args:
        address: paths and other schemes are refused.
        limits: see `FetchLimits`.

    Raises:
        PictureError: if it names nothing that may be fetched, nothing that looks like a picture, or is over a limit.
    """
    limits = limits or FetchLimits()
    address = address.strip()
    if address[:5].lower() == "data:":
        return _inline(address, limits)
    deadline = time.monotonic() + limits.seconds
    place = address
    for _ in range(MAX_REDIRECTS + 1):
        content, place = _one_hop(place, limits, deadline)
        if content is not None:
            return content
    raise PictureError(f"{_failure(address)}: its address leads on more than {MAX_REDIRECTS} times.")


def shown_name(address: str) -> str:
    """What a picture is called in a sentence that begins with it."""
    return DATA if address[:5].lower() == "data:" else f"The picture {address[:200]}"


def _inline(address: str, limits: FetchLimits) -> bytes:
    head, comma, text = address.partition(",")
    kind = head[5:].partition(";")[0].strip().lower()
    if not comma:
        raise PictureError("A picture is a data URI without content; write data:image/png;base64,… .")
    if kind and not kind.startswith("image/") and kind not in UNTOLD:
        raise PictureError(f"A data URI holds {kind[:60]} and no picture; write data:image/png;base64,… .")
    if len(text) > 3 * limits.bytes:  # percent-encoded, the longest way to write a byte
        raise _too_large(DATA, limits)
    content = urllib.parse.unquote_to_bytes(text)
    if head.lower().endswith(";base64"):
        try:
            content = base64.b64decode(b"".join(content.split()), validate=True)
        except binascii.Error as error:
            raise PictureError("The base64 of a picture's data URI is damaged.") from error
    if len(content) > limits.bytes:
        raise _too_large(DATA, limits)
    return content


def _too_large(what: str, limits: FetchLimits) -> PictureError:
    return PictureError(f"{what} is larger than {limits.megabytes:g} MB, the most that is taken.")


# ---- one request ----------------------------------------------------------------------------------------------------


def _one_hop(address: str, limits: FetchLimits, deadline: float) -> tuple[bytes | None, str]:
    """What an address answers: content, or the address that it leads to."""
    shown = _failure(address)
    parts, host, port = _split(address, shown)
    expired = threading.Event()
    try:
        connection = _connect(host, port, parts.scheme == "https", limits, deadline)
    except PictureError as error:
        raise PictureError(f"{shown}: {error}.") from error
    except OSError as error:
        raise PictureError(f"{shown}: {_reason(error, limits)}.") from error

    opened = connection.sock  # which `http.client` lets go of where the answer closes the connection

    def expire() -> None:
        expired.set()
        with contextlib.suppress(OSError):  # it has ended by itself
            opened.shutdown(socket.SHUT_RDWR)

    watch = threading.Timer(max(deadline - time.monotonic(), 0), expire)
    watch.daemon = True
    watch.start()
    try:
        path = urllib.parse.quote(parts.path or "/", safe="/%:=&~+!$,;'@()*[]")
        query = urllib.parse.quote(parts.query, safe="/%:=&~+!$,;'@()*[]?")
        headers = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "minigpt4", "Connection": "close"}
        connection.request("GET", f"{path}?{query}" if query else path, headers=headers)
        response = connection.getresponse()
        if response.status in REDIRECTS and (target := response.getheader("Location")):
            return None, urllib.parse.urljoin(address, target)
        return _content(response, shown, limits, expired), address
    except (OSError, http.client.HTTPException) as error:
        if expired.is_set():
            raise PictureError(f"{shown}: it takes longer than {limits.seconds:g} seconds.") from error
        raise PictureError(f"{shown}: {_reason(error, limits)}.") from error
    finally:
        watch.cancel()
        connection.close()


def _failure(address: str) -> str:
    return f"{shown_name(address)} is not to be had"


def _split(address: str, shown: str) -> tuple[urllib.parse.SplitResult, str, int]:
    """The parts of an address that may be asked, its host and its port."""
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise PictureError(f"{shown}: its address cannot be read.") from error
    if parts.scheme not in ("http", "https"):
        raise PictureError(
            f"A picture is named as {address[:60]!r}; they come by http:, https: or data: addresses, not from files."
        )
    if not parts.hostname or parts.username is not None or parts.password is not None:
        raise PictureError(f"{shown}: its address has {'a password' if parts.hostname else 'no host'}.")
    return parts, parts.hostname, port or (443 if parts.scheme == "https" else 80)


def _look_up(host: str, port: int, deadline: float) -> list[Any]:
    """The addresses of a host. Nothing ends a look-up, so a thread that may stay behind does it."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except OSError as error:
            answers.put(error)
        except UnicodeError as error:  # no name of a host
            answers.put(socket.gaierror(str(error)))

    threading.Thread(target=ask, name="look-up", daemon=True).start()
    try:
        found = answers.get(timeout=max(deadline - time.monotonic(), 0))
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, OSError):
        raise found
    return list(found)


def _connect(host: str, port: int, secure: bool, limits: FetchLimits, deadline: float) -> http.client.HTTPConnection:
    """A connection to one of a host's addresses, each of which has been looked at."""
    found = _look_up(host, port, deadline)
    if not limits.allow_private and not all(is_public(str(place[4][0])) for place in found):
        raise PictureError("it lies on this machine or in a private network, from where nothing is fetched")
    failed: OSError = OSError("it has no address")
    for family, kind, protocol, _, place in found:
        opened = socket.socket(family, kind, protocol)
        try:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            opened.settimeout(left)
            opened.connect(place)
            if secure:
                opened = ssl.create_default_context().wrap_socket(opened, server_hostname=host)
            connection = http.client.HTTPConnection(host, port, timeout=left)
            connection.sock = opened
            if secure:
                connection.default_port = 443  # what the header `Host` leaves out
            return connection
        except OSError as error:
            opened.close()
            failed = error
    raise failed


def _content(response: http.client.HTTPResponse, shown: str, limits: FetchLimits, expired: threading.Event) -> bytes:
    """The body of an answer, if it looks like a picture."""
    if response.status != 200:
        raise PictureError(f"{shown}: the address answers {response.status} {response.reason}".rstrip() + ".")
    kind = (response.getheader("Content-Type") or "").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind not in UNTOLD:
        raise PictureError(f"{shown}: the address answers with {kind[:60]}, which is no picture.")
    if (response.length or 0) > limits.bytes:
        raise _too_large(shown.removesuffix(" is not to be had"), limits)
    content, whole = bytearray(), response.length
    while piece := response.read1(PIECE):
        content += piece
        if len(content) > limits.bytes:
            raise _too_large(shown.removesuffix(" is not to be had"), limits)
    if expired.is_set():
        raise TimeoutError
    if whole is not None and len(content) < whole:
        raise PictureError(f"{shown}: the connection ended before its end.")
    return bytes(content)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open network, also where it is wrapped in another."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        wrapped = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64 or int(ip) >> 32 == 0:  # the second is how IPv4 was written first
            wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if any(inner is not None and not is_public(str(inner)) for inner in wrapped):
            return False
        if ip.ipv4_mapped is not None:
            return True
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def _reason(error: Exception, limits: FetchLimits) -> str:
    """Why a connection failed, in a few words."""
    if isinstance(error, TimeoutError):
        return f"it takes longer than {limits.seconds:g} seconds"
    if isinstance(error, socket.gaierror):
        return "its host is unknown"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not valid ({error.verify_message})".replace(".)", ")")
    if isinstance(error, ConnectionRefusedError):
        return "its host refuses the connection"
    text = " ".join(str(getattr(error, "strerror", None) or error).split()).rstrip(".")
    return f"the connection failed ({text[:100] or type(error).__name__})"
