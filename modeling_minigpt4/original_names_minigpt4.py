"""Names and shapes of the released code's tensors, beside ours: what is expected, what fits, and how it is renamed."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Group:
    """
    Tensors that stand below one name.

    Args:
        original, ours: the name in the released code and in [`MiniGPT4ForConditionalGeneration`]; `{}` is the number
            of a layer.
        rows: the rest of both names (one text where they are equal), and the shape in named sizes. `.*` stands for a
            weight of that shape and a bias of its first size.
    """

    original: str
    ours: str
    rows: tuple[tuple[str, ...], ...]

    def names(self, layers: Iterable[int] = (0,)) -> dict[str, tuple[str, str]]:
        """The original's name → our name and shape, for every layer."""
        found = {}
        for layer in layers:
            for row in self.rows:
                original, ours = self.original.format(layer) + row[0], self.ours.format(layer) + row[-2]
                if not original.endswith(".*"):
                    found[original] = (ours, row[-1])
                    continue
                for kind, shape in (("weight", row[-1]), ("bias", row[-1].split()[0])):
                    found[original[:-1] + kind] = (ours[:-1] + kind, shape)
        return found


VISION = Group(
    "visual_encoder.",
    "model.vision_model.",
    (
        ("cls_token", "embeddings.class_embedding", "1 1 width"),
        ("pos_embed", "embeddings.position_embedding", "1 tokens width"),
        ("patch_embed.proj.*", "embeddings.patch_embedding.*", "width 3 patch patch"),
    ),
)
VISION_BLOCK = Group(
    "visual_encoder.blocks.{}.",
    "model.vision_model.encoder.layers.{}.",
    (
        ("norm1.*", "layer_norm1.*", "width"),
        ("attn.qkv.weight", "self_attn.qkv.weight", "3*width width"),
        ("attn.q_bias", "self_attn.qkv.bias", "width"),  # with `v_bias` behind it; keys have none
        ("attn.v_bias", "self_attn.qkv.bias", "width"),
        ("attn.proj.*", "self_attn.projection.*", "width width"),
        ("norm2.*", "layer_norm2.*", "width"),
        ("mlp.fc1.*", "mlp.fc1.*", "mlp width"),
        ("mlp.fc2.*", "mlp.fc2.*", "width mlp"),
    ),
)
VISION_NORM = Group("ln_vision.", "model.vision_model.post_layernorm.", (("weight", "width"), ("bias", "width")))
QFORMER = Group(
    "",
    "model.",
    (
        ("query_tokens", "1 queries query_width"),
        ("Qformer.bert.embeddings.LayerNorm.*", "qformer.layernorm.*", "query_width"),
    ),
)
QFORMER_LAYER = Group(
    "Qformer.bert.encoder.layer.{}.",
    "model.qformer.encoder.layer.{}.",
    (
        *(
            (f"attention.self.{name}.*", f"attention.attention.{name}.*", "query_width query_width")
            for name in ("query", "key", "value")
        ),
        ("attention.output.dense.*", "query_width query_width"),
        ("attention.output.LayerNorm.*", "query_width"),
        ("intermediate_query.dense.*", "intermediate query_width"),
        ("output_query.dense.*", "query_width intermediate"),
        ("output_query.LayerNorm.*", "query_width"),
    ),
)
QFORMER_CROSS = Group(
    "Qformer.bert.encoder.layer.{}.crossattention.",
    "model.qformer.encoder.layer.{}.crossattention.",
    (
        ("self.query.*", "attention.query.*", "query_width query_width"),
        ("self.key.*", "attention.key.*", "query_width width"),
        ("self.value.*", "attention.value.*", "query_width width"),
        ("output.dense.*", "query_width query_width"),
        ("output.LayerNorm.*", "query_width"),
    ),
)
PROJECTION = Group("llama_proj.", "model.language_projection.", (("weight", "hidden features"), ("bias", "hidden")))
LLAMA = Group(
    "llama_model.",
    "",
    (
        ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "vocabulary hidden"),
        ("model.norm.weight", "model.language_model.norm.weight", "hidden"),
        ("lm_head.weight", "vocabulary hidden"),
    ),
)
LLAMA_LAYER = Group(
    "llama_model.model.layers.{}.",
    "model.language_model.layers.{}.",
    (
        ("self_attn.q_proj.weight", "heads hidden"),
        ("self_attn.k_proj.weight", "key_heads hidden"),
        ("self_attn.v_proj.weight", "key_heads hidden"),
        ("self_attn.o_proj.weight", "hidden heads"),
        ("mlp.gate_proj.weight", "feed_forward hidden"),
        ("mlp.up_proj.weight", "feed_forward hidden"),
        ("mlp.down_proj.weight", "hidden feed_forward"),
        ("input_layernorm.weight", "hidden"),
        ("post_attention_layernorm.weight", "hidden"),
    ),
)

# Buffers that are computed, not learned.
COMPUTED = re.compile(r"^Qformer\.bert\.embeddings\.position_ids$|^llama_model\..*\.rotary_emb\.inv_freq$")


