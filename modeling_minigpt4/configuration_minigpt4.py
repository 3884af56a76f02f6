"""Configuration of MiniGPT-4: a vision encoder, an optional Q-Former, a language model, and one projection."""

import copy
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    Blip2VisionModel,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithNoAttention
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .checks_minigpt4 import check_joins, is_image_size, is_positive, is_square, is_whole
from .compat_minigpt4 import CACHE_NAMES, argument_names, autocast_on_meta, let_servers_find
from .heads_minigpt4 import decoder_name
from .patches_minigpt4 import (
    LAYOUTS,
    STRATEGIES,
    check_square,
    dropped,
    encoder_options,
    find_patches,
    is_shrunk,
    own_image_size,
    pair,
    select_layer,
)
from .remote_code_minigpt4 import (
    UnreadConfig,
    brings_code,
    check_trust,
    copy_code,
    is_unread,
    local_references,
    parts_without_place,
)


# transformers 4.57 leaves "blip_2_vision_model" out of CONFIG_MAPPING, so these two are looked up here first.
_BLIP2_CONFIGS: dict[str, type[PretrainedConfig]] = {
    Blip2VisionConfig.model_type: Blip2VisionConfig,
    Blip2QFormerConfig.model_type: Blip2QFormerConfig,
}


def _build_sub_config(
    name: str, value: "str | Mapping[str, Any] | PretrainedConfig", default: str
) -> PretrainedConfig:
    """Turn a config, a dict or the name of a model type into the config object of one part."""
    if isinstance(value, PretrainedConfig):
        return value
    if not isinstance(value, (str, Mapping)):
        raise TypeError(
            f"`{name}` is a {type(value).__name__}; it has to be a configuration, a dict or the name of a model type."
        )
    options = {"model_type": value} if isinstance(value, str) else copy.deepcopy(dict(value))
    model_type = options.pop("model_type", default)
    config_class = _BLIP2_CONFIGS.get(model_type)
    if config_class is None:
        if brings_code({"model_type": model_type, **options}):
            return UnreadConfig(model_type=model_type, **options)
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`{name}` asks for the model type {model_type!r}, which the installed transformers does not know; "
                "name one of its model types in `model_type`, or upgrade transformers."
            )
        config_class = CONFIG_MAPPING[model_type]
    return config_class(**options)


class _SubConfigs:
    """The parts of a configuration: two without a Q-Former, because transformers 4.57 cannot save a `None`."""

    def __get__(self, config: "MiniGPT4Config | None", owner: type) -> dict[str, type]:
        parts: dict[str, type] = {"vision_config": AutoConfig, "text_config": AutoConfig}
        if config is None or config.qformer_config is not None:
            parts["qformer_config"] = Blip2QFormerConfig
        if config is not None and isinstance(config.vision_config, Blip2VisionConfig):
            parts["vision_config"] = Blip2VisionConfig  # which AutoConfig of 4.57 does not know
        return parts


