"""Push and pull over HTTP: what goes to a repository loads from it by its name, elsewhere and with an empty cache."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from closeness import assert_close
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor, saving_minigpt4


ID, PRIVATE, EYES, WORDS = "you/adapter", "you/secret", "you/eyes", "you/words"
LOADS = {"model.safetensors", "config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"}
CODE = {"modeling_minigpt4.py", "configuration_minigpt4.py", "processing_minigpt4.py", "backbones.py"}

# One line for the model, one for the processor; the rest looks at what came.
PULL = """
import json, sys
import torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
options = {}
if sys.argv[1] == "package":
    import modeling_minigpt4
    Auto = modeling_minigpt4.AutoModelForVision2Seq
else:
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("modeling_minigpt4", "processing_minigpt4", "recipes_minigpt4"):
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Block())
    options = {"trust_remote_code": True}
    Auto = transformers.AutoModelForImageTextToText
inputs, chat, asked = load_file(sys.argv[2]), json.loads(sys.argv[3]), json.loads(sys.argv[4])
found, report = {}, {}
for name, where in asked.items():
    try:
        model = Auto.from_pretrained(*where[:1], **options, **where[1]).eval()
    except OSError as error:
        report[name] = " ".join(str(error).split())
        continue
    with torch.no_grad():
        found[name] = model(**inputs).logits
    report[name] = type(model).__module__.split(".")[0]
