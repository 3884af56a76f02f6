"""
`minigpt4 app FOLDER…`: show models on a page.

    minigpt4 app runs/stage2
    minigpt4 app untrained=runs/start stage1=runs/stage1 stage2=runs/stage2
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr

from recipes_minigpt4.serving.app_chat import add_chat_tab
from recipes_minigpt4.serving.app_compare import add_compare_tab
from recipes_minigpt4.serving.app_look import add_look_tab
from recipes_minigpt4.serving.app_state import AppState
from recipes_minigpt4.serving.models import ModelOptions, Talker, open_talker
from recipes_minigpt4.serving.options import build_parser
from recipes_minigpt4.serving.settings import ReplySettings


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the models and serve the page until Ctrl-C."""
    args = build_parser("app").parse_args(arguments)
    options = ModelOptions(args.device, args.dtype, args.quantization, args.trust_remote_code)
    talkers = {}
    for name in args.models:
        talker = open_talker(name, options)
        talkers[talker.label] = talker
    page = build(args, talkers)
    page.launch(server_name=args.host, server_port=args.port, share=args.share)


def build(args: argparse.Namespace, talkers: Mapping[str, Talker]) -> gr.Blocks:
    """
    The page.

    Args:
        args: what the parser of `options.py` makes of the command line.
        talkers: the models by label.
    """
    settings = ReplySettings()
    app = AppState(talkers, settings, [], Path(args.output_dir))
    with gr.Blocks(title="MiniGPT-4", analytics_enabled=False) as page:
        add_chat_tab(app, page)
        add_compare_tab(app, page)
        add_look_tab(app, page)
    return page
