"""MiniGPT-4 for transformers: a frozen vision encoder and language model, joined by one trained projection."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Blip2QFormerModel, Blip2VisionConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import set_zero3_state
from transformers.utils import can_return_tuple, logging

from .backbones import PARTS  # noqa: F401  # 4.57 copies the files that are named here, and not theirs
from .checks_minigpt4 import (
    check_given,
    check_inputs,
    check_joins,
    check_length,
    check_pixels,
    describe_mismatch,
    tells_out_of_range,
    warn_about_size,
)
from .compat_minigpt4 import (
    CACHE,
    CACHE_NAMES,
    GATHER_LOGITS,
    accepted,
    argument_names,
    attention_of_parts,
    keep_qformer_eager,
    no_split_modules,
    takes_cache,
    tied_weights_keys,
)
from .composition_minigpt4 import CompositionMixin
from .configuration_minigpt4 import MiniGPT4Config, build_causal_lm, build_decoder, build_vision_model
from .digest_minigpt4 import digests  # noqa: F401  # likewise
from .freezing_minigpt4 import FreezingMixin
from .generation_minigpt4 import MiniGPT4GenerationMixin
from .heads_minigpt4 import adjust_logits, check_head, decoder_name, head_name, score_answers
from .labels_minigpt4 import mask_image_labels, mask_look_ups, register_name, scored_elsewhere
from .patches_minigpt4 import encoder_options, patch_tokens, select_layer
from .peft_minigpt4 import PeftMixin
from .projector_minigpt4 import Float32Linear, build_projection, first_layer
from .quantization_minigpt4 import QuantizationMixin
from .remote_code_minigpt4 import read_parts  # noqa: F401  # likewise
from .saving_minigpt4 import SavingMixin
from .unchanged_minigpt4 import tied_to


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
        image_hidden_states, image_outputs: see [`MiniGPT4ModelOutputWithPast`].
        log_probs, entropy, is_top1 (`torch.FloatTensor` of shape `(num_answers,)`, *optional*):
            If `answers` are given: their log-probabilities, the entropy in nats of what was predicted in their places,
            and 1 where an answer is the most likely token, 0 elsewhere.
    """

    image_hidden_states: torch.Tensor | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


