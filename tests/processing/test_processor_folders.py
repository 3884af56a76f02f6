"""Folders of processors: saved, loaded through every door, moved between releases, and made from backbones."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
from inner_templates import CHATML, template_tokenizer
from tiny_text import (
    IMAGE_ID,
    IMAGE_TOKENS,
    byte_tokenizer,
    dummy_prefix_tokenizer,
    make_processor,
    one_sentence,
    plain,
)
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

import modeling_minigpt4  # noqa: F401  # registers the processor with AutoProcessor
from processing_minigpt4 import MiniGPT4ImageProcessor, MiniGPT4Processor, load_chat_template, wrap_chat_template


PICTURE = PIL.Image.new("RGB", (9, 7), (200, 30, 0))
CHAT = [
    {"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "A red cat."},
]
CODE = {
    "batch_minigpt4.py",
    "chat_templates_minigpt4.py",
    "conversations_minigpt4.py",
    "image_opening_minigpt4.py",
    "image_processing_minigpt4.py",
    "placeholder_minigpt4.py",
    "replies_minigpt4.py",
    "processing_compat_minigpt4.py",
    "processing_minigpt4.py",
    "segments_minigpt4.py",
}


@pytest.fixture
def complaints() -> Iterator[list[str]]:
    """Every warning that transformers logs or Python shows during the test."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    library.addHandler(handler)
    logging.Logger.warning_once.cache_clear()  # what other tests have made transformers say once counts again
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        yield found
        found.extend(str(warning.message) for warning in shown)
    library.removeHandler(handler)


def outputs(processor: Any) -> dict[str, Any]:
    """All that a processor makes of one chat, in a form that can be compared."""
    result = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return {
        "text": processor.apply_chat_template(CHAT),
        "pixels": np.asarray(result["pixel_values"]).tolist(),
        **{name: result[name] for name in ("input_ids", "attention_mask", "assistant_masks")},
    }


TEMPLATES = {
    "vicuna_v0": lambda: make_processor(),
    "llama2-dummy-prefix": lambda: make_processor(dummy_prefix_tokenizer(), chat_template="llama2"),
    "wrapped": lambda: make_processor(template_tokenizer(CHATML), chat_template="wrapped"),
    "own-text": lambda: make_processor(template_tokenizer(None), chat_template=CHATML),
    "other-placeholder": lambda: make_processor(num_image_tokens=5, image_token_id=7777),
}


@pytest.fixture(params=TEMPLATES)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[MiniGPT4Processor, Path]:
    processor = TEMPLATES[request.param]()
    processor.save_pretrained(tmp_path / "saved")
    return processor, tmp_path / "saved"


