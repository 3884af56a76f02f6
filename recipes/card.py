"""The model card of a trained adapter, rendered from MODEL_CARD.md.

A card goes to people who do not have this machine: folders appear by their last name only, never with their path.
"""

import os
import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modeling_minigpt4.backbones import HERE
from modeling_minigpt4.peft_minigpt4 import plain_names
from modeling_minigpt4.quantization_minigpt4 import stored_quantization
from recipes_minigpt4 import TINY


PARTS = {"vision": "vision encoder", "qformer": "Q-Former", "language_model": "language model"}
TAGS = ["minigpt-4", "image-text-to-text", "image-captioning"]
TRAINING_TAGS = ["adapter", "trl", "sft"]

# Settings of a run that a card tells, under these names.
SETTINGS = {
    "learning_rate": "learning rate",
    "min_learning_rate": "lowest learning rate",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay (matrices only)",
    "seed": "seed",
}


def card_template() -> str:
    """The text of MODEL_CARD.md, a Jinja template that reads well as it stands."""
    return resources.files(__package__).joinpath("MODEL_CARD.md").read_text(encoding="utf-8")


def is_local(name: str) -> bool:
    """Whether a name is a path of this machine rather than a repository of the Hub, such as `owner/name`."""
    if name == HERE:
        return False
    return os.path.isabs(name) or name.startswith((".", "~")) or os.path.exists(name) or name.count("/") > 1


def public_name(name: str, revision: str | None = None) -> str:
    """A backbone or a dataset as a card may show it, in Markdown."""
    if name == TINY:
        return "generated scenes of coloured shapes (the embedded world of `minigpt4-transformers`)"
    if name == HERE:
        return "this repository"
    if is_local(name):
        return f"a local folder or file ({os.path.basename(os.path.normpath(name))})"
    at = f", revision `{revision}`" if revision else ""
    return f"[{name}](https://huggingface.co/{name}){at}"


def render_card(
    model: Any,
    args: Any = None,
    *,
    language: "str | list[str]" = "en",
    license: str = "other",
    title: str | None = None,
    steps: int | None = None,
    stage: int | None = None,
    dataset_name: str | None = None,
    repo_id: str | None = None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """
    Render the card of a model.

    Args:
        model: the trained model; its configuration names the backbones.
        args: settings of the run, such as `StageArguments`; the next three come from there if it is given.
        language: that of the training text.
        license: that of the trained weights.
        title: name of the model; the last part of `repo_id` if there is one.
        steps: optimizer steps that were taken.
        stage: 1 or 2, if it was one of the two.
        dataset_name: what it was trained on; a path becomes its last name.
        repo_id: where it is published; that of the settings if left out.
        results: measure → value, the table of results.

    Returns:
        The card in Markdown with its metadata in front.
    """
    if args is not None:
        language, license = args.language, args.license
        title = title or os.path.basename(os.path.normpath(args.output_dir))
        repo_id = repo_id or args.hub_model_id
    sources = {part: source for part, source in model.config.backbones.items() if part in PARTS}
    public = {part: source for part, source in sources.items() if not is_local(source["name_or_path"])}
    base_models = [
        name for name in dict.fromkeys(source["name_or_path"] for source in public.values()) if name != HERE
    ]
    on_hub = dataset_name and dataset_name != TINY and not is_local(dataset_name)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_models or None,
        base_model_relation="adapter" if base_models else None,
        datasets=[dataset_name] if on_hub else None,
        tags=TAGS if args is None else TAGS + TRAINING_TAGS,
    )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    card = ModelCard.from_template(
        data,
        template_str=card_template(),
        repo_id=repo_id,
        title=(repo_id or title or "MiniGPT-4").split("/")[-1],
        stage=stage,
        holds=_holds(sources),
        parts={
            PARTS[part]: public_name(source["name_or_path"], source.get("revision"))
            for part, source in sources.items()
        },
        local_parts=[PARTS[part] for part in sources if part not in public],
        trained=_trained_parts(model, trained),
        trained_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        training_data=public_name(dataset_name) if dataset_name else None,
        settings=None if args is None else _settings(model, args, steps),
        results={name: _format(value) for name, value in (results or {}).items()},
    )
    # The template hides from its readers, in comments, what is to be filled in; empty ones are left of them.
    text = re.sub(r"<!--.*?-->", "", str(card), flags=re.DOTALL)
    return re.sub(r"\n{3,}", "\n\n", text)


def _holds(sources: Mapping[str, Mapping[str, Any]]) -> str:
    """What lies in the repository itself: `"everything"`, the `"vision"` side too, or the `"projection"` alone."""
    if not sources:
        return "everything"
    return "vision" if any(source["name_or_path"] == HERE for source in sources.values()) else "projection"


def _trained_parts(model: Any, names: list[str]) -> list[str]:
    """Names of the parts that were trained; a language model with an adapter was not trained itself."""
    parts = set()
    for name, plain in plain_names(model, names).items():
        part = name.removeprefix("model.").split(".")[0]
        kinds = "" if plain is not None else ", ".join(config.peft_type.value for config in model.peft_config.values())
        parts.add(f"{part} ({kinds} adapter)" if kinds else part)
    return sorted(parts)


def _settings(model: Any, args: Any, steps: int | None) -> dict[str, str]:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = {"steps": f"{steps:,}"} if steps else {}
    settings["batch size"] = str(batch)
    settings.update({text: _format(getattr(args, name)) for name, text in SETTINGS.items() if hasattr(args, name)})
    if model.is_language_model_quantized:
        bits = 4 if getattr(model.language_model, "is_loaded_in_4bit", False) else 8
        settings["language model in training"] = f"{bits} bits ({stored_quantization(model.config)})"
    settings["precision"] = "bfloat16 mixed" if args.bf16 else "float16 mixed" if args.fp16 else "float32"
    return settings


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
