"""
Mistakes that are easily made, one at a time in the package, and the first stage of `test_parity.py` that catches each.

A suite that passes whatever one does proves nothing. Everything before the stage named passes: it shows where to look.
"""

from collections.abc import Callable
from typing import Any

import parity_case
import pytest
import torch
from parity_case import VARIANTS, build_case, first_failing_stage
from transformers.activations import ACT2FN
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPooling
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Model, convert_minigpt4_to_hf
from modeling_minigpt4 import freezing_minigpt4 as freezing
from modeling_minigpt4 import generation_minigpt4 as generation
from recipes_minigpt4.data import formatting as recipes


Patch = pytest.MonkeyPatch


def wrap(patch: Patch, owner: Any, name: str, change: Callable[[Any], Any]) -> None:
    """Let a function or method return what `change` makes of its result."""
    original = getattr(owner, name)
    patch.setattr(owner, name, lambda *args, **kwargs: change(original(*args, **kwargs)))


def once_built(patch: Patch, change: Callable[[MiniGPT4ForConditionalGeneration], None]) -> None:
    """Change every model once it has been built."""
    build = MiniGPT4ForConditionalGeneration.__init__

    def build_and_change(model: MiniGPT4ForConditionalGeneration, *args: Any, **kwargs: Any) -> None:
        build(model, *args, **kwargs)
        change(model)

    patch.setattr(MiniGPT4ForConditionalGeneration, "__init__", build_and_change)


# ---- the vision side ------------------------------------------------------------------------------------------------


def ln_vision_has_the_epsilon_of_the_other_norms(patch: Patch) -> None:
    once_built(patch, lambda model: setattr(model.model.vision_model.post_layernorm, "eps", 1e-6))


def gelu_of_the_vit_is_the_tanh_approximation(patch: Patch) -> None:
    def change(model: MiniGPT4ForConditionalGeneration) -> None:
        for layer in model.model.vision_model.encoder.layers:
            layer.mlp.activation_fn = ACT2FN["gelu_pytorch_tanh"]

    once_built(patch, change)


def biases_of_queries_and_values_are_swapped(patch: Patch) -> None:
    convert = convert_minigpt4_to_hf.convert_original_state_dict
    other = {"attn.q_bias": "attn.v_bias", "attn.v_bias": "attn.q_bias"}

    def swapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return convert({name[:-11] + other.get(name[-11:], name[-11:]): value for name, value in tensors.items()})

    patch.setattr(convert_minigpt4_to_hf, "convert_original_state_dict", swapped)


def qformer_is_left_in_train_mode(patch: Patch) -> None:
    patch.delattr(freezing.FreezingMixin, "train")


def qformer_does_not_see_cls(patch: Patch) -> None:
    once_built(patch, lambda model: setattr(model.config, "vision_feature_select_strategy", "default"))