@pytest.mark.parametrize("door", [MiniGPT4Processor, AutoProcessor])
def test_what_was_saved_is_what_loads(saved, door, complaints):
    processor, folder = saved
    loaded = door.from_pretrained(folder)
    assert type(loaded) is MiniGPT4Processor and type(loaded.image_processor) is MiniGPT4ImageProcessor
    assert complaints == []
    for name in ("image_token", "image_token_id", "num_image_tokens", "chat_template", "separator"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert outputs(loaded) == outputs(processor)
    assert {path.name for path in folder.glob("*.py")} == CODE


def test_a_folder_that_holds_the_model_too(saved, make_model, complaints):
    processor, folder = saved
    make_model().save_pretrained(folder)
    assert complaints == []
    assert outputs(AutoProcessor.from_pretrained(folder)) == outputs(processor)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert plain(tokenizer, "a red cat") == plain(processor.tokenizer, "a red cat")
    assert complaints == []
    # 4.57 says of every class without a "fast" twin that it is slow, so what is said behind this door does not count.
    assert type(AutoImageProcessor.from_pretrained(folder)) is MiniGPT4ImageProcessor


def test_saving_again_changes_nothing(saved, tmp_path):
    processor, folder = saved
    loaded = MiniGPT4Processor.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = MiniGPT4Processor.from_pretrained(tmp_path / "again")
    assert again.chat_template == processor.chat_template
    assert outputs(again) == outputs(processor)
    for path in folder.iterdir():  # what transformers writes for a tokenizer depends on how it was made
        if path.suffix in (".py", ".jinja") or path.name in ("processor_config.json", "preprocessor_config.json"):
            assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_loaded_processor_does_not_wrap_twice(tmp_path):
    processor = make_processor(template_tokenizer(CHATML), chat_template="wrapped")
    processor.save_pretrained(tmp_path)
    loaded = MiniGPT4Processor.from_pretrained(tmp_path)
    assert loaded.chat_template.count("minigpt4 = namespace") == 1
    assert load_chat_template("wrapped", loaded.tokenizer) == loaded.chat_template
    assert wrap_chat_template(AutoTokenizer.from_pretrained(tmp_path)) == loaded.chat_template


@pytest.mark.parametrize("asked", ["llama2", "text"])
def test_another_template_can_be_asked_for_while_loading(tmp_path, asked):
    make_processor(template_tokenizer(CHATML), chat_template="wrapped").save_pretrained(tmp_path)
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}|{% endfor %}" if asked == "text" else asked
    )
    for door in (MiniGPT4Processor, AutoProcessor):
        loaded = door.from_pretrained(tmp_path, chat_template=template)
        rendered = loaded.apply_chat_template(CHAT)
        if asked == "text":
            assert rendered == "user: <image>What is this?|assistant: A red cat.|"
        else:
            assert loaded.chat_template == load_chat_template("llama2")
            assert rendered.endswith("[INST] <Img><image></Img> What is this? [/INST] A red cat.<|im_end|>")
    with pytest.raises(ValueError, match="no chat template named 'vicuna'") as caught:
        MiniGPT4Processor.from_pretrained(tmp_path, chat_template="vicuna")
    assert one_sentence(caught.value)


def test_options_can_be_changed_while_loading(tmp_path):
    make_processor().save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path, num_image_tokens=2)
    ids = loaded(text="<image>", images=PICTURE)["input_ids"][0]
    assert ids.count(IMAGE_ID) == 2
    loaded = MiniGPT4Processor.from_pretrained(tmp_path, padding_side="left")
    assert loaded.tokenizer.padding_side == "left"


# ---- from one release to another ---------------------------------------------------------------------------------


def edit_json(path: Path, **changes: Any) -> dict[str, Any]:
    found = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**found, **changes}))
    return found


def test_a_folder_names_no_class_that_the_other_release_lacks(saved):
    _, folder = saved
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("layout", ["4.57", "5.x"])
def test_a_folder_of_the_other_release_loads(tmp_path, complaints, layout):
    """4.57 writes `preprocessor_config.json`; 5.x nests the image processor in `processor_config.json`."""
    processor = make_processor(template_tokenizer(CHATML), chat_template="wrapped")
    expected = outputs(processor)
    processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    images = processor.image_processor.to_dict()
    images.pop("processor_class", None)
    auto_map = {
        "AutoImageProcessor": "image_processing_minigpt4.MiniGPT4ImageProcessor",
        "AutoProcessor": "processing_minigpt4.MiniGPT4Processor",
    }
    images.update(image_processor_type="MiniGPT4ImageProcessor", auto_map=auto_map)
    config = {key: value for key, value in config.items() if key != "image_processor"}
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    if layout == "4.57":
        edit_json(tmp_path / "preprocessor_config.json", **images, processor_class="MiniGPT4Processor")
    else:
        config["image_processor"] = images
    config["auto_map"] = {"AutoProcessor": "processing_minigpt4.MiniGPT4Processor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    for door in (MiniGPT4Processor, AutoProcessor):
        assert outputs(door.from_pretrained(tmp_path)) == expected
    assert complaints == []


# ---- without the package -----------------------------------------------------------------------------------------

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"modeling_minigpt4", "processing_minigpt4", "recipes_minigpt4"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""

USE = """
import json
import numpy as np
import PIL.Image
from transformers import AutoProcessor

processor = AutoProcessor.from_pretrained("saved", trust_remote_code=True)
processor.save_pretrained("again")
processor = AutoProcessor.from_pretrained("again", trust_remote_code=True)
picture = PIL.Image.new("RGB", (9, 7), (200, 30, 0))
chat = [
    {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": "A red cat."},
]
result = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
made = {name: result[name] for name in ("input_ids", "attention_mask", "assistant_masks")}
made["pixels"] = np.asarray(result["pixel_values"]).tolist()
made["text"] = processor.apply_chat_template(chat)
try:  # what can be wrapped in the package only
    processor.apply_chat_template(chat[1:], chat_template="{{ messages[0].content }}")
except ValueError as error:
    made["error"] = str(error)
print(json.dumps(made))
"""


@pytest.mark.parametrize("name", ["vicuna_v0", "own-text"])
def test_a_process_without_the_package(tmp_path, make_model, name):
    processor = TEMPLATES[name]()
    processor.save_pretrained(tmp_path / "saved")
    make_model().save_pretrained(tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, "-c", BLOCK + USE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]},
    )
    assert done.returncode == 0, done.stderr
    of_torchao = ("torchao/_C_", "torch/utils/_pytree.py")  # its kernels for GPUs, and torch about it
    assert [line for line in done.stderr.splitlines() if not any(known in line for known in of_torchao)] == []
    made = json.loads(done.stdout)
    assert "install" in (error := made.pop("error")) and one_sentence(error)
    assert made == outputs(processor)
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE


