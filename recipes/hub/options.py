"""What the commands of this room take. Importing this file is cheap."""

import argparse
from pathlib import Path

from recipes_minigpt4.utils.command_line import CommandParser


PRESETS = ("vicuna-7b", "vicuna-13b", "llama2-7b")  # of modeling_minigpt4.convert_minigpt4_to_hf
ABOUT = {
    "convert": "Turn the released files of MiniGPT-4 into a folder or repository that from_pretrained loads.",
    "push": "Publish a trained adapter, or any saved MiniGPT-4, as a repository of the Hub.",
}


TRUST = "run the code that a part brings, to look through the folder; default: false"


def truth(text: str) -> bool:
    """`true` or `false` of a command line."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def build_parser(command: str) -> argparse.ArgumentParser:
    """The parser of `minigpt4 convert` or `minigpt4 push`."""
    parser = CommandParser(prog=f"minigpt4 {command}", description=ABOUT[command], allow_abbrev=False)
    (_add_convert if command == "convert" else _add_push)(parser)
    return parser


def _add_convert(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", required=True, help="MiniGPT-4's own file: prerained_minigpt4_7b.pth or another")
    add("--language_model", required=True, help="the language model it was trained with: repository or folder")
    add("--output_dir", required=True, type=Path, help="folder to write")
    add("--vit", help="eva_vit_g.pth")
    add("--qformer", help="blip2_pretrained_flant5xxl.pth; not needed for a model without a Q-Former")
    add("--vision_backbone", help="a BLIP-2 repository or folder instead of these two files")
    add("--preset", choices=PRESETS, help="the released model; default: the one that the projection fits")
    add("--config", help="config.json with the sizes of another ViT and Q-Former than the released ones")
    add("--full", action="store_true", help="write all weights, so that the folder needs no other repository")
    add("--push_to_hub", metavar="REPO", help="upload the folder to this repository of the Hub")
    add("--private", action="store_true", help="make that repository private")
    add("--license", default="other", help="licence of the weights, for the model card; default: %(default)s")


def _add_push(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="what training, conversion or save_pretrained wrote")
    add("repo", help="repository of the Hub, as in you/your-adapter; made if there is none")
    add("--private", action="store_true", help="make the repository private")
    add("--revision", help="branch to push to, made if there is none; default: main")
    add("--trust_remote_code", nargs="?", const=True, default=False, type=truth, metavar="true", help=TRUST)
    add("--commit_message", default="Upload MiniGPT-4", help="default: %(default)s")
