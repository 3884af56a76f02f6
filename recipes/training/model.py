"""The model of a run with its frozen parts, its processor, and its adapter of PEFT."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType
from transformers import set_seed

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from modeling_minigpt4.checks_minigpt4 import why_missing
from modeling_minigpt4.peft_minigpt4 import find_peft_folder
from recipes_minigpt4.training.arguments import ModelArguments, StageArguments
from recipes_minigpt4.training.quantization import quantization_config
from recipes_minigpt4.utils.embedded_world import TINY, backbone_folder
from recipes_minigpt4.utils.errors import RecipeError, one_line


NO_MODEL = (
    "No model: name --vision, --language_model and perhaps --qformer, or an adapter with --model_name_or_path; "
    "--config tiny_stage1 has all that a first run needs."
)


def check_model(args: ModelArguments) -> None:
    """
    Make sure that a model is named, as far as can be told without loading it.

    Raises:
        RecipeError: if a part is not named, or what is named is no model of this package.
    """
    if args.model_name_or_path:
        check_saved(args.model_name_or_path)
    elif not {"vision", "language_model"} <= backbone_sources(args).keys():
        raise RecipeError(NO_MODEL)


def load_model(args: ModelArguments, training: StageArguments) -> tuple[MiniGPT4ForConditionalGeneration, Any]:
    """
    Compose or load the model, freeze what does not train, and make its processor.

    Raises:
        RecipeError: if a part is not named, cannot be found or does not fit.
    """
    set_seed(training.seed)  # a new projection is drawn from it
    options: dict[str, Any] = {"dtype": weights_dtype(args, training)}
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    if args.quantization is not None:
        options["quantization_config"] = quantization_config(args.quantization, options["dtype"])
    parts = backbone_sources(args)
    trust: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    template = {} if args.chat_template is None else {"chat_template": args.chat_template}
    try:
        if args.model_name_or_path:
            check_saved(args.model_name_or_path)
            model = MiniGPT4ForConditionalGeneration.from_pretrained(
                args.model_name_or_path, backbones=parts, **trust, **options
            )
            processor = MiniGPT4Processor.from_pretrained(args.model_name_or_path, **trust, **template)
            args.check_saved_fields(model.config)
        elif {"vision", "language_model"} <= parts.keys():
            options |= args.new_fields()
            if args.chat_template and "{" not in args.chat_template:  # not what the language model's own chats end in
                options["separator"] = "###" if args.chat_template.startswith("vicuna_v0") else None
            model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, **trust, **options)
            processor = MiniGPT4Processor.from_backbones(
                parts["vision"], parts["language_model"], model.config, **trust, **template
            )
        else:
            raise RecipeError(NO_MODEL)
        model.check_language_model_is_elsewhere()
        model.freeze_backbones(train=args.train_parts)
        if args.peft_config:
            add_adapter(model, args)
    except RecipeError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise RecipeError(f"{one_line(error)}.") from error
    return model, processor


def check_saved(path: str) -> tuple[Any, str]:
    """
    Make sure that a folder or repository holds a model of this package, as far as its configuration tells.

    Returns:
        What `find_peft_folder` tells: where an adapter that PEFT saved by itself is, or None, and the model below it.

    Raises:
        RecipeError: if there is none, or if it is another's.
    """
    try:
        found, base = find_peft_folder(path, {})
        fields, _ = MiniGPT4Config.get_config_dict(base)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"--model_name_or_path {path} cannot be opened: {why_missing(path)}; name the folder that a stage has "
            "written, or a repository with such a model."
        ) from error
    if (kind := fields.get("model_type")) != MiniGPT4Config.model_type:
        raise RecipeError(
            f"--model_name_or_path {base} is a model of the type {kind!r} and not one of this package; a language "
            "model alone is named with --language_model."
        )
    return found, base


def add_adapter(model: MiniGPT4ForConditionalGeneration, args: ModelArguments) -> None:
    """
    Put the adapter of `peft_config` on the language model.

    Raises:
        RecipeError: if there is one already, the language model trains itself, or PEFT knows no such configuration.
    """
    if model.has_adapter:
        raise RecipeError(f"{args.model_name_or_path} has an adapter, which goes on training; leave peft_config out.")
    if "language_model" in args.train_parts:
        raise RecipeError("An adapter needs a frozen language model; leave out peft_config or its train_parts.")
    try:
        model.add_adapter(read_peft_config(args.peft_config))
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(f"peft_config does not fit the language model: {one_line(error)}.") from error


def read_peft_config(value: Any) -> Any:
    """PEFT's own configuration from its fields, a mapping or JSON."""
    try:
        fields = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RecipeError(
            f'peft_config is no JSON ({one_line(error)}); write it as in {{"peft_type": "LORA", "r": 8}}.'
        ) from error
    kind = str(fields.get("peft_type")).upper() if isinstance(fields, Mapping) else None
    if kind not in PeftType.__members__:
        raise RecipeError(
            "peft_config is a mapping with a peft_type that PEFT knows, as in "
            f'{{"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}}; got {fields!r}.'
        )
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]](**{**fields, "peft_type": kind})
    except TypeError as error:
        raise RecipeError(f"peft_config has a field that PEFT does not know: {one_line(error)}.") from error


def weights_dtype(args: ModelArguments, training: StageArguments) -> torch.dtype:
    if args.dtype == "auto":
        return torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    dtype = getattr(torch, str(args.dtype), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise RecipeError(f"--dtype is {args.dtype!r}; it has to be float32, bfloat16, float16 or auto.")
    return dtype


def backbone_sources(args: ModelArguments) -> dict[str, str]:
    """Part → repository or folder of those that are named; `tiny` stands for the folder of the shipped one."""
    named = {"vision": args.vision, "qformer": args.qformer, "language_model": args.language_model}
    return {part: backbone_folder(part) if name == TINY else name for part, name in named.items() if name}
