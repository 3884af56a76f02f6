"""Models of timm as vision encoders; they need a torch and a torchvision that fit each other: `make test-timm`."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, TimmBackboneConfig, TimmWrapperConfig
from transformers.image_utils import PILImageResampling

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor


pytestmark = pytest.mark.slow
timm = pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)

SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
# Architecture, its arguments, pixels, channels, cells or patches, how many are joined.
MODELS = [
    ("test_vit", {}, 160, 64, 100, 4),
    ("test_vit", {"img_size": 64}, 64, 64, 16, 4),
    ("test_resnet", {}, 160, 96, 25, 5),
    ("test_efficientnet", {}, 160, 256, 25, 1),
    ("swin_tiny_patch4_window7_224", SWIN, 224, 128, 49, 7),  # which gives feature maps with channels last
]


def make(architecture: str, seed: int = 0, **arguments: Any) -> torch.nn.Module:
    """A model of timm with random weights, statistics of BatchNorm included."""
    torch.manual_seed(seed)
    model = timm.create_model(architecture, num_classes=0, **arguments).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2.0)
    return model


def write_wrapped(folder: Path, architecture: str, arguments: dict[str, Any]) -> str:
    """The folder that transformers' wrapper saves."""
    from transformers import TimmWrapperModel

    model = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=arguments or None))
    model.timm_model.load_state_dict(make(architecture, **arguments).state_dict())
    model.save_pretrained(folder)
    return str(folder)


def write_as_timm(folder: Path, architecture: str) -> str:
    """The files of a repository of timm: no model type, and weights by timm's own names."""
    model = make(architecture)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    known = {"input_size": [3, 160, 160], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear"}
    fields = {
        "architecture": architecture, "num_classes": 0, "num_features": model.num_features, "pretrained_cfg": known,
        "label_names": [],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


@torch.no_grad()
def check(model: Any, eyes: torch.nn.Module, patches: int, merge: int, channels: int, pixels: int) -> None:
    """Compare image features with what timm itself computes."""
    assert model.config.image_size == (pixels, pixels)
    assert model.config.num_image_tokens == patches // merge
    assert model.model.language_projection.in_features == channels * merge
    images = torch.randn(2, 3, pixels, pixels)
    expected = eyes.forward_features(images)
    if expected.ndim == 4:
        expected = expected.flatten(1, 2) if expected.shape[-1] == channels else expected.flatten(2).mT
    expected = expected[:, -patches:]
    found = model.get_image_features(images).last_hidden_state
    # The last bits of these features are those of whole batches on this machine.
    assert_close(found.flatten(), expected.reshape(2, patches // merge, merge * channels).flatten())


@torch.no_grad()
def score(model: Any, make_inputs: Any) -> torch.Tensor:
    return model(**make_inputs(model, [[1, "image", 8, 30], [1, 7, "image", 9, 20, 21]])).logits


@pytest.mark.parametrize(("name", "arguments", "pixels", "channels", "patches", "merge"), MODELS, ids=str)
def test_wrapped_models_are_joined_saved_and_loaded(
    name, arguments, pixels, channels, patches, merge, backbones, make_inputs, tmp_path
) -> None:
    parts = {"vision": write_wrapped(tmp_path / "eyes", name, arguments), "language_model": backbones.language_model}
    options = {"patch_merge_size": merge, "patch_merge_layout": "consecutive"}
    known = MiniGPT4Config().to_dict()
    options = {field: value for field, value in options.items() if field in known}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, **options).eval()
    check(model, make(name, **arguments), patches, merge, channels, pixels)
    processor = MiniGPT4Processor.from_backbones(**parts, config=model.config)
    expected = timm.data.resolve_model_data_config(make(name, **arguments))
    assert tuple(processor.image_processor.image_mean) == tuple(expected["mean"])
    assert tuple(processor.image_processor.image_std) == tuple(expected["std"])
    model.save_pretrained(tmp_path / "saved")
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert_close(score(loaded, make_inputs), score(model, make_inputs))
    loaded.save_pretrained(tmp_path / "full", full=True)
    whole = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "full").eval()
    assert_close(score(whole, make_inputs), score(model, make_inputs))


def test_repositories_of_timm_are_read_as_they_are(backbones, make_inputs, tmp_path) -> None:
    parts = {"vision": write_as_timm(tmp_path / "eyes", "test_vit"), "language_model": backbones.language_model}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, patch_merge_size=5).eval()
    weights = make("test_vit").state_dict()
    ours = model.model.vision_model.state_dict()
    assert all(torch.equal(ours[f"timm_model.{name}"], tensor) for name, tensor in weights.items())
    processor = MiniGPT4Processor.from_backbones(**parts, config=model.config).image_processor
    assert processor.image_mean == [0.1, 0.2, 0.3] and processor.image_std == [0.4, 0.5, 0.6]
    assert processor.resample == PILImageResampling.BILINEAR and processor.size == {"height": 160, "width": 160}
    model.save_pretrained(tmp_path / "saved")
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert_close(score(loaded, make_inputs), score(model, make_inputs))


def test_backbones_give_their_last_map(backbones, make_inputs, tmp_path) -> None:
    from transformers import TimmBackbone

    torch.manual_seed(0)
    eyes = TimmBackbone(TimmBackboneConfig(backbone="test_resnet", use_pretrained_backbone=False)).eval()
    eyes.save_pretrained(tmp_path / "eyes")
    assert AutoConfig.from_pretrained(tmp_path / "eyes").model_type == "timm_backbone"
    parts = {"vision": str(tmp_path / "eyes"), "language_model": backbones.language_model}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, patch_merge_size=1).eval()
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        expected = eyes(images).feature_maps[-1].flatten(2).mT
        assert_close(model.get_image_features(images).last_hidden_state.flatten(), expected.flatten())
    model.save_pretrained(tmp_path / "saved")
    loaded = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    assert_close(score(loaded, make_inputs), score(model, make_inputs))


def test_a_new_process_loads_it(backbones, make_inputs, tmp_path) -> None:
    parts = {"vision": write_wrapped(tmp_path / "eyes", "test_vit", {}), "language_model": backbones.language_model}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts).eval()
    model.save_pretrained(tmp_path / "saved")
    inputs = make_inputs(model, [[1, "image", 8, 30]])
    save_file(inputs, tmp_path / "inputs.safetensors")
    code = """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForImageTextToText
    import modeling_minigpt4
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained("saved").eval()
    with torch.no_grad():
        save_file({"logits": model(**load_file("inputs.safetensors")).logits}, "outputs.safetensors")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert_close(load_file(tmp_path / "outputs.safetensors")["logits"], model(**inputs).logits)
