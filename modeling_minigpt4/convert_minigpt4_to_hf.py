"""Official checkpoints of MiniGPT-4 as a folder of this package: names, shapes, files, and the three released models.

The command is `minigpt4 convert`; what it does with names is `convert_original_state_dict`.
"""

import os
import pickle
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2QFormerConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from processing_minigpt4 import MiniGPT4Processor

from .backbones import HERE, load_backbone_config, normalize_source
from .configuration_minigpt4 import MiniGPT4Config
from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration


VISION_FOLDER = "vision"  # of a converted folder whose vision side came in files
SCRATCH = ".convert-"  # begins the name of a folder that is there while converting

# ---- the released models --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preset:
    """
    One of the released models.

    Args:
        text_config: sizes of its language model; Vicuna v0 has one token more than LLaMA, its pad token.
        qformer: whether the Q-Former of BLIP-2 stands before the projection.
        chat_template: name of the chat format that its second stage was trained in.
    """

    text_config: Mapping[str, Any]
    qformer: bool
    chat_template: str

    @property
    def width(self) -> int:
        """Width of the language model."""
        return int(self.text_config.get("hidden_size", 4096))

    def config(self) -> MiniGPT4Config:
        """The whole configuration, with EVA ViT-g/14 at 224 pixels."""
        qformer = Blip2QFormerConfig.model_type if self.qformer else None
        return MiniGPT4Config(text_config={"model_type": "llama", **self.text_config}, qformer_config=qformer)


_VICUNA = {"vocab_size": 32001, "max_position_embeddings": 2048}
_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}

PRESETS = {
    "vicuna-7b": Preset(_VICUNA, qformer=True, chat_template="vicuna_v0"),
    "vicuna-13b": Preset({**_VICUNA, **_13B}, qformer=True, chat_template="vicuna_v0"),
    "llama2-7b": Preset({"max_position_embeddings": 4096}, qformer=False, chat_template="llama2"),
}

# How the original's demo draws its replies (released code, `minigpt4/conversation/conversation.py`).
GENERATION = {
    "do_sample": True,
    "top_p": 0.9,
    "temperature": 1.0,
    "repetition_penalty": 1.05,
    "penalize_prompt": False,
    "max_new_tokens": 300,
}


# ---- names and shapes -----------------------------------------------------------------------------------------------


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


