"""What the entry point `vllm.general_plugins` runs in every process of vLLM: it makes MiniGPT-4 known there."""

import importlib.util
import logging
import os


ARCHITECTURE = "MiniGPT4ForConditionalGeneration"
MODE = "minigpt4"  # of tokenizer and renderer, see `--tokenizer-mode`
NEEDED = ("vllm.renderers.registry", "vllm.tokenizers.registry", "vllm.multimodal.processing.processor")
_HERE = "recipes_minigpt4.serving"

logger = logging.getLogger("vllm.minigpt4")


def register() -> None:
    """
    Register the model and how its prompts are made, by name: nothing is imported before it is asked for.

    vLLM runs this whatever it serves, so a release of it that has no such places gets a warning and no error.
    """
    if missing := [name for name in NEEDED if not is_there(name)]:
        logger.warning("MiniGPT-4 cannot be served: this release of vLLM has no %s.", ", ".join(missing))
        return
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import modeling_minigpt4  # noqa: F401  # registers configuration and processor with the Auto classes

    ModelRegistry.register_model(ARCHITECTURE, f"{_HERE}.vllm_model:MiniGPT4ForVLLM")
    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, f"{_HERE}.vllm_renderer", "MiniGPT4Renderer")
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Settings
    if os.environ.get("VLLM_MEDIA_CONNECTOR") == MODE:
        from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

        from recipes_minigpt4.serving.vllm_pictures import PictureConnector

        MEDIA_CONNECTOR_REGISTRY.register(MODE)(PictureConnector)


def is_there(module: str) -> bool:
    """Whether a module can be imported, by its place."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of what it lies in
        return False


class Settings:
    """What vLLM asks about a model before it serves it."""

    @staticmethod
    def verify_and_update_model_config(model_config: object) -> None:
        """Have prompts made by the renderer of ours, whatever the command line says."""
        model_config.tokenizer_mode = MODE  # type: ignore[attr-defined]

    @staticmethod
    def verify_and_update_config(vllm_config: object) -> None:
        """Nothing has to be changed there."""
