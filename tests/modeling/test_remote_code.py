"""Backbones that bring their own code: run only if trusted, found again by whoever loads what was saved."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from foreign_parts import bring_own_code, bring_own_tokenizer, write_code, write_encoder
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Model, MiniGPT4Processor


OPTION = "trust_remote_code=True"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, write_backbones) -> dict[str, str]:
    """Folders of an encoder and a language model of types that transformers does not know."""
    root = tmp_path_factory.mktemp("foreign")
    llama = Path(write_backbones(root / "parts").language_model)
    return {"vision": write_encoder(root / "lantern"), "language_model": bring_own_code(llama)}


def compose(parts: dict, **options) -> MiniGPT4ForConditionalGeneration:
    torch.manual_seed(5)
    return MiniGPT4ForConditionalGeneration.from_backbones(**parts, trust_remote_code=True, **options).eval()


@torch.no_grad()
def score(model, make_inputs) -> torch.Tensor:
    inputs = make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])
    return model(**inputs).logits


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, foreign) -> Path:
    """An adapter of these parts with its processor, for reading only."""
    folder = tmp_path_factory.mktemp("adapter")
    model = compose(foreign)
    model.save_pretrained(folder)
    processor = MiniGPT4Processor.from_backbones(**foreign, config=model.config, trust_remote_code=True)
    processor.save_pretrained(folder)
    return folder


# ---- trusted ------------------------------------------------------------------------------------------------------


def test_parts_compute_what_their_code_says(foreign, make_inputs, tmp_path, tokenizer) -> None:
    model = compose(foreign)
    weights = load_file(Path(foreign["vision"]) / "model.safetensors")
    assert torch.equal(model.model.vision_model.layers[1].running_mean, weights["layers.1.running_mean"])
    assert type(model.model.vision_model).__name__ == "LanternModel"
    assert type(model.config.text_config).__name__ == "SpeakerConfig"
    assert model.config.num_image_tokens == 4 and not model.training
    # As a Llama, the language model computes the same.
    plain = tmp_path / "plain"
    shutil.copytree(foreign["language_model"], plain)
    fields = json.loads((plain / "config.json").read_text())
    del fields["auto_map"]
    (plain / "config.json").write_text(json.dumps({**fields, "model_type": "llama"}))
    twice = write_encoder(tmp_path / "twice", factor=2.0)
    llama = compose({**foreign, "language_model": str(plain)})
    assert_close(score(model, make_inputs), score(llama, make_inputs))
    assert not torch.equal(score(model, make_inputs), score(compose({**foreign, "vision": twice}), make_inputs))


LOAD = """
import sys
BLOCKED = {blocked}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
import torch
if not BLOCKED:
    import modeling_minigpt4
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
folder = {folder!r}
inputs = load_file({inputs!r})
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")
model.save_pretrained({again!r})
again = AutoModelForImageTextToText.from_pretrained({again!r}, trust_remote_code=True).eval()
with torch.no_grad():
    found = {{"logits": model(**inputs).logits, "hidden": base(**inputs).last_hidden_state,
              "pipeline": pipe.model.eval()(**inputs).logits, "again": again(**inputs).logits}}