def cls_is_joined_with_patches(patch: Patch) -> None:
    """And the last patch goes instead, for with all 17 tokens the package refuses (see the last test)."""

    def encode(self: MiniGPT4Model, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        features = self.vision_model(pixel_values).last_hidden_state[:, :-1]
        return BaseModelOutputWithPooling(last_hidden_state=self._join_patches(features))

    patch.setattr(MiniGPT4Model, "encode_images", encode)


def distant_patches_are_joined(patch: Patch) -> None:
    def strided(self: MiniGPT4Model, features: torch.Tensor) -> torch.Tensor:
        batch_size, tokens, channels = features.shape
        merge = self.config.patch_merge_size
        features = features.view(batch_size, merge, tokens // merge, channels).transpose(1, 2)
        return features.reshape(batch_size, tokens // merge, merge * channels)

    patch.setattr(MiniGPT4Model, "_join_patches", strided)


def projection_has_no_bias(patch: Patch) -> None:
    wrap(
        patch,
        convert_minigpt4_to_hf,
        "convert_original_state_dict",
        lambda tensors: {
            name: torch.zeros_like(tensor) if name == "model.language_projection.bias" else tensor
            for name, tensor in tensors.items()
        },
    )


# ---- training batches -----------------------------------------------------------------------------------------------


def prompts_change(patch: Patch, change: Callable[[str], str]) -> None:
    wrap(
        patch,
        recipes.Rows,
        "__call__",
        lambda rows: {**rows, "prompt": [change(prompt) for prompt in rows["prompt"]]},
    )


def bos_stands_twice(patch: Patch) -> None:
    prompts_change(patch, lambda prompt: "<s>" + prompt)


def bos_is_missing(patch: Patch) -> None:
    prompts_change(patch, lambda prompt: prompt.removeprefix("<s>"))


def end_sym_is_not_counted_when_cutting(patch: Patch) -> None:
    completion = recipes.Rows.completion

    def longer(self: recipes.Rows, text: str) -> str:
        object.__setattr__(self, "max_txt_len", self.max_txt_len + 2)  # "###" is two tokens
        try:
            return completion(self, text)
        finally:
            object.__setattr__(self, "max_txt_len", self.max_txt_len - 2)

    patch.setattr(recipes.Rows, "completion", longer)


def labels_change(patch: Patch, change: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> None:
    collator = DataCollatorForVisionLanguageModeling
    wrap(patch, collator, "torch_call", lambda batch: {**batch, "labels": change(batch)})


def labels_are_shifted_by_one(patch: Patch) -> None:
    labels_change(patch, lambda batch: batch["labels"].roll(-1, dims=1))


def end_sym_is_not_trained(patch: Patch) -> None:
    def without_last(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        last = batch["attention_mask"].sum(1, keepdim=True) - 1
        return batch["labels"].scatter(1, last, -100)

    labels_change(patch, without_last)


def prompts_are_trained_too(patch: Patch) -> None:
    labels_change(patch, lambda batch: batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))


def loss_does_not_shift(patch: Patch) -> None:
    def change(model: MiniGPT4ForConditionalGeneration) -> None:
        model.loss_function = lambda logits, labels, **options: ForCausalLMLoss(
            logits, labels, shift_labels=labels, **options
        )

    once_built(patch, change)


# ---- replies --------------------------------------------------------------------------------------------------------


def separator_is_not_heeded(patch: Patch) -> None:
    patch.delattr(generation.MiniGPT4GenerationMixin, "_get_stopping_criteria")


def penalty_counts_the_prompt(patch: Patch) -> None:
    patch.setattr(generation, "penalize_replies_only", lambda processors, prompt_length: None)


def earlier_replies_are_tokenized_apart(patch: Patch) -> None:
    """As replies are that are trained."""
    together, apart = '"" if add_generation_prompt else segment_mark', "segment_mark"
    wrap(patch, parity_case, "load_chat_template", lambda template: template.replace(together, apart))


MISTAKES = [
    (gelu_of_the_vit_is_the_tanh_approximation, "qformer", "vit_output"),
    (biases_of_queries_and_values_are_swapped, "qformer", "vit_output"),
    (ln_vision_has_the_epsilon_of_the_other_norms, "qformer", "image_embeds"),
    (qformer_is_left_in_train_mode, "qformer", "query_output"),
    (qformer_does_not_see_cls, "qformer", "query_output"),
    (cls_is_joined_with_patches, "no_qformer", "image_embeds_grouped"),
    (distant_patches_are_joined, "no_qformer", "image_embeds_grouped"),
    (projection_has_no_bias, "qformer", "inputs_llama"),
    (bos_stands_twice, "qformer", "stage1.input_ids"),
    (bos_is_missing, "qformer", "stage1.input_ids"),
    (labels_are_shifted_by_one, "qformer", "stage1.labels"),
    (end_sym_is_not_trained, "qformer", "stage1.labels"),
    (prompts_are_trained_too, "qformer", "stage1.labels"),
    (loss_does_not_shift, "qformer", "stage1.loss"),
    (end_sym_is_not_counted_when_cutting, "qformer", "truncated.input_ids"),
    (penalty_counts_the_prompt, "qformer", "chat_free.turn0.processed_scores"),
    (earlier_replies_are_tokenized_apart, "qformer", "chat_free.turn1.segments"),
    (separator_is_not_heeded, "qformer", "chat_stopped.turn0.ids"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_without_a_mistake_no_stage_fails(variant: str) -> None:
    assert first_failing_stage(variant, build_case(variant)) is None


@pytest.mark.parametrize(
    ("make", "variant", "stage"), [pytest.param(*entry, id=f"{entry[0].__name__}-{entry[2]}") for entry in MISTAKES]
)
def test_mistake_is_caught(make: Callable[[Patch], None], variant: str, stage: str, monkeypatch: Patch) -> None:
    make(monkeypatch)
    assert first_failing_stage(variant, build_case(variant)) == stage


def test_joining_patches_with_cls_and_all_is_refused(monkeypatch: Patch) -> None:
    """17 tokens cannot be joined 4 at a time, so that this mistake does not even reach a comparison."""
    once_built(monkeypatch, lambda model: setattr(model.config, "vision_feature_select_strategy", "full"))
    with pytest.raises(ValueError, match="17 tokens"):
        first_failing_stage("no_qformer", build_case("no_qformer"))
