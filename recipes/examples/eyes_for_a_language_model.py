"""Give a language model eyes: join it with a vision encoder, and save the untrained model to train it from there.

    python -m recipes_minigpt4.examples.eyes_for_a_language_model \\
        google/siglip-so400m-patch14-224 Qwen/Qwen3-0.6B runs/untrained
    minigpt4 stage1 --model_name_or_path runs/untrained --dataset_name PAIRS --output_dir runs/stage1

Without arguments for the parts, the shipped ones are joined, which needs no network.
"""

import sys

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE


def main(vision: str, language_model: str, output: str, qformer: str | None = None) -> None:
    """Join the parts by a new projection; `qformer` is a BLIP-2 repository, or None to join patches."""
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        vision=vision, language_model=language_model, qformer=qformer
    )
    processor = MiniGPT4Processor.from_backbones(vision=vision, language_model=language_model, config=model.config)
    model.freeze_backbones()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    everything = sum(parameter.numel() for parameter in model.parameters())
    print(f"{trained:,} of {everything:,} parameters train, {trained / everything:.2%}")
    model.save_pretrained(output)  # the projection; the parts stay where they are
    processor.save_pretrained(output)
    print(f"{output} knows its parts: {', '.join(model.config.backbones)}")


if __name__ == "__main__":
    shipped = [str(VISION_BACKBONE), str(LANGUAGE_BACKBONE), "runs/untrained", str(VISION_BACKBONE)]
    main(*(sys.argv[1:] or shipped))
