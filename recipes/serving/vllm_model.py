"""MiniGPT-4 inside vLLM: its own vision side and projection, and the decoder with vLLM's attention and cache."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from modeling_minigpt4.heads_minigpt4 import adjust_logits
from processing_minigpt4 import MiniGPT4Processor


@lru_cache(maxsize=2)
def load_processor(name: str, revision: str | None, trust_remote_code: bool) -> MiniGPT4Processor:
    """The processor of a folder or repository, with a tokenizer of its own: vLLM's stays as it is."""
    return MiniGPT4Processor.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def processor_of(model_config: Any) -> MiniGPT4Processor:
    """The processor of the model that vLLM serves."""
    return load_processor(model_config.model, model_config.revision, model_config.trust_remote_code)


class Info(BaseProcessingInfo):  # type: ignore[misc]
    """How many pictures a prompt may have, and how long each is."""

    def get_supported_mm_limits(self) -> dict[str, None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> dict[str, int]:
        return {"image": self.get_hf_config().num_image_tokens}

    def get_hf_processor(self, **kwargs: Any) -> MiniGPT4Processor:
        return processor_of(self.ctx.model_config)

    def places(self, pictures: int = 1) -> list[int]:
        """The ids that stand for pictures."""
        config = self.get_hf_config()
        return [config.image_token_id] * (config.num_image_tokens * pictures)


class DummyInputs(BaseDummyInputsBuilder):  # type: ignore[misc]
    """Pictures with which vLLM measures how much memory is needed."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        height, width = self.info.get_hf_config().image_size
        count = mm_counts.get("image", 0)
        pictures = self._get_dummy_images(
            width=width, height=height, num_images=count, overrides=mm_options.get("image")
        )
        return {"image": pictures}


class PictureProcessor(BaseMultiModalProcessor):  # type: ignore[misc]
    """Pictures to pixels; prompts come with the places of their pictures, as the renderer of ours makes them."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        inputs.prompt = self.info.places(mm_counts.get("image", 0))
        return inputs

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        places = self.info.places()
        return [PromptReplacement(modality="image", target=places, replacement=places)]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> tuple[list[int], Any]:
        """Find the places: there is nothing to replace, and no text in which to look for them."""
        pictures, places = len(mm_prompt_updates.get("image", ())), self.info.places()
        if token_ids.count(places[0]) != pictures * len(places):
            raise ValueError(
                f"The prompt has {token_ids.count(places[0])} places for {pictures} pictures of {len(places)} tokens "
                "each; write <image> once where each picture goes."
            )
        return token_ids, self._find_mm_placeholders(token_ids, mm_prompt_updates)


@MULTIMODAL_REGISTRY.register_processor(PictureProcessor, info=Info, dummy_inputs=DummyInputs)
class MiniGPT4ForVLLM(TransformersMultiModalForCausalLM):  # type: ignore[misc]
    """
    The model as vLLM runs it.

    The id of image places lies outside the vocabulary, as it does elsewhere, and is never looked up.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.configure_mm_token_handling(self.text_config.vocab_size, [self.config.image_token_id])
        self.logits_processor = LogitsProcessor(self.text_config.vocab_size)  # see `compute_logits`

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>" if modality == "image" else None

    def recursive_replace(self) -> None:
        """Put vLLM's layers in, but not for the projection, which stays in float32 and is never quantized."""
        projection, self.model.language_projection = self.model.language_projection, nn.Identity()
        super().recursive_replace()
        self.model.language_projection = projection

    def embed_multimodal(self, pixel_values: torch.Tensor | None = None, **kwargs: Any) -> list[torch.Tensor]:
        """Image tokens, a tensor of shape (num_image_tokens, hidden_size) for each picture."""
        if pixel_values is None:
            return []
        return list(self.model.get_image_features(pixel_values, return_dict=True).pooler_output)

    def embed_input_ids(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Embeddings of words, with image tokens in their places; ids that are no words are not looked up."""
        words = input_ids.masked_fill(input_ids >= self.text_config.vocab_size, 0)
        return super().embed_input_ids(words, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder, on several prompts in a row: together they may be longer than its window."""
        return self.get_language_model().forward(*args, **kwargs)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Scores of the next tokens, adjusted as the language model's own head does."""
        logits = super().compute_logits(hidden_states)
        return None if logits is None else adjust_logits(logits, self.text_config)
