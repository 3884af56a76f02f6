"""Turn the released files of MiniGPT-4 into a folder or repository that `from_pretrained` loads.

From the original's files, or with the vision side of a BLIP-2 repository instead of two of them:

    minigpt4 convert --vit eva_vit_g.pth --qformer blip2_pretrained_flant5xxl.pth \\
        --checkpoint prerained_minigpt4_7b.pth --language_model vicuna-7b-v0 --output_dir minigpt4-7b
    minigpt4 convert --vision_backbone Salesforce/blip2-flan-t5-xxl \\
        --checkpoint prerained_minigpt4_7b.pth --language_model vicuna-7b-v0 --output_dir minigpt4-7b

With the second, the folder holds a few MB: the projection. With the first, the vision side lies in it as well.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_minigpt4 import MiniGPT4Config
from modeling_minigpt4.backbones import describe
from modeling_minigpt4.convert_minigpt4_to_hf import VISION_FOLDER, convert_original_checkpoint
from recipes_minigpt4.hub.card import render_card
from recipes_minigpt4.hub.options import build_parser
from recipes_minigpt4.hub.push import push
from recipes_minigpt4.utils.errors import RecipeError, one_line


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    args = build_parser("convert").parse_args(arguments)
    if args.config and args.vision_backbone:
        raise RecipeError("--vision_backbone brings its own sizes; leave --config out.")
    if args.private and not args.push_to_hub:
        raise RecipeError("--private is about a repository; name it with --push_to_hub.")
    return args


def main(arguments: Sequence[str]) -> None:
    """
    Convert, and push if asked to.

    Raises:
        RecipeError: if the files are not there, do not belong together, or cannot be pushed.
    """
    args = parse(arguments)
    try:
        model = convert_original_checkpoint(
            args.checkpoint,
            args.language_model,
            args.output_dir,
            vit=args.vit,
            qformer=args.qformer,
            vision_backbone=args.vision_backbone,
            preset=args.preset,
            config=None if args.config is None else read_sizes(args.config, args.output_dir),
            full=args.full,
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"{one_line(error)}.") from error
    # Others see what lies in the folder itself by its place there, and not by the path on this machine.
    model.config.backbones = MiniGPT4Config.from_pretrained(args.output_dir).backbones
    card = render_card(model, license=args.license, title=args.output_dir.name)
    (args.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(summary(model, args.output_dir))
    if args.push_to_hub:
        print(push(args.output_dir, args.push_to_hub, args.private or None, message="Converted MiniGPT-4"))


def read_sizes(path: str, output_dir: Path) -> MiniGPT4Config:
    """
    The configuration in a folder or file.

    Raises:
        RecipeError: if there is none, or if it would be overwritten.
    """
    file = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    try:
        known = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"--config {path} is no configuration that can be read ({one_line(error)}).") from error
    if known != MiniGPT4Config.model_type:
        raise RecipeError(f"--config {path} is the configuration of a {known!r} model; name one of MiniGPT4Config.")
    if file.resolve() == output_dir.resolve() / "config.json":
        raise RecipeError(f"--config {path} is read from and would be overwritten; name another --output_dir.")
    return MiniGPT4Config.from_pretrained(file)


def summary(model: Any, folder: Path) -> str:
    """What was written, and where the rest comes from."""
    projection = sum(parameter.numel() for parameter in model.model.language_projection.parameters())
    weights = [*folder.glob("*.safetensors"), *(folder / VISION_FOLDER).glob("*.safetensors")]
    size = sum(path.stat().st_size for path in weights)
    lines = [f"{folder}: {size:,} bytes of weights; a projection of {projection:,} parameters."]
    lines += [f"{part:<15} from {describe(source)}" for part, source in model.config.backbones.items()]
    return "\n".join(lines)
