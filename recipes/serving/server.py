"""The server of `minigpt4 serve`, put together: transformers' own, with what stands in front of it."""

import argparse
import sys
import time
from typing import Any

from recipes_minigpt4.evaluation.speakers import BlipSpeaker, ChatSpeaker, open_speaker
from recipes_minigpt4.serving.models import ModelOptions, Talker, client_name, split_label
from recipes_minigpt4.serving.server_compat import build_app
from recipes_minigpt4.serving.server_front import Front, FrontSettings
from recipes_minigpt4.serving.server_model import Loaded
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.picture_fetching import FetchLimits
from recipes_minigpt4.utils.runs import quiet


def build(args: argparse.Namespace) -> Any:
    """
    Load the model, and make the application that answers for it; its `loaded` is the model.

    Args:
        args: see `serve.parse`.

    Raises:
        RecipeError: if the model cannot be loaded, or cannot be asked in chats.
    """
    start, (label, name) = time.perf_counter(), split_label(args.model)
    options = ModelOptions.of(args).for_speaker()
    # Not as a talker, whose penalties are those of the original's demo: replies are those of `generate`.
    print(f"Loading {name} …", file=sys.stderr, flush=True)
    with quiet():
        speaker = None if name.startswith("openai:") else open_speaker(name, options)
    if not isinstance(speaker, ChatSpeaker) or isinstance(speaker, BlipSpeaker):
        raise RecipeError(f"{name} is no chat model that can be loaded here, and clients send chats; name one.")
    print(Talker(label, name, speaker, time.perf_counter() - start).about, flush=True)
    loaded = Loaded(client_name(args.model), speaker.model, speaker.processor)
    limits = FetchLimits(args.max_picture_mb, args.fetch_seconds, args.allow_private_addresses)
    app: Any = Front(build_app(loaded), loaded, FrontSettings(args.api_key, limits, args.max_megapixels))
    if args.allow_origins:
        from starlette.middleware.cors import CORSMiddleware

        app = CORSMiddleware(app, allow_origins=args.allow_origins, allow_methods=["*"], allow_headers=["*"])
        app.loaded = loaded
    return app