def convert_original_state_dict(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename a whole state dict of the released code for [`MiniGPT4ForConditionalGeneration`].

    Sizes are read off the tensors, so any size of ViT, Q-Former and LLaMA converts, with a Q-Former or without.

    Args:
        state_dict: the original's name (`visual_encoder.…`, `ln_vision.…`, `query_tokens`, `Qformer.…`,
            `llama_proj.…`, `llama_model.…`) → tensor.

    Returns:
        Our name → tensor, for a strict `load_state_dict`; dtypes stay, and no tensor but `qkv.bias` is copied.

    Raises:
        ValueError: if tensors are missing, unknown or of a shape that does not fit the others; it lists them.
    """
    expected = _expected_names(state_dict)
    _check(state_dict, expected)
    return _rename(state_dict, expected)


# What stands at the front of names of one part; a file holds all of a part or nothing of it.
PARTS_OF_ORIGINAL = ("visual_encoder.", "ln_vision.", "query_tokens", "Qformer.", "llama_proj.", "llama_model.")


def _expected_names(state_dict: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
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


def _check(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[str, str]]) -> None:
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


def _rename(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[str, str]]
) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, (ours, _) in expected.items():
        if name in state_dict and not name.endswith(".v_bias"):
            tensor = state_dict[name]
            if name.endswith(".q_bias"):
                values = state_dict[name.removesuffix("q_bias") + "v_bias"]
                tensor = torch.cat([tensor, torch.zeros_like(tensor), values])
            renamed[ours] = tensor
    return renamed


# ---- files ----------------------------------------------------------------------------------------------------------


def read_original_file(path: "str | os.PathLike[str]") -> dict[str, torch.Tensor]:
    """
    Open an official `.pth` file: a state dict, or one under `"model"` with optimizer and scaler state beside it.

    Nothing in the file is executed (`weights_only=True`), and tensors are mapped, not read, where the format allows.

    Raises:
        OSError: if there is no such file, or it is damaged.
        ValueError: if it needs more than tensors and plain values, or holds no tensors.
    """
    if not os.path.isfile(path):
        raise OSError(f"There is no file {path}; download it, or correct the path.")
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        if refused := re.search(r"Unsupported (global|class)[^.\n]*(\.\w[^.\n]*)*", str(error)):
            raise ValueError(
                f"{path} was not opened, because it holds more than tensors and plain values, which could run code "
                f"({refused[0].strip()}); save its tensors alone with torch.save, where that does no harm."
            ) from error
        raise OSError(_no_file_of_torch(path)) from error
    except (RuntimeError, ValueError, LookupError, AttributeError, EOFError, OSError) as error:
        raise OSError(_no_file_of_torch(path)) from error
    model = content.get("model") if isinstance(content, Mapping) else None
    tensors = model if isinstance(model, Mapping) else content if isinstance(content, Mapping) else {}
    tensors = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        raise ValueError(f'{path} holds no named tensors, at the top or under "model"; name another file.')
    return tensors


def _load(path: "str | os.PathLike[str]") -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files of torch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)


def _no_file_of_torch(path: "str | os.PathLike[str]") -> str:
    return f"{path} cannot be read: it is damaged, cut off, or a web page and no file of torch; download it again."


@dataclass
class Original:
    """
    The official files of one model.

    Args:
        trained: tensors of MiniGPT-4's own file: the projection, and whatever else was tuned.
        vision: tensors of the vision side that came in files.

    Both have the original's names.
    """

    trained: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]

    @property
    def width(self) -> int:
        """Width of the language model that the projection was trained for."""
        return self.trained["llama_proj.weight"].shape[0]

    @property
    def features(self) -> int:
        """Number of features of an image token in front of the projection."""
        return self.trained["llama_proj.weight"].shape[1]


def read_original(checkpoint: Any, vit: Any, qformer: Any, config: MiniGPT4Config) -> Original:
    """
    Open the official files and pick what MiniGPT-4 uses of them.

    Args:
        checkpoint: MiniGPT-4's own file, such as `prerained_minigpt4_7b.pth`; every tensor of it must be known.
        vit: `eva_vit_g.pth` or None. What `config` has no block for is left out, as the original does.
        qformer: `blip2_pretrained_flant5xxl.pth` or None; the Q-Former, its queries and `ln_vision` are used.
        config: sizes of the vision side; not looked at without `vit`.

    Raises:
        OSError: if a file is missing or damaged.
        ValueError: if tensors are missing, unknown or of a wrong shape.
    """
    original = Original(read_original_file(checkpoint), {})
    if original.trained.get("llama_proj.weight", torch.empty(0)).ndim != 2:
        raise ValueError(f"{checkpoint} holds no projection, llama_proj.weight; name MiniGPT-4's own file.")
    required = {"llama_proj."}
    if vit is not None:
        required.add("visual_encoder.")
        prefix = "visual_encoder."
        tensors = {prefix + name.removeprefix(prefix): tensor for name, tensor in read_original_file(vit).items()}
        wanted = {**VISION.names(), **VISION_BLOCK.names(range(config.vision_config.num_hidden_layers))}
        original.vision = {name: tensors[name] for name in wanted if name in tensors}
        if not original.vision:
            raise ValueError(f"{vit} holds no ViT of EVA-CLIP; name the right file, such as eva_vit_g.pth.")
        if original.features == 4 * config.vision_config.hidden_size:
            original.vision |= untrained_norm(config.vision_config.hidden_size)
            qformer = None  # the original does not look at it either
        elif qformer is None and "query_tokens" not in original.trained:
            raise ValueError(
                f"The projection takes {original.features} features, which come from a Q-Former and not from four "
                f"joined patches of {config.vision_config.hidden_size}; give the Q-Former's file too."
            )
        else:
            required |= {"ln_vision.", "query_tokens", "Qformer."}
    if qformer is not None:
        tensors = read_original_file(qformer)
        wanted = _expected_names(tensors)
        if "query_tokens" not in tensors:
            raise ValueError(f"{qformer} holds no Q-Former of BLIP-2; name the right file.")
        original.vision |= {n: tensors[n] for n in wanted if n in tensors and not n.startswith("visual_encoder.")}
    merged = {**original.vision, **original.trained}
    required |= {_part(name) for name in merged}
    expected = _expected_names(merged)
    if vit is not None:
        check_vision_size(vit, original.vision, config)
        expected |= VISION_BLOCK.names(range(config.vision_config.num_hidden_layers))
        if "query_tokens" in merged and config.qformer_config is not None:
            expected |= QFORMER_LAYER.names(range(config.qformer_config.num_hidden_layers))
    _check(merged, {name: entry for name, entry in expected.items() if _part(name) in required})
    return original


def check_vision_size(path: Any, tensors: Mapping[str, torch.Tensor], config: MiniGPT4Config) -> None:
    """Raise a `ValueError` if a ViT's width, patches or picture size are not those of the configuration."""
    vision = config.vision_config
    wanted = {
        "visual_encoder.pos_embed": (1, (vision.image_size // vision.patch_size) ** 2 + 1, vision.hidden_size),
        "visual_encoder.patch_embed.proj.weight": (vision.hidden_size, 3, vision.patch_size, vision.patch_size),
    }
    for name, shape in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{path} is a ViT of another size: its {name.removeprefix('visual_encoder.')} has the shape "
                f"{tuple(tensors[name].shape)}, not {shape}; name the right file, or give the sizes as `config`."
            )


def untrained_norm(width: int) -> dict[str, torch.Tensor]:
    """
    `ln_vision` of a model without a Q-Former: as it was made, for the original loads it with the Q-Former only.

    BLIP-2's, which a backbone would bring, is not what the projection was trained behind.
    """
    return {"ln_vision.weight": torch.ones(width), "ln_vision.bias": torch.zeros(width)}


def _part(name: str) -> str:
    return next((part for part in PARTS_OF_ORIGINAL if name.startswith(part)), "")


# ---- folders --------------------------------------------------------------------------------------------------------


def convert_original_checkpoint(
    checkpoint: "str | os.PathLike[str]",
    language_model: Any,
    output_dir: "str | os.PathLike[str]",
    *,
    vit: "str | os.PathLike[str] | None" = None,
    qformer: "str | os.PathLike[str] | None" = None,
    vision_backbone: Any = None,
    preset: str | None = None,
    config: MiniGPT4Config | None = None,
    full: bool = False,
) -> MiniGPT4ForConditionalGeneration:
    """
    Turn official files into a folder that `from_pretrained` loads, processor and generation config included.

    The folder holds what MiniGPT-4 trained, and below `vision/` the vision side if it came in files. The rest comes
    from its own repositories.

    Args:
        checkpoint: MiniGPT-4's own `.pth` file.
        language_model: repository, `"repository@revision"` or folder of the language model it was trained with.
        output_dir: folder to write.
        vit, qformer: `eva_vit_g.pth` and `blip2_pretrained_flant5xxl.pth`; the latter only where the model has one.
        vision_backbone: a BLIP-2 repository or folder instead of these two.
        preset: name of the released model (`PRESETS`); by default the one that the projection fits.
        config: sizes of the vision side, if they are not the released ones.
        full: write all weights, the language model's too, so that the folder needs no other.

    Returns:
        The model, as it was saved.

    Raises:
        OSError: if a file, folder or repository cannot be opened.
        ValueError: if the files do not belong together.
    """
    if (vit is None) == (vision_backbone is None):
        raise ValueError(
            "The vision side comes from `vit` (and `qformer`) or from `vision_backbone`; give one of them."
        )
    if qformer is not None and vision_backbone is not None:
        raise ValueError("`vision_backbone` brings its own Q-Former; leave `qformer` out.")
    output = prepare_output(output_dir, language_model, vision_backbone)
    sizes = PRESETS["vicuna-7b"].config() if config is None else config
    original = read_original(checkpoint, vit, qformer, sizes)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=output) as scratch:
        vision = vision_backbone
        if vit is not None:
            vision = {"name_or_path": scratch, "subfolder": VISION_FOLDER}
            write_vision_side(Path(scratch, VISION_FOLDER), original, sizes)
        model, processor, trained = compose(original, vision, language_model, preset)
        # From here on nothing can be wrong with the files, and what an earlier run has left may go.
        shutil.rmtree(output / VISION_FOLDER, ignore_errors=True)
        if vit is not None and not full:
            os.replace(Path(scratch, VISION_FOLDER), output / VISION_FOLDER)
            for part in {"vision", "qformer"} & model.config.backbones.keys():
                model.config.backbones[part]["name_or_path"] = str(output)
        # By themselves, the tensors of the checkpoint keep their dtype.
        model.save_pretrained(output, full=full, state_dict=None if full else trained)
        processor.save_pretrained(output)
    if full:
        model.config.backbones = {}
    return model


