"""How the tokens of an encoder become image tokens: which are dropped, how many are joined, and which with which."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, Blip2VisionConfig, LlavaConfig, LlavaModel, PretrainedConfig

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from modeling_minigpt4.composition_minigpt4 import compose_config


@dataclass(frozen=True)
class Encoder:
    """
    An encoder of transformers, narrow and shallow, with the picture and patches of a released one.

    Args:
        tokens: what it gives for a picture; for a feature map, its cells.
        dropped: how many of them stand in front of the patches.
        merge, layout: how patches are joined where nobody says it.
        fields: of its configuration.
    """

    tokens: int
    dropped: int
    merge: int
    layout: str
    fields: dict[str, Any]

    @property
    def image_tokens(self) -> int:
        return (self.tokens - self.dropped) // self.merge

    def config(self) -> PretrainedConfig:
        options = dict(self.fields)
        kind = options.pop("model_type")
        if kind == "blip_2_vision_model":
            return Blip2VisionConfig(**options)
        return AutoConfig.for_model(kind, **options)


NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
STAGES = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}


def vit(kind: str, image: int, patch: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": kind, **NARROW, "image_size": image, "patch_size": patch, **fields}


ENCODERS = {
    "clip-b32-224": Encoder(50, 1, 1, "consecutive", vit("clip_vision_model", 224, 32)),
    "clip-l14-336": Encoder(577, 1, 4, "square", vit("clip_vision_model", 336, 14)),
    "siglip-b16-224": Encoder(196, 0, 4, "square", vit("siglip_vision_model", 224, 16)),
    "siglip-so400m14-384": Encoder(729, 0, 3, "consecutive", vit("siglip_vision_model", 384, 14)),
    "siglip2-so400m16-512": Encoder(1024, 0, 4, "square", vit("siglip_vision_model", 512, 16)),
    "dinov2-b14-518": Encoder(1370, 1, 1, "consecutive", vit("dinov2", 518, 14)),
    "dinov2-b14-224": Encoder(257, 1, 4, "square", vit("dinov2", 224, 14)),
    "dinov2-registers-b14-518": Encoder(
        1374, 5, 1, "consecutive", vit("dinov2_with_registers", 518, 14, num_register_tokens=4)
    ),
    "dinov3-s16-224": Encoder(201, 5, 4, "square", vit("dinov3_vit", 224, 16, num_register_tokens=4)),
    "deit-b16-224": Encoder(198, 2, 4, "square", vit("deit", 224, 16)),
    "vit-b16-224": Encoder(197, 1, 4, "square", vit("vit", 224, 16)),
    "beit-b16-224": Encoder(197, 1, 4, "square", vit("beit", 224, 16)),
    "blip2-g14-224": Encoder(257, 1, 4, "consecutive", vit("blip_2_vision_model", 224, 14)),
    "resnet-50": Encoder(49, 0, 1, "consecutive", {"model_type": "resnet", "embedding_size": 8, **STAGES}),
    "convnext-tiny": Encoder(49, 0, 1, "consecutive", {"model_type": "convnext", **STAGES}),
    "swin-tiny": Encoder(
        49, 0, 1, "consecutive",
        {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 2]},
    ),
    "efficientnet-b0": Encoder(
        49, 0, 1, "consecutive",
        {"model_type": "efficientnet", "image_size": 224, "width_coefficient": 0.1, "depth_coefficient": 0.1,
         "hidden_dim": 128},
    ),
    "hiera-tiny": Encoder(
        49, 0, 1, "consecutive",
        {"model_type": "hiera", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 2]},
    ),
    "pvt-tiny": Encoder(50, 1, 1, "consecutive", {"model_type": "pvt", **STAGES, "num_attention_heads": [1, 1, 1, 2]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def compose(backbones, tmp_path_factory) -> Callable[..., MiniGPT4Config]:
    """`compose(vision configuration, **fields)`: what `from_backbones` makes of an encoder, without weights."""

    def build(vision: PretrainedConfig, **fields: Any) -> MiniGPT4Config:
        folder = backbones.vision  # which holds one of BLIP-2's, as its repositories do
        if not isinstance(vision, Blip2VisionConfig):
            vision.save_pretrained(folder := tmp_path_factory.mktemp("encoder"))
        return compose_config(str(folder), backbones.language_model, None, {}, vision_config=vision, **fields)

    return build


def features_of(config: MiniGPT4Config, pictures: int = 1) -> torch.Tensor:
    """Image tokens of random pictures by a random model."""
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        return model.get_image_features(torch.randn(pictures, 3, *config.image_size)).pooler_output


@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
def test_every_encoder_composes_without_options(encoder: Encoder, compose) -> None:
    vision = encoder.config()
    config = compose(vision)
    assert (config.patch_merge_size, config.patch_merge_layout) == (encoder.merge, encoder.layout)
    assert config.vision_feature_select_strategy == ("default" if encoder.dropped else "full")
    assert config.num_image_tokens == encoder.image_tokens
    assert features_of(config).shape == (1, encoder.image_tokens, config.text_config.hidden_size)
    saved = MiniGPT4Config.from_dict(config.to_dict())
    assert saved.num_image_tokens == encoder.image_tokens and saved.to_dict() == config.to_dict()


# ---- which tokens are dropped ---------------------------------------------------------------------------------------

PICTURE = vit("vit", 56, 14)  # 4 × 4 patches
PREFIXES = {
    "none": (vit("siglip_vision_model", 56, 14), 0),
    "cls": (PICTURE, 1),
    "cls-and-distillation": (vit("deit", 56, 14), 2),
    "cls-and-registers": (vit("dinov2_with_registers", 56, 14, num_register_tokens=4), 5),
    "cls-and-two-registers": (vit("dinov3_vit", 56, 14, num_register_tokens=2), 3),
}


def random_model(vision: Any, **fields: Any) -> MiniGPT4ForConditionalGeneration:
    """A random model without a Q-Former, whose patches stay apart unless `fields` join them."""
    torch.manual_seed(0)
    text = {"vocab_size": 10, **NARROW, "num_key_value_heads": 2}
    fields = {"patch_merge_size": 1, **fields}
    config = MiniGPT4Config(vision_config=vision, qformer_config=None, text_config=text, **fields)
    model = MiniGPT4ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.vision_model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def encode(model: MiniGPT4ForConditionalGeneration, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.model.encode_images(pixels, **options).last_hidden_state


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 56, 56)


@torch.no_grad()
@pytest.mark.parametrize(("vision", "prefix"), PREFIXES.values(), ids=PREFIXES)
def test_all_tokens_in_front_of_the_patches_are_dropped(vision: dict, prefix: int, pixels: torch.Tensor) -> None:
    model = random_model(vision)
    everything = model.model.vision_model(pixels, return_dict=True).last_hidden_state
    assert everything.shape[1] == prefix + 16
    assert torch.equal(encode(model, pixels), everything[:, prefix:])
    assert model.config.num_image_tokens == 16
    model.config.vision_feature_select_strategy = "full"
    assert torch.equal(encode(model, pixels), everything)
    assert model.config.num_image_tokens == prefix + 16


def test_a_qformer_sees_no_registers_where_they_are_dropped(tiny_config, pixels: torch.Tensor) -> None:
    vision = vit("dinov2_with_registers", 56, 14)
    config = tiny_config(vision=vision, vision_feature_select_strategy="default")
    model = MiniGPT4ForConditionalGeneration(config).eval()
    seen = []
    model.model.qformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"].shape), with_kwargs=True
    )
    assert encode(model, pixels).shape[1] == config.num_query_tokens
    assert seen == [(2, 16, 32)]


def test_tokens_of_unknown_places_are_kept_or_told(compose, pixels: torch.Tensor) -> None:
    """YOLOS has CLS in front of its patches, and detections behind them."""
    yolos = AutoConfig.for_model(
        **vit("yolos", [56, 56], 14, num_detection_tokens=3, use_mid_position_embeddings=False)
    )
    config = compose(yolos)
    assert (config.vision_feature_select_strategy, config.patch_merge_layout) == ("full", "consecutive")
    assert config.num_image_tokens * config.patch_merge_size == 1 + 16 + 3
    told = r"gives 20 tokens for a picture of 56 × 56 pixels, and which .* is not known; set `num_prefix_tokens`"
    with pytest.raises(ValueError, match=told):
        compose(yolos, vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match=told):
        encode(random_model(yolos), pixels)
    yolos.num_prefix_tokens = 4
    config = compose(yolos, vision_feature_select_strategy="default")
    assert MiniGPT4Config.from_dict(config.to_dict()).num_image_tokens == 4


# ---- which are joined -----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", [2, 4])
def test_squares_are_neighbours_row_by_row(side: int, pixels: torch.Tensor) -> None:
    model = random_model(PICTURE, patch_merge_layout="square", patch_merge_size=side * side)
    patches = model.model.vision_model(pixels).last_hidden_state[:, 1:]
    joined = encode(model, pixels)
    expected = [
        torch.cat([patches[:, 4 * (top + row) + left + column] for row in range(side) for column in range(side)], -1)
        for top in range(0, 4, side)
        for left in range(0, 4, side)
    ]
    assert torch.equal(joined, torch.stack(expected, 1))
    assert model.config.num_image_tokens == joined.shape[1] == 16 // side**2


@torch.no_grad()
def test_squares_of_a_picture_that_is_no_square() -> None:
    """2 × 6 cells of a feature map; the third image token is the last two columns."""
    fields = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    model = random_model(
        {"model_type": "resnet", **fields}, image_size=[16, 48], patch_merge_layout="square", patch_merge_size=4
    )
    pixels = torch.randn(1, 3, 16, 48)
    cells = model.model.vision_model(pixels).last_hidden_state
    assert cells.shape == (1, 16, 2, 6)
    expected = torch.stack([cells[..., 2 * i : 2 * i + 2].flatten(2).mT.flatten(1) for i in range(3)], 1)
    assert torch.equal(encode(model, pixels), expected)
    assert (model.config.num_image_tokens, model.config.image_size) == (3, (16, 48))


@torch.no_grad()
def test_a_configuration_that_names_no_layout_joins_row_by_row(pixels: torch.Tensor) -> None:
    """As those do that were saved before there was another."""
    fields = random_model(PICTURE, patch_merge_size=4).config.to_dict()
    for name in ("patch_merge_layout", "vision_feature_layer", "vision_feature_size", "image_size"):
        del fields[name]
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration(MiniGPT4Config.from_dict(fields)).eval()
    everything = model.model.vision_model(pixels).last_hidden_state
    assert torch.equal(encode(model, pixels), everything[:, 1:].reshape(2, 4, 128))


CHOSEN = [
    # (encoder, fields that are given, what comes out)
    ("siglip-so400m14-384", {"patch_merge_size": 9}, ("square", 9, 81)),
    ("siglip-so400m14-384", {"patch_merge_layout": "square"}, ("square", 1, 729)),
    ("clip-l14-336", {"patch_merge_layout": "consecutive"}, ("consecutive", 4, 144)),
    ("clip-l14-336", {"patch_merge_size": 2}, ("consecutive", 2, 288)),
    ("clip-l14-336", {"patch_merge_size": 1}, ("consecutive", 1, 576)),
    ("siglip-b16-224", {"vision_feature_select_strategy": "default"}, ("square", 4, 49)),
    ("clip-b32-224", {"vision_feature_select_strategy": "full"}, ("consecutive", 2, 25)),
    ("deit-b16-224", {"vision_feature_select_strategy": "full"}, ("consecutive", 3, 66)),
    ("blip2-g14-224", {"patch_merge_layout": "square"}, ("square", 4, 64)),
    ("clip-b32-224", {"image_size": 256}, ("square", 4, 16)),
    ("dinov2-b14-518", {"image_size": 448}, ("square", 4, 256)),
    ("resnet-50", {"image_size": 448}, ("square", 4, 49)),
    ("resnet-50", {"vision_feature_layer": -2}, ("square", 4, 49)),
    ("swin-tiny", {"image_size": 448}, ("square", 4, 49)),
    ("swin-tiny", {"image_size": (448, 256)}, ("square", 4, 28)),
    ("swin-tiny", {"vision_feature_layer": -3}, ("square", 4, 49)),
    ("pvt-tiny", {"vision_feature_layer": -2}, ("consecutive", 1, 49)),
]


@pytest.mark.parametrize(("encoder", "given", "expected"), CHOSEN)
def test_what_is_given_is_heeded_and_the_rest_made_to_fit(encoder: str, given: dict, expected: tuple, compose) -> None:
    config = compose(ENCODERS[encoder].config(), **given)
    assert (config.patch_merge_layout, config.patch_merge_size, config.num_image_tokens) == expected
    assert all(getattr(config, name) in (value, (value, value)) for name, value in given.items())
    assert features_of(config, 2).shape[:2] == (2, config.num_image_tokens)


ENCODERS_OF_ONE_SIZE = {"model_type": "levit", "hidden_sizes": [16, 16, 32], "num_attention_heads": [1, 1, 1],
                        "depths": [1, 1, 1], "key_dim": [8, 8, 8]}  # fmt: skip
IMPOSSIBLE = [
    # (encoder, fields that are given, what is told)
    (ENCODERS["clip-b32-224"].fields, {"patch_merge_size": 4}, "gives 49 tokens, which cannot be joined 4 at a time"),
    (
        ENCODERS["dinov2-b14-224"].fields,
        {"patch_merge_size": 16, "patch_merge_layout": "square", "image_size": (112, 196)},
        r"8 × 14 patches, which cannot be joined as 4 × 4 neighbours; set `patch_merge_layout` to 'consecutive'",
    ),
    (
        ENCODERS["deit-b16-224"].fields,
        {"patch_merge_size": 9, "patch_merge_layout": "square", "vision_feature_select_strategy": "full"},
        "gives 198 tokens that are no grid of patches, so neighbours cannot be joined",
    ),
    (ENCODERS["clip-l14-336"].fields, {"vision_feature_layer": 2}, "`vision_feature_layer` is 2, .* numbered -2 to 1"),
    (
        ENCODERS_OF_ONE_SIZE,
        {"image_size": 256},
        r"\(levit\) takes no picture of 256 × 256 pixels .*; leave `image_size` out, for 224 × 224",
    ),
    (
        {"model_type": "siglip2_vision_model", **NARROW},
        {},
        r"\(siglip2_vision_model\) takes no picture of 224 × 224 pixels by itself .*; name another encoder\.$",
    ),
    (
        {"model_type": "sam_vision_model", **NARROW, "output_channels": 16, "image_size": 64, "mlp_dim": 32},
        {"vision_feature_layer": -1},
        r"gives feature maps with channels last, of shape \(4, 4, 32\)",
    ),
]


@pytest.mark.parametrize(("encoder", "given", "told"), IMPOSSIBLE)
def test_what_cannot_be_is_told_before_weights_are_read(encoder: dict, given: dict, told: str, compose) -> None:
    with pytest.raises(ValueError, match=told):
        compose(AutoConfig.for_model(**encoder), **given)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"patch_merge_layout": "round"}, "`patch_merge_layout` is 'round'; it must be 'consecutive' .* or 'square'"),
        ({"patch_merge_layout": "square", "patch_merge_size": 3}, "'square', but `patch_merge_size` is 3"),
        ({"vision_feature_layer": "last"}, "`vision_feature_layer` is 'last'; it must be a whole number"),
        ({"vision_feature_size": 0}, "`vision_feature_size` is 0; it must be 1 or more"),
        ({"image_size": 0}, "`image_size` is 0; it must be a whole number of pixels, or two"),
        ({"image_size": [224]}, r"`image_size` is \[224\]; it must be"),
    ],
)
def test_fields_that_make_no_sense_are_told(fields: dict, told: str, compose) -> None:
    with pytest.raises(ValueError, match=told):
        MiniGPT4Config(**fields)
    with pytest.raises(ValueError, match=told):
        compose(ENCODERS["clip-l14-336"].config(), **fields)


# ---- layers and sizes -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_another_layer_is_taken_as_llava_takes_it(pixels: torch.Tensor) -> None:
    model = random_model({**vit("clip_vision_model", 56, 14), "num_hidden_layers": 2}, vision_feature_layer=-2)
    config = LlavaConfig(vision_config=model.config.vision_config, text_config=model.config.text_config)
    llava = LlavaModel(config).eval()
    llava.vision_tower.load_state_dict(model.model.vision_model.state_dict())
    llava.multi_modal_projector = torch.nn.Identity()
    theirs = llava.get_image_features(pixels, vision_feature_layer=-2, vision_feature_select_strategy="default")
    theirs = torch.stack(list(getattr(theirs, "pooler_output", theirs)))
    assert torch.equal(encode(model, pixels), theirs)


@torch.no_grad()
def test_hidden_states_are_asked_for_where_a_layer_is_wanted_and_shown_where_asked_for(pixels: torch.Tensor) -> None:
    vision = {**PICTURE, "num_hidden_layers": 2}
    asked = []
    for layer in (None, -2):
        model = random_model(vision, vision_feature_layer=layer)
        model.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(kwargs.get("output_hidden_states")), with_kwargs=True
        )
        assert model.model.encode_images(pixels).hidden_states is None
        assert len(model.model.encode_images(pixels, output_hidden_states=True).hidden_states) == 3
    assert asked == [None, True, True, True]


@torch.no_grad()
@pytest.mark.parametrize("encoder", ["clip-l14-336", "dinov2-b14-224", "blip2-g14-224"])
def test_pictures_of_another_size_are_taken_with_interpolated_positions(encoder: str) -> None:
    vision = ENCODERS[encoder].config()
    model = random_model(vision, image_size=112)
    assert (model.config.num_image_tokens, model.config.image_size) == (64, (112, 112))
    pixels = torch.randn(1, 3, 112, 112)
    options = {} if encoder.startswith("dino") else {"interpolate_pos_encoding": True}  # which does it anyhow
    expected = model.model.vision_model(pixels, **options).last_hidden_state[:, 1:]
    assert torch.equal(encode(model, pixels), expected)
    with pytest.raises(ValueError, match=r"they have to be numbers of shape \(pictures, 3, 112, 112\)"):
        encode(model, torch.randn(1, 3, *[vision.image_size] * 2))


@torch.no_grad()
def test_what_was_composed_is_loaded_again_with_its_processor(backbones, tmp_path: Path, picture) -> None:
    """CLIP at twice its size, of its last layer but one, 2 × 2 patches at a time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**vit("clip_vision_model", 28, 7), "num_hidden_layers": 2})
    AutoModel.from_config(config).save_pretrained(tmp_path / "clip")
    parts = {"vision": str(tmp_path / "clip"), "language_model": backbones.language_model}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts, image_size=56, vision_feature_layer=-2)
    processor = MiniGPT4Processor.from_backbones(**parts, config=model.config)
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert again.config.to_dict() == {**model.config.to_dict(), "_name_or_path": again.config._name_or_path}
    assert (again.config.num_image_tokens, again.config.patch_merge_layout) == (16, "square")
    inputs = MiniGPT4Processor.from_pretrained(tmp_path / "saved")(
        picture("red"), "<image> What?", return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)
    assert int((inputs["input_ids"] == again.config.image_token_id).sum()) == 16
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_qformer_sees_pictures_of_another_size_and_another_layer(backbones: Any, picture: Any) -> None:
    fields = {"image_size": 56, "vision_feature_layer": -2}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**backbones.parts(), **fields)
    seen = []
    model.model.qformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    processor = MiniGPT4Processor.from_backbones(backbones.vision, backbones.language_model, config=model.config)
    inputs = processor(picture("red"), "<image> What?", return_tensors="pt")
    with torch.no_grad():
        model(**inputs)
        states = model.model.vision_model(
            inputs["pixel_values"], interpolate_pos_encoding=True, output_hidden_states=True
        ).hidden_states
    assert inputs["pixel_values"].shape == (1, 3, 56, 56) and states[-2].shape == (1, 17, 16)
    assert torch.equal(seen[0], states[-2])


