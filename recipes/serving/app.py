"""
`minigpt4 app MODEL…`: show models on a page.

    minigpt4 app runs/stage2
    minigpt4 app untrained=runs/start stage1=runs/stage1 stage2=runs/stage2 --examples pictures
"""

import argparse
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from recipes_minigpt4.serving.addresses import free_port
from recipes_minigpt4.serving.app_chat import add_chat_tab
from recipes_minigpt4.serving.app_compare import add_compare_tab
from recipes_minigpt4.serving.app_guard import Guard
from recipes_minigpt4.serving.app_look import CSS as LOOK_CSS
from recipes_minigpt4.serving.app_look import add_look_tab
from recipes_minigpt4.serving.app_state import AppState
from recipes_minigpt4.serving.models import ModelOptions, Talker, check_labels, open_talker
from recipes_minigpt4.serving.options import build_parser
from recipes_minigpt4.serving.page_chat import PageChats
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.space import make_space
from recipes_minigpt4.serving.uploads import find_examples, kept_folder, upload_folder
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.runs import quiet


MOST_BYTES = 20 << 20  # of an upload
MOST_WAITING = 32  # questions in line
KEPT_SECONDS = 24 * 3600  # that uploads stay while the page is served
# What Gradio reads in the environment: it reports nothing, and keeps no history of runs on the Hub.
ENVIRONMENT = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    font=("system-ui", "sans-serif"),  # those of the reader's machine: none are fetched
    font_mono=("ui-monospace", "monospace"),
)
CSS = """
.gradio-container { max-width: 1200px !important; width: 100% !important; margin: 0 auto !important; }
#title h1 { margin: 0; font-size: 1.4rem; }
#title p { margin: 0; }
#chat-log .example-image { width: 96px; height: 96px; object-fit: cover; }
#chat-log .example-image-container { width: auto; height: auto; }
#chat-log .user img { min-height: 160px; object-fit: contain; }
#chat-log .user .image-container:not(:hover) .icon-button-wrapper { opacity: 0; }
#chat-log .edit-textarea { width: min(24rem, 60vw) !important; min-height: 4rem !important; }
#chat-log .placeholder { text-align: center; padding: 0 1rem; }
#chat-log [aria-label="Share"], #chat-log > [data-testid="status-tracker"] { display: none; }
"""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """
    Read a command line.

    Raises:
        RecipeError: if it is wrong.
    """
    return build_parser("app").parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Load the models and serve the page until Ctrl-C or SIGTERM."""
    args = parse(arguments)
    if args.space or args.space_dir is not None:
        print(make_space(args))
        return
    talkers = open_talkers(args)
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with upload_folder():
        page = build(args, talkers)
        try:
            launch(page, args)
            print(f"Open {page.share_url or page.local_url} – Ctrl-C ends it.", flush=True)
            threading.Event().wait()
        except KeyboardInterrupt:
            print("The page is closed.", file=sys.stderr)
        finally:
            signal.signal(signal.SIGTERM, former)
            page.chats.close_all()
            if page.votes is not None:
                page.votes.close()
            page.close(verbose=False)


def open_talkers(args: argparse.Namespace) -> dict[str, Talker]:
    """
    The models of the command line by label.

    Raises:
        RecipeError: if one cannot be loaded, or two have one label.
    """
    check_labels(args.models)
    options = ModelOptions.of(args)
    talkers: dict[str, Talker] = {}
    for name in args.models:
        print(f"Loading {name} …", file=sys.stderr, flush=True)
        with quiet():
            talker = open_talker(name, options)
        print(talker.about, flush=True)
        talkers[talker.label] = talker
    return talkers


def build(args: argparse.Namespace, talkers: Mapping[str, Talker]) -> Any:
    """
    The page; call it in `upload_folder()`.

    Args:
        args: what the parser of `options.py` makes of the command line.
        talkers: the models by label.

    Returns:
        A `gradio.Blocks`, whose `chats` are those of the people who look at it.

    Raises:
        RecipeError: if there is no picture in the folder of examples.
    """
    settings, uploads = ReplySettings.of(args), kept_folder()
    app = AppState(talkers, settings, copy_examples(args.examples, uploads), args.output_dir, uploads, PageChats())
    blocks = gr.Blocks(title="MiniGPT-4", analytics_enabled=False, delete_cache=(3600, KEPT_SECONDS))
    with blocks as page:
        gr.Markdown(f"# MiniGPT-4\n{' · '.join(talkers)}", elem_id="title")
        with gr.Tabs():
            add_chat_tab(app, page)
            votes = add_compare_tab(app, page)
            add_look_tab(app, page)
    page.chats, page.votes = app.chats, votes
    return page


def copy_examples(folder: Path | None, uploads: Path) -> list[Path]:
    """
    Copy pictures to where the page may show them from; see `find_examples`.

    Raises:
        RecipeError: if there are none.
    """
    copies: list[Path] = []
    for path, _ in () if folder is None else find_examples(folder):
        (uploads / "examples").mkdir(parents=True, exist_ok=True)
        copies.append(Path(shutil.copyfile(path, uploads / "examples" / path.name)))
    return copies


def launch(page: Any, args: argparse.Namespace) -> None:
    """
    Serve the page in another thread.

    Args:
        page: of `build`.
        args: what the parser of `options.py` makes of the command line.

    Raises:
        RecipeError: if the address or the port cannot be used.
    """
    os.environ.update(ENVIRONMENT)
    page.queue(max_size=MOST_WAITING)
    try:
        page.launch(
            server_name=args.host,
            server_port=free_port(args.host) if args.port == 0 else args.port,
            share=args.share,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=MOST_BYTES,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            inline=False,
            footer_links=["api", "gradio", "settings"],
            app_kwargs={"middleware": [Middleware(Guard)]},
            theme=THEME,
            css=CSS + LOOK_CSS,
        )
    except OSError as error:
        raise RecipeError(
            f"The page cannot be served at {args.host}, port {args.port or 7860} ({error}); name another with --port."
        ) from error
