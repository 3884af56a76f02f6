"""The image processor: exactly Pillow's bicubic and CLIP's statistics, for every kind of picture people have."""

import base64
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from closeness import assert_close
from tiny_text import one_sentence
from transformers import image_utils

from processing_minigpt4 import MiniGPT4ImageProcessor, image_processing_minigpt4


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
ORIENTATION = 0x0112  # EXIF tag


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def photo(width: int = 37, height: int = 23, mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(noise(height, width, 3)).convert(mode)


def as_torchvision(image: PIL.Image.Image, side: int = 224, mean: Any = CLIP_MEAN, std: Any = CLIP_STD) -> np.ndarray:
    """What `Resize(bicubic)`, `ToTensor` and `Normalize` compute, in their order and in float32."""
    resized = image.convert("RGB").resize((side, side), PIL.Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (mean, std))
    return pixels.sub(mean).div(std).numpy()


def in_double_precision(image: PIL.Image.Image) -> np.ndarray:
    """Pillow's bicubic pixels, scaled without rounding."""
    resized = image.convert("RGB").resize((224, 224), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(resized).astype(np.float64) / 255
    return ((pixels - np.array(CLIP_MEAN)) / np.array(CLIP_STD)).transpose(2, 0, 1)


def assert_same_bits(actual: Any, expected: np.ndarray) -> None:
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation: int = 6) -> bytes:
    """A file whose EXIF data says how it has to be turned to be upright."""
    exif = PIL.Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(photo(), exif=exif)


@pytest.fixture
def processor() -> MiniGPT4ImageProcessor:
    return MiniGPT4ImageProcessor()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the image processor warns of; transformers says each such thing once per process only."""
    said: list[str] = []
    monkeypatch.setattr(image_processing_minigpt4.logger, "warning_once", said.append)
    return said


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The internet of a test: what each URL answers. No other request is possible."""
    answers: dict[str, bytes] = {}

    def get(url: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(content=answers[url], raise_for_status=lambda: None)

    for library in ("requests", "httpx"):
        if hasattr(image_utils, library):
            monkeypatch.setattr(getattr(image_utils, library), "get", get)
    return answers


# ---- values ------------------------------------------------------------------------------------------------------


SIZES = [(224, 224), (37, 23), (1, 1), (2, 1), (1, 300), (501, 2), (640, 480), (225, 223), (1, 5000), (6000, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
def test_values_equal_those_of_torchvision(processor, size, mode):
    image = photo(*size, mode=mode)
    pixels = processor(image)["pixel_values"][0]
    assert_same_bits(pixels, as_torchvision(image))
    # Three operations in float32, each rounded once: two units in the last place of the largest values.
    assert np.abs(pixels - in_double_precision(image)).max() <= 2 * np.spacing(np.float32(2))


def test_every_grey_value_is_exact(processor):
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    pixels = processor(PIL.Image.fromarray(ramp), do_resize=False)["pixel_values"][0]
    expected = torch.arange(256).float().div(255).sub(torch.tensor(CLIP_MEAN)[:, None])
    assert_same_bits(pixels[:, 0], expected.div(torch.tensor(CLIP_STD)[:, None]).numpy())


MODES = ["1", "L", "LA", "P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB", "I", "I;16", "F"]
FROM_RGB = ("CMYK", "HSV", "LAB", "RGBA")


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_converted_as_pillow_does(processor, mode):
    image = photo(mode={"PA": "P", "RGBa": "RGBA"}.get(mode, "RGB" if mode in FROM_RGB else "L")).convert(mode)
    assert image.mode == mode
    assert_same_bits(processor(image)["pixel_values"][0], as_torchvision(image))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow, where opacities are several
def test_transparency_is_dropped_and_not_blended(processor):
    solid = photo()
    clear = solid.copy()
    clear.putalpha(0)
    palette = solid.convert("P")
    assert_same_bits(processor(clear)["pixel_values"][0], as_torchvision(solid))
    for transparency in (0, bytes(range(256))):  # one colour of the palette, or an opacity for each
        see_through = PIL.Image.open(io.BytesIO(encoded(palette, transparency=transparency)))
        assert see_through.mode == "P" and "transparency" in see_through.info
        assert_same_bits(processor(see_through)["pixel_values"][0], as_torchvision(palette))
    grey = photo(mode="L")
    veiled = PIL.Image.merge("LA", (grey, PIL.Image.fromarray(noise(23, 37, seed=1))))
    assert_same_bits(processor(veiled)["pixel_values"][0], as_torchvision(grey))


def test_16_bit_greys_are_clipped_as_pillow_does_and_the_user_is_told(processor, warnings):
    values = np.linspace(0, 65535, 23 * 37).astype(np.uint16).reshape(23, 37)
    image = PIL.Image.open(io.BytesIO(encoded(PIL.Image.fromarray(values))))
    assert image.mode.startswith("I")
    pixels = processor(image)["pixel_values"][0]
    assert_same_bits(pixels, as_torchvision(PIL.Image.fromarray(np.minimum(values, 255).astype(np.uint8))))
    assert len(warnings) == 1 and "0–255" in warnings[0]


def test_dark_16_bit_greys_need_no_warning(processor, warnings):
    image = PIL.Image.fromarray(noise(23, 37).astype(np.uint16))
    assert_same_bits(processor(image)["pixel_values"][0], as_torchvision(PIL.Image.fromarray(noise(23, 37))))
    assert warnings == []


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_animation_gives_its_first_frame(processor, tmp_path, kind):
    frames = [PIL.Image.new("RGB", (20, 10), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / f"film.{kind.lower()}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert PIL.Image.open(path).n_frames == 3
    np.testing.assert_allclose(processor(str(path))["pixel_values"][0], as_torchvision(frames[0]), atol=0.01, rtol=0)


# ---- where pictures come from ------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone_from_every_source(processor, tmp_path, web, orientation):
    content = turned(orientation)
    path = tmp_path / "turned.png"
    path.write_bytes(content)
    web["https://pictures.test/turned.png"] = content
    opened = PIL.Image.open(path)
    upright = PIL.ImageOps.exif_transpose(opened)
    assert (upright.size == opened.size) == (orientation <= 4)
    sources = [str(path), path, "https://pictures.test/turned.png", opened, content, {"bytes": content, "path": None}]
    for pixels in processor(sources)["pixel_values"]:
        assert_same_bits(pixels, as_torchvision(upright))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda content, path: base64.b64encode(content).decode(),
        lambda content, path: "data:image/png;base64," + base64.b64encode(content).decode(),
        lambda content, path: content,
        lambda content, path: bytearray(content),
        lambda content, path: {"bytes": content, "path": "elsewhere.png"},
        lambda content, path: {"bytes": None, "path": str(path)},
        lambda content, path: {"path": path},
        lambda content, path: "http://pictures.test/photo",
        lambda content, path: str(path),
        lambda content, path: path,
    ],
    ids=["base64", "data-uri", "bytes", "bytearray", "datasets", "datasets-path", "path-only", "url", "str", "Path"],
)
def test_every_source_gives_the_same_pixels(processor, tmp_path, web, wrap):
    content = encoded(photo(mode="RGBA"))
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    web["http://pictures.test/photo"] = content
    assert_same_bits(processor(wrap(content, path))["pixel_values"][0], as_torchvision(photo()))


def test_datasets_pictures_decoded_or_not(processor):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"image": [photo()]}, features=datasets.Features({"image": datasets.Image()}))
    raw = rows.cast_column("image", datasets.Image(decode=False))
    for row in (rows[0]["image"], raw[0]["image"]):
        assert_same_bits(processor(row)["pixel_values"][0], as_torchvision(photo()))


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("text.png", "text.png"),
        ("empty.png", "empty.png"),
        ("cut.png", "cut.png"),
        ("missing.png", "missing.png"),
        (Path("missing.png"), "missing.png"),
        (".", "'.'"),
        ("https://pictures.test/page.html", "https://pictures.test/page.html"),
        ("data:image/png;base64,AAAA", "data:image/png;base64,AAAA"),
        ("no picture " * 100, "no picture no picture"),
        (b"no picture", "10 bytes"),
        ({"bytes": b"no picture", "path": "row.png"}, "row.png"),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, dict) else "dict",
)
def test_what_is_no_picture_is_named_in_one_sentence(processor, tmp_path, monkeypatch, web, source, named):
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("no picture")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(encoded(photo())[:800])
    web["https://pictures.test/page.html"] = b"<html>404</html>"
    with pytest.raises(ValueError, match="No image could be read") as caught:
        processor(source)
    assert one_sentence(caught.value) and named in str(caught.value)
    assert len(str(caught.value)) < 500 and "0x" not in str(caught.value)