save_file(found, {outputs!r})
print(processor.num_image_tokens, type(model.config).__module__.split(".")[0])
"""
PACKAGES = ("modeling_minigpt4", "processing_minigpt4", "recipes_minigpt4")


def run(code: str, tmp_path: Path, **more) -> subprocess.CompletedProcess:
    """Run a script in a process that has imported none of the code so far, and has no terminal to ask on."""
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env={**os.environ, **environment, **more},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("full", "blocked"), [(False, PACKAGES), (True, ())], ids=["adapter_without_the_package", "full_with_it"]
)
def test_saved_models_load_in_a_new_process(foreign, adapter, full, blocked, make_inputs, tmp_path) -> None:
    model = compose(foreign)
    model.save_pretrained(tmp_path / "saved", full=full)
    MiniGPT4Processor.from_pretrained(adapter).save_pretrained(tmp_path / "saved")
    inputs = make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])
    save_file(inputs, tmp_path / "inputs.safetensors")
    places = {name: str(tmp_path / f"{name}.safetensors") for name in ("inputs", "outputs")}
    done = run(
        LOAD.format(blocked=blocked, folder=str(tmp_path / "saved"), again=str(tmp_path / "again"), **places), tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "4"
    if blocked:
        assert done.stdout.split()[1] == "transformers_modules"
    found = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        logits = model(**inputs).logits
        assert_close(found["hidden"], model.model(**inputs).last_hidden_state)
    for name in ("logits", "pipeline", "again"):
        assert_close(found[name], logits)
    names = {path.name for path in (tmp_path / "saved").glob("*lantern.py")}
    assert bool(names) == full  # an adapter takes the code from its backbone


def test_configuration_keeps_what_it_has_not_read(adapter, tmp_path) -> None:
    config = MiniGPT4Config.from_pretrained(adapter)
    assert config.vision_config.stem == 8 and config.text_config.vocab_size == 300
    config.save_pretrained(tmp_path)
    saved, again = (json.loads((folder / "config.json").read_text()) for folder in (adapter, tmp_path))
    assert again["vision_config"] == saved["vision_config"] and again["text_config"] == saved["text_config"]
    assert again["vision_config"]["auto_map"] == {
        "AutoConfig": "configuration_lantern.LanternConfig", "AutoModel": "modeling_lantern.LanternModel"
    }  # fmt: skip


# ---- not trusted --------------------------------------------------------------------------------------------------


def refusal(error: pytest.ExceptionInfo) -> str:
    """The message, after checking that it is one sentence which names the option in both spellings."""
    text = str(error.value)
    assert OPTION in text and "--trust_remote_code true" in text and "\n" not in text
    assert "no configuration" not in text
    return text


@pytest.fixture
def terminal(monkeypatch) -> None:
    """Nobody may be asked: transformers would wait for an answer for 15 seconds."""

    def ask(*_):
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.parametrize("part", ["vision", "language_model"])
def test_code_is_refused_by_default(foreign, backbones, part, terminal) -> None:
    parts = {**backbones.parts(qformer=False), part: foreign[part]}
    with pytest.raises(ValueError) as error:
        MiniGPT4ForConditionalGeneration.from_backbones(**parts)
    assert f"{part} backbone {foreign[part]} brings its own code" in refusal(error)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": None}], ids=str)
@pytest.mark.parametrize("model", [MiniGPT4ForConditionalGeneration, MiniGPT4Model, AutoModelForImageTextToText])
def test_saved_code_is_refused_by_default(adapter, foreign, model, trust, terminal) -> None:
    with pytest.raises(ValueError) as error:
        model.from_pretrained(adapter, **trust)
    assert foreign["vision"] in refusal(error)


def test_an_unread_part_cannot_be_built(adapter, terminal) -> None:
    config = MiniGPT4Config.from_pretrained(adapter)
    for build in (MiniGPT4ForConditionalGeneration, MiniGPT4Model, lambda config: config.num_image_tokens):
        with pytest.raises(ValueError) as error:
            build(config)
        assert "brings its own code" in refusal(error)


def test_code_that_is_missing_or_broken_is_told(foreign, tmp_path) -> None:
    shutil.copytree(foreign["vision"], tmp_path / "lacking")
    (tmp_path / "lacking" / "modeling_lantern.py").unlink()
    with pytest.raises(OSError, match=r"code modeling_lantern\.LanternModel of the vision backbone in .*lacking"):
        compose({**foreign, "vision": str(tmp_path / "lacking")})
    shutil.copytree(foreign["vision"], tmp_path / "broken")
    (tmp_path / "broken" / "modeling_lantern.py").write_text("import a_package_nobody_has\n")
    with pytest.raises(OSError, match="a_package_nobody_has"):
        compose({**foreign, "vision": str(tmp_path / "broken")})
    file = tmp_path / "broken" / "config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "auto_map": {"AutoConfig": fields["auto_map"]["AutoConfig"]}}))
    with pytest.raises(ValueError, match="brings code for its configuration, but none for AutoModel"):
        compose({**foreign, "vision": str(tmp_path / "broken")})


def test_a_type_that_nobody_knows_is_told(foreign, tmp_path) -> None:
    shutil.copytree(foreign["vision"], tmp_path / "unknown")
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "from_the_future"}')
    with pytest.raises(ValueError, match="is a 'from_the_future' model, which the installed"):
        compose({**foreign, "vision": str(tmp_path / "unknown")})


# ---- tokenizers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def speaker(backbones, tmp_path) -> dict[str, str]:
    """Backbones of transformers' own types, but for the tokenizer."""
    shutil.copytree(backbones.language_model, tmp_path / "speaker")
    return {"vision": backbones.vision, "language_model": bring_own_tokenizer(tmp_path / "speaker")}


