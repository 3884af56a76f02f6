"""Ask about several pictures at once, in a batch with another chat, then watch a reply appear word by word.

python -m recipes_minigpt4.examples.several_pictures demo-output/adapter one.png two.png
"""

import sys
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, TextStreamer

import modeling_minigpt4  # noqa: F401  # registers the model with the Auto classes


def chat_about(pictures: list[str], question: str) -> list[dict[str, Any]]:
    """A chat of one turn: pictures first, then the question."""
    content = [{"type": "image", "path": path} for path in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def main(adapter: str, *pictures: str) -> None:
    """Print two replies of one batch, then stream a third."""
    model = AutoModelForImageTextToText.from_pretrained(adapter).eval()
    processor = AutoProcessor.from_pretrained(adapter)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    chats = [
        chat_about(list(pictures), "What do these images have in common?"),
        chat_about([pictures[0]], "Describe this image in detail."),
    ]
    inputs = processor.apply_chat_template(
        chats, padding=True, **options
    )  # rows of different length, padded at the left
    with torch.inference_mode():
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        for chat, reply in zip(chats, processor.post_process_image_text_to_text(ids), strict=True):
            print(f"{chat[0]['content'][-1]['text']}\n  {reply}")
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate(**processor.apply_chat_template(chats[1], **options), streamer=streamer)


if __name__ == "__main__":
    main(*sys.argv[1:])
