"""MiniGPT-4 for transformers: a frozen vision encoder and language model, joined by one trained projection."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Blip2QFormerModel,
    Blip2VisionConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import set_zero3_state
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import can_return_tuple, logging

from .backbones import HUB_OPTIONS, PARTS, BackbonesMixin, load_backbone_config, normalize_source, part_of
from .checks_minigpt4 import (
    check_inputs,
    check_length,
    check_part,
    check_pixels,
    has_learned_positions,
    out_of_range,
    warn_about_size,
)
from .compat_minigpt4 import (
    CACHE,
    CACHE_NAMES,
    GATHER_LOGITS,
    IS_TRANSFORMERS_4,
    argument_names,
    checkpoint_with_gradients_only,
    takes_cache,
    tied_weights_keys,
)
from .configuration_minigpt4 import (
    MiniGPT4Config,
    build_vision_model,
    vision_hidden_size,
    vision_image_size,
    vision_output_tokens,
)
from .digest_minigpt4 import digests  # noqa: F401  # 4.57 copies the files that are named here, and not theirs
from .generation_minigpt4 import MiniGPT4GenerationMixin, compose_generation_config
from .heads_minigpt4 import adjust_logits, check_head, decoder_name, head_name, score_answers
from .labels_minigpt4 import mask_image_labels, mask_look_ups, scored_elsewhere
from .peft_minigpt4 import adapter_modules, trains_itself
from .quantization_minigpt4 import QuantizationMixin
from .unchanged_minigpt4 import UnchangedMixin
from .whole_minigpt4 import WholeMixin


logger = logging.get_logger(__name__)


@dataclass
class MiniGPT4ModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    Output of [`MiniGPT4Model`].

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            Image tokens as the language model receives them, behind the projection.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            What [`~MiniGPT4Model.get_image_features`] gave, with the vision encoder's `hidden_states` and `attentions`
            if those are asked for.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class MiniGPT4CausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Output of [`MiniGPT4ForConditionalGeneration`].

    `loss` is the mean cross-entropy over the labelled positions; `logits` of shape `(batch_size, sequence_length,
    vocab_size)` are scores of the language model's own vocabulary, of which image tokens are no part; the cache,
    `hidden_states` and `attentions` are those of the language model.

    Args:
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            Image tokens as the language model receives them, behind the projection.
        image_outputs (`BaseModelOutputWithPooling`, *optional*):
            What [`~MiniGPT4Model.get_image_features`] gave, with the vision encoder's `hidden_states` and `attentions`
            if those are asked for.
        log_probs (`torch.FloatTensor` of shape `(num_answers,)`, *optional*):
            Log-probabilities of `answers`, if these are given.
        entropy (`torch.FloatTensor` of shape `(num_answers,)`, *optional*):
            Entropy of what was predicted in their places, in nats.
        is_top1 (`torch.FloatTensor` of shape `(num_answers,)`, *optional*):
            1 where an answer is the most likely token, 0 elsewhere.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


class Float32Linear(nn.Linear):
    """
    A linear layer whose weights stay in float32 whatever the rest of the model is cast to.

    The projection is the only thing that trains: AdamW steps of 1e-4 and less vanish in bfloat16.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, dtype=torch.float32)

    def _apply(self, fn: Any, recurse: bool = True) -> "Float32Linear":
        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_dtype, recurse)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def build_projection(config: MiniGPT4Config) -> nn.Module:
    """
    The trained part: one linear layer from vision features to the language model's width (paper, section 3.1).

    With `projector_num_layers` > 1 the further layers keep that width, with an activation in between (Table 5).
    """
    if config.qformer_config is not None:
        in_features = config.qformer_config.hidden_size
    else:
        in_features = vision_hidden_size(config.vision_config) * config.patch_merge_size
    out_features = config.text_config.hidden_size
    layers: list[nn.Module] = [Float32Linear(in_features, out_features)]
    for _ in range(config.projector_num_layers - 1):
        layers += [ACT2FN[config.projector_hidden_act], Float32Linear(out_features, out_features)]
    return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


