"""What a model of ours makes of chats: its replies, and how likely it finds replies that are given."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from processing_minigpt4.segments_minigpt4 import tokenize_pieces


Chat = Sequence[Mapping[str, Any]]

# What tasks ask of `generate`. Of other models' options, such as `image_aspect_ratio`, ours need none.
TAKEN = (
    "do_sample", "length_penalty", "max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty",
    "temperature", "top_k", "top_p", "until",
)  # fmt: skip

logger = logging.getLogger(__name__)


def chat_about(pictures: Sequence[Any], text: str) -> Chat:
    """A chat of one turn: pictures first, then the text."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def generation_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What a task asks of `reply`, as ours takes it: greedy unless it asks for samples or a temperature above 0."""
    if left_out := sorted(asked.keys() - set(TAKEN)):
        logger.info("minigpt4 has no use for %s of the task.", ", ".join(left_out))
    options = {name: asked[name] for name in TAKEN if asked.get(name) is not None}
    if options.get("temperature", 1) == 0 or not options.get("do_sample", "temperature" in options):
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_k", "top_p")}
        return {**options, "do_sample": False}
    return {**options, "do_sample": True}


@torch.inference_mode()
def reply(model: Any, processor: Any, chats: Sequence[Chat], options: Mapping[str, Any]) -> list[str]:
    """
    A reply to every chat, in one batch.

    Args:
        processor: whose tokenizer pads at the left.
        options: what `generate` takes, and `until`: texts before which a reply ends.

    Raises:
        ValueError: if a message holds what is neither text nor a picture.
    """
    options = dict(options)
    ends = options.pop("until", [])
    inputs = _prompts(processor, chats).to(model.device)
    ids = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    replies = processor.post_process_image_text_to_text(ids)
    for end in filter(None, [ends] if isinstance(ends, str) else ends):
        replies = [text.split(end)[0] for text in replies]
    return replies


@torch.inference_mode()
def losses(model: Any, processor: Any, chats: Sequence[Chat], replies: Sequence[str]) -> list[tuple[float, bool]]:
    """
    How unlikely a reply to every chat is: the mean loss of its tokens, and whether each of them is the likeliest.

    The reply is spelt as in training, without white space around it and without what ends it (EOS, or `###`).

    Raises:
        ValueError: if a reply is empty.
    """
    pieces = tokenize_pieces(processor.tokenizer, [text.strip() for text in replies], with_spans=False, options={})
    spelt = [ids for ids, _ in pieces]
    if not all(spelt):
        raise ValueError("A reply whose likelihood is asked for is empty; take the choice out, or write it out.")
    inputs = _prompts(processor, chats).to(model.device)
    starts = inputs["attention_mask"].sum(-1).tolist()
    prompts = [row[mask.bool()] for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    rows = [torch.cat([row, row.new_tensor(ids)]) for row, ids in zip(prompts, spelt, strict=True)]
    inputs["input_ids"] = pad_sequence(rows, batch_first=True)  # at the right, where no mask has to tell positions
    inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    logits = model(**inputs).logits.float()
    found = []
    for scores, row, start in zip(logits, rows, starts, strict=True):
        wanted, scores = row[start:], scores[start - 1 : row.shape[0] - 1]
        found.append((float(F.cross_entropy(scores, wanted)), bool((scores.argmax(-1) == wanted).all())))
    return found


def _prompts(processor: Any, chats: Sequence[Chat]) -> Any:
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(list(chats), padding=True, **options)