class MiniGPT4PreTrainedModel(SavingMixin, CompositionMixin, PeftMixin, FreezingMixin, QuantizationMixin):
    r"""
    What both models below share. Each class in front of transformers' [`PreTrainedModel`] brings one thing:

    1. `SavingMixin`: saves what no backbone provides, and pushes it with a card.
    2. `CompositionMixin`: joins backbones and a projection, new or saved.
    3. `PeftMixin`: puts an adapter of PEFT on the language model.
    4. `FreezingMixin`: says what trains; the rest stays in eval mode.
    5. `QuantizationMixin`: quantizes the language model and nothing else.

    Who overrides what, and whom it calls:

    - `save_pretrained`: 1. It chooses the tensors and checks them; it has 3 write the adapter and 5 hide the
      quantization while transformers writes the rest.
    - `from_pretrained`: 2, then 5, then transformers. 2 merges the checkpoint with its backbones, 5 keeps quantization
      to the decoder. On the loaded model 2 calls 4 to freeze it, 1 to choose what a save will write, and 3 to put on
      the saved adapter.
    - `train`: 4. It has 5 check that gradients pass through quantized layers.
    - `generate`: `MiniGPT4GenerationMixin`, which stands in front of the model with a head.
    """

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
        super().post_init()
        self._no_split_modules = no_split_modules(self)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Linear):
            module.reset_parameters()  # the original's initialization is nn.Linear's own
        elif isinstance(module, MiniGPT4Model):
            if module.query_tokens is not None:
                nn.init.normal_(module.query_tokens, mean=0.0, std=self.config.qformer_config.initializer_range)
        else:
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.get_decoder().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.get_decoder().set_input_embeddings(value)
        mask_look_ups(value, self.config)

    def get_decoder(self) -> PreTrainedModel:
        return self.base_model.language_model

    def set_decoder(self, decoder: PreTrainedModel) -> None:
        self.base_model.language_model = decoder

    @classmethod
    def _skeleton(cls, config: MiniGPT4Config) -> "MiniGPT4ForConditionalGeneration":
        """The whole model without memory: names and shapes of every tensor."""
        with set_zero3_state(), torch.device("meta"):  # ZeRO-3 would fill and share out every model that is made
            return MiniGPT4ForConditionalGeneration(copy.deepcopy(config))

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
        super().set_attn_implementation(attention_of_parts(self.config, attn_implementation))


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
            keep_qformer_eager(config)
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
            shape = (1, config.num_query_tokens, config.qformer_config.hidden_size)
            self.query_tokens = nn.Parameter(torch.zeros(shape))
        self.language_projection = build_projection(config)
        self.language_model = language_model or build_decoder(config.text_config)
        self.language_model_arguments, self.cache_name = argument_names(self.language_model.forward)
        self.set_input_embeddings(self.get_input_embeddings())
        self.post_init()

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
        kwargs = accepted(kwargs, self.vision_model_arguments)  # CNNs have no attentions
        if not (torch.compiler.is_compiling() or kwargs.get("interpolate_pos_encoding")):
            check_pixels(pixel_values, self.config)
        size, layer = (pixel_values.shape[-2], pixel_values.shape[-1]), self.config.vision_feature_layer
        wanted = layer is None or kwargs.get("output_hidden_states")
        kwargs.update(encoder_options(self.config.vision_config, size, layer, self.vision_model_arguments))
        vision = self.vision_model(pixel_values.to(self.vision_model.dtype), **{**kwargs, "return_dict": True})
        features = patch_tokens(select_layer(vision, layer), self.config, size)
        if self.qformer is not None and self.query_tokens is not None:
            queries = self.query_tokens.expand(features.shape[0], -1, -1)
            found = self.qformer(query_embeds=queries, encoder_hidden_states=features, return_dict=True)
            features = found.last_hidden_state
        else:
            features = self._join_patches(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=features,
            hidden_states=getattr(vision, "hidden_states", None) if wanted else None,
            attentions=getattr(vision, "attentions", None),
        )

    def _join_patches(self, features: torch.Tensor) -> torch.Tensor:
        """Concatenate tokens in their order: (B, N, C) → (B, N / merge, merge · C), as the released code does."""
        merge = self.config.patch_merge_size
        batch_size, tokens, channels = features.shape
        check_joins(tokens, merge)
        return features.reshape(batch_size, tokens // merge, merge * channels)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, vision_features: torch.Tensor | None = None, **kwargs: Any
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
        outputs = BaseModelOutputWithPooling(last_hidden_state=vision_features)
        if pixel_values is not None:
            outputs = self.encode_images(pixel_values, **kwargs)
        channels, expected = outputs.last_hidden_state.shape[-1], first_layer(self.language_projection).in_features
        if channels != expected:
            raise ValueError(
                f"`vision_features` have {channels} channels but the projection takes {expected}; compute them with "
                "`encode_images` of the same model."
            )
        image_tokens = self.language_projection(outputs.last_hidden_state)
        # In place, 4.57's outputs would keep a field that was None out of their tuple.
        return BaseModelOutputWithPooling(**{**outputs, "pooler_output": image_tokens})

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
            raise ValueError(describe_mismatch(places, tokens, self.config.image_token_id))
        return mask

    @tells_out_of_range
    def _embed(
        self, input_ids: torch.Tensor, image_tokens: torch.Tensor | None, places: torch.Tensor | None
    ) -> torch.Tensor:
        """Look up text tokens and put image tokens, in order, where the placeholders are."""
        if places is None:
            mask = self.get_placeholder_mask(input_ids, image_tokens)
        elif len(places) != (tokens := 0 if image_tokens is None else image_tokens.shape[:2].numel()):
            raise ValueError(describe_mismatch(len(places), tokens, self.config.image_token_id))
        else:
            mask = input_ids == self.config.image_token_id
        # Placeholders lie outside the vocabulary, so any row of it stands in for the look-up.
        embeddings = self._with_neftune_noise(self.get_input_embeddings()(input_ids.masked_fill(mask, 0)))
        if image_tokens is None:
            return embeddings
        image_tokens = image_tokens.to(embeddings.device, embeddings.dtype)
        if places is None and torch.compiler.is_compiling():  # where shapes must not depend on values
            return embeddings.masked_scatter(mask[..., None].expand_as(embeddings), image_tokens)
        if places is None:
            places = mask.flatten().nonzero().squeeze(-1)
        # Not `masked_scatter`, whose gradient asks the device how many places there are.
        whole = embeddings.flatten(0, 1).index_copy(0, places.to(embeddings.device), image_tokens.flatten(0, 1))
        return whole.view_as(embeddings)

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
        has_pictures = pixel_values is not None or vision_features is not None
        check_given(input_ids, inputs_embeds, has_pictures, self.config.image_token_id)
        rows = input_ids if inputs_embeds is None else inputs_embeds
        if rows is not None and not torch.compiler.is_compiling():
            check_inputs(rows, attention_mask, None, vision_features, image_positions, cached=cache is not None)
            check_length(rows.shape[1], self.config.text_config, may_go_beyond=not self.training)
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        asked = {name: getattr(self.config, name) if value is None else value for name, value in asked.items()}
        images, image_tokens = None, None
        if has_pictures:
            images = self.get_image_features(pixel_values, vision_features, return_dict=True, **asked)
            image_tokens = images.pooler_output
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, image_tokens, image_positions)
        if image_tokens is None and inputs_embeds is not None and self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._zero_without_pictures().to(inputs_embeds)
        if position_ids is None and inputs_embeds is not None:
            position_ids = self._positions(attention_mask, inputs_embeds)
        options = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        options = {**options, self.cache_name: cache, **asked, **kwargs}
        options = accepted(options, self.language_model_arguments)  # older decoders take only what they name
        outputs = self.language_model(inputs_embeds=inputs_embeds, **{**options, "return_dict": True})
        return MiniGPT4ModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            image_hidden_states=image_tokens,
            image_outputs=images,
            **{CACHE: outputs.get(CACHE)},
        )


