"""The server of transformers, which is another one in transformers 4: the one place that knows both."""

import contextlib
import copy
import inspect
from types import SimpleNamespace
from typing import Any

from modeling_minigpt4.compat_minigpt4 import IS_TRANSFORMERS_4
from processing_minigpt4 import ReplyStreamer
from recipes_minigpt4.serving.server_model import Loaded, RequestModel
from recipes_minigpt4.utils.errors import RecipeError


# What its servers are asked: the real chat is in the exchange, and `RequestProcessor` writes it.
PLACEHOLDER = [{"role": "user", "content": "-"}]


def build_app(loaded: Loaded) -> Any:
    """
    The server of transformers for one model that is loaded already.

    Raises:
        RecipeError: if something that it needs is missing.
    """
    try:
        # A template of replies would have them parsed in release 5 alone; `Ending` does it in both.
        getattr(loaded.processor, "tokenizer", loaded.processor).response_template = None
        return _app_4(loaded) if IS_TRANSFORMERS_4 else _app_5(loaded)
    except ImportError as error:
        raise RecipeError(
            f'Serving needs the extra [serve] ({error}), so run `pip install "minigpt4-transformers[serve]"`; '
            "transformers has to be 4.57, or 5.24 or later."
        ) from error


def _app_5(loaded: Loaded) -> Any:
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState, Modality

    class OneModel(ModelManager):
        """Has its model from the start to the end."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        @staticmethod
        def get_model_modality(model: Any, processor: Any = None) -> Any:
            return Modality.VLM

        def load_model_and_processor(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            return loaded.of_request()

        def list_models(self, cache_dir: str | None = None) -> list[dict]:
            return [loaded.card]

        def shutdown(self) -> None:
            """The process ends."""

    manager, state = OneModel(), GenerationState()
    handler = ChatCompletionHandler(model_manager=manager, generation_state=state)
    others = [name for name in inspect.signature(build_server).parameters if name.endswith("_handler")]
    none: dict[str, Any] = dict.fromkeys(others)  # nobody reaches the routes of these
    return build_server(manager, **{**none, "chat_handler": handler}, generation_state=state)


def _app_4(loaded: Loaded) -> Any:
    from transformers.commands import serving

    class OneModel(serving.ServeCommand):
        """Has its model from the start to the end."""

        def process_model_name(self, model_id: str) -> str:
            return model_id

        @staticmethod
        def get_model_modality(model: Any) -> Any:
            return serving.Modality.VLM

        def load_model_and_processor(self, *args: Any) -> tuple[Any, Any]:
            model, processor = loaded.of_request()
            return QuietModel(loaded, model.exchange), processor

        def get_gen_models(self) -> list[dict]:
            return [loaded.card]

        def is_continuation(self, req: dict) -> bool:
            return False  # the cache of whoever asked last is nobody's business

    # Which is looked into for families that call tools; a model that was never saved has none.
    loaded.model.config.architectures = loaded.model.config.architectures or [type(loaded.model).__name__]
    command, found = OneModel(serving.ServeArguments(log_level="warning")), []
    uvicorn, serving.uvicorn = serving.uvicorn, SimpleNamespace(run=lambda app, **_: found.append(app))
    try:
        command.run()  # makes the application, and would start it
    finally:
        serving.uvicorn = uvicorn
    return found[0]


class _Through(ReplyStreamer):
    """Cuts a reply into pieces in place of the streamer of transformers 4, which loses spaces behind line breaks."""

    def __init__(self, processor: Any, target: Any) -> None:
        super().__init__(processor)
        self.target = target

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.target.on_finalized_text(text, stream_end)


class QuietModel(RequestModel):
    """What transformers 4 runs in a thread of its own: errors are in the exchange, and a cache is asked for."""

    @property
    def generation_config(self) -> Any:
        return copy.deepcopy(self.loaded.model.generation_config)

    def generate(self, *, streamer: Any, **given: Any) -> Any:  # type: ignore[override]
        given["streamer"] = _Through(self.loaded.processor, streamer)
        with contextlib.suppress(Exception):  # told by whoever reads the stream
            super().generate(**given)
        return SimpleNamespace(past_key_values=None)