# What stands at the front of names of one part; a file holds all of a part or nothing of it.
PARTS_OF_ORIGINAL = ("visual_encoder.", "ln_vision.", "query_tokens", "Qformer.", "llama_proj.", "llama_model.")


def part_of_original(name: str) -> str:
    """The one of `PARTS_OF_ORIGINAL` that a name begins with, or nothing."""
    return next((part for part in PARTS_OF_ORIGINAL if name.startswith(part)), "")


def expected_names(state_dict: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """What a whole model with as many layers as these must have: the original's name → our name and shape."""
    cross = _layers(state_dict, QFORMER_CROSS)
    layers = range(max(_layers(state_dict, QFORMER_LAYER), default=-1) + 1)
    # Every second layer looks at the picture; what has another rhythm shows it in its first two such layers.
    every = cross[1] - cross[0] if len(cross) > 1 else 2
    groups = [VISION.names(), VISION_NORM.names(), PROJECTION.names(), LLAMA.names()]
    for group in (VISION_BLOCK, LLAMA_LAYER):
        groups.append(group.names(range(max(_layers(state_dict, group), default=0) + 1)))
    if layers or "query_tokens" in state_dict:
        groups += [QFORMER.names(), QFORMER_LAYER.names(layers or [0]), QFORMER_CROSS.names(layers[::every] or [0])]
    return {name: entry for group in groups for name, entry in group.items()}


def _layers(names: Iterable[str], group: Group) -> list[int]:
    """Numbers of the layers of a group that some name belongs to."""
    pattern = re.compile("^" + re.escape(group.original).replace(re.escape("{}"), r"(\d+)"))
    return sorted({int(match[1]) for match in map(pattern.match, names) if match})


def check_tensors(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[str, str]]) -> None:
    """
    Refuse tensors that are not exactly those expected, in shapes that go together; computed buffers may stand beside.

    Args:
        state_dict: the original's name → tensor.
        expected: see `expected_names`.

    Raises:
        ValueError: listing what is missing, unknown or of another shape.
    """
    missing = sorted(expected.keys() - state_dict.keys())
    unknown = sorted(name for name in state_dict if name not in expected and not COMPUTED.match(name))
    there = {name: tuple(state_dict[name].shape) for name in expected if name in state_dict}
    sizes = _sizes(there, expected)
    wrong = []
    for name, shape in there.items():
        if shape != (wanted := _shape(expected[name][1], sizes)):
            wrong.append(f"{name} {shape} instead of {str(wanted).replace(str(DISPUTED), '?')}")
    problems = {"missing": missing, "unknown": unknown, "of a shape that does not fit the others": sorted(wrong)}
    if told := [f"{kind}: {_list(names)}" for kind, names in problems.items() if names]:
        raise ValueError(
            f"These are not the tensors of a whole MiniGPT-4, so nothing was converted; {'; '.join(told)}."
        )


def _list(names: list[str], most: int = 24) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


DISPUTED = -1  # a size of which as many tensors say one thing as another: none of them is known to be right


def _sizes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[str, str]]) -> dict[str, int]:
    """
    The value of every named size that most tensors agree on.

    Patches lie in a square, with CLS in front; without a Q-Former, 4 of them make one feature.
    """
    votes: dict[str, Counter[int]] = {}
    for name, shape in shapes.items():
        for size, value in zip(expected[name][1].split(), shape, strict=False):
            votes.setdefault(size, Counter())[value] += 1
    sizes = {}
    for size, counter in votes.items():
        (value, most), *others = counter.most_common(2)
        sizes[size] = DISPUTED if others and others[0][1] == most else value
    if "tokens" in sizes:
        sizes["tokens"] = 1 + round(max(sizes["tokens"] - 1, 0) ** 0.5) ** 2
    with_qformer = any(size == "queries" for _, shape in expected.values() for size in shape.split())
    if with_qformer and "query_width" in sizes:
        sizes["features"] = sizes["query_width"]
    elif not with_qformer and "width" in sizes:
        sizes["features"] = max(4 * sizes["width"], DISPUTED)
    return sizes


def _shape(shape: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    numbers = []
    for size in shape.split():
        factor, _, name = size.rpartition("*")
        value = int(name) if name.isdigit() else sizes.get(name, DISPUTED)
        numbers.append(value if value == DISPUTED else int(factor or 1) * value)
    return tuple(numbers)


def rename(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Our name → tensor, of those that are there; the biases of queries and values become one, with 0 for keys."""
    renamed = {}
    for name, (ours, _) in expected.items():
        if name in state_dict and not name.endswith(".v_bias"):
            tensor = state_dict[name]
            if name.endswith(".q_bias"):
                values = state_dict[name.removesuffix("q_bias") + "v_bias"]
                tensor = torch.cat([tensor, torch.zeros_like(tensor), values])
            renamed[ours] = tensor
    return renamed


__all__ = [
    "QFORMER_LAYER",
    "VISION",
    "VISION_BLOCK",
    "check_tensors",
    "expected_names",
    "part_of_original",
    "rename",
]
