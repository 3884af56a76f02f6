"""Joining backbones and a projection: `from_backbones` makes a new model, `from_pretrained` loads a saved one."""

import copy
import inspect
import os
from collections.abc import Mapping
from typing import Any, Self

import torch
from transformers import Blip2VisionConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from .backbones import (
    HERE,
    HUB_OPTIONS,
    Checkpoint,
    check_shapes,
    collect,
    describe,
    fetch_options,
    hub_only,
    load_backbone_config,
    part_of,
)
from .checks_minigpt4 import check_dtype, check_part
from .compat_minigpt4 import DEFAULT_DTYPE
from .configuration_minigpt4 import (
    TIMM,
    MiniGPT4Config,
    build_vision_model,
    told_hidden_size,
    vision_output_shape,
)
from .generation_minigpt4 import compose_generation_config
from .patches_minigpt4 import default_fields
from .peft_minigpt4 import find_peft_folder
from .projector_minigpt4 import new_projection, start_at_words
from .remote_code_minigpt4 import read_parts, take_code
from .sources_minigpt4 import check_parts, moved_backbones, normalize_source
from .unchanged_minigpt4 import Provided, remember_backbones


class CompositionMixin(PreTrainedModel):
    """
    Loads a model from the checkpoint of its projection and from the backbones that `config.backbones` names.

    Everything about dtypes, devices and quantization is left to transformers: this class finds the tensors, checks
    them and hands them over.
    """

    # Names of tensors that came with the checkpoint although their part has a backbone, e.g. a tuned Q-Former.
    _own_tensors: frozenset[str] = frozenset()

    # What the backbones have provided, by the names of the whole model without an adapter.
    _provided: Mapping[str, Provided] = {}

    @classmethod
    def from_backbones(
        cls,
        vision: Any,
        language_model: Any,
        qformer: Any = None,
        separator: str | None = "auto",
        **kwargs: Any,
    ) -> Self:
        r"""
        Join a vision encoder and a language model by a new projection; both are frozen and stay what they are.

        Args:
            vision: repository, `"repository@revision"`, folder, or dict with `name_or_path`, `revision`, `subfolder`:
                any model of `AutoModel` that takes pictures, or a composite one (BLIP-2, CLIP) that holds one.
            language_model: the same for any decoder of `AutoModelForCausalLM`.
            qformer: the same for a repository that holds a BLIP-2 Q-Former and its queries. `None` joins patches
                instead.
            separator: text at which replies end beside EOS. `"auto"` is `###`, the original's, unless the language
                model's tokenizer brings a chat template, whose turns end with EOS. `None` for EOS only.
            **kwargs: fields of [`MiniGPT4Config`] (`projector_num_layers`, `patch_merge_size`, `image_size`, …), where
                what is not said of the joining of patches is made to fit the encoder, and `projector_norm` is true
                and `projector_init` `"embeddings"` between parts that are not the original's; everything else goes to
                `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `cache_dir`, `token`, …).
                `trust_remote_code=True` runs code that a part brings, if transformers has no model of its type.

        Returns:
            The model with `config.backbones` filled, revisions pinned, and a projection drawn from torch's seed as
            `projector_init` says.

        Raises:
            OSError: if a repository or folder cannot be opened.
            ValueError: if the parts do not fit together, or one brings code that is not trusted.
        """
        fields = set(inspect.signature(MiniGPT4Config).parameters) - {"kwargs", "backbones"}
        options = {name: kwargs.pop(name) for name in fields & set(kwargs)}
        hub = {name: kwargs.get(name) for name in HUB_OPTIONS}
        hub["trust_remote_code"] = bool(kwargs.pop("trust_remote_code", False))
        config = compose_config(vision, language_model, qformer, hub, **options)
        model: Self = cls._compose(config, hub, **kwargs)
        if model.can_generate():
            source = config.backbones["language_model"]
            model.generation_config = compose_generation_config(source, config, separator, hub)
        return model

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        backbones: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Load a full checkpoint, or an adapter-only one together with the backbones that its configuration names.

        Takes every option of [`~transformers.PreTrainedModel.from_pretrained`]: `dtype`, `device_map`,
        `quantization_config`, `attn_implementation`, … Of an adapter-only checkpoint all but the projection is frozen.
        Quantized are linear layers of the language model's decoder alone, less those that the config leaves out.

        Args:
            pretrained_model_name_or_path: repository or folder of the checkpoint.
            config: configuration to use instead of the checkpoint's.
            backbones: part (`"vision"`, `"qformer"`, `"language_model"`) → repository, folder or dict, for backbones
                that have moved. They must hold the weights that the projection was trained with.
            trust_remote_code (`bool`, *optional*): run the code that a backbone brings, at the revision that the
                configuration names.

        Raises:
            OSError: if a file of the checkpoint or of a backbone is missing or damaged.
            ValueError: if a tensor is missing, has another shape, or is not the one the projection was trained with;
                or if a backbone brings code that is not trusted.
        """
        load = super().from_pretrained
        check_dtype(kwargs)
        check_parts(backbones or {})
        adapter, pretrained_model_name_or_path = find_peft_folder(pretrained_model_name_or_path, kwargs)
        where = {name: kwargs[name] for name in (*HUB_OPTIONS, "revision", "subfolder") if name in kwargs}
        if pretrained_model_name_or_path is not None and not isinstance(config, PretrainedConfig):
            path = pretrained_model_name_or_path if config is None else config
            # A configuration would take "auto" for its own dtype, and swallow `torch_dtype`, the name before 4.56.
            ours = ("dtype", "torch_dtype", "quantization_config", "trust_remote_code")
            loading: dict[str, Any] = {name: kwargs.pop(name) for name in ours if name in kwargs}
            config, kwargs = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
            kwargs = {**kwargs, **where, **loading}
        whole = {"name_or_path": pretrained_model_name_or_path, **where}
        trusted = kwargs.get("trust_remote_code")
        if pretrained_model_name_or_path is None or not config.backbones:
            find_parts(config, whole, trusted=trusted)
            loaded = load(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
            return cls._with_adapter(loaded, adapter, pretrained_model_name_or_path, where)

        for name in (*where, "trust_remote_code"):
            kwargs.pop(name, None)
        config = copy.deepcopy(config)
        config.__dict__.pop("quantization_config", None)  # that of a model which was loaded: backbones are whole
        find_parts(config, whole, backbones, trusted)
        generation_config = kwargs.pop("generation_config", None) or _find_generation_config(
            pretrained_model_name_or_path, where
        )
        checkpoint = Checkpoint(whole, "adapter", where)
        loaded = cls._compose(config, where, *model_args, checkpoint=checkpoint, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        if generation_config is not None and model.can_generate():
            model.generation_config = generation_config
        return cls._with_adapter(loaded, adapter, pretrained_model_name_or_path, where)

    @classmethod
    def _with_adapter(
        cls, loaded: Any, from_peft: tuple[Any, dict[str, Any]] | None, path: Any, where: Mapping[str, Any]
    ) -> Any:
        """Put on the language model what the checkpoint holds for it, or what PEFT has saved by itself."""
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        subfolder = model.config.__dict__.pop("language_model_adapter", None)  # written anew with every adapter
        if subfolder is not None and path is not None:
            model._load_adapter(path, where, subfolder)
        if from_peft is not None and not (from_peft[0] == path and model.has_adapter):
            model._load_adapter(*from_peft)
        return loaded

    @classmethod
    def _compose(
        cls,
        config: Any,
        hub_options: Mapping[str, Any],
        *model_args: Any,
        checkpoint: Checkpoint | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Merge the tensors of a checkpoint and of `config.backbones` and let transformers load the whole."""
        check_dtype(kwargs)
        skeleton = cls._skeleton(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
        if config.tie_word_embeddings:
            shapes.pop("lm_head.weight", None)
        merged = new_projection(config) if checkpoint is None else read_adapter(checkpoint, shapes, config)
        own = frozenset(merged)
        if not issubclass(cls, type(skeleton)):  # the model without a head
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(f"{cls.base_model_prefix}.")}
        for part, source in config.backbones.items():
            names = skeleton.lm_head_name, skeleton.decoder_name
            dtype = _target_dtype(config, kwargs)
            tensors, digest = collect(part, source, shapes, *names, hub_options, skip=own, dtype=dtype)
            config.backbones[part] = {**source, "fingerprint": digest}
            merged.update(tensors)
        if checkpoint is None and config.projector_init == "embeddings":
            start_at_words({name: merged[name] for name in merged if name in own}, config, *_words(skeleton, merged))
        if not issubclass(cls, type(skeleton)):  # the model without a head
            prefix = f"{cls.base_model_prefix}."
            merged = {name.removeprefix(prefix): value for name, value in merged.items() if name.startswith(prefix)}
        model, info = super().from_pretrained(
            None, *model_args, config=config, state_dict=merged, output_loading_info=True, **kwargs
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{len(missing)} tensors are in no backbone and not in the checkpoint, {missing[0]} among them; name "
                f"the right backbones (now {', '.join(map(describe, config.backbones.values()))})."
            )
        model._own_tensors = own
        model.freeze_backbones()
        remember_backbones(model)
        model._choose_what_to_save()
        return (model, info) if output_loading_info else model


