"""`minigpt4 serve`: a model for clients that speak OpenAI's language, on the server of transformers."""

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from recipes_minigpt4.serving.addresses import OPEN_TO_ALL, in_address, is_loopback
from recipes_minigpt4.serving.options import build_parser
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.redaction import remember_secret


KEY = "MINIGPT4_API_KEY"
NEEDED = ("fastapi", "uvicorn", "openai")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """
    What was asked for.

    Raises:
        RecipeError: for what does not go together.
    """
    args = build_parser("serve").parse_args(list(arguments))
    args.api_key = args.api_key or os.environ.get(KEY) or None
    if args.engine == "transformers" and args.engine_arguments:
        raise RecipeError(f"What stands behind -- is for --engine vllm: {' '.join(args.engine_arguments)}.")
    return args


def main(arguments: Sequence[str]) -> int:
    """
    Serve until a signal comes; replies that are under way end first.

    Raises:
        RecipeError: if that cannot begin.
    """
    args = parse(arguments)
    if args.api_key:
        remember_secret(args.api_key)
    if args.engine == "vllm":
        from recipes_minigpt4.serving.serve_vllm import serve

        if code := serve(args):
            raise SystemExit(code)
        return 0
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise RecipeError(
            f"{' and '.join(missing)} not found: serving needs the extra [serve], so run "
            '`pip install "minigpt4-transformers[serve]"`.'
        )
    with bind(args.host, args.port) as opened:  # before the model, which takes longer
        from recipes_minigpt4.serving.server import build

        app = build(args)
        place = f"http://{in_address(args.host)}:{opened.getsockname()[1]}"
        print(f"{app.loaded.name} answers at {place}/v1 (Ctrl-C ends).", flush=True)
        if not args.api_key and not is_loopback(args.host):
            print(OPEN_TO_ALL, flush=True)
        run(app, opened)
    return 0


@contextlib.contextmanager
def bind(host: str, port: int) -> Iterator[socket.socket]:
    """
    A socket that has an address, and takes no calls yet.

    Raises:
        RecipeError: if it cannot have it.
    """
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(place)
    except OSError as error:
        raise RecipeError(
            f"Port {port} of {host} cannot be used ({error.strerror}); name another with --port."
        ) from error
    with opened:
        yield opened


def run(app: Any, opened: socket.socket) -> None:
    """Answer until SIGINT or SIGTERM comes, and then until all replies under way have ended."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="info"))
    # Once it has ended by a signal, uvicorn raises it again, for those who were there before.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[opened])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