def test_tokenizers_bring_their_code_if_trusted(speaker, tmp_path, terminal) -> None:
    model = compose(speaker)
    assert model.generation_config.separator == "###"
    made = MiniGPT4Processor.from_backbones(**speaker, config=model.config, trust_remote_code=True)
    assert made.tokenizer.speaks
    made.save_pretrained(tmp_path / "saved")
    assert "trust_remote_code" not in (tmp_path / "saved" / "processor_config.json").read_text()
    assert MiniGPT4Processor.from_pretrained(tmp_path / "saved", trust_remote_code=True).tokenizer.speaks
    with pytest.raises(ValueError) as error:
        MiniGPT4Processor.from_pretrained(tmp_path / "saved")
    assert f"tokenizer of {tmp_path / 'saved'} brings its own code" in refusal(error)


def test_tokenizers_with_code_are_refused_by_default(speaker, terminal, tiny_config) -> None:
    with pytest.raises(ValueError) as error:
        MiniGPT4ForConditionalGeneration.from_backbones(**speaker)
    assert f"tokenizer of {speaker['language_model']} brings its own code" in refusal(error)
    with pytest.raises(ValueError) as error:
        MiniGPT4Processor.from_backbones(**speaker, config=tiny_config())
    assert f"tokenizer of {speaker['language_model']} brings its own code" in refusal(error)


# ---- moved, registered by hand ------------------------------------------------------------------------------------


def test_moved_backbones_bring_their_code_along(foreign, adapter, make_inputs, tmp_path) -> None:
    moved = {part: str(tmp_path / part) for part in foreign}
    for part, folder in moved.items():
        shutil.copytree(foreign[part], folder)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(adapter, backbones=moved, trust_remote_code=True).eval()
    assert_close(score(model, make_inputs), score(compose(foreign), make_inputs))


def test_folders_inside_the_checkpoint_bring_their_code(foreign, make_inputs, tmp_path) -> None:
    model = compose(foreign)
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(foreign["vision"], tmp_path / "saved" / "eyes")
    file = tmp_path / "saved" / "config.json"
    fields = json.loads(file.read_text())
    fields["backbones"]["vision"] |= {"name_or_path": ".", "subfolder": "eyes"}
    file.write_text(json.dumps(fields))
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert_close(score(loaded, make_inputs), score(model, make_inputs))


def test_classes_registered_by_hand_need_no_option(foreign, backbones, make_inputs, tmp_path, monkeypatch) -> None:
    shutil.copytree(foreign["vision"], tmp_path / "handmade")
    file = tmp_path / "handmade" / "configuration_lantern.py"
    file.write_text(file.read_text().replace('"lantern"', '"handmade"'))
    (tmp_path / "handmade" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    classes = importlib.import_module("handmade.modeling_lantern")
    AutoConfig.register("handmade", classes.LanternConfig)
    AutoModel.register(classes.LanternConfig, classes.LanternModel)
    config = json.loads((tmp_path / "handmade" / "config.json").read_text())
    (tmp_path / "handmade" / "config.json").write_text(json.dumps({**config, "model_type": "handmade"}))
    parts = {"vision": str(tmp_path / "handmade"), "language_model": backbones.language_model}
    torch.manual_seed(5)
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts).eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded.model.vision_model) is classes.LanternModel
    assert_close(score(model, make_inputs), score(loaded, make_inputs))
    # What transformers knows comes before what the repository brings.
    assert type(compose(parts).model.vision_model) is classes.LanternModel


