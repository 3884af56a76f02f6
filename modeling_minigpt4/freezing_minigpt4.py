"""What trains and what stays frozen, and what a training step needs because most of the model is frozen."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .backbones import PARTS, part_of
from .compat_minigpt4 import checkpoint_with_gradients_only
from .peft_minigpt4 import adapter_modules, trains_itself
from .projector_minigpt4 import first_layer


class FreezingMixin(PreTrainedModel):
    """Frozen parts stay in eval mode while the model trains, and pass gradients on to the projection."""

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
        for parameter in self.base_model.language_projection.parameters():
            parameter.requires_grad_(True)
        if self.has_adapter:
            self.set_adapter(self.active_adapters())
        self.train(self.training)

    def train(self, mode: bool = True) -> "FreezingMixin":
        """
        Set training mode, except for the parts of which nothing trains.

        These are never in it, not for a moment: another thread may be writing a reply.
        """
        if mode:
            self.prepare_quantized_training()
        base = self.base_model
        parts = [part for part in (base.vision_model, base.qformer, base.language_model) if part is not None]
        frozen = {module: part for part in parts if not trains_itself(part) for module in part.modules()}
        if isinstance(embeddings := base.get_input_embeddings(), nn.Embedding):
            frozen[embeddings] = embeddings  # so that `_with_neftune_noise` alone adds noise, whatever trains
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
        base = self.base_model
        frozen = [part for part in (base.vision_model, base.qformer) if part is not None and not trains_itself(part)]
        theirs = {number for part in frozen for module in part.modules() for number in module._forward_hooks}
        for hook in getattr(self, "_require_grads_hooks", ()):  # 4.57 has one, at the language model
            if hook.id in theirs:
                hook.remove()

    def _parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of every part that a backbone can provide."""
        parts: dict[str, list[nn.Parameter]] = {part: [] for part in PARTS}
        prefix = f"{self.base_model_prefix}." if self.base_model is self else ""
        for name, parameter in self.named_parameters():
            if (part := part_of(prefix + name)) is not None:
                parts[part].append(parameter)
        return {part: tensors for part, tensors in parts.items() if tensors}

    # ---- in a training step of `MiniGPT4Model` --------------------------------------------------------------------

    def _zero_without_pictures(self) -> torch.Tensor:
        """
        Nought, with a gradient of nought for whatever trains of the vision side and the projection.

        A training step on text alone would have nothing to do backward without it, and DDP would miss gradients.
        """
        if any(tensor.requires_grad for part in ("vision", "qformer") for tensor in self._parts().get(part, ())):
            shape = (1, getattr(self.config.vision_config, "num_channels", 3), *self.config.image_size)
            blank = torch.zeros(shape, device=self.vision_model.device)
            tokens = self.get_image_features(blank, return_dict=True).pooler_output
        else:
            first = first_layer(self.language_projection)
            tokens = self.language_projection(first.weight.new_zeros(1, first.in_features))
        return tokens.sum() * 0

    def _with_neftune_noise(self, embeddings: torch.Tensor) -> torch.Tensor:
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


__all__ = ["FreezingMixin"]