@pytest.mark.parametrize("thing", [3, 2.5, {"picture": 1}, object(), {"bytes": None, "path": None}])
def test_other_types_are_named(processor, thing):
    with pytest.raises(TypeError, match=r"cannot be read; pass a PIL image.*\.$") as caught:
        processor([photo(), thing])
    assert one_sentence(caught.value)


# ---- arrays and tensors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [np.asarray, torch.tensor], ids=["numpy", "torch"])
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (lambda rgb: rgb, {}),
        (lambda rgb: rgb.transpose(2, 0, 1), {}),
        (lambda rgb: rgb, {"input_data_format": "channels_last"}),
        (lambda rgb: rgb.transpose(2, 0, 1), {"input_data_format": "channels_first"}),
        (lambda rgb: rgb.astype(np.float32), {}),
        (lambda rgb: rgb.astype(np.int64), {}),
        (lambda rgb: rgb.astype(np.float64), {}),
        (lambda rgb: np.concatenate([rgb, rgb[..., :1]], axis=-1), {}),
    ],
    ids=["hwc", "chw", "said-hwc", "said-chw", "float", "int64", "double", "rgba"],
)
def test_arrays_equal_the_picture(processor, library, layout, options):
    image = photo()
    pixels = processor(library(np.ascontiguousarray(layout(np.asarray(image)))), **options)["pixel_values"][0]
    assert_same_bits(pixels, as_torchvision(image))


