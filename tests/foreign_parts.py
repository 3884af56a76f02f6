"""Folders of backbones whose classes only their own code knows: an encoder with a feature map, and a decoder."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


ENCODER_CONFIG = '''
"""Configuration of a small convolutional encoder."""

from transformers import PretrainedConfig


class LanternConfig(PretrainedConfig):
    model_type = "lantern"

    def __init__(self, stem=8, image_size=28, num_channels=3, **kwargs):
        self.stem, self.image_size, self.num_channels = stem, image_size, num_channels
        super().__init__(**kwargs)

    @property
    def hidden_size(self):
        return 2 * self.stem
'''
ENCODER = '''
"""Two convolutions with BatchNorm; the output is a feature map."""

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithNoAttention

from .configuration_lantern import LanternConfig


class LanternModel(PreTrainedModel):
    config_class = LanternConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.layers = nn.Sequential(
            nn.Conv2d(config.num_channels, config.stem, 7, stride=7),
            nn.BatchNorm2d(config.stem),
            nn.ReLU(),
            nn.Conv2d(config.stem, config.hidden_size, 1),
            nn.BatchNorm2d(config.hidden_size),
        )
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, pixel_values, return_dict=True):
        return BaseModelOutputWithNoAttention(last_hidden_state=FACTOR * self.layers(pixel_values))
'''
DECODER_CONFIG = '''
"""Configuration of a Llama under another name."""

from transformers import LlamaConfig


class SpeakerConfig(LlamaConfig):
    model_type = "speaker"
'''
DECODER = '''
"""A Llama under another name."""

from transformers import LlamaForCausalLM

from .configuration_speaker import SpeakerConfig


class SpeakerForCausalLM(LlamaForCausalLM):
    config_class = SpeakerConfig
'''
TOKENIZER = '''
"""A tokenizer that marks its texts."""

from transformers import PreTrainedTokenizerFast


class SpeakerTokenizerFast(PreTrainedTokenizerFast):
    speaks = True
'''
ENCODER_CODE = {"configuration_lantern.py": ENCODER_CONFIG, "modeling_lantern.py": ENCODER}
ENCODER_CLASSES = {
    "AutoConfig": "configuration_lantern.LanternConfig", "AutoModel": "modeling_lantern.LanternModel"
}  # fmt: skip
DECODER_CLASSES = {
    "AutoConfig": "configuration_speaker.SpeakerConfig",
    "AutoModelForCausalLM": "modeling_speaker.SpeakerForCausalLM",
}


def write_encoder(folder: Path, factor: float = 1.0, code: str = "") -> str:
    """
    A folder with a random encoder of 16 channels, whose map of a picture of 28 pixels has 4 × 4 cells.

    Args:
        folder: to write.
        factor: what its code multiplies the map by.
        code: another repository that has the code, which is not written then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    auto_map = {name: f"{code}--{place}" if code else place for name, place in ENCODER_CLASSES.items()}
    fields = {"model_type": "lantern", "stem": 8, "image_size": 28, "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    if not code:
        write_code(folder, factor)
    torch.manual_seed(3)
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 7, stride=7), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
    )
    for layer in (layers[1], layers[4]):  # as training leaves them
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    save_file({f"layers.{name}": tensor for name, tensor in layers.state_dict().items()}, folder / "model.safetensors")
    return str(folder)


def write_code(folder: Path, factor: float = 1.0) -> None:
    """The code of the encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in ENCODER_CODE.items():
        (folder / name).write_text(text.replace("FACTOR", str(factor)), encoding="utf-8")


def bring_own_code(llama: Path) -> str:
    """Turn the folder of a Llama into one that brings its own code."""
    file = llama / "config.json"
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    fields |= {"model_type": "speaker", "auto_map": DECODER_CLASSES, "architectures": ["SpeakerForCausalLM"]}
    file.write_text(json.dumps(fields), encoding="utf-8")
    (llama / "configuration_speaker.py").write_text(DECODER_CONFIG, encoding="utf-8")
    (llama / "modeling_speaker.py").write_text(DECODER, encoding="utf-8")
    return str(llama)


def bring_own_tokenizer(llama: Path) -> str:
    """Give the folder of a language model a tokenizer class of its own."""
    file = llama / "tokenizer_config.json"
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    fields |= {"auto_map": {"AutoTokenizer": [None, "tokenization_speaker.SpeakerTokenizerFast"]}}
    fields |= {"tokenizer_class": "SpeakerTokenizerFast"}
    file.write_text(json.dumps(fields), encoding="utf-8")
    (llama / "tokenization_speaker.py").write_text(TOKENIZER, encoding="utf-8")
    return str(llama)