# ---- on the Hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def remote_parts(foreign, hub, tmp_path) -> dict[str, str]:
    """Repositories of an encoder and a language model with code of their own."""
    for name, folder in (("you/eyes", foreign["vision"]), ("you/words", foreign["language_model"])):
        hub.add_repo(name, files_of(folder))
    return {"vision": "you/eyes", "language_model": "you/words"}


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def change(repo_id: str, folder: Path) -> None:
    """Give a repository code that computes something else."""
    write_code(folder, factor=3.0)
    HfApi().upload_file(
        path_or_fileobj=str(folder / "modeling_lantern.py"), path_in_repo="modeling_lantern.py", repo_id=repo_id
    )


def test_code_is_pinned_as_weights_are(remote_parts, foreign, hub, make_inputs, tmp_path) -> None:
    where = {"cache_dir": tmp_path / "cache"}
    pinned = hub.head("you/eyes")
    model = compose(remote_parts, **where)
    model.save_pretrained(tmp_path / "saved")
    change("you/eyes", tmp_path / "changed")
    assert hub.head("you/eyes") != pinned
    where = {"cache_dir": tmp_path / "another_cache"}
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved", trust_remote_code=True, **where)
    assert loaded.config.backbones["vision"]["revision"] == pinned
    assert "code_revision" not in loaded.config.backbones["vision"]
    before = score(compose(foreign), make_inputs)
    assert_close(score(loaded.eval(), make_inputs), before)
    assert not torch.equal(score(compose(remote_parts, **where), make_inputs), before)


def test_code_of_another_repository_is_pinned_too(foreign, hub, make_inputs, tmp_path) -> None:
    write_code(tmp_path / "code")
    hub.add_repo("you/code", files_of(str(tmp_path / "code")))
    hub.add_repo("you/eyes", files_of(write_encoder(tmp_path / "eyes", code="you/code")))
    parts, where = {**foreign, "vision": "you/eyes"}, {"cache_dir": tmp_path / "cache"}
    pinned = hub.head("you/code")
    compose(parts, **where).save_pretrained(tmp_path / "saved")
    change("you/code", tmp_path / "changed")
    where = {"cache_dir": tmp_path / "another_cache"}
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved", trust_remote_code=True, **where)
    assert loaded.config.backbones["vision"]["code_revision"] == pinned
    before = score(compose(foreign), make_inputs)
    assert_close(score(loaded.eval(), make_inputs), before)
    # Whoever knows the commit can name it for a new model as well; a full checkpoint holds the code.
    eyes = {"name_or_path": "you/eyes", "code_revision": pinned}
    model = compose({**parts, "vision": eyes}, **where)
    assert_close(score(model, make_inputs), before)
    model.save_pretrained(tmp_path / "full", full=True)
    hub.repos.clear()
    full = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "full", trust_remote_code=True).eval()
    assert_close(score(full, make_inputs), before)


def test_code_of_several_repositories_is_refused(foreign, hub, tmp_path) -> None:
    eyes = Path(write_encoder(tmp_path / "eyes"))
    fields = json.loads((eyes / "config.json").read_text())
    fields["auto_map"] = {name: f"you/code-{name}--{text}" for name, text in fields["auto_map"].items()}
    (eyes / "config.json").write_text(json.dumps(fields))
    with pytest.raises(
        ValueError, match=r"code from several repositories \(you/code-AutoConfig, you/code-AutoModel\)"
    ):
        compose({**foreign, "vision": str(eyes)})


def test_full_checkpoints_are_pushed_with_the_code(remote_parts, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = compose(remote_parts, cache_dir=tmp_path / "cache")
    model.push_to_hub("you/adapter")
    model.save_pretrained(str(tmp_path / "full"), full=True, push_to_hub=True, repo_id="you/full")
    code = {"configuration_lantern.py", "modeling_lantern.py", "configuration_speaker.py", "modeling_speaker.py"}
    assert not code & hub.files("you/adapter").keys()
    assert code <= hub.files("you/full").keys()