def _words(skeleton: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The language model's embeddings, and what it multiplies them by when it looks them up."""
    embeddings = skeleton.get_input_embeddings()
    (name,) = [name for name, module in skeleton.named_modules() if module is embeddings]
    scale = getattr(embeddings, "scalar_embed_scale", getattr(embeddings, "embed_scale", 1.0))
    if isinstance(scale, torch.Tensor):  # Gemma 3 of transformers 4.57, whose number a model without memory forgets
        scale = embeddings.embedding_dim**0.5
    return tensors[f"{name}.weight"], scale


def find_parts(
    config: Any, whole: Mapping[str, Any], backbones: Mapping[str, Any] | None = None, trusted: Any = False
) -> None:
    """
    Find the backbones of a configuration that has been read, and load the code that they bring.

    Args:
        config: a [`MiniGPT4Config`], which is changed in place.
        whole: where the checkpoint is: `name_or_path`, and options of fetching.
        backbones, trusted: `backbones` and `trust_remote_code` of `from_pretrained`.

    Raises:
        OSError: if the code of a part cannot be loaded.
        ValueError: if it is not trusted.
    """
    where = {name: value for name, value in whole.items() if name != "name_or_path"}
    for part, source in config.backbones.items():
        if source["name_or_path"] == HERE:
            config.backbones[part] = _inside(whole["name_or_path"], source, where)
    config.backbones = moved_backbones(config.backbones, backbones or {})
    read_parts(config, whole, hub_only(where), trusted)


def compose_config(
    vision: Any, language_model: Any, qformer: Any, hub_options: Mapping[str, Any], **options: Any
) -> MiniGPT4Config:
    """
    The configuration of a model joined from backbones, of which only the configurations are read.

    Args:
        vision, language_model, qformer: see [`MiniGPT4ForConditionalGeneration.from_backbones`].
        hub_options: how files are fetched, and `trust_remote_code`.
        **options: fields of [`MiniGPT4Config`] that are not the backbones'.

    Raises:
        OSError: if a repository or folder cannot be opened.
        ValueError: if the parts do not fit together, or one brings code that is not trusted.
    """
    sources = {"vision": vision, "qformer": qformer, "language_model": language_model}
    if missing := [part for part in ("vision", "language_model") if sources[part] is None]:
        raise ValueError(f"`{missing[0]}` is None; name a repository or folder. Only `qformer` can be left out.")
    sources = {part: normalize_source(source) for part, source in sources.items() if source is not None}
    found: dict[str, PretrainedConfig] = {}
    for part in sources:
        found[part], sources[part] = load_backbone_config(part, sources[part], hub_options)
        check_part(part, found[part], sources[part]["name_or_path"])

    options.setdefault("vision_config", getattr(found["vision"], "vision_config", found["vision"]))
    options.setdefault("text_config", found["language_model"].get_text_config())
    if options["vision_config"].model_type in TIMM:
        tell_timm(options["vision_config"])
    for part, name in (("vision", "vision_config"), ("language_model", "text_config")):
        sources[part] = dict(take_code(name, options[name], sources[part], hub_only(hub_options)))
    if "qformer" not in found:
        options.setdefault("qformer_config", None)
    elif not hasattr(found["qformer"], "qformer_config"):
        raise ValueError(
            f"{sources['qformer']['name_or_path']} is a {found['qformer'].model_type!r} model without a Q-Former; "
            "name a BLIP-2 repository, or leave `qformer` out."
        )
    else:
        options.setdefault("qformer_config", found["qformer"].qformer_config)
        options.setdefault("num_query_tokens", found["qformer"].num_query_tokens)
    if not _is_original(options["vision_config"], options["text_config"]):
        options = {"projector_norm": True, "projector_init": "embeddings", **options}
    # What "auto" stands for, today's default: the language model's own, not that of the projection (float32).
    options.setdefault("dtype", found["language_model"].get_text_config().dtype or found["language_model"].dtype)
    config = MiniGPT4Config(**{**options, **_vision_fields(options)}, backbones=sources)
    _ = config.num_image_tokens  # which says it before weights are read, if patches cannot be joined
    return config


def tell_timm(config: PretrainedConfig) -> None:
    """
    Put into the configuration of a model of timm what it leaves to timm: sizes, width, and how pictures are prepared.

    Raises:
        ImportError: if timm is not installed.
    """
    try:  # transformers asks for whatever the code of a checkpoint imports outside of such a block
        from timm.data import resolve_data_config
    except ImportError as error:
        raise ImportError(
            "The vision encoder is a model of timm, which is not installed; `pip install timm`."
        ) from error
    if config.model_type == "timm_backbone":
        config.use_pretrained_backbone = False  # with which 4.57 would fetch other weights than those named here
    with torch.device("meta"):
        encoder = build_vision_model(config).eval()
        model = getattr(encoder, "timm_model", None) or encoder._backbone
        known = getattr(config, "pretrained_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
        data = resolve_data_config(getattr(config, "model_args", None) or {}, pretrained_cfg=dict(known))
        channels, *size = data["input_size"]
        features = encoder(torch.zeros(1, channels, *size)).last_hidden_state
    config.num_channels, config.image_size = channels, size
    config.hidden_size = features.shape[1 if features.ndim == 4 else 2]
    config.pretrained_cfg = {**known, **{name: data[name] for name in ("input_size", "mean", "std", "interpolation")}}
    config.do_pooling = False  # of which nothing is used
    if features.ndim == 3:
        config.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        if (patches := getattr(model, "patch_embed", None)) is not None:
            height, width = patches.patch_size
            config.patch_size = height if height == width else [height, width]


def _is_original(vision_config: PretrainedConfig, text_config: PretrainedConfig) -> bool:
    """Whether these are MiniGPT-4's own parts: BLIP-2's encoder, and a language model with LLaMA's vocabulary."""
    vocab_size = 32_000  # and one pad token in Vicuna v0
    is_llama = text_config.model_type == "llama" and text_config.vocab_size in (vocab_size, vocab_size + 1)
    return is_llama and isinstance(vision_config, Blip2VisionConfig)


def _vision_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the encoder itself says of its features, and how its patches are joined where nobody says it."""
    asked = MiniGPT4Config(**options)
    layer, size = asked.vision_feature_layer, asked.image_size
    joins = asked.qformer_config is None
    if not joins and layer is None and options.get("image_size") is None:
        return {}
    shape = vision_output_shape(asked.vision_config, size, layer)
    fields = default_fields(asked.vision_config, shape, size, options) if joins else {}
    if (width := shape[1] if len(shape) == 2 else shape[0]) != told_hidden_size(asked.vision_config):
        fields["vision_feature_size"] = width
    return fields


def read_adapter(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], config: Any
) -> dict[str, torch.Tensor]:
    """The checkpoint's own tensors, after checking that none is missing, unknown or of another shape."""
    where = describe(checkpoint.source)
    # The model without a head has saved names of its own.
    keys = {name if (name := f"model.{key}") in shapes else key: key for key in checkpoint.keys()}  # noqa: SIM118
    own = {name for name in shapes if part_of(name) not in config.backbones}
    if missing := sorted(own - keys.keys()):
        raise ValueError(
            f"{where} lacks {', '.join(missing[:3])}, which is trained and in no backbone; the folder is incomplete "
            "or its configuration was changed, so download or save it again."
        )
    if unknown := sorted(keys.keys() - shapes.keys()):
        raise ValueError(
            f"{where} holds {', '.join(unknown[:3])}, which its configuration has no place for; restore the "
            "config.json that it was saved with (`projector_num_layers`, `qformer_config`)."
        )
    remedy = "it was trained for another language model or vision encoder, so load it with those."
    check_shapes(keys, shapes, checkpoint, remedy)
    return {name: checkpoint.tensor(key) for name, key in keys.items()}


def _target_dtype(config: PretrainedConfig, options: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype that the options of `from_pretrained` ask for, or None where transformers finds out by itself."""
    dtype = options.get("dtype", options.get("torch_dtype", DEFAULT_DTYPE))
    dtype = getattr(config, "dtype", None) if dtype == "auto" else dtype
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def _inside(path: Any, source: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out where a backbone is that lies in the checkpoint's own repository or folder."""
    commit = extract_commit_hash(cached_file(path, "config.json", **fetch_options(where, where)), None)
    folders = [folder for folder in (where.get("subfolder"), source.get("subfolder")) if folder]
    own = {"name_or_path": os.fspath(path), "revision": commit, "subfolder": "/".join(folders)}
    return normalize_source({**source, **own})


def _find_generation_config(path: Any, options: Mapping[str, Any]) -> GenerationConfig | None:
    try:
        return GenerationConfig.from_pretrained(path, **options)
    except OSError:
        return None


__all__ = ["CompositionMixin", "compose_config", "find_parts", "read_adapter"]
