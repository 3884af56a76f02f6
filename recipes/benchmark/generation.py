"""Writing replies: greedy, as many tokens for every picture, beside BLIP-2's `generate`."""

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from recipes_minigpt4.benchmark.measure import compare, device, take_turns
from recipes_minigpt4.benchmark.models import (
    build_config,
    build_ours,
    build_pairs,
    build_peer,
    build_processor,
    peer_inputs,
    size_of,
)
from recipes_minigpt4.benchmark.options import IMAGES, NEW_TOKENS
from recipes_minigpt4.benchmark.report import Bar, describe_machine, describe_shapes, judge
from recipes_minigpt4.data.formatting import INSTRUCTIONS
from recipes_minigpt4.utils.errors import RecipeError


# Set for two CPU cores, the size `mid`, and the numbers of `options`.
BARS = (Bar("generation", ("ratios", "ours", "median"), ">=", 1.0),)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """
    Measure generation.

    Returns:
        The report: for both sides seconds and tokens per second; their ratio.

    Raises:
        RecipeError: if the sides do not write the same.
    """
    torch.set_num_threads(args.threads)
    inputs = build_inputs(args.size, args.images)
    works = build_works(args, inputs)
    check_replies({name: work() for name, work in works.items()}, args.new_tokens)  # which is the warm-up too
    times = take_turns(works, args.rounds)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    rows, length = inputs["input_ids"].shape
    report = {
        "benchmark": "generate",
        "size": args.size,
        "rounds": args.rounds,
        "machine": describe_machine(),
        "shapes": {
            **describe_shapes(size_of(args.size)),
            "batch": f"{rows} prompts of {length} tokens, {args.new_tokens} new tokens each, greedy",
            "dtype": "float32",
        },
        "sides": {
            name: {
                "seconds_per_batch": median,
                "fastest_seconds": min(times[name]),
                "tokens_per_second": args.images * args.new_tokens / median,
                "seconds": times[name],
            }
            for name, median in medians.items()
        },
        "ratios": {"ours": compare(times["peer"], times["ours"])},
    }
    usual = (args.size, args.images, args.new_tokens) == ("mid", IMAGES, NEW_TOKENS)
    return {**report, "bars": judge(report, BARS) if usual else []}


def build_inputs(size_name: str, images: int) -> dict[str, Tensor]:
    """A question about every picture in the chat template: `input_ids`, `attention_mask` and `pixel_values`."""
    processor = build_processor(build_config(size_of(size_name)))
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": INSTRUCTIONS[0]}]}]
    prompt = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(images=build_pairs(images)["image"][:], text=[prompt] * images, return_tensors="pt")
    names = ("input_ids", "attention_mask", "pixel_values")
    return {name: inputs[name].to(device()) for name in names}


def build_works(args: argparse.Namespace, inputs: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """For both sides a call that returns the ids of its replies, of shape (images, new tokens)."""
    size = size_of(args.size)
    ours = build_ours(size, args.seed).to(device())
    return replies_of(ours, build_peer(size, args.seed, ours=ours).to(device()), inputs, args.new_tokens)


def replies_of(ours: Any, peer: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The same for two models that are there."""
    ours.eval()
    peer.eval()
    options = {
        "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False,
        "eos_token_id": ours.config.text_config.eos_token_id, "pad_token_id": ours.config.text_config.pad_token_id,
    }  # fmt: skip
    theirs = peer_inputs(inputs, ours.config)
    length = inputs["input_ids"].shape[1]
    return {
        "peer": lambda: peer.generate(**theirs, **options)[:, length:],
        "ours": lambda: ours.generate(**inputs, **options)[:, length:],
    }


def check_replies(replies: Mapping[str, Tensor], new_tokens: int) -> None:
    """
    Make sure that both sides wrote the same, and as much as they were asked for.

    Raises:
        RecipeError: if not.
    """
    for name, ids in replies.items():
        if ids.shape[1] != new_tokens:
            raise RecipeError(f"{name!r} wrote {ids.shape[1]} tokens instead of {new_tokens}, so times say nothing.")
    first, second = replies.values()
    if differing := int((first != second).any(-1).sum()):
        raise RecipeError(
            f"The sides do not do the same work, so times say nothing: {differing} of {len(first)} replies differ."
        )
