"""`minigpt4 serve`: a model for clients that speak OpenAI's language."""

import argparse
from collections.abc import Sequence

from recipes_minigpt4.serving.options import build_parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What was asked for."""
    return build_parser("serve").parse_args(list(arguments))


def main(arguments: Sequence[str]) -> int:
    """
    Serve until a signal comes.

    Raises:
        RecipeError: if that cannot begin.
    """
    args = parse(arguments)
    if args.engine == "vllm":
        from recipes_minigpt4.serving.serve_vllm import serve

        if code := serve(args):
            raise SystemExit(code)
        return 0
    raise NotImplementedError
