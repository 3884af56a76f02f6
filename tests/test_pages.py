"""The pages: commands are understood, links lead somewhere, and Python runs on the embedded world."""

import importlib
import json
import re
import shlex
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4 import cli
from recipes_minigpt4.accelerate import LAUNCH_CONFIGS
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE
from recipes_minigpt4.tiny.scenes import draw_scene, evaluation_scenes
from recipes_minigpt4.utils.errors import RecipeError


ROOT = Path(__file__).parents[1]
ROOMS = ("modeling_minigpt4", "processing", "recipes")
FILES = [*ROOT.glob("*.md"), *(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))]
NO_PAGES = ("CHANGELOG.md", "card_template.md")  # a history, and a template that tests of the card fill in
PAGES = {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in sorted(FILES)}
PAGES = {name: text for name, text in PAGES.items() if Path(name).name not in NO_PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What the pages name on the Hub → the shipped backbone that stands there, in a folder of that name.
ON_THE_HUB = {
    "Salesforce/blip2-flan-t5-xxl": VISION_BACKBONE,
    "google/siglip-so400m-patch14-224": VISION_BACKBONE,
    "lmsys/vicuna-7b-v1.1": LANGUAGE_BACKBONE,
    "Qwen/Qwen3-8B": LANGUAGE_BACKBONE,
}


# ---- commands -------------------------------------------------------------------------------------------------------


def commands_of(text: str) -> list[str]:
    """The commands of a page, from its blocks and from its sentences."""
    blocks = [block.replace("\\\n", " ") for kind, block in BLOCK.findall(text) if kind == "bash"]
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split(" && ")]
    in_sentences = re.findall(r"`((?:minigpt4 |make |python -m recipes_minigpt4\.)[^`]+)`", BLOCK.sub("", text))
    lines += [" ".join(code.split()) for code in in_sentences]
    known = ("minigpt4 ", "make ", "python -m recipes_minigpt4.", "accelerate launch ")
    return [line for line in lines if line.startswith(known) and "COMMAND" not in line]


def parse(command: str) -> None:
    """Read a command as its program does, without running it."""
    command = command.replace("$(python -m recipes_minigpt4.accelerate)", str(LAUNCH_CONFIGS))
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return
    if program == "minigpt4" and arguments[0].startswith("--"):  # an option of the command itself
        assert arguments[0] in cli.build_parser().format_help()
        return
    if program == "minigpt4":
        name, arguments = cli.COMMANDS[arguments[0]][0], arguments[1:]
        if not arguments:  # named in a sentence
            return
    elif program == "accelerate":
        launch = launch_command_parser().parse_args(arguments[1:])
        assert launch.module and (launch.config_file is None or Path(launch.config_file).is_file())
        name, arguments = launch.training_script, launch.training_script_args
    else:
        name, arguments = arguments[1], arguments[2:]
    module = importlib.import_module(name)
    if name != "recipes_minigpt4.accelerate":  # it takes no arguments
        module.parse(arguments)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # settings of a stage change it
    for command in commands_of(PAGES[page]):
        try:
            parse(command)
        except (RecipeError, KeyError, SystemExit) as error:
            pytest.fail(f"{command}: {error}")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_command_that_is_wrong_is_noticed() -> None:
    text = "Try `minigpt4 fly`.\n```bash\nminigpt4 stage1 --config tiny_stage1 \\\n    --speed 3   # fast\n```\n"
    wrong, unknown = commands_of(text)
    with pytest.raises(RecipeError, match="speed"):
        parse(wrong)
    with pytest.raises(KeyError, match="fly"):
        parse(unknown)


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page, and files that it names, that are not there."""
    text = BLOCK.sub("", text)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)|src(?:set)?=\"([^\"]+)\"", text):
        address, _, anchor = "".join(link).partition("#")
        target = page.parent / address if address else page
        if address.startswith("http"):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target.read_text(encoding="utf-8"))):
            broken.append("".join(link))
    named = re.findall(rf"`((?:tests|{'|'.join(ROOMS)})/[\w/.-]+)`", text)
    return broken + [name for name in named if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    assert broken_links(ROOT / page, PAGES[page]) == []


def test_a_link_that_is_broken_is_noticed() -> None:
    text = "[a](nowhere.md) [b](README.md#nothing) [c](#here) [d](README.md#train) `tests/no.py`\n\n# Here\n"
    assert broken_links(ROOT / "page.md", text) == ["nowhere.md", "README.md#nothing", "#here", "tests/no.py"]


# ---- Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all that the pages name is there: backbones, an adapter, a picture, chats."""
    folder = tmp_path_factory.mktemp("pages")
    for name, backbone in ON_THE_HUB.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(backbone, target_is_directory=True)
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        vision=VISION_BACKBONE, qformer=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE
    )
    model.generation_config.max_new_tokens = 8
    processor = MiniGPT4Processor.from_backbones(
        vision=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE, config=model.config
    )
    for adapter in ("demo-output/adapter", "runs/stage1", "your-name/your-adapter"):
        model.save_pretrained(folder / adapter)
        processor.save_pretrained(folder / adapter)
    picture = draw_scene(evaluation_scenes(1, 0)[0][1])
    for name in ("demo-output/scene.png", "photo.jpg"):
        picture.save(folder / name)
    chat = [{"role": "user", "content": "What is this?"}, {"role": "assistant", "content": "A scene of shapes."}]
    row = json.dumps({"messages": chat, "images": [str(folder / "photo.jpg")]})
    (folder / "chats.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "```python\n" in text])
def test_python_runs(page: str, place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All blocks of a page, one after the other, as a reader pastes them."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # trainers change it
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    names: dict = {"__name__": "__main__"}
    for kind, block in BLOCK.findall(PAGES[page]):
        if kind == "python":
            exec(compile(block, page, "exec"), names)
    AcceleratorState._reset_state(reset_partial_state=True)