class MiniGPT4ForConditionalGeneration(MiniGPT4GenerationMixin, MiniGPT4PreTrainedModel):
    r"""
    MiniGPT-4: answers in text about pictures and text (arXiv 2304.10592).

    Example:

    ```python
    >>> eyes = "Salesforce/blip2-flan-t5-xxl"
    >>> model = MiniGPT4ForConditionalGeneration.from_backbones(eyes, "./vicuna-7b", qformer=eyes)
    ```
    """

    # Tensor parallelism: every device scores a share of the vocabulary, and the shares are put together.
    _tp_plan = {"lm_head": GATHER_LOGITS}

    def __init__(self, config: MiniGPT4Config) -> None:
        super().__init__(config)
        warn_about_size(config, lambda: self._skeleton(config))
        # The language model's own class brings the right head: with or without a bias, under whatever name.
        causal_lm = build_causal_lm(config.text_config)
        check_head(causal_lm)
        self.lm_head_name, self.decoder_name = head_name(causal_lm), decoder_name(causal_lm)
        self.model = MiniGPT4Model(config, language_model=getattr(causal_lm, self.decoder_name))
        self.lm_head = causal_lm.get_output_embeddings()
        self._tied_weights_keys: Any = tied_weights_keys(tied_to(self))
        self.register_forward_pre_hook(mask_image_labels, with_kwargs=True)
        self.post_init()

    @property
    def language_model(self) -> PreTrainedModel:
        return self.model.language_model

    def get_image_features(
        self, pixel_values: torch.Tensor | None = None, vision_features: torch.Tensor | None = None, **kwargs: Any
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
        more = ("output_hidden_states", "output_attentions")  # which are of all positions
        if answers is not None and not any(kwargs.get(name) or getattr(self.config, name) for name in more):
            kwargs["answer_positions"] = answer_positions  # the last layer may compute these positions only
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
        text_config = self.config.text_config
        if answers is not None and answer_positions is not None:
            flat = outputs.last_hidden_state.flatten(0, 1)
            before = flat.index_select(0, answer_positions.to(flat.device))
            log_probs, entropy, is_top1 = score_answers(before, answers.to(flat.device), self.lm_head, text_config)
            return MiniGPT4CausalLMOutputWithPast(log_probs=log_probs, entropy=entropy, is_top1=is_top1)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state if logits_to_keep is None else outputs.last_hidden_state[:, keep]
        logits = adjust_logits(self.lm_head(hidden_states), text_config)
        loss = None
        if labels is None:
            outside = (self.training and torch.is_grad_enabled()) or kwargs.get("num_items_in_batch") is not None
            if outside and outputs.image_hidden_states is not None:
                logits = scored_elsewhere(logits, self.config.image_token_id)
        else:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        return MiniGPT4CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            **{CACHE: outputs.get(CACHE)},
        )


register_name(MiniGPT4ForConditionalGeneration)
MiniGPT4Model.register_for_auto_class("AutoModel")
MiniGPT4ForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["MiniGPT4ForConditionalGeneration", "MiniGPT4Model", "MiniGPT4PreTrainedModel"]