@pytest.mark.parametrize("shape", [(23, 37), (23, 37, 1), (1, 23, 37)])
def test_grey_arrays_equal_the_grey_picture(processor, shape):
    grey = noise(23, 37)
    pixels = processor(grey.reshape(shape))["pixel_values"][0]
    assert_same_bits(pixels, as_torchvision(PIL.Image.fromarray(grey)))


def test_layout_that_shape_cannot_tell_is_told(processor):
    array = noise(3, 20, 3)  # three rows, or three channels
    last = processor(array, input_data_format="channels_last")["pixel_values"][0]
    first = processor(array, input_data_format="channels_first")["pixel_values"][0]
    assert_same_bits(last, as_torchvision(PIL.Image.fromarray(array)))
    assert_same_bits(first, as_torchvision(PIL.Image.fromarray(array.transpose(1, 2, 0).copy())))


def test_floats_from_0_to_1_warn_and_work_without_rescaling(processor, warnings):
    image = photo(224, 224)
    scaled = np.asarray(image).astype(np.float32) / 255
    pixels = processor(scaled, do_rescale=False)["pixel_values"][0]
    assert warnings == []
    assert_close(torch.as_tensor(pixels), torch.from_numpy(as_torchvision(image)))
    processor(scaled)
    assert len(warnings) == 1 and "do_rescale=False" in warnings[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_a_model_are_taken(processor, dtype):
    tensor = torch.tensor(np.asarray(photo())).to(dtype).requires_grad_()
    rounded = PIL.Image.fromarray(tensor.detach().float().clamp(0, 255).byte().numpy())
    pixels = processor(tensor.clamp(0, 255))["pixel_values"][0]
    assert_same_bits(pixels, as_torchvision(rounded))


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 2, 2), (7, 9, 5), (0, 9, 3)])
def test_arrays_that_are_no_picture(processor, shape):
    with pytest.raises(ValueError) as caught:
        processor(np.zeros(shape, dtype=np.uint8))
    assert one_sentence(caught.value) and str(shape) in str(caught.value)