processor = transformers.AutoProcessor.from_pretrained("you/adapter", **options)
prompt = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
found["prompt"] = processor.apply_chat_template(chat, **prompt)["input_ids"]
pipe = transformers.pipeline("image-text-to-text", model="you/adapter", device="cpu", **options)
reply = pipe(text=chat, generate_kwargs=dict(max_new_tokens=4, do_sample=False), return_full_text=False)
report["reply"] = reply[0]["generated_text"]
save_file(found, sys.argv[5])
print(json.dumps(report))
"""


def files_of(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def published(backbones, picture, tmp_path_factory) -> Iterator[dict[str, Any]]:
    """
    A model whose backbones are on the Hub, pushed with its processor; and what it computes.

    The branch `first` has an older projection. Later the backbones' repositories get other weights.
    """
    work = tmp_path_factory.mktemp("published")
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        hub.add_user("you", TOKEN)
        hub.add_user("another", "hf_of_another")
        for name, folder in ((EYES, backbones.vision), (WORDS, backbones.language_model)):
            hub.add_repo(name, files_of(folder))
        pinned = {name: hub.head(name) for name in (EYES, WORDS)}
        hub.connect(patch, TOKEN)
        sources, where = {"vision": EYES, "language_model": WORDS}, {"cache_dir": work / "cache"}
        torch.manual_seed(0)
        model = MiniGPT4ForConditionalGeneration.from_backbones(**sources, qformer=EYES, **where).eval()
        processor = MiniGPT4Processor.from_backbones(**sources, config=model.config, **where)

        picture("green").save(work / "green.png")
        seen = {"type": "image", "path": str(work / "green.png")}
        chat = [{"role": "user", "content": [seen, {"type": "text", "text": "What colour is the square?"}]}]
        inputs = processor(images=picture("red"), text="Human: <image> What?", return_tensors="pt")
        inputs = {name: tensor.contiguous() for name, tensor in inputs.items()}
        save_file(inputs, work / "inputs.safetensors")

        logits = {}
        for branch in ("first", "main"):
            torch.nn.init.normal_(model.model.language_projection.weight)
            with torch.no_grad():
                logits[branch] = model(**inputs).logits
            patch.chdir(work)  # 4.57 would save into a folder here of the repository's last name
            model.push_to_hub(ID, revision=None if branch == "main" else branch)
        after_model = hub.files(ID)
        processor.push_to_hub(ID)
        MiniGPT4ForConditionalGeneration.push_to_hub(model, PRIVATE, private=True)
        prompt = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        reply = model.generate(**prompt, max_new_tokens=4, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        for name, path in ((EYES, "model.safetensors"), (WORDS, "model.safetensors")):
            HfApi().upload_file(path_or_fileobj=b"others", path_in_repo=path, repo_id=name)
        assert all(hub.head(name) != pinned[name] for name in pinned)
        yield {
            "hub": hub, "work": work, "chat": chat, "logits": logits, "prompt": prompt["input_ids"], "pinned": pinned,
            "after_model": after_model, "reply": processor.post_process_image_text_to_text(reply)[0],
        }  # fmt: skip
    hub.forget_connections()


def start(published: dict[str, Any], how: str, home: str, name: str, asked: dict[str, Any], **settings: str) -> Any:
    """Begin to pull in a process of its own."""
    work = published["work"]
    told = [str(work / "inputs.safetensors"), json.dumps(published["chat"]), json.dumps(asked), str(work / name)]
    environment = {**os.environ, **published["hub"].environment(work / home), **settings}
    if "HF_TOKEN" not in settings:
        environment.pop("HF_TOKEN", None)
    return subprocess.Popen(
        [sys.executable, "-c", PULL, how, *told],
        cwd=work, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def result(published: dict[str, Any], process: Any, name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(printed.splitlines()[-1]), load_file(published["work"] / name)


@pytest.fixture(scope="module")
def pulled(published) -> dict[str, Any]:
    """
    What two processes with empty caches get, one with this package and a token, the other with neither; then a third
    from the first one's cache, without network.
    """
    first = {"main": [ID, {}], "first": [ID, {"revision": "first"}], "private": [PRIVATE, {}]}
    package = start(published, "package", "home", "package", first, HF_TOKEN=TOKEN)
    remote = start(published, "remote", "elsewhere", "remote", {"main": [ID, {}], "private": [PRIVATE, {}]})
    found = {"package": result(published, package, "package")}
    before = len(published["hub"].seen)
    offline = start(published, "package", "home", "offline", {"main": [ID, {}]}, HF_HUB_OFFLINE="1")
    found["remote"] = result(published, remote, "remote")
    found["offline"] = result(published, offline, "offline")
    asked = published["hub"].seen[before:]
    return {**found, "asked": asked}


def test_model_push_to_hub_sends_adapter_code_and_this_project_s_card(published) -> None:
    files = published["after_model"]
    assert files.keys() >= {"model.safetensors", "config.json", "generation_config.json", "README.md"} | (
        CODE - {"processing_minigpt4.py"}
    )
    assert len(files["model.safetensors"]) < 4000  # 24 × 16 and 16 numbers
    sources = json.loads(files["config.json"])["backbones"]
    assert {source["revision"] for source in sources.values()} == set(published["pinned"].values())
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == [EYES, WORDS] and card.data.base_model_relation == "adapter"
    assert f'from_pretrained("{ID}")' in card.text and "This repository holds the projection only" in card.text
    assert "automatically generated" not in card.text


@pytest.mark.parametrize("registered", [True, False])
def test_the_card_is_written_by_who_is_registered_for_it(
    registered: bool, make_model: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SimpleNamespace(load=lambda: lambda model, repo_id: f"{type(model).__name__} of {repo_id}")
    monkeypatch.setattr(saving_minigpt4, "entry_points", lambda group: [writer] if registered else [])
    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", lambda *args, **kwargs: None)
    general = f"<!-- {saving_minigpt4.GENERAL_CARD} -->"
    for text, written in ((general, f"MiniGPT4ForConditionalGeneration of {ID}"), ("My own", "My own")):
        (tmp_path / "README.md").write_text(text)
        make_model()._upload_modified_files(tmp_path, ID)
        assert (tmp_path / "README.md").read_text() == (written if registered else text)


def test_processor_push_to_hub_completes_it_and_keeps_the_card(published) -> None:
    files = published["hub"].files(ID)
    assert files.keys() >= LOADS | CODE
    assert files["README.md"] == published["after_model"]["README.md"]


@pytest.mark.parametrize("how, module", [("package", "modeling_minigpt4"), ("remote", "transformers_modules")])
def test_one_line_loads_the_same_model(how: str, module: str, pulled, published) -> None:
    report, found = pulled[how]
    assert report["main"] == module
    assert_close(found["main"], published["logits"]["main"])
    assert torch.equal(found["prompt"], published["prompt"])
    assert report["reply"].strip() == published["reply"].strip()


def test_a_revision_is_what_was_pushed_there(pulled, published) -> None:
    _, found = pulled["package"]
    assert_close(found["first"], published["logits"]["first"])
    assert not torch.equal(found["first"], found["main"])


def test_a_private_repository_needs_the_token(pulled, published) -> None:
    _, found = pulled["package"]
    assert_close(found["private"], published["logits"]["main"])
    report, found = pulled["remote"]
    assert "private" not in found and "you/secret" in report["private"] and TOKEN not in report["private"]


def test_afterwards_the_cache_is_enough(pulled, published) -> None:
    report, found = pulled["offline"]
    assert_close(found["main"], published["logits"]["main"])
    assert report["reply"].strip() == published["reply"].strip()


def test_storage_never_sees_the_token(pulled, published) -> None:
    stored = [one for one in published["hub"].seen if one.method in ("GET", "PUT") and one.path.startswith("/models/")]
    assert len(stored) > 4 and all(one.authorization is None for one in stored)
