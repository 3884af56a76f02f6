"""The model card of a trained adapter, rendered from card_template.md.

A card goes to people who do not have this machine: folders appear by their last name only, never with their path.
"""

import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, metadata_load, try_to_load_from_cache

from modeling_minigpt4.backbones import HERE
from modeling_minigpt4.peft_minigpt4 import plain_names
from modeling_minigpt4.quantization_minigpt4 import stored_quantization
from modeling_minigpt4.remote_code_minigpt4 import code_places
from recipes_minigpt4.utils.embedded_world import TINY
from recipes_minigpt4.utils.redaction import redact


PARTS = {"vision": "vision encoder", "qformer": "Q-Former", "language_model": "language model"}
TAGS = ["minigpt-4", "image-text-to-text", "image-captioning"]
NO_RESULTS = "No measurements were given with this card."  # in the template, until there are some
NAMELESS = "your-name/your-adapter"  # in the template, where a card names its repository
TRAINING_TAGS = ["adapter", "trl", "sft"]

EVA_WIDTH = 1408  # channels of EVA-CLIP ViT-g/14, the encoder of BLIP-2
LLAMA_VOCABULARIES = (32000, 32001)  # of LLaMA and Llama 2, and of Vicuna v0

# What the Hub allows as `owner/name`, or as `name` of its oldest ones.
_REPOSITORY = re.compile(r"(?!.*(?:--|\.\.))(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
DATA_FILES = {".csv", ".gz", ".json", ".jsonl", ".parquet", ".tar", ".tgz", ".tsv", ".zip"}

# A path in a text: one that starts like one, has two slashes, or ends like a file of data. All up to the last slash of
# the text is taken, so that a name with blanks leaves nothing behind.
_ENDING = "|".join(ending[1:] for ending in sorted(DATA_FILES))
_PATH = re.compile(
    r"(?<![\w.~/\\:-])(?:[A-Za-z]:[\\/]|\w+://|\\\\|(?:~\w*|\.\.?)?[\\/]"
    rf"|[^\s\\/]+[\\/](?=\S*[\\/]|\S*\.(?:{_ENDING})\b))(?:.*[\\/])?",
    re.DOTALL,
)
UNNAMED = "unnamed"

# Settings of a run that a card tells, under these names.
SETTINGS = {
    "learning_rate": "learning rate",
    "min_learning_rate": "lowest learning rate",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay (matrices only)",
    "seed": "seed",
}


def card_template() -> str:
    """The text of card_template.md, a Jinja template for `huggingface_hub.ModelCard`."""
    return resources.files(__package__).joinpath("card_template.md").read_text(encoding="utf-8")


def last_name(name: str) -> str:
    """The last part of a path, pattern or address, of this system or another; all that a card may show of it."""
    parts = [part for part in re.split(r"[/\\]", redact(name).removesuffix("?…")) if part.strip()]
    last = parts[-1] if parts else ""
    return UNNAMED if not last.strip(".~ ") else _as_cell(last)


def is_local(name: str) -> bool:
    """Whether a name is something of this machine or of the web rather than a repository, such as `owner/name`."""
    if name == HERE:
        return False
    suffix = os.path.splitext(name)[1].lower()
    return not _REPOSITORY.fullmatch(name) or suffix in DATA_FILES or os.path.exists(name)


def hub_dataset(name: str) -> str | None:
    """The dataset of the Hub that a name means, as in `owner/name` or `hf://datasets/owner/name/*.tar`; or None."""
    inside = re.match(r"hf://datasets/([^/@]+/[^/@]+)(?:@[^/]+)?(?:/|$)", name)
    name = inside[1] if inside else name
    known = _REPOSITORY.fullmatch(name) and name not in (TINY, HERE) and (inside or not is_local(name))
    return name if known else None


def public_name(name: str, revision: str | None = None) -> str:
    """A backbone as a card may show it, in Markdown."""
    if name == HERE:
        return "this repository"
    if is_local(name):
        return _unreachable(name)
    at = f", revision `{_as_cell(revision)}`" if revision else ""
    return f"[{name}](https://huggingface.co/{name}){at}"


def public_dataset(name: str) -> str:
    """A dataset as a card may show it, in Markdown."""
    if name == TINY:
        return "generated scenes of coloured shapes (the embedded world of `minigpt4-transformers`)"
    if (dataset := hub_dataset(name)) is not None:
        return f"[{dataset}](https://huggingface.co/datasets/{dataset})"
    return _unreachable(name)


def _unreachable(name: str) -> str:
    kind = "files of the web" if re.match(r"\w+://", name) else "a local folder or file"
    return f"{kind} ({last_name(name)})"


def public_text(value: Any) -> str:
    """What somebody wrote, as a cell of a table without secrets; of a path in it only the last name is left."""
    return _as_cell(_PATH.sub("", redact(_format(value))))


def _as_cell(text: str) -> str:
    return re.sub(r"[|`<>\[\]]", "", " ".join(text.split()))


def render_card(
    model: Any,
    args: Any = None,
    *,
    language: "str | list[str]" = "en",
    license: str = "other",
    title: str | None = None,
    steps: int | None = None,
    stage: int | None = None,
    dataset_name: str | Sequence[str] | None = None,
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
        dataset_name: what it was trained on, one name or several; a path becomes its last name.
        repo_id: where it is published; that of the settings if left out.
        results: measure → value, the table of results.

    Returns:
        The card in Markdown with its metadata in front.
    """
    if args is not None:
        language, license = args.language, args.license
        here = last_name(args.output_dir) == UNNAMED  # as in `.`
        title = title or (os.path.abspath(args.output_dir) if here else args.output_dir)
        repo_id = repo_id or args.hub_model_id
    repo_id = repo_id if repo_id and _REPOSITORY.fullmatch(repo_id) else None
    names = [dataset_name] if isinstance(dataset_name, str) else list(dataset_name or [])
    datasets = list(dict.fromkeys(found for name in names if (found := hub_dataset(name))))
    sources = {part: model.config.backbones[part] for part in PARTS if part in model.config.backbones}
    public = {part: source for part, source in sources.items() if not is_local(source["name_or_path"])}
    base_models = [
        name for name in dict.fromkeys(source["name_or_path"] for source in public.values()) if name != HERE
    ]
    language = public_text(language) if isinstance(language, str) else [public_text(one) for one in language]
    license = public_text(license)
    data = ModelCardData(
        language=language,
        license=license,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        base_model=base_models or None,
        base_model_relation="adapter" if base_models else None,
        datasets=datasets or None,
        tags=TAGS if args is None else TAGS + TRAINING_TAGS,
    )
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    card = ModelCard.from_template(
        data,
        template_str=card_template(),
        repo_id=repo_id,
        title=last_name(repo_id or title or "MiniGPT-4"),
        stage=stage,
        holds=_holds(sources),
        parts={
            PARTS[part]: public_name(source["name_or_path"], source.get("revision")) + _told_licence(source)
            for part, source in sources.items()
        },
        code={
            PARTS[part]: " and ".join(public_name(*place) for place in places)
            for part, places in code_places(model.config).items()
        },
        trust=", trust_remote_code=True" if code_places(model.config) else "",
        local_parts=[PARTS[part] for part in sources if part not in public],
        **describe_parts(model.config, sources),
        trained=_trained_parts(model, trained),
        trained_parameters=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        training_data=", ".join(dict.fromkeys(map(public_dataset, names))) or None,
        settings=None if args is None else _settings(model, args, steps),
        results={public_text(name): public_text(value) for name, value in (results or {}).items()},
    )
    return str(card)


# ---- parts ----------------------------------------------------------------------------------------------------------


def describe_parts(config: Any, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    What the template tells of the parts: their kinds, tokens of a picture, and what is known of some of them.

    Args:
        config: of the model.
        sources: part → where it comes from.
    """
    configs = {"vision": config.vision_config, "qformer": config.qformer_config, "language_model": config.text_config}
    words = str(sources.get("language_model", {}).get("name_or_path", "")).lower()
    eva = configs["vision"].model_type == "blip_2_vision_model" and configs["vision"].hidden_size == EVA_WIDTH
    original = eva and config.text_config.model_type == "llama" and config.text_config.vocab_size in LLAMA_VOCABULARIES
    unnamed = original and not words
    known = {
        "Vicuna v0 derives from LLaMA and is for research only": "vicuna" in words or unnamed,
        "Llama 2 has Meta's community licence": re.search(r"llama-?2", words) or unnamed,
        "BLIP-2 and EVA-CLIP are under permissive ones": eva,
    }
    return {
        "kinds": {PARTS[part]: one.model_type for part, one in configs.items() if one is not None},
        "image_tokens": config.num_image_tokens,
        "original": original,
        "known_licences": "; ".join(text for text, holds in known.items() if holds),
    }


def _told_licence(source: Mapping[str, Any]) -> str:
    """The licence of a backbone behind its name, if its folder or what is cached of its repository tells one."""
    found = find_licence(source["name_or_path"], source.get("revision"))
    return f", licence {public_text(found)}" if found else ""


def find_licence(name: str, revision: str | None = None) -> str | None:
    """The licence that the card of a local or cached backbone names; nothing is fetched."""
    folder = Path(os.path.expanduser(name))
    card: Any = folder / "README.md" if folder.is_dir() else None
    if card is None and name != HERE and not is_local(name):
        card = try_to_load_from_cache(name, "README.md", revision=revision)
    try:
        fields = metadata_load(card) if isinstance(card, (str, Path)) and os.path.isfile(card) else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    licence = (fields or {}).get("license_name") or (fields or {}).get("license")
    return licence if isinstance(licence, str) else None


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
    if getattr(args, "warmup_ratio", 0):
        settings[SETTINGS["warmup_steps"]] = f"{100 * args.warmup_ratio:.3g} % of all"
    if model.is_language_model_quantized:
        bits = 4 if getattr(model.language_model, "is_loaded_in_4bit", False) else 8
        settings["language model in training"] = f"{bits} bits ({stored_quantization(model.config)})"
    settings["precision"] = "bfloat16 mixed" if args.bf16 else "float16 mixed" if args.fp16 else "float32"
    return settings


def _format(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