# ---- the page -------------------------------------------------------------------------------------------------------

ROWS = {
    "CLIP ViT-B/32": ("clip-b32-224",),
    "CLIP ViT-L/14": ("clip-l14-336",),
    "SigLIP B/16": ("siglip-b16-224",),
    "SigLIP so400m/14": ("siglip-so400m14-384",),
    "SigLIP 2 so400m/16": ("siglip2-so400m16-512",),
    "DINOv2 B/14": ("dinov2-b14-224", "dinov2-b14-518"),
    "DINOv2 B/14 with registers": ("dinov2-registers-b14-518",),
    "DINOv3 S/16": ("dinov3-s16-224",),
    "DeiT B/16": ("deit-b16-224",),
    "ViT B/16, BEiT B/16": ("vit-b16-224", "beit-b16-224"),
    "BLIP-2's EVA ViT-g/14": ("blip2-g14-224",),
    "ResNet-50, ConvNeXt-T, Swin-T, Hiera-T, EfficientNet-B0": (
        "resnet-50", "convnext-tiny", "swin-tiny", "hiera-tiny", "efficientnet-b0",
    ),
    "PVT-T": ("pvt-tiny",),
}  # fmt: skip


def test_the_table_of_the_page_is_what_comes_out(compose) -> None:
    page = (Path(__file__).parents[2] / "modeling_minigpt4" / "README.md").read_text(encoding="utf-8")
    table = page.split("## Tokens of a picture")[1].split("\n\n")[2].splitlines()[2:]
    told = {tuple(cell.strip() for cell in row.strip("|").split("|")) for row in table}
    expected = set()
    for name, encoders in ROWS.items():
        for encoder in (ENCODERS[one] for one in encoders):
            joined = {"square": "2 × 2", "consecutive": f"{encoder.merge} in a row"}[encoder.layout]
            numbers = (compose(encoder.config()).image_size[0], encoder.tokens, encoder.dropped)
            last = ("–" if encoder.merge == 1 else joined, str(encoder.image_tokens))
            expected.add((name, *map(str, numbers), *last))
    assert told == expected and set(ENCODERS) == {one for encoders in ROWS.values() for one in encoders}