# ---- from backbones ----------------------------------------------------------------------------------------------

CONFIG = SimpleNamespace(
    image_size=(4, 6), image_token_id=IMAGE_ID, num_image_tokens=IMAGE_TOKENS, vision_config=SimpleNamespace()
)


@pytest.fixture
def vision(tmp_path: Path) -> Path:
    folder = tmp_path / "vision"
    folder.mkdir()
    edit_json(folder / "config.json", model_type="siglip_vision_model")
    return folder


def test_from_backbones_takes_the_language_models_own_template(tmp_path, vision):
    template_tokenizer(CHATML).save_pretrained(tmp_path / "llm")
    processor = MiniGPT4Processor.from_backbones(vision, tmp_path / "llm", CONFIG)
    assert processor.apply_chat_template(CHAT[:1]).endswith("<|im_start|>user\n<image>What is this?<|im_end|>\n")
    assert (processor.image_token_id, processor.num_image_tokens) == (IMAGE_ID, IMAGE_TOKENS)
    assert dict(processor.image_processor.size) == {"height": 4, "width": 6}
    assert processor.image_processor.image_mean == MiniGPT4ImageProcessor().image_mean
    assert processor.tokenizer.padding_side == "left"


def test_from_backbones_puts_white_behind_transparency_and_saves_it(tmp_path, vision):
    """A folder of before, which names no colour, keeps what it did."""
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    ghost = PIL.Image.new("RGBA", (6, 4), (200, 0, 0, 0))  # red, and not to be seen
    white, red = (PIL.Image.new("RGB", (6, 4), color) for color in ("white", (200, 0, 0)))

    def is_seen_as(processor, picture) -> bool:
        seen, expected = (processor(images=one)["pixel_values"][0] for one in (ghost, picture))
        return np.array_equal(seen, expected)

    made = MiniGPT4Processor.from_backbones(vision, tmp_path / "llm", CONFIG)
    plain = MiniGPT4Processor.from_backbones(vision, tmp_path / "llm", CONFIG, background_color=None)
    for name, processor, picture in (("made", made, white), ("plain", plain, red)):
        processor.save_pretrained(tmp_path / name)
        saved = MiniGPT4Processor.from_pretrained(tmp_path / name)
        assert is_seen_as(processor, picture) and is_seen_as(saved, picture), name
    for path in (tmp_path / "made").glob("*processor_config.json"):
        settings = json.loads(path.read_text())
        for fields in (settings, settings.get("image_processor", {})):
            fields.pop("background_color", None)
        path.write_text(json.dumps(settings))
    assert is_seen_as(MiniGPT4Processor.from_pretrained(tmp_path / "made"), red)


