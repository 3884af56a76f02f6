"""Describe every picture of a folder, in batches, and write a JSON line for each.

python -m recipes_minigpt4.examples.caption_folder demo-output/adapter PICTURES captions.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_minigpt4  # noqa: F401  # registers the model with the Auto classes


PROMPT = "Describe this image in detail."
BATCH_SIZE = 8
ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def main(adapter: str, folder: str, output: str) -> None:
    """Describe the pictures of `folder` with the model in `adapter`; a line of `output` is `{"file", "caption"}`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageTextToText.from_pretrained(adapter).to(device).eval()
    processor = AutoProcessor.from_pretrained(adapter)
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in ENDINGS)
    with open(output, "w", encoding="utf-8") as file:
        for start in range(0, len(paths), BATCH_SIZE):
            batch = paths[start : start + BATCH_SIZE]
            chats = [
                [{"role": "user", "content": [{"type": "image", "path": str(path)}, {"type": "text", "text": PROMPT}]}]
                for path in batch
            ]
            inputs = processor.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            ).to(device)
            with torch.inference_mode():
                ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            for path, caption in zip(batch, processor.post_process_image_text_to_text(ids), strict=True):
                file.write(json.dumps({"file": path.name, "caption": caption}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
