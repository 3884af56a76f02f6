"""What the entry point `lmms_eval.models` tells lmms-eval: where the model `minigpt4` is."""

from lmms_eval.models.registry_v2 import ModelManifest


MODELS = "recipes_minigpt4.evaluation.harness.lmms_model"


def manifest() -> ModelManifest:
    """The model for tasks that give whole chats, and with `--force_simple` the one that scores likelihoods too."""
    return ModelManifest("minigpt4", chat_class_path=f"{MODELS}.MiniGPT4Chat", simple_class_path=f"{MODELS}.MiniGPT4")
