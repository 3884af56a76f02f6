"""Other people's harnesses: tasks for lm-evaluation-harness and lmms-eval, and the model that lmms-eval runs.

    python -m recipes_minigpt4.evaluation.harness scenes scenes.parquet
    lm_eval --model hf-multimodal --model_args pretrained=FOLDER,trust_remote_code=True --apply_chat_template \\
        --include_path "$(python -m recipes_minigpt4.evaluation.harness lm_eval)" --tasks minigpt4_scenes
    lmms-eval --model minigpt4 --model_args pretrained=FOLDER \\
        --include_path "$(python -m recipes_minigpt4.evaluation.harness lmms_eval)" --tasks minigpt4_scenes
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.errors import RecipeError, one_line
from recipes_minigpt4.utils.ranges import COUNT, SEED, in_range


TASKS = {name: Path(__file__).parent / f"{name}_tasks" for name in ("lm_eval", "lmms_eval")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 2 after a mistake, which is told on standard error in one sentence."""
    try:
        args = parse(arguments)
        if args.what == "scenes":
            _write_scenes(args.file, args.scenes, args.seed)
        else:
            print(TASKS[args.what])
    except RecipeError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read what is asked for: a folder of tasks, or a file with scenes."""
    parser = CommandParser(prog="harness", description="What other people's harnesses need to judge our models.")
    kinds = parser.add_subparsers(dest="what", required=True)
    for name in TASKS:
        kinds.add_parser(name, help=f"print the folder with our tasks, for --include_path of {name.replace('_', '-')}")
    scenes = kinds.add_parser("scenes", help="write the scenes that the demo is judged on, with the truth about them")
    scenes.add_argument("file", type=Path, help="parquet file to write")
    scenes.add_argument("--scenes", type=in_range(COUNT), default=240, help="how many; default: %(default)s")
    scenes.add_argument("--seed", type=in_range(SEED), default=0, help="default: %(default)s, the demo's")
    return parser.parse_args(arguments)


def _write_scenes(file: Path, count: int, seed: int) -> None:
    from recipes_minigpt4.evaluation.harness.scenes import scene_rows  # here, so that the folders are printed at once

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scene_rows(count, seed).to_parquet(str(file))
    except OSError as error:
        raise RecipeError(f"{file} cannot be written: {one_line(error)}.") from error
    print(f"{file}: {count} scenes")