def test_from_backbones_falls_back_on_vicuna(tmp_path, vision):
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    assert byte_tokenizer().chat_template is None
    processor = MiniGPT4Processor.from_backbones(str(vision), str(tmp_path / "llm"), CONFIG)
    assert processor.chat_template == load_chat_template("vicuna_v0") and processor.separator == "###"
    chosen = MiniGPT4Processor.from_backbones(vision, tmp_path / "llm", CONFIG, chat_template="llama2")
    assert chosen.chat_template == load_chat_template("llama2")


@pytest.mark.parametrize(("pad", "expected"), [("<pad>", "<pad>"), (None, "</s>")])
def test_from_backbones_makes_sure_that_there_is_a_pad_token(tmp_path, vision, pad, expected):
    byte_tokenizer(pad_token=pad).save_pretrained(tmp_path / "llm")
    processor = MiniGPT4Processor.from_backbones(vision, tmp_path / "llm", CONFIG)
    processor.save_pretrained(tmp_path / "saved")
    for made in (processor, MiniGPT4Processor.from_pretrained(tmp_path / "saved")):
        assert made.tokenizer.pad_token == expected and made.tokenizer.padding_side == "left"
        masks = made(text=["a", "a longer text"], padding=True)["attention_mask"]
        assert masks[0][0] == 0 and len(made.tokenizer) == len(byte_tokenizer())


@pytest.mark.parametrize(
    "layout",
    [
        lambda found: ("preprocessor_config.json", found),
        lambda found: ("processor_config.json", {"image_processor": found}),
    ],
)
def test_from_backbones_takes_the_statistics_of_the_vision_encoder(tmp_path, vision, layout):
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    name, content = layout(
        {
            "image_processor_type": "SiglipImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.4, 0.3],
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": 384, "width": 384},
            "do_center_crop": True,
        }
    )
    edit_json(vision / name, **content)
    spec = {"name_or_path": str(vision)}
    processor = MiniGPT4Processor.from_backbones(spec, {"name_or_path": tmp_path / "llm"}, CONFIG).image_processor
    assert (processor.image_mean, processor.image_std) == ([0.5, 0.5, 0.5], [0.5, 0.4, 0.3])
    assert processor.resample == PIL.Image.Resampling.BILINEAR and dict(processor.size) == {"height": 4, "width": 6}


def test_from_backbones_without_a_tokenizer_fails_clearly(tmp_path, vision):
    (tmp_path / "llm").mkdir()
    with pytest.raises(OSError) as caught:
        MiniGPT4Processor.from_backbones(vision, tmp_path / "llm", CONFIG)
    assert str(tmp_path / "llm") in str(caught.value)


# ---- a tokenizer that SentencePiece trained ----------------------------------------------------------------------


def test_a_sentencepiece_tokenizer(tmp_path):
    """A file as LLaMA's: `tokenizer.model` and nothing else."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from tiny_text import CORPUS

    with open(tmp_path / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS * 3),
            model_writer=file,
            vocab_size=340,
            model_type="bpe",
            byte_fallback=True,
            remove_extra_whitespaces=False,  # as LLaMA's was trained
            normalization_rule_name="identity",
            minloglevel=2,
            hard_vocab_limit=False,
        )
    edit_json(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=True)
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    processor = make_processor(tokenizer)
    prompt = processor.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True, return_dict=True)
    system = load_chat_template("vicuna_v0").split('set system = "')[1].split('"')[0]
    expected = [1, *original.encode(system + "###Human: <Img>"), *[IMAGE_ID] * IMAGE_TOKENS]
    expected += original.encode("</Img> What is this?###Assistant: ")
    assert prompt["input_ids"] == [expected]
    assert plain(tokenizer, "red") == original.encode("red")
    whole = processor.apply_chat_template(CHAT, tokenize=True, return_dict=True)
    assert whole["input_ids"] == [expected + original.encode("A red cat.###")]
