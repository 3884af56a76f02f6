"""The tiny MiniGPT-4 that transformers' common tests run on, in the form in which they ask for it."""

from typing import Any

import torch

from modeling_minigpt4 import MiniGPT4Config


IMAGE_SIZE = 28  # pixels; patches of 14 make 4 of them and a CLS token


def config_fields(qformer: bool) -> dict[str, Any]:
    """Fields of a tiny configuration, as plain data."""
    return {
        "vision_config": {
            "model_type": "blip_2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": IMAGE_SIZE,
            "patch_size": 14,
        },
        "qformer_config": {
            "model_type": "blip_2_qformer",
            "vocab_size": 8,
            "hidden_size": 24,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "cross_attention_frequency": 2,
            "max_position_embeddings": 8,
        }
        if qformer
        else None,
        "text_config": {
            "model_type": "llama",
            "vocab_size": 99,
            "hidden_size": 32,
            "intermediate_size": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        "num_query_tokens": 4,
        "patch_merge_size": 2,
    }


class TinyMiniGPT4:
    """What a mixin of transformers calls a model tester: one picture in front of a few words, in every row."""

    is_training = True
    batch_size = 7  # that of the comparisons of attention implementations, which add rows without a picture otherwise
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    image_size = IMAGE_SIZE

    def __init__(self, qformer: bool) -> None:
        self.qformer = qformer
        self.num_image_tokens = self.get_config().num_image_tokens
        self.seq_length = self.num_image_tokens + 6
        self.text_only = False

    def get_config(self) -> MiniGPT4Config:
        return MiniGPT4Config(**config_fields(self.qformer))

    def prepare_config_and_inputs_for_common(self) -> tuple[MiniGPT4Config, dict[str, torch.Tensor]]:
        config = self.get_config()
        generator = torch.Generator().manual_seed(0)
        input_ids = torch.randint(3, 99, (self.batch_size, self.seq_length), generator=generator)
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if not self.text_only:
            input_ids[:, 1 : 1 + self.num_image_tokens] = config.image_token_id
            inputs["pixel_values"] = torch.randn(self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        return config, inputs