def prepare_output(folder: Any, language_model: Any, vision_backbone: Any) -> Path:
    """
    Make the output folder.

    Raises:
        ValueError: if it is a file, or a folder of which something would be lost.
    """
    output = Path(folder).expanduser().resolve()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file and no folder; name another to write into.")
    for source, overwritten in (
        (language_model, [output]),
        (vision_backbone, [output, output / VISION_FOLDER]),
    ):
        if source is not None and Path(normalize_source(source)["name_or_path"]) in overwritten:
            raise ValueError(f"{source} is read from and would be overwritten; name another folder to write into.")
    vision = output / VISION_FOLDER
    if vision.exists() and not _is_converted(output):
        raise ValueError(f"{vision} is not from an earlier conversion and would be replaced; name another folder.")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{output} cannot be made ({error.strerror}); name another folder to write into.") from error
    return output


def _is_converted(folder: Path) -> bool:
    """Whether a folder with a vision side in it is what a conversion has written, and nothing more."""
    inside = {path.name for path in (folder / VISION_FOLDER).iterdir()}
    try:
        backbones = MiniGPT4Config.from_pretrained(folder).backbones
    except (OSError, ValueError):
        return False
    return inside <= {"config.json", SAFE_WEIGHTS_NAME} and backbones.get("vision", {}).get("name_or_path") == HERE