# ---- batches and options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pack", "count"),
    [
        (lambda: photo(), 1),
        (lambda: [photo(), photo(5, 5)], 2),
        (lambda: (photo(), photo()), 2),
        (lambda: [[photo()], [], [photo(9, 9), photo()]], 3),
        (lambda: [photo(), noise(8, 9, 3), torch.tensor(noise(3, 8, 9))], 3),
        (lambda: noise(4, 8, 9, 3), 4),
        (lambda: torch.tensor(noise(2, 3, 8, 9)), 2),
        (lambda: [photo(), None], 1),
    ],
    ids=["one", "list", "tuple", "nested", "mixed", "array-batch", "tensor-batch", "none"],
)
@pytest.mark.parametrize(("tensors", "kind"), [("pt", torch.Tensor), ("np", np.ndarray), (None, list)])
def test_batches_are_flattened_in_order(processor, pack, count, tensors, kind):
    pixels = processor(pack(), return_tensors=tensors)["pixel_values"]
    assert isinstance(pixels, kind) and len(pixels) == count
    assert {tuple(image.shape) for image in pixels} == {(3, 224, 224)}
    if tensors == "pt":
        assert pixels.dtype == torch.float32


@pytest.mark.parametrize("nothing", [[], [[]], None, [None]])
def test_an_empty_batch_is_refused(processor, nothing):
    with pytest.raises(ValueError, match="There is no image to process") as caught:
        processor(nothing)
    assert one_sentence(caught.value)


def test_pictures_of_the_caller_stay_as_they_are(processor):
    image, array = photo(), noise(9, 8, 3)
    before = image.tobytes(), array.copy()
    processor([image, array])
    assert image.tobytes() == before[0] and (array == before[1]).all()


def test_options_of_a_call_win_over_those_of_the_processor(processor):
    image = photo()
    mean, std = [0.5, 0.4, 0.3], [0.5, 0.6, 0.7]
    wide = processor(image, size={"height": 10, "width": 20})["pixel_values"][0]
    assert wide.shape == (3, 10, 20)
    pixels = processor(image, size=30, image_mean=mean, image_std=std)["pixel_values"][0]
    assert_same_bits(pixels, as_torchvision(image, side=30, mean=mean, std=std))
    raw = processor(image, do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"][0]
    assert (np.asarray(raw) == np.asarray(image).transpose(2, 0, 1)).all()
    assert processor(image, data_format="channels_last")["pixel_values"][0].shape == (224, 224, 3)
    nearest = processor(image, resample=PIL.Image.Resampling.NEAREST, do_normalize=False, do_rescale=False)
    expected = np.asarray(image.resize((224, 224), PIL.Image.Resampling.NEAREST)).transpose(2, 0, 1)
    assert (np.asarray(nearest["pixel_values"][0]) == expected).all()
    assert_same_bits(processor(image)["pixel_values"][0], as_torchvision(image))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (30, (30, 30)),
        ((20, 30), (20, 30)),
        ([20, 30], (20, 30)),
        ({"height": 20, "width": 30}, (20, 30)),
        (None, (224, 224)),
    ],
)
def test_size_takes_the_forms_people_write(size, expected):
    processor = MiniGPT4ImageProcessor(size=size)
    assert dict(processor.size) == {"height": expected[0], "width": expected[1]}
    assert processor(photo())["pixel_values"][0].shape == (3, *expected)


@pytest.mark.parametrize("size", [{"shortest_edge": 224}, {"longest_edge": 5, "shortest_edge": 3}])
def test_sizes_that_keep_the_aspect_ratio_are_refused(size):
    with pytest.raises(ValueError, match="without keeping the aspect ratio"):
        MiniGPT4ImageProcessor(size=size)


# ---- folders -----------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    saved = MiniGPT4ImageProcessor(size={"height": 8, "width": 12}, image_mean=[0.5, 0.4, 0.3], do_convert_rgb=False)
    saved.save_pretrained(tmp_path)
    assert (tmp_path / "image_processing_minigpt4.py").is_file()
    loaded = MiniGPT4ImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == saved.to_dict()
    image = photo()
    assert (np.asarray(loaded(image)["pixel_values"][0]) == np.asarray(saved(image)["pixel_values"][0])).all()
    assert MiniGPT4ImageProcessor.from_pretrained(tmp_path, size=6)(image)["pixel_values"][0].shape == (3, 6, 6)
