"""The built wheel, unpacked somewhere else: what it holds, what it imports, and that its checkpoints load anywhere."""

import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("modeling_minigpt4", "processing_minigpt4", "recipes_minigpt4")

# Put in front of a script: the named packages cannot be found, as if they were not installed.
BLOCK = """
import sys
class Hide:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Hide, sys.meta_path)
"""

SAVE = """
import torch
from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration
vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14, initializer_range=0.1)
text = dict(model_type="llama", vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2)
torch.manual_seed(0)
model = MiniGPT4ForConditionalGeneration(
    MiniGPT4Config(vision_config=vision, qformer_config=None, text_config=text)
).eval()
model.save_pretrained("saved")
"""

SCORE = """
import torch
ids = torch.tensor([[1, 50, 7]])
pixels = torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)
print(repr(model(input_ids=ids, pixel_values=pixels).logits.sum().item()))
print(model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False, pad_token_id=0).tolist())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # The build writes beside the sources, so it works on a copy of what git would ship.
    source = folder / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, files):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(script: str, cwd: Path, site: Path | None, without: tuple[str, ...] = ()) -> str:
    """Run a script from `cwd` with the unpacked wheel first on the path; return what it printed."""
    code = BLOCK.format(names=set(without) or "()") + (f"sys.path.insert(0, {str(site)!r})\n" if site else "")
    done = subprocess.run(
        [sys.executable, "-c", code + textwrap.dedent(script)],
        cwd=cwd, capture_output=True, text=True, env={"HF_HOME": str(cwd / "hf"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_holds_three_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == set(PACKAGES)
    for expected in (
        "modeling_minigpt4/py.typed",
        "processing_minigpt4/chat_templates/vicuna_v0.jinja",
        "recipes_minigpt4/accelerate/fsdp2.yaml",
        "recipes_minigpt4/configs/tiny_stage1.yaml",
        "recipes_minigpt4/configs/ablations/baseline.yaml",
        "recipes_minigpt4/evaluation/harness/lm_eval_tasks/minigpt4_scenes.yaml",
        "recipes_minigpt4/evaluation/harness/lmms_eval_tasks/minigpt4_scenes.yaml",
        "recipes_minigpt4/hub/card_template.md",
        "recipes_minigpt4/tiny/backbones/llama/model.safetensors",
        "recipes_minigpt4/tiny/backbones/blip2/model.safetensors",
    ):
        assert expected in names
    assert not [name for name in names if name.endswith("README.md")]  # pages belong to the checkout


def test_cards_of_the_recipes_are_found_by_the_model(site: Path, tmp_path: Path) -> None:
    script = """
    from importlib.metadata import entry_points
    from modeling_minigpt4.saving_minigpt4 import CARDS
    print(entry_points(group=CARDS)["recipes"].load().__name__)
    """
    assert run(script, tmp_path, site, without=("trl", "datasets", "peft")) == "render_card\n"


def test_lmms_eval_is_told_of_a_file_that_the_wheel_has(wheel: Path, site: Path, tmp_path: Path) -> None:
    script = """
    from importlib.metadata import entry_points
    (model,) = entry_points(group="lmms_eval.models")
    print(model.name, model.value)
    """
    name, value = run(script, tmp_path, site).split()
    file = value.replace(".", "/").replace(":manifest", ".py")
    assert name == "minigpt4" and "def manifest()" in zipfile.ZipFile(wheel).read(file).decode()


def test_core_imports_without_any_extra(site: Path, tmp_path: Path) -> None:
    script = """
    import modeling_minigpt4, processing_minigpt4, sys
    print(modeling_minigpt4.__file__)
    assert not any(name.startswith("recipes_minigpt4") for name in sys.modules)
    """
    where = run(script, tmp_path, site, without=("trl", "datasets", "peft", "torchao", "torchvision"))
    assert where.startswith(str(site))


def test_recipes_say_which_extra_is_missing(site: Path, tmp_path: Path) -> None:
    script = """
    import sys
    from recipes_minigpt4.cli import main
    sys.stderr = sys.stdout
    print(main(["stage1", "--config", "tiny_stage1"]))
    """
    printed = run(script, tmp_path, site, without=("trl", "datasets", "peft"))
    assert "minigpt4-transformers[train]" in printed and printed.endswith("2\n")


def test_conversion_and_pushing_need_no_extra(site: Path, tmp_path: Path) -> None:
    script = """
    import sys
    from recipes_minigpt4.cli import main
    sys.stderr = sys.stdout
    files = ["--checkpoint", "none.pth", "--vit", "none.pth"]
    print(main(["convert", *files, "--language_model", "llama", "--output_dir", "out"]))
    print(main(["push", "nowhere", "you/adapter"]))
    """
    printed = run(script, tmp_path, site, without=("trl", "datasets", "peft", "torchao", "torchvision"))
    assert printed == (
        "minigpt4 convert: There is no file none.pth; download it, or correct the path.\n2\n"
        "minigpt4 push: There is no folder nowhere; name what training or save_pretrained wrote.\n2\n"
    )


def test_checkpoint_of_the_wheel_loads_without_the_package(site: Path, tmp_path: Path) -> None:
    saved = run(SAVE + SCORE, tmp_path, site)
    load = """
    from transformers import AutoModelForImageTextToText
    model = AutoModelForImageTextToText.from_pretrained("saved", trust_remote_code=True)
    """
    loaded = run(textwrap.dedent(load) + SCORE, tmp_path, None, without=PACKAGES)
    assert loaded == saved
    resave = """
    from transformers import AutoModelForImageTextToText
    AutoModelForImageTextToText.from_pretrained("saved", trust_remote_code=True).save_pretrained("again")
    model = AutoModelForImageTextToText.from_pretrained("again", trust_remote_code=True)
    """
    assert run(textwrap.dedent(resave) + SCORE, tmp_path, None, without=PACKAGES) == saved
    assert (tmp_path / "again" / "modeling_minigpt4.py").is_file()