def _mismatch(places: int, tokens: int, image_token_id: int) -> str:
    return (
        f"Image features and image tokens do not match, tokens: {places}, features: {tokens}; `input_ids` need "
        f"{image_token_id} exactly once per image token, so prepare text and images together with this model's "
        f"processor (with `processor.image_token_id = {image_token_id}`, which moves when tokens are added), and do "
        "not let truncation cut an image."
    )


class MiniGPT4PreTrainedModel(WholeMixin, UnchangedMixin, BackbonesMixin, QuantizationMixin, PreTrainedModel):
    config_class = MiniGPT4Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _keep_in_fp32_modules_strict = ["language_projection"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["Blip2QFormerMultiHeadAttention", "Blip2QFormerLayer"]

    def post_init(self) -> None:
        """
        Record the layers that this very model is made of, which `device_map` and FSDP handle as one.

        4.57 leaves out those of the parts; 5.x also names layers that a part might have, over which FSDP stumbles.
        """
        super().post_init()
        parts = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        self._no_split_modules = sorted(
            _outermost(self, {name for one in parts for name in one._no_split_modules or ()})
        )

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Linear):
            module.reset_parameters()  # the original's initialization is nn.Linear's own
        elif isinstance(module, MiniGPT4Model):
            if module.query_tokens is not None:
                std = self.config.qformer_config.initializer_range
                nn.init.normal_(module.query_tokens, mean=0.0, std=std)
        else:
            super()._init_weights(module)

    @classmethod
    def _skeleton(cls, config: MiniGPT4Config) -> "MiniGPT4ForConditionalGeneration":
        """The whole model without memory: names and shapes of every tensor."""
        with set_zero3_state(), torch.device("meta"):  # ZeRO-3 would fill and share out every model that is made
            return MiniGPT4ForConditionalGeneration(copy.deepcopy(config))

    @classmethod
    def _new_projection(cls, config: MiniGPT4Config) -> dict[str, torch.Tensor]:
        tensors = build_projection(config).state_dict()
        return {f"model.language_projection.{name}": tensor for name, tensor in tensors.items()}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """
        Resize the vocabulary; see [`~transformers.PreTrainedModel.resize_token_embeddings`].

        `config.image_token_id` moves with it if it would otherwise become a token of the vocabulary.
        """
        embeddings: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        if self.config.image_token_id < (vocab_size := self.config.text_config.vocab_size):
            logger.warning(
                f"The vocabulary has grown over the image placeholder {self.config.image_token_id}, which is now "
                f"{vocab_size}; set `processor.image_token_id = {vocab_size}` too."
            )
            self.config.image_token_id = vocab_size
        return embeddings

    def set_attn_implementation(self, attn_implementation: "str | dict[str, str]") -> None:
        """Set the attention of every part; the Q-Former of 4.57, which knows eager attention only, keeps it."""
        if IS_TRANSFORMERS_4 and self.config.qformer_config is not None:
            if isinstance(attn_implementation, str):
                attn_implementation = dict.fromkeys(("", *self.config.sub_configs), attn_implementation)
            attn_implementation = {**attn_implementation, "qformer_config": "eager"}
        super().set_attn_implementation(attn_implementation)

    # ---- freezing -------------------------------------------------------------------------------------------------

    def freeze_backbones(self, train: Sequence[str] = ()) -> None:
        """
        Freeze the vision encoder, the Q-Former and the language model, so that only the projection trains, and an
        adapter of PEFT where there is one.

        Frozen parts stay in eval mode even after `model.train()`: the Q-Former has dropout 0.1, and the original keeps
        it off (paper, section 3.1; released code).

        Args:
            train: parts that train beside the projection: `"vision"`, `"qformer"` (with its queries) or
                `"language_model"`. What trains is saved with the checkpoint.

        Raises:
            ValueError: for a part that does not exist, or a language model that is quantized.
        """
        if "language_model" in train and self.is_language_model_quantized:
            raise ValueError(
                "A quantized language model cannot train; load it unquantized, or leave it frozen and give it an "
                "adapter of PEFT."
            )
        parts = self._parts()
        if unknown := set(train) - set(parts):
            raise ValueError(f"No such part to train: {', '.join(sorted(unknown))}; choose among {', '.join(parts)}.")
        for name, tensors in parts.items():
            for tensor in tensors:
                tensor.requires_grad_(name in train and tensor.is_floating_point())
        for parameter in self._base().language_projection.parameters():
            parameter.requires_grad_(True)
        if self.has_adapter:
            self.set_adapter(self.active_adapters())
        self.train(self.training)

    def train(self, mode: bool = True) -> "MiniGPT4PreTrainedModel":
        """
        Set training mode, except for the parts of which nothing trains.

        These are never in it, not for a moment: another thread may be writing a reply.
        """
        if mode:
            self.prepare_quantized_training()
        base = self._base()
        parts = [part for part in (base.vision_model, base.qformer, base.language_model) if part is not None]
        frozen = {module: part for part in parts if not trains_itself(part) for module in part.modules()}
        if isinstance(embeddings := base.get_input_embeddings(), nn.Embedding):
            frozen[embeddings] = embeddings  # NEFTune's noise is that of `_noisy`, even if the language model trains
        adapters = {module for part in parts for module in adapter_modules(part)}
        for module in self.modules():
            own = mode and (module not in frozen or module in adapters or _keeps_checkpointing(module))
            if module.training != own:
                module.training = own
        return self

    def enable_input_require_grads(self) -> None:
        """
        Start gradients at the embeddings, but not at those of frozen pictures.

        transformers 5 asks for it with gradient checkpointing, and of all models inside: the frozen vision side would
        be kept for a backward pass that changes nothing.
        """
        super().enable_input_require_grads()
        base = self._base()
        frozen = [part for part in (base.vision_model, base.qformer) if part is not None and not trains_itself(part)]
        theirs = {number for part in frozen for module in part.modules() for number in module._forward_hooks}
        for hook in getattr(self, "_require_grads_hooks", ()):  # 4.57 has one, at the language model
            if hook.id in theirs:
                hook.remove()

    def _base(self) -> "MiniGPT4Model":
        return self if isinstance(self, MiniGPT4Model) else self.model

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of every part that a backbone can provide."""
        parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        prefix = "model." if isinstance(self, MiniGPT4Model) else ""
        for name, parameter in self.named_parameters():
            if (part := part_of(prefix + name)) is not None:
                parts[part].append(parameter)
        return {part: tensors for part, tensors in parts.items() if tensors}


def _outermost(module: nn.Module, names: set[str]) -> set[str]:
    """Those classes among `names` that modules below this one have, unless they are inside another of them only."""
    found: set[str] = set()
    for child in module.children():
        name = type(child).__name__
        found |= {name} if name in names else _outermost(child, names)
    return found


def _keeps_checkpointing(module: nn.Module) -> bool:
    """
    Whether a module of a frozen part is a layer that goes on with gradient checkpointing.

    transformers ties that to training mode. Gradients flow through the frozen language model to the projection, so its
    activations are what fills the memory. Only the layer's own flag is set: modules inside stay in eval mode, and a
    layer with dropout of its own is left.
    """
    if not isinstance(module, GradientCheckpointingLayer) or getattr(module, "dropout", None):
        return False
    checkpoint_with_gradients_only(type(module))
    with torch.enable_grad():
        return bool(module.gradient_checkpointing)


class MiniGPT4Model(MiniGPT4PreTrainedModel):
    r"""
    MiniGPT-4 without the LM head: vision encoder → Q-Former → projection → decoder.

    Args:
        config ([`MiniGPT4Config`]): what the parts are.
        language_model (`PreTrainedModel`, *optional*): decoder to use instead of building one from `text_config`.
    """

    def __init__(self, config: MiniGPT4Config, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        self.vision_model = build_vision_model(config.vision_config)
        if isinstance(config.vision_config, Blip2VisionConfig):
            self.vision_model.post_layernorm.eps = config.vision_post_layernorm_eps
        self.vision_model_arguments, _ = argument_names(self.vision_model.forward)
        self.qformer, self.query_tokens = None, None
        if config.qformer_config is not None:
            if IS_TRANSFORMERS_4:  # whose Q-Former knows no other attention; 5.x goes through the interface
                config.qformer_config._attn_implementation = "eager"
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
            shape = (1, config.num_query_tokens, config.qformer_config.hidden_size)
            self.query_tokens = nn.Parameter(torch.zeros(shape))
        self.language_projection = build_projection(config)
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        self.language_model_arguments, self.cache_name = argument_names(self.language_model.forward)
        self.set_input_embeddings(self.get_input_embeddings())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)
        mask_look_ups(value, self.config)

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model

    def set_decoder(self, decoder: PreTrainedModel) -> None:
        self.language_model = decoder

    def encode_images(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Run the frozen vision side: encoder, and Q-Former or the joining of patches.

        Its `last_hidden_state` does not depend on anything that trains, so it can be stored and given back to the
        model as `vision_features`.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): processed pictures.

        Returns:
            Output whose `last_hidden_state` has the shape `(num_images, num_image_tokens, channels)`, with the
            encoder's `hidden_states` and `attentions` if asked for.
        """
        if "kwargs" not in self.vision_model_arguments:  # such as CNNs, which have no attentions
            kwargs = {name: value for name, value in kwargs.items() if name in self.vision_model_arguments}
        if not (torch.compiler.is_compiling() or kwargs.get("interpolate_pos_encoding")):
            check_pixels(pixel_values, self.config)
        vision = self.vision_model(pixel_values.to(self.vision_model.dtype), **{**kwargs, "return_dict": True})
        features = vision.last_hidden_state
        if features.ndim == 4:  # feature map (B, C, H, W) → (B, H·W, C)
            features = features.flatten(2).transpose(1, 2)
        elif self.config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        if self.qformer is not None and self.query_tokens is not None:
            queries = self.query_tokens.expand(features.shape[0], -1, -1)
            features = self.qformer(
                query_embeds=queries, encoder_hidden_states=features, return_dict=True
            ).last_hidden_state
        else:
            features = self._join_patches(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            hidden_states=getattr(vision, "hidden_states", None),
            attentions=getattr(vision, "attentions", None),
        )

    def _join_patches(self, features: torch.Tensor) -> torch.Tensor:
        """Concatenate consecutive patch tokens: (B, N, C) → (B, N / merge, merge · C), as the released code does."""
        merge = self.config.patch_merge_size
        batch_size, tokens, channels = features.shape
        if tokens % merge:
            raise ValueError(
                f"The vision encoder gives {tokens} tokens, which cannot be joined {merge} at a time; set "
                "`patch_merge_size` to a divisor, or `vision_feature_select_strategy` to 'full' without a CLS token."
            )
        return features.reshape(batch_size, tokens // merge, merge * channels)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """
        Turn pictures, or stored features of the frozen vision side, into image tokens for the language model.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                Processed pictures.
            vision_features (`torch.FloatTensor` of shape `(num_images, num_image_tokens, channels)`, *optional*):
                `last_hidden_state` of [`~MiniGPT4Model.encode_images`], instead of pixels.

        Returns:
            Output with `last_hidden_state`, the features before the projection, and `pooler_output` of shape
            `(num_images, num_image_tokens, hidden_size)`, behind it.

        Raises:
            ValueError: if both or none of the two are given, or if the features have another width.
        """
        if (pixel_values is None) == (vision_features is None):
            raise ValueError("Give either `pixel_values` or `vision_features`, not both and not none.")
        if pixel_values is not None:
            outputs = self.encode_images(pixel_values, **kwargs)
        else:
            outputs = BaseModelOutputWithPooling(last_hidden_state=vision_features)
        projection = self.language_projection
        first = projection[0] if isinstance(projection, nn.Sequential) else projection
        if outputs.last_hidden_state.shape[-1] != first.in_features:
            raise ValueError(
                f"`vision_features` have {outputs.last_hidden_state.shape[-1]} channels but the projection takes "
                f"{first.in_features}; compute them with `encode_images` of the same model."
            )
        # In place, 4.57's outputs would keep a field that was None out of their tuple.
        return BaseModelOutputWithPooling(**{**outputs, "pooler_output": projection(outputs.last_hidden_state)})

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Find the places of image tokens.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): ids with placeholders.
            image_features (`torch.FloatTensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
                Image tokens that are to be put there.

        Returns:
            `torch.BoolTensor` of shape `(batch_size, sequence_length)`.

        Raises:
            ValueError: if there are more or fewer places than image tokens.
        """
        mask = input_ids == self.config.image_token_id
        tokens = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if torch.compiler.is_compiling():
            torch._assert_async(mask.sum() == tokens, "Image features and image tokens do not match")
            return mask
        places = int(mask.sum())
        if places != tokens:
            raise ValueError(_mismatch(places, tokens, self.config.image_token_id))
        return mask

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MiniGPT4ModelOutputWithPast:
        """
        Put image tokens in their places and run the decoder.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; `config.image_token_id` marks the places of image tokens, picture by picture, row by row.
            pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`, *optional*):
                All pictures of the batch, in the order of their places.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding, on either side.
            cache (`Cache`, *optional*):
                Keys and values of what came before; `past_key_values` before transformers 5.24.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings instead of `input_ids`, with image tokens already in them.
            vision_features (`torch.FloatTensor` of shape `(num_images, num_image_tokens, channels)`, *optional*):
                Stored output of [`~MiniGPT4Model.encode_images`] instead of `pixel_values`.
            image_positions (`torch.LongTensor` of shape `(num_images * num_image_tokens,)`, *optional*):
                Places of the image tokens in the flattened `input_ids`, in order. They are looked for if left out,
                which on a GPU means to wait for it.

        Raises:
            ValueError: if pictures and places do not match.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is not None and not torch.compiler.is_compiling():
            check_inputs(rows, attention_mask, None, vision_features, image_positions, cached=cache is not None)
            if self.training or has_learned_positions(self.config.text_config):
                check_length(rows.shape[1], self.config.text_config)
        asked = {
            "output_attentions": self.config.output_attentions if output_attentions is None else output_attentions,
            "output_hidden_states": (
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
        }
        images, image_tokens = None, None
        if pixel_values is not None or vision_features is not None:
            if input_ids is None:
                raise ValueError(
                    f"Pictures need `input_ids`, whose placeholders {self.config.image_token_id} tell their places; "
                    "embeddings given as `inputs_embeds` must hold the image tokens already, which those of PEFT's "
                    "prompt tuning and P-tuning do not (LoRA, IA3 and prefix tuning work)."
                )
            images = self.get_image_features(pixel_values, vision_features, return_dict=True, **asked)
            image_tokens = images.pooler_output
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, image_tokens, image_positions)
        if image_tokens is None and inputs_embeds is not None and self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._no_picture().to(inputs_embeds)
        if position_ids is None and inputs_embeds is not None:
            position_ids = self._positions(attention_mask, inputs_embeds)
        options = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            self.cache_name: cache,
            "use_cache": use_cache,
            **asked,
            **kwargs,
        }
        if "kwargs" not in self.language_model_arguments:  # older decoders take only what they name
            options = {name: value for name, value in options.items() if name in self.language_model_arguments}
        outputs = self.language_model(inputs_embeds=inputs_embeds, **{**options, "return_dict": True})
        return MiniGPT4ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_tokens,
            image_outputs=images,
            **{CACHE: outputs.get(CACHE)},
        )

    def _no_picture(self) -> torch.Tensor:
        """
        Nought, with a gradient of nought for whatever trains of the vision side and the projection.

        A training step on text alone would have nothing to do backward without it, and DDP would miss gradients.
        """
        if any(tensor.requires_grad for part in ("vision", "qformer") for tensor in self._parts().get(part, ())):
            shape = (1, getattr(self.config.vision_config, "num_channels", 3), *self.config.image_size)
            blank = torch.zeros(shape, device=self.vision_model.device)
            tokens = self.get_image_features(blank, return_dict=True).pooler_output
        else:
            first = next(layer for layer in self.language_projection.modules() if isinstance(layer, nn.Linear))
            tokens = self.language_projection(first.weight.new_zeros(1, first.in_features))
        return tokens.sum() * 0

    def _embed(
        self, input_ids: torch.Tensor, image_tokens: torch.Tensor | None, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Embeddings of text and pictures; ids and places out of range are told where they are met on the CPU."""
        if torch.compiler.is_compiling():
            return self._place(input_ids, image_tokens, places)
        try:
            return self._place(input_ids, image_tokens, places)
        except IndexError as error:
            raise out_of_range(input_ids, places, self.config) from error

    def _place(
        self, input_ids: torch.Tensor, image_tokens: torch.Tensor | None, places: torch.Tensor | None
    ) -> torch.Tensor:
        """Look up text tokens and put image tokens, in order, where the placeholders are."""
        if places is None:
            mask = self.get_placeholder_mask(input_ids, image_tokens)
        elif len(places) != (tokens := 0 if image_tokens is None else image_tokens.shape[:2].numel()):
            raise ValueError(_mismatch(len(places), tokens, self.config.image_token_id))
        else:
            mask = input_ids == self.config.image_token_id
        # Placeholders lie outside the vocabulary, so any row of it stands in for the look-up.
        embeddings = self._noisy(self.get_input_embeddings()(input_ids.masked_fill(mask, 0)))
        if image_tokens is None:
            return embeddings
        if places is None and torch.compiler.is_compiling():  # where shapes must not depend on values
            image_tokens = image_tokens.to(embeddings.device, embeddings.dtype)
            return embeddings.masked_scatter(mask[..., None].expand_as(embeddings), image_tokens)
        if places is None:
            places = mask.flatten().nonzero().squeeze(-1)
        image_tokens = image_tokens.to(embeddings.device, embeddings.dtype).flatten(0, 1)
        # Not `masked_scatter`, whose gradient asks the device how many places there are.
        whole = embeddings.flatten(0, 1).index_copy(0, places.to(embeddings.device), image_tokens)
        return whole.view_as(embeddings)

    def _noisy(self, embeddings: torch.Tensor) -> torch.Tensor:
        """
        Text embeddings with the noise of NEFTune (arXiv 2310.05914), while a trainer has set its strength.

        transformers adds it in embeddings that are in training mode, which those of a frozen language model never are.
        A step that has no gradients, such as a reply that another thread writes, has no noise.
        """
        module = self.get_input_embeddings()
        alpha = getattr(module, "neftune_noise_alpha", None)
        if alpha is None or module.training or not (self.training and torch.is_grad_enabled()):
            return embeddings
        most = alpha / embeddings.shape[1:].numel() ** 0.5
        return embeddings + torch.empty_like(embeddings).uniform_(-most, most)

    @staticmethod
    def _positions(attention_mask: torch.Tensor | None, inputs_embeds: torch.Tensor) -> torch.Tensor | None:
        """
        Count positions over real tokens only, as `generate` does, so that left padding changes nothing.

        Decoders with learned positions would otherwise count from the first pad.
        """
        if attention_mask is None or attention_mask.ndim != 2:
            return None
        positions = attention_mask.long().cumsum(-1) - 1
        return positions.clamp(min=0)[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device)


class MiniGPT4ForConditionalGeneration(MiniGPT4GenerationMixin, MiniGPT4PreTrainedModel):
    r"""
    MiniGPT-4: answers in text about pictures and text (arXiv 2304.10592).

    Example:

    ```python
    >>> model = MiniGPT4ForConditionalGeneration.from_backbones(
    ...     vision="Salesforce/blip2-flan-t5-xxl", qformer="Salesforce/blip2-flan-t5-xxl", language_model="./vicuna-7b"
    ... )
    ```
    """

    # Tensor parallelism: every device scores a share of the vocabulary, and the shares are put together.
    _tp_plan = {"lm_head": GATHER_LOGITS}

    def __init__(self, config: MiniGPT4Config) -> None:
        super().__init__(config)
        warn_about_size(config, lambda: self._skeleton(config))
        # The language model's own class brings the right head: with or without a bias, under whatever name.
        causal_lm = AutoModelForCausalLM.from_config(config.text_config)
        check_head(causal_lm)
        self.lm_head_name, self.decoder_name = head_name(causal_lm), decoder_name(causal_lm)
        self.model = MiniGPT4Model(config, language_model=getattr(causal_lm, self.decoder_name))
        self.lm_head = causal_lm.get_output_embeddings()
        embeddings = self.get_input_embeddings()
        source = next(name for name, module in self.named_modules() if module is embeddings) + ".weight"
        self._tied_weights_keys: Any = tied_weights_keys(source)
        self.register_forward_pre_hook(mask_image_labels, with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def get_decoder(self) -> PreTrainedModel:
        return self.model.get_decoder()

    def set_decoder(self, decoder: PreTrainedModel) -> None:
        self.model.set_decoder(decoder)

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """See [`MiniGPT4Model.get_image_features`]."""
        return self.model.get_image_features(pixel_values, vision_features, **kwargs)

    def get_placeholder_mask(
        self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See [`MiniGPT4Model.get_placeholder_mask`]."""
        return self.model.get_placeholder_mask(input_ids, image_features)

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        vision_features: torch.Tensor | None = None,
        image_positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        answers: torch.Tensor | None = None,
        answer_positions: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MiniGPT4CausalLMOutputWithPast:
        """
        Score the next token at every position, and the labels if there are any.

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to learn, -100 where there is nothing to learn; shifted inside. Image placeholders count as -100.
            logits_to_keep (`int` or `torch.LongTensor` of shape `(num_positions,)`, defaults to 0):
                Score only that many last positions (0: all), or only these.
            answers (`torch.LongTensor` of shape `(num_answers,)`, *optional*):
                Ids to learn, instead of `labels`. Nothing else is scored, and no logits are kept: the output has
                `log_probs`, `entropy` and `is_top1` of the answers.
            answer_positions (`torch.LongTensor` of shape `(num_answers,)`, *optional*):
                Places in the flattened `input_ids` behind which the answers stand.

        The other arguments are those of [`MiniGPT4Model`].
        """
        if (answers is None) != (answer_positions is None) or (answers is not None and labels is not None):
            raise ValueError("Give `answers` and `answer_positions` together, and without `labels`.")
        if labels is not None and not torch.compiler.is_compiling():
            check_inputs(input_ids if inputs_embeds is None else inputs_embeds, labels=labels)
        if answers is not None and not self._tells_more(kwargs):
            kwargs["answer_positions"] = answer_positions  # for whoever leaves out what nobody reads of the last layer
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            vision_features=vision_features,
            image_positions=image_positions,
            use_cache=use_cache,
            **{**kwargs, "return_dict": True},
        )
        if answers is not None and answer_positions is not None:
            flat = outputs.last_hidden_state.flatten(0, 1)
            before = flat.index_select(0, answer_positions.to(flat.device))
            log_probs, entropy, is_top1 = score_answers(
                before, answers.to(flat.device), self.lm_head, self.config.text_config
            )
            return MiniGPT4CausalLMOutputWithPast(log_probs=log_probs, entropy=entropy, is_top1=is_top1)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state if logits_to_keep is None else outputs.last_hidden_state[:, keep]
        logits = adjust_logits(self.lm_head(hidden_states), self.config.text_config)
        loss = None
        if labels is None:
            outside = (self.training and torch.is_grad_enabled()) or kwargs.get("num_items_in_batch") is not None
            if outside and outputs.image_hidden_states is not None:
                logits = scored_elsewhere(logits, self.config.image_token_id)
        else:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return MiniGPT4CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **{CACHE: outputs.get(CACHE)},
        )

    def _tells_more(self, options: dict[str, Any]) -> bool:
        """Whether hidden states or attentions of all positions are asked for."""
        names = ("output_hidden_states", "output_attentions")
        return any(options.get(name) or getattr(self.config, name) for name in names)

    # ---- composition ----------------------------------------------------------------------------------------------

    @classmethod
    def from_backbones(
        cls,
        vision: Any,
        language_model: Any,
        qformer: Any = None,
        separator: str | None = "auto",
        **kwargs: Any,
    ) -> "MiniGPT4ForConditionalGeneration":
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
            **kwargs: fields of [`MiniGPT4Config`] (`projector_num_layers`, `patch_merge_size`, …); everything else
                goes to `from_pretrained` (`dtype`, `device_map`, `quantization_config`, `cache_dir`, `token`, …).

        Returns:
            The model with `config.backbones` filled, revisions pinned, and a projection initialized as `nn.Linear`
            is, from torch's seed.

        Raises:
            OSError: if a repository or folder cannot be opened.
            ValueError: if the parts do not fit together.
        """
        fields = set(inspect.signature(MiniGPT4Config).parameters) - {"kwargs", "backbones"}
        options = {name: kwargs.pop(name) for name in fields & set(kwargs)}
        hub = {name: kwargs.get(name) for name in HUB_OPTIONS}
        config = compose_config(vision, language_model, qformer, hub, **options)
        model: MiniGPT4ForConditionalGeneration = cls._compose(config, hub, **kwargs)
        model.generation_config = compose_generation_config(config.backbones["language_model"], config, separator, hub)
        return model


def compose_config(
    vision: Any, language_model: Any, qformer: Any, hub_options: Mapping[str, Any], **options: Any
) -> MiniGPT4Config:
    """
    The configuration of a model joined from backbones, of which only the configurations are read.

    Args:
        vision, language_model, qformer: see [`MiniGPT4ForConditionalGeneration.from_backbones`].
        hub_options: how files are fetched.
        **options: fields of [`MiniGPT4Config`] that are not the backbones'.

    Raises:
        OSError: if a repository or folder cannot be opened.
        ValueError: if the parts do not fit together.
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
    if "qformer" not in found:
        options.setdefault("qformer_config", None)
        options.setdefault("vision_feature_select_strategy", _select_strategy(options["vision_config"]))
    elif not hasattr(found["qformer"], "qformer_config"):
        raise ValueError(
            f"{sources['qformer']['name_or_path']} is a {found['qformer'].model_type!r} model without a Q-Former; "
            "name a BLIP-2 repository, or leave `qformer` out."
        )
    else:
        options.setdefault("qformer_config", found["qformer"].qformer_config)
        options.setdefault("num_query_tokens", found["qformer"].num_query_tokens)
    # What "auto" stands for, today's default: the language model's own, not that of the projection (float32).
    options.setdefault("dtype", found["language_model"].get_text_config().dtype or found["language_model"].dtype)
    return MiniGPT4Config(**options, backbones=sources)


def _select_strategy(vision_config: PretrainedConfig) -> str:
    """`"default"` for an encoder with a CLS token: one token more than its patches."""
    tokens, is_map = vision_output_tokens(vision_config)
    patch = getattr(vision_config, "patch_size", None)
    if is_map or not isinstance(patch, int):
        return "full"
    height, width = vision_image_size(vision_config)
    return "default" if tokens == (height // patch) * (width // patch) + 1 else "full"


# Trainer shifts labels before it smooths them for classes in the first of these, and `transformers serve` tells by the
# other that a model sees.
for _names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    _names[MiniGPT4Config.model_type] = MiniGPT4ForConditionalGeneration.__name__

MiniGPT4Model.register_for_auto_class("AutoModel")
MiniGPT4ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MiniGPT4ForConditionalGeneration", "MiniGPT4Model", "MiniGPT4PreTrainedModel"]