def write_vision_side(folder: Path, original: Original, config: MiniGPT4Config) -> None:
    """Write the vision side as BLIP-2 lays it out, in the dtype of the files."""
    kept = {n: tensor for n, tensor in original.trained.items() if not n.startswith(("llama_proj.", "llama_model."))}
    tensors = {**kept, **original.vision}
    renamed = _rename(tensors, _expected_names(tensors))
    folder.mkdir(parents=True, exist_ok=True)
    qformer = config.qformer_config or Blip2QFormerConfig()
    Blip2Config(
        vision_config=config.vision_config.to_dict(),
        qformer_config=qformer.to_dict(),
        num_query_tokens=config.num_query_tokens,
    ).save_pretrained(folder)
    stored = {name.removeprefix("model."): tensor.contiguous() for name, tensor in renamed.items()}
    save_file(stored, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})


def compose(
    original: Original, vision: Any, language_model: Any, preset: str | None
) -> tuple[MiniGPT4ForConditionalGeneration, MiniGPT4Processor, dict[str, torch.Tensor]]:
    """Join the backbones and put what was trained in its place: the model, its processor, and what was trained."""
    found, _ = load_backbone_config("vision", normalize_source(vision), {})
    has_qformer = _has_qformer(original.features, found)
    chosen = choose_preset(preset, original.width, has_qformer)
    parts = {"vision": vision, "language_model": language_model, **({"qformer": vision} if has_qformer else {})}
    separator = "###" if chosen.chat_template == "vicuna_v0" else None
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, separator=separator, dtype="auto")
    if (width := model.config.text_config.hidden_size) != original.width:
        raise ValueError(
            f"The projection was trained for a language model of width {original.width}, but {language_model} has "
            f"{width}; name the one it was trained with."
        )
    trained = dict(original.trained)
    if not has_qformer and not original.vision:
        trained = {**untrained_norm(found.vision_config.hidden_size), **trained}
    renamed = _rename(trained, _expected_names(trained))
    model.load_state_dict(renamed, strict=False)
    model._own_tensors = frozenset(renamed)
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    processor = MiniGPT4Processor.from_backbones(
        vision=vision, language_model=language_model, config=model.config, chat_template=chosen.chat_template
    )
    return model, processor, renamed


def _has_qformer(features: int, config: Any) -> bool:
    """Whether a projection of so many features stands behind the Q-Former of a backbone or behind joined patches."""
    if not hasattr(config, "vision_config"):
        raise ValueError(f"A {config.model_type!r} model has no vision encoder; name a BLIP-2 repository or folder.")
    per_patch = config.vision_config.hidden_size
    per_query = getattr(getattr(config, "qformer_config", None), "hidden_size", None)
    if features not in (4 * per_patch, per_query):
        raise ValueError(
            f"The projection takes {features} features, but this vision side gives {per_query} per query of its "
            f"Q-Former and {4 * per_patch} per four patches; name the one it was trained with."
        )
    return features == per_query


def choose_preset(name: str | None, width: int, has_qformer: bool) -> Preset:
    """
    The released model of that name, or the one that a projection fits; of another width, one with the same chats.

    Raises:
        ValueError: if there is no such preset, or the projection does not fit it.
    """
    if name is None:
        return max(PRESETS.values(), key=lambda preset: (preset.qformer == has_qformer, preset.width == width))
    if name not in PRESETS:
        raise ValueError(f"There is no preset {name!r}; choose among {', '.join(PRESETS)}, or leave it out.")
    preset = PRESETS[name]
    if (preset.width, preset.qformer) != (width, has_qformer):
        told = {True: "behind a Q-Former", False: "without a Q-Former"}
        raise ValueError(
            f"The checkpoint is no {name}: its projection is {width} wide and {told[has_qformer]}, where {name} is "
            f"{preset.width} wide and {told[preset.qformer]}; leave the preset out, or name the right file."
        )
    return preset


__all__ = ["PRESETS", "Preset", "convert_original_checkpoint", "convert_original_state_dict", "read_original_file"]
