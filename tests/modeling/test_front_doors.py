"""The ways everybody loads a model: Auto classes, remote code and pipelines, all without a warning."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from closeness import assert_close
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.pipelines import SUPPORTED_TASKS

import modeling_minigpt4
from modeling_minigpt4 import (
    AutoModelForVision2Seq,
    MiniGPT4Config,
    MiniGPT4ForConditionalGeneration,
    MiniGPT4Model,
    MiniGPT4Processor,
)


PACKAGES = ("modeling_minigpt4", "processing_minigpt4", "recipes_minigpt4")
MODEL_CODE = {
    "configuration_minigpt4.py",
    "modeling_minigpt4.py",
    "backbones.py",
    "generation_minigpt4.py",
    "heads_minigpt4.py",
    "checks_minigpt4.py",
    "labels_minigpt4.py",
    "compat_minigpt4.py",
    "peft_minigpt4.py",
    "quantization_minigpt4.py",
}
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory, backbones) -> Path:
    """A published checkpoint: adapter, processor and code."""
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts(), projector_init="linear")
    torch.nn.init.normal_(model.model.language_projection.weight, std=0.5)
    processor = MiniGPT4Processor.from_backbones(
        language_model=backbones.language_model, vision=backbones.vision, config=model.config
    )
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder) -> MiniGPT4ForConditionalGeneration:
    return MiniGPT4ForConditionalGeneration.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder) -> MiniGPT4Processor:
    return MiniGPT4Processor.from_pretrained(folder)


# Notices that transformers gives at these doors whatever the model, and one of ours that is meant.
EXPECTED = (
    "The class `AutoModelForVision2Seq` is deprecated",  # 4.57, by its own name
    "Device set to use cpu",  # 4.57, every pipeline
    "The input data was not formatted as a chat",  # every pipeline, for images + text
    "refers to folders of this machine",  # on saving
    "torchao/_C_",  # torchao, which transformers imports, about its kernels for GPUs
    "torch/utils/_pytree.py",  # and torch about torchao
)


def unexpected(texts: list[str]) -> list[str]:
    return [text for text in texts if text.strip() and not any(known in text for known in EXPECTED)]


@pytest.fixture
def no_warnings(caplog, recwarn):
    """Call it at the end of a test: nothing was warned about, neither through Python nor through a logger."""

    def check() -> None:
        texts = [record.getMessage() for record in caplog.records if record.levelno >= 30]
        assert unexpected(texts + [str(warning.message) for warning in recwarn.list]) == []

    logger = transformers.utils.logging.get_logger("transformers")
    before = logger.propagate
    logger.propagate = True
    yield check
    logger.propagate = before


# ---- Auto classes -------------------------------------------------------------------------------------------------

# Public name, whether this release of transformers has it, and what it gives.
AUTO_CLASSES = {
    "AutoConfig": MiniGPT4Config,
    "AutoModel": MiniGPT4Model,
    "AutoModelForImageTextToText": MiniGPT4ForConditionalGeneration,
    "AutoModelForVision2Seq": MiniGPT4ForConditionalGeneration,
    "AutoModelForMultimodalLM": MiniGPT4ForConditionalGeneration,
    "AutoProcessor": MiniGPT4Processor,
}


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_classes_of_transformers(folder, name: str, no_warnings) -> None:
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    assert type(getattr(transformers, name).from_pretrained(folder)) is AUTO_CLASSES[name]
    no_warnings()


def test_vision2seq_of_this_package_on_every_release(folder, no_warnings) -> None:
    assert type(AutoModelForVision2Seq.from_pretrained(folder)) is MiniGPT4ForConditionalGeneration
    expected = "AutoModelForVision2Seq" if hasattr(transformers, "AutoModelForVision2Seq") else None
    assert AutoModelForVision2Seq.__name__ == (expected or "AutoModelForImageTextToText")
    assert "AutoModelForVision2Seq" in modeling_minigpt4.__all__
    no_warnings()


def test_auto_classes_build_from_a_configuration(tiny_config) -> None:
    config = tiny_config()
    assert type(AutoModel.from_config(config)) is MiniGPT4Model
    assert type(AutoModelForImageTextToText.from_config(config)) is MiniGPT4ForConditionalGeneration
    assert type(AutoConfig.for_model("minigpt4")) is MiniGPT4Config


@torch.no_grad()
def test_loaded_parts_work_together(folder, model, picture, no_warnings) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    loaded = AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = processor(
        images=picture("blue"), text="###Human: <Img><image></Img> What?###Assistant:", return_tensors="pt"
    )
    assert_close(loaded(**inputs).logits, model(**inputs).logits)
    no_warnings()


def test_a_folder_with_older_code_loads_where_the_package_is_installed(folder, model, picture, tmp_path) -> None:
    """The code that travels with a checkpoint may be older than transformers; what is installed comes first."""
    older = tmp_path / "older"
    shutil.copytree(folder, older)
    for file in older.glob("*.py"):
        file.write_text("raise RuntimeError('written for a release of long ago')\n")
    loaded = AutoModelForImageTextToText.from_pretrained(older).eval()
    inputs = AutoProcessor.from_pretrained(older)(images=picture("blue"), text="<image> What?", return_tensors="pt")
    assert torch.equal(loaded.generate(**inputs, **OPTIONS), model.generate(**inputs, **OPTIONS))


# ---- remote code --------------------------------------------------------------------------------------------------

REMOTE = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)

def served(folder):
    # The class that `transformers serve --trust-remote-code` loads, before anything else has, and what it sees in it.
    if transformers.__version__.startswith("4."):
        from transformers.commands.serving import ServeCommand as Server
        server = Server.__new__(Server)  # without what a server on the net needs
        server.args = SimpleNamespace(trust_remote_code=True, dtype="auto", device="cpu", attn_implementation=None,
                                      load_in_4bit=False, load_in_8bit=False)
        model, _ = server._load_model_and_data_processor(folder)
        return [type(model).__module__, type(model).__name__, Server.get_model_modality(model).name]
    from transformers.cli.serving.model_manager import ModelManager as Server
    server = Server(device="cpu", trust_remote_code=True, model_timeout=-1)
    model, processor = server.load_model_and_processor(folder + "@main")
    modality = Server.get_model_modality(model, processor).name
    stops = ["stop"] if processor.tokenizer.response_template else []
    return [type(model).__module__, type(model).__name__, modality, *stops]

torch.set_num_threads(1)
folder, again = {folder!r}, {again!r}
inputs = load_file({inputs!r})
report = {{"config": type(AutoConfig.from_pretrained(folder, trust_remote_code=True)).__name__}}
report["served"] = served(folder)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
report["base"] = type(base).__name__
found = {{}}
for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq", "AutoModelForMultimodalLM"):
    if hasattr(transformers, name):
        model = getattr(transformers, name).from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            found[name] = model(**inputs).logits
report["module"] = type(model).__module__
found["new_ids"] = model.generate(**inputs, max_new_tokens={new_tokens}, do_sample=False)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
report["processor"] = type(processor).__name__
chat = {chat!r}
prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True,
                                       return_tensors="pt")
found["prompt"] = prompt["input_ids"]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True, device="cpu")
reply = pipe(text=chat, generate_kwargs=dict(max_new_tokens={new_tokens}, do_sample=False), return_full_text=False)
report["reply"] = reply[0]["generated_text"]
model.save_pretrained(again)
processor.save_pretrained(again)
model = AutoModelForImageTextToText.from_pretrained(again, trust_remote_code=True).eval()
with torch.no_grad():
    found["again"] = model(**inputs).logits
report["processor_again"] = type(AutoProcessor.from_pretrained(again, trust_remote_code=True)).__name__
save_file(found, {outputs!r})
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def remote(folder, processor, picture, tmp_path_factory) -> dict[str, Any]:
    """What a process that does not have this package makes of the folder."""
    work = tmp_path_factory.mktemp("remote")
    picture("green").save(work / "green.png")
    chat = [{"role": "user", "content": [
        {"type": "image", "path": str(work / "green.png")}, {"type": "text", "text": "What colour is the square?"},
    ]}]  # fmt: skip
    inputs = processor(images=picture("red"), text="Human: <image> What?", return_tensors="pt")
    save_file({name: tensor.contiguous() for name, tensor in inputs.items()}, work / "inputs.safetensors")
    code = textwrap.dedent(REMOTE).format(
        packages=PACKAGES, folder=str(folder), again=str(work / "again"), inputs=str(work / "inputs.safetensors"),
        outputs=str(work / "outputs.safetensors"), chat=chat, new_tokens=NEW_TOKENS,
    )  # fmt: skip
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "HF_HOME": str(work / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True,
        env={**os.environ, **quiet, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        **load_file(work / "outputs.safetensors"),
        "inputs": load_file(work / "inputs.safetensors"),
        "chat": chat,
        "folder": work / "again",
        "stderr": done.stderr,
    }


def test_remote_code_brings_the_same_classes(remote) -> None:
    assert (remote["config"], remote["base"]) == ("MiniGPT4Config", "MiniGPT4Model")
    assert remote["module"].startswith("transformers_modules.")
    assert remote["processor"] == remote["processor_again"] == "MiniGPT4Processor"


def test_the_server_of_transformers_finds_the_model(remote) -> None:
    module, name, modality, *stop = remote["served"]
    assert module.startswith("transformers_modules.") and name == "MiniGPT4ForConditionalGeneration"
    assert (modality, stop) in (("VLM", []), ("MULTIMODAL", ["stop"]))


@torch.no_grad()
def test_remote_code_gives_the_same_bits(remote, model, processor) -> None:
    inputs = remote["inputs"]
    expected = model(**inputs).logits
    names = [name for name in remote if name.startswith("AutoModel")]
    assert len(names) == 2
    for name in names:
        assert_close(remote[name], expected)
    assert_close(remote["again"], expected)
    new_ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert torch.equal(remote["new_ids"], new_ids)
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(remote["chat"], **options)
    assert torch.equal(remote["prompt"], prompt["input_ids"])
    assert remote["reply"] == generated(model, processor, [remote["chat"]])[0]


def test_remote_code_warns_about_nothing(remote) -> None:
    # The server tells what it loads, as a warning. Python shows the line of code below one.
    lines = [line for line in remote["stderr"].splitlines() if not line.endswith("@main")]
    assert [line for line in unexpected(lines) if line.strip() != "warnings.warn("] == []


def test_code_lies_flat_beside_the_weights(folder, remote) -> None:
    for place in (folder, remote["folder"]):
        code = {file.name for file in place.rglob("*.py")}
        assert code >= MODEL_CODE | {"processing_minigpt4.py", "image_processing_minigpt4.py"}
        assert all(file.parent == place for file in place.rglob("*.py"))
        assert (place / "model.safetensors").stat().st_size < 3000
        for name in MODEL_CODE:
            assert (place / name).read_text() == (folder / name).read_text()


# ---- pipelines ----------------------------------------------------------------------------------------------------

OPTIONS = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def ask(image: Any, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def generated(model, processor, chats: list) -> list[str]:
    """Replies of `generate` to chats, one at a time."""
    replies = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
        replies += processor.post_process_image_text_to_text(ids)
    return replies


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_with_chats(folder, model, processor, picture, batch_size: int, no_warnings) -> None:
    chats = [
        ask(picture("red"), "What colour is the square?"),
        ask(picture("blue", size=(60, 50)), "Describe this image in detail."),
        ask(picture("green"), "What?"),
    ]
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert type(pipe.model) is MiniGPT4ForConditionalGeneration
    expected = generated(model, processor, chats)
    assert len(set(expected)) > 1
    found = pipe(text=chats, generate_kwargs=OPTIONS, batch_size=batch_size, return_full_text=False)
    assert [row[0]["generated_text"] for row in found] == expected
    single = pipe(text=chats[0], generate_kwargs=OPTIONS, return_full_text=False)
    assert single[0]["generated_text"] == expected[0]
    no_warnings()


@pytest.mark.parametrize("batch_size", [1, 2])
def test_pipeline_with_images_and_text(folder, model, processor, picture, batch_size: int, no_warnings) -> None:
    images = [picture("red"), picture("yellow"), picture("black")]
    texts = ["Human: <image> What? Assistant:", "Human: <image> Describe. Assistant:", "<image> The"]
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    found = pipe(images=images, text=texts, generate_kwargs=OPTIONS, batch_size=batch_size, return_full_text=False)
    for row, image, text in zip(found, images, texts, strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
        (reply,) = processor.post_process_image_text_to_text(ids)
        assert (row[0] if isinstance(row, list) else row)["generated_text"].strip() == reply
    no_warnings()


def test_nobody_is_asked_to_run_code_that_is_installed(folder, tmp_path: Path, monkeypatch) -> None:
    """Also not in a folder that 4.57 has saved, whose image processor has a file of its own."""
    monkeypatch.setattr("builtins.input", lambda question="": pytest.fail(f"asked: {question}"))
    saved = tmp_path / "saved"
    shutil.copytree(folder, saved)
    settings = json.loads((saved / "processor_config.json").read_text())
    if "image_processor" in settings:
        (saved / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    for source in (folder, saved):
        pipe = pipeline("image-text-to-text", model=str(source))
        assert type(pipe.model) is MiniGPT4ForConditionalGeneration and type(pipe.processor) is MiniGPT4Processor
        for auto_class in ("AutoImageProcessor", "AutoTokenizer", "AutoProcessor", "AutoModel"):
            getattr(transformers, auto_class).from_pretrained(source)


def test_image_to_text_pipeline(folder, model, processor, picture) -> None:
    if "image-to-text" not in SUPPORTED_TASKS:
        pytest.skip(f"transformers {transformers.__version__} has no image-to-text pipeline")
    pipe = pipeline("image-to-text", model=str(folder), device="cpu")
    found = pipe([picture("red"), picture("blue")], generate_kwargs=OPTIONS)
    for row, colour in zip(found, ("red", "blue"), strict=True):
        pixels = processor(images=picture(colour), return_tensors="pt")["pixel_values"]
        ids = model.generate(pixel_values=pixels, **OPTIONS)
        assert row[0]["generated_text"] == processor.tokenizer.decode(ids[0], skip_special_tokens=True)
    (row,) = pipe(picture("red"), prompt="What? Assistant:", generate_kwargs=OPTIONS)  # goes behind the picture
    inputs = processor(images=picture("red"), text="<image>What? Assistant:", return_tensors="pt")
    expected = processor.batch_decode(model.generate(**inputs, **OPTIONS), skip_special_tokens=True)[0]
    assert row["generated_text"] == expected


# ---- a real device ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_bfloat16_on_a_gpu(folder, processor, picture) -> None:
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cuda"}
    assert loaded.model.language_projection.weight.dtype == torch.float32
    assert {parameter.dtype for parameter in loaded.language_model.parameters()} == {torch.bfloat16}
    texts = ["Human: <image> What? Assistant:", "<image> The picture shows"]
    images = [picture("red"), picture("blue")]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True).to("cuda")
    logits = loaded(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    exact = MiniGPT4ForConditionalGeneration.from_pretrained(folder).eval()(**inputs.to("cpu")).logits
    assert (logits[:, -1].float().cpu() - exact[:, -1]).abs().max() < 0.1 * exact[:, -1].abs().max()
    replies = loaded.generate(**inputs.to("cuda"), **OPTIONS)
    assert replies.shape[0] == 2
    assert replies[:, inputs["input_ids"].shape[1] :].max() < loaded.config.text_config.vocab_size