class MiniGPT4Config(PretrainedConfig):
    r"""
    Configuration of [`MiniGPT4Model`] and [`MiniGPT4ForConditionalGeneration`].

    The defaults are the released MiniGPT-4 (arXiv 2304.10592, section 3): EVA-CLIP ViT-g/14 at 224 pixels, the
    Q-Former of BLIP-2 with 32 queries, Vicuna-7B, and one linear layer between them.

    Args:
        vision_config (`str`, `dict` or `PretrainedConfig`, *optional*):
            Configuration, or the name of a model type, of any vision encoder that `AutoModel` knows. Defaults to
            [`~transformers.Blip2VisionConfig`], which is EVA ViT-g/14 (39 blocks, width 1408).
        qformer_config (`str`, `dict` or `PretrainedConfig`, *optional*):
            Configuration of the Q-Former. `None` means that there is none: patch tokens are then joined
            `patch_merge_size` at a time and projected directly, as in the released Llama-2 checkpoint.
        text_config (`str`, `dict` or `PretrainedConfig`, *optional*):
            Configuration, or the name of a model type, of any decoder that `AutoModelForCausalLM` knows. Defaults to
            [`~transformers.LlamaConfig`], whose defaults are Vicuna-7B's.
        num_query_tokens (`int`, defaults to 32):
            Number of learned queries of the Q-Former, and so of image tokens per picture.
        image_token_id (`int`, *optional*):
            Id that marks the place of an image token in `input_ids`. It lies outside the language model's vocabulary,
            so that no embedding is resized; defaults to `text_config.vocab_size`, the first id that does.
        projector_num_layers (`int`, defaults to 1):
            Number of linear layers of the projection; the paper's ablation (Table 5) uses 3.
        projector_hidden_act (`str`, defaults to `"gelu"`):
            Activation between the linear layers of the projection, if there is more than one.
        projector_norm (`bool`, defaults to `False`):
            Whether features are normalized, as a LayerNorm without weights does, before the projection. The original
            projects them as they are.
        projector_init (`str`, defaults to `"linear"`):
            How [`MiniGPT4ForConditionalGeneration.from_backbones`] draws a new projection. `"linear"` is `nn.Linear`'s
            own way, the original's. `"embeddings"` gives image tokens the mean and the spread of the language model's
            words.
        vision_feature_select_strategy (`str`, *optional*):
            `"full"` keeps every token of the encoder, `"default"` drops those in front of the patches: CLS, registers.
            Defaults to `"full"` with a Q-Former and `"default"` without, as in the released code. Feature maps have
            no such tokens and stay whole.
        vision_feature_layer (`int`, *optional*):
            Which of the encoder's `hidden_states` is used, such as -2 for the last but one, as LLaVA does. `None` is
            the last hidden state, behind the final norm.
        vision_feature_size (`int`, *optional*):
            Number of channels of that state, where it is not the `hidden_size` (or the last of `hidden_sizes`) of
            `vision_config`. Found out by [`MiniGPT4ForConditionalGeneration.from_backbones`].
        image_size (`int` or two of them, *optional*):
            Height and width in pixels of the pictures, where they are not those of `vision_config`. Position
            embeddings are interpolated to it where the encoder knows how. Reading it always gives both sides.
        patch_merge_size (`int`, defaults to 4):
            Without a Q-Former, how many patch tokens are concatenated into one image token.
        patch_merge_layout (`str`, defaults to `"consecutive"`):
            Which: `"consecutive"` takes them as they come, row by row, as the released code does; `"square"` takes
            neighbours, 2 × 2 for a `patch_merge_size` of 4, 3 × 3 for 9.
        vision_post_layernorm_eps (`float`, defaults to 1e-5):
            Epsilon of the LayerNorm behind a BLIP-2 vision encoder (`ln_vision` of the original), whose own norms use
            `vision_config.layer_norm_eps`, 1e-6. Other encoders keep the epsilon of their own configuration.
        backbones (`dict`, *optional*):
            Where the frozen parts come from: `"vision"`, `"qformer"` and `"language_model"`, each a dict with
            `name_or_path`, `revision` (commit hash), `subfolder` and `fingerprint`. A part that is not named is saved
            with the checkpoint. Written by [`MiniGPT4ForConditionalGeneration.from_backbones`].

    Raises:
        ValueError: if a model type is unknown, or if `image_token_id` lies inside the vocabulary.
    """

    model_type = "minigpt4"
    sub_configs = _SubConfigs()
    # Outputs that are no predictions, which `Trainer.predict` and `evaluate` would gather beside the logits.
    keys_to_ignore_at_inference = [*CACHE_NAMES, "image_hidden_states", "image_outputs"]

    def __init__(
        self,
        vision_config: "str | Mapping[str, Any] | PretrainedConfig | None" = None,
        qformer_config: "str | Mapping[str, Any] | PretrainedConfig | None" = Blip2QFormerConfig.model_type,
        text_config: "str | Mapping[str, Any] | PretrainedConfig | None" = None,
        num_query_tokens: int = 32,
        image_token_id: int | None = None,
        projector_num_layers: int = 1,
        projector_hidden_act: str = "gelu",
        projector_norm: bool = False,
        projector_init: str = "linear",
        vision_feature_select_strategy: str | None = None,
        vision_feature_layer: int | None = None,
        vision_feature_size: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        patch_merge_size: int = 4,
        patch_merge_layout: str = "consecutive",
        vision_post_layernorm_eps: float = 1e-5,
        backbones: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        default_vision = Blip2VisionConfig.model_type
        self.vision_config = _build_sub_config("vision_config", vision_config or default_vision, default_vision)
        self.text_config = _build_sub_config("text_config", text_config or "llama", "llama")
        self.qformer_config = None
        if qformer_config is not None:
            default_qformer = Blip2QFormerConfig.model_type
            self.qformer_config = _build_sub_config("qformer_config", qformer_config, default_qformer)
            if not isinstance(self.qformer_config, Blip2QFormerConfig):
                raise ValueError(
                    f"`qformer_config` is that of a {self.qformer_config.model_type!r} model; it has to be a "
                    "Blip2QFormerConfig, or None."
                )
        self.vision_feature_size = vision_feature_size
        self._check_parts()
        self.num_query_tokens = num_query_tokens
        self.image_token_id = self.text_config.vocab_size if image_token_id is None else image_token_id
        self.projector_num_layers = projector_num_layers
        self.projector_hidden_act = projector_hidden_act
        self.projector_norm = projector_norm
        self.projector_init = projector_init
        if vision_feature_select_strategy is None:
            vision_feature_select_strategy = "default" if self.qformer_config is None else "full"
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.vision_feature_layer = vision_feature_layer
        self.image_size = image_size
        self.patch_merge_size = patch_merge_size
        self.patch_merge_layout = patch_merge_layout
        self.vision_post_layernorm_eps = vision_post_layernorm_eps
        if not isinstance(backbones or {}, Mapping):
            raise TypeError(f"`backbones` is a {type(backbones).__name__}; it has to be a dict of parts.")
        self.backbones = copy.deepcopy(dict(backbones or {}))
        # transformers ties the LM head by the outer flag, which therefore follows the language model's own.
        kwargs["tie_word_embeddings"] = getattr(self.text_config, "tie_word_embeddings", False)
        if kwargs.get("pad_token_id") is None:  # which trainers look for here
            kwargs["pad_token_id"] = pad_token_id(self.text_config)
        super().__init__(**kwargs)
        self._check()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the vision encoder is given."""
        size = self.__dict__.get("image_size")
        return own_image_size(self.vision_config) if size is None else pair(size)

    @image_size.setter
    def image_size(self, size: int | tuple[int, int] | None) -> None:
        self.__dict__["image_size"] = size  # as it is saved

    @property
    def num_image_tokens(self) -> int:
        """
        Number of image tokens that one picture takes in the sequence.

        The queries of the Q-Former; without one, the patches that are left by `vision_feature_select_strategy`, joined
        `patch_merge_size` at a time.

        Raises:
            ValueError: if the patches cannot be joined without remainder.
        """
        if self.qformer_config is not None:
            return self.num_query_tokens
        size = self.image_size
        shape = vision_output_shape(self.vision_config, size, self.vision_feature_layer)
        tokens = shape[0] if len(shape) == 2 else shape[1] * shape[2]
        place = find_patches(self.vision_config, shape, size)
        tokens -= dropped(self, place, tokens, size)
        check_joins(tokens, self.patch_merge_size)
        if self.patch_merge_layout == "square":
            check_square(place, tokens, self.patch_merge_size)
        return tokens // self.patch_merge_size

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        A configuration from its fields; see [`~transformers.PretrainedConfig.from_dict`].

        Raises:
            ValueError: for the fields of another model, which transformers would take for none and fill with defaults.
        """
        if (kind := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(
                f"This is a {kind!r} model and no MiniGPT-4; a vision encoder and a language model are joined by "
                "`MiniGPT4ForConditionalGeneration.from_backbones`."
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """All fields, without the places that the parts were once read from: `backbones` tells what others need."""
        fields: dict[str, Any] = super().to_dict()
        for part in self.sub_configs:
            if fields.get(part) and not is_unread(getattr(self, part)):
                fields[part]["_name_or_path"] = ""
        for part, config in parts_without_place(self):
            fields[part]["auto_map"] = local_references(config.auto_map)
        return fields

    def save_pretrained(self, save_directory: "str | os.PathLike[str]", *args: Any, **kwargs: Any) -> None:
        """Save it, and the code of parts that no backbone provides; see [`~transformers.PretrainedConfig`]."""
        os.makedirs(save_directory, exist_ok=True)
        copy_code(self, save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)

    def settle(self) -> None:
        """Take over what follows from a part whose code has been loaded since."""
        self._check_parts()
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self._check()

    def _check_parts(self) -> None:
        """Fit the parts together, as far as their code is loaded."""
        if self.qformer_config is not None and not is_unread(self.vision_config):
            # Cross-attention reads the encoder's output: one width, decided by the encoder.
            width = self.vision_feature_size or vision_hidden_size(self.vision_config)
            self.qformer_config.encoder_hidden_size = width
        if not is_unread(self.text_config) and not is_whole(getattr(self.text_config, "vocab_size", None), 1):
            raise ValueError(
                f"`text_config` is that of a {self.text_config.model_type!r} model without a vocabulary; it has to be "
                "that of a decoder, such as LlamaConfig."
            )

    def _check(self) -> None:
        """Raise a `ValueError` for values that no model could be built from."""
        vocab_size = 0 if is_unread(self.text_config) else self.text_config.vocab_size
        for name in ("num_query_tokens", "projector_num_layers", "patch_merge_size"):
            if not is_whole(getattr(self, name), 1):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be 1 or more, a whole number.")
        if not is_positive(self.vision_post_layernorm_eps):
            raise ValueError(
                f"`vision_post_layernorm_eps` is {self.vision_post_layernorm_eps!r}; it must be a number above 0."
            )
        if self.projector_hidden_act not in ACT2FN:
            raise ValueError(
                f"`projector_hidden_act` is {self.projector_hidden_act!r}, which transformers does not know; use "
                "'gelu', 'relu', 'silu', …"
            )
        if not isinstance(self.projector_norm, bool):
            raise ValueError(f"`projector_norm` is {self.projector_norm!r}; it must be true or false.")
        if self.projector_init not in ("linear", "embeddings"):
            raise ValueError(
                f"`projector_init` is {self.projector_init!r}; it must be 'linear' (as nn.Linear draws weights) or "
                "'embeddings' (with the mean and the spread of the language model's words)."
            )
        if not is_whole(self.image_token_id, 0):
            raise ValueError(f"`image_token_id` is {self.image_token_id!r}; it must be a whole number.")
        if self.image_token_id < vocab_size:
            raise ValueError(
                f"`image_token_id` is {self.image_token_id}, a token of the language model itself (vocabulary of "
                f"{vocab_size}); choose an id of {vocab_size} or more, or leave it out."
            )
        if self.vision_feature_select_strategy not in STRATEGIES:
            raise ValueError(
                f"`vision_feature_select_strategy` is {self.vision_feature_select_strategy!r}; it must be 'default' "
                "(drop the tokens in front of the patches: CLS, registers) or 'full' (keep every token)."
            )
        self._check_vision_features()

    def _check_vision_features(self) -> None:
        layer, width, size = self.vision_feature_layer, self.vision_feature_size, self.__dict__["image_size"]
        if layer is not None and not is_whole(layer):
            raise ValueError(
                f"`vision_feature_layer` is {layer!r}; it must be a whole number, such as -2 for the last but one."
            )
        if width is not None and not is_whole(width, 1):
            raise ValueError(f"`vision_feature_size` is {width!r}; it must be 1 or more, a whole number.")
        if size is not None and not is_image_size(size):
            raise ValueError(
                f"`image_size` is {size!r}; it must be a whole number of pixels, or two of them, height and width."
            )
        if self.patch_merge_layout not in LAYOUTS:
            raise ValueError(
                f"`patch_merge_layout` is {self.patch_merge_layout!r}; it must be 'consecutive' (row by row) or "
                "'square' (neighbours)."
            )
        if self.patch_merge_layout == "square" and not is_square(self.patch_merge_size):
            raise ValueError(
                f"`patch_merge_layout` is 'square', but `patch_merge_size` is {self.patch_merge_size}; it must be a "
                "square number, such as 4, or the layout 'consecutive'."
            )


def pad_token_id(text_config: PretrainedConfig) -> int | None:
    """The pad token of a language model; EOS, or the first of several, where it has none."""
    pad, eos = (getattr(text_config, name, None) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or pad < 0:  # early LLaMAs have -1
        pad = eos[0] if isinstance(eos, (list, tuple)) and eos else eos
    return pad if isinstance(pad, int) else None


def told_hidden_size(vision_config: PretrainedConfig) -> int | None:
    """What a vision configuration tells of the encoder's channels: `hidden_size`, or the last of `hidden_sizes`."""
    size = getattr(vision_config, "hidden_size", None)
    if size is None and getattr(vision_config, "hidden_sizes", None):
        size = vision_config.hidden_sizes[-1]
    return size if isinstance(size, int) else None


def vision_hidden_size(vision_config: PretrainedConfig) -> int:
    """Number of channels that a vision encoder puts out; a `ValueError` where its configuration does not tell it."""
    if (size := told_hidden_size(vision_config)) is None:
        raise ValueError(
            f"The vision configuration {type(vision_config).__name__} has neither `hidden_size` nor `hidden_sizes`, "
            "so the width of the projection is unknown; set `hidden_size` on it to the encoder's number of channels, "
            "or `vision_feature_size`."
        )
    return size


def check_read(config: PretrainedConfig) -> None:
    """Raise a `ValueError` that names the option, for the configuration of a part whose code has not been loaded."""
    if is_unread(config):
        check_trust(f"part with the model type {config.model_type!r}", trusted=False)


def build_causal_lm(text_config: PretrainedConfig) -> PreTrainedModel:
    """Build a language model with its head."""
    check_read(text_config)
    return AutoModelForCausalLM.from_config(text_config)


def build_decoder(text_config: PretrainedConfig) -> PreTrainedModel:
    """Build a language model without its head; code of others may name a class of the whole only."""
    if AutoModel._model_mapping.get(type(text_config), None) is not None:
        return AutoModel.from_config(text_config)
    causal_lm = build_causal_lm(text_config)
    decoder: PreTrainedModel = getattr(causal_lm, decoder_name(causal_lm))
    return decoder


def build_vision_model(vision_config: PretrainedConfig) -> PreTrainedModel:
    """Build a vision encoder; transformers 4.57 does not know BLIP-2's under `AutoModel`."""
    if isinstance(vision_config, Blip2VisionConfig):
        return Blip2VisionModel._from_config(vision_config)
    check_read(vision_config)
    model: PreTrainedModel = AutoModel.from_config(vision_config)
    if vision_config.model_type in TIMM:
        model.register_forward_hook(_as_other_encoders)
    return model


# Model types with which transformers wraps models of timm.
TIMM = ("timm_wrapper", "timm_backbone")


def _as_other_encoders(model: Any, args: Any, output: Any) -> Any:
    """Give what timm calls feature maps as the last hidden state, with channels in front of rows and columns."""
    if (maps := getattr(output, "feature_maps", None)) is not None:
        return BaseModelOutputWithNoAttention(last_hidden_state=maps[-1], hidden_states=output.hidden_states)
    if getattr(model.timm_model, "output_fmt", None) == "NHWC" and output.last_hidden_state.ndim == 4:
        output.last_hidden_state = output.last_hidden_state.permute(0, 3, 1, 2)
    return output


_SHAPES: dict[tuple[Any, ...], tuple[int, ...]] = {}  # what was asked for once


def vision_output_shape(
    vision_config: PretrainedConfig, size: tuple[int, int], layer: int | None = None
) -> tuple[int, ...]:
    """
    Ask a vision encoder what it gives for one picture; it is built and run without memory.

    Args:
        vision_config: of the encoder.
        size: height and width of the picture in pixels.
        layer: which hidden state is meant; see `vision_feature_layer`.

    Returns:
        (tokens, channels), CLS and the like among the tokens, or (channels, rows, columns) of a feature map.

    Raises:
        ValueError: if it does not take such pictures, or has no such hidden state.
    """
    key = type(vision_config), json.dumps(vision_config.to_dict(), sort_keys=True, default=str), size, layer
    if key not in _SHAPES:
        _SHAPES[key] = _ask_encoder(vision_config, size, layer)
    return _SHAPES[key]


def _ask_encoder(vision_config: PretrainedConfig, size: tuple[int, int], layer: int | None) -> tuple[int, ...]:
    vision_config = copy.deepcopy(vision_config)
    vision_config._attn_implementation = "eager"  # others may need a GPU
    # Not with fake tensors, which encoders that remember their positions would mistake for real ones later.
    with set_zero3_state(), torch.device("meta"), torch.no_grad(), autocast_on_meta():
        encoder = build_vision_model(vision_config).eval()
        options = encoder_options(vision_config, size, layer, argument_names(encoder.forward)[0])
        pixels = torch.zeros(1, getattr(vision_config, "num_channels", 3), *size, dtype=encoder.dtype)
        try:
            outputs = encoder(pixels, **options, return_dict=True)
        except Exception as error:
            raise ValueError(_why_not(vision_config, size, error)) from error
    shape = tuple(select_layer(outputs, layer).shape[1:])
    if len(shape) == 3 and is_shrunk(size, shape[:2]) and not is_shrunk(size, shape[1:]):
        raise ValueError(
            f"The vision encoder ({vision_config.model_type}) gives feature maps with channels last, of shape {shape};"
            " name another encoder, or another `vision_feature_layer`."
        )
    return shape


def _why_not(vision_config: PretrainedConfig, size: tuple[int, int], error: Exception) -> str:
    """What to say of an encoder that does not take a picture of a size."""
    own = own_image_size(vision_config)
    remedy = "name another encoder"
    if size != own:
        remedy = f"leave `image_size` out, for {own[0]} × {own[1]}, or {remedy}"
    reason = " ".join(str(error).split()).rstrip(".")
    return (
        f"The vision encoder ({vision_config.model_type}) takes no picture of {size[0]} × {size[1]} pixels by itself "
        f"({type(error).__name__}: {reason}); {remedy}."
    )


let_servers_find(MiniGPT4Config.model_type, "MiniGPT4ForConditionalGeneration")
MiniGPT4Config.register_for_auto_class()

__all__ = ["MiniGPT4Config"]
