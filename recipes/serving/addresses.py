"""Where servers of this room listen."""

import socket


OPEN_TO_ALL = "Everybody who reaches this machine may ask: there is no --api_key, and no MINIGPT4_API_KEY."


def free_port(host: str) -> int:
    """A port that nobody listens at."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as opened:
        opened.bind((host, 0))
        return int(opened.getsockname()[1])


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


def in_address(host: str) -> str:
    """A host as it stands in an address of the web."""
    return f"[{host}]" if ":" in host else host
