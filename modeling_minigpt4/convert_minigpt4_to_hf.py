"""Official checkpoints of MiniGPT-4 as a folder of this package: the three released models and their files.

The command is `minigpt4 convert`; names of tensors and their shapes are in `original_names_minigpt4`.
"""

import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2QFormerConfig
from transformers.utils import SAFE_WEIGHTS_NAME

from processing_minigpt4 import MiniGPT4Processor

from .backbones import HERE, load_backbone_config
from .configuration_minigpt4 import MiniGPT4Config
from .modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from .original_names_minigpt4 import (
    QFORMER_LAYER,
    VISION,
    VISION_BLOCK,
    check_tensors,
    expected_names,
    part_of_original,
    rename,
)
from .sources_minigpt4 import normalize_source


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


# ---- names ----------------------------------------------------------------------------------------------------------


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
    expected = expected_names(state_dict)
    check_tensors(state_dict, expected)
    return rename(state_dict, expected)


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
        wanted = expected_names(tensors)
        if "query_tokens" not in tensors:
            raise ValueError(f"{qformer} holds no Q-Former of BLIP-2; name the right file.")
        original.vision |= {n: tensors[n] for n in wanted if n in tensors and not n.startswith("visual_encoder.")}
    merged = {**original.vision, **original.trained}
    required |= {part_of_original(name) for name in merged}
    expected = expected_names(merged)
    if vit is not None:
        check_vision_size(vit, original.vision, config)
        expected |= VISION_BLOCK.names(range(config.vision_config.num_hidden_layers))
        if "query_tokens" in merged and config.qformer_config is not None:
            expected |= QFORMER_LAYER.names(range(config.qformer_config.num_hidden_layers))
    check_tensors(merged, {name: entry for name, entry in expected.items() if part_of_original(name) in required})
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
    renamed = rename(tensors, expected_names(tensors))
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
    fields = {"projector_norm": False, "projector_init": "linear"}
    joined = {} if has_qformer else {"patch_merge_size": 4, "patch_merge_layout": "consecutive"}
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        **parts, **fields, **joined, separator=separator, dtype="auto"
    )
    if (width := model.config.text_config.hidden_size) != original.width:
        raise ValueError(
            f"The projection was trained for a language model of width {original.width}, but {language_model} has "
            f"{width}; name the one it was trained with."
        )
    trained = dict(original.trained)
    if not has_qformer and not original.vision:
        trained = {**untrained_norm(found.vision_config.hidden_size), **trained}
    renamed = rename(trained, expected_names(trained))
    model.load_state_dict(renamed, strict=False)
    model._own_tensors = frozenset(renamed)
    for name, value in GENERATION.items():
        setattr(model.generation_config, name, value)
    processor = MiniGPT4Processor.from_backbones(
        vision=vision,
        language_model=language_model,
        config=model.config,
        chat_template=chosen.chat_template,
        background_color=None,  # what lies under transparent pixels, as in training
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
