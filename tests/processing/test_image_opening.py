"""Where pictures come from, what shows through transparent ones, and which way round thin arrays are."""

import base64
import io
import tempfile
import threading
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_text import SIZE, byte_tokenizer, make_processor, one_sentence

from processing_minigpt4 import MiniGPT4ImageProcessor
from processing_minigpt4.image_opening_minigpt4 import inline_picture, open_image, without_content


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def photo(mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(noise(23, 37, 3)).convert(mode)


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels_of(image: Any, **options: Any) -> np.ndarray:
    return MiniGPT4ImageProcessor()(image, **options)["pixel_values"][0]


def same(image: Any, expected: PIL.Image.Image, **options: Any) -> bool:
    return np.array_equal(pixels_of(image, **options), pixels_of(expected))


# ---- file objects ---------------------------------------------------------------------------------------------------


def spooled(content: bytes) -> Any:
    file = tempfile.SpooledTemporaryFile()  # noqa: SIM115  # what an upload's `file` is
    file.write(content)
    return file


def member(content: bytes) -> Any:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", content)
    return zipfile.ZipFile(buffer).open("a.png")


class Pipe(io.RawIOBase):
    """Bytes that come once, as from a network."""

    def __init__(self, content: bytes) -> None:
        self.rest = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.rest.readinto(buffer)


FILES: dict[str, Callable[[bytes], Any]] = {
    "BytesIO": io.BytesIO,
    "spooled": spooled,  # and at its end, as one that was just written
    "zip member": member,
    "pipe": Pipe,
    "buffered pipe": lambda content: io.BufferedReader(Pipe(content)),
    "only read": lambda content: SimpleNamespace(read=io.BytesIO(content).read),
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("wrap", [lambda file: file, lambda file: [[file]]], ids=["alone", "nested"])
def test_file_objects_are_read(kind: str, wrap: Callable) -> None:
    assert same(wrap(FILES[kind](encoded(photo()))), photo())


def test_open_files_are_read_from_their_start_and_left_open(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photo().save(path)
    with path.open("rb") as file:
        file.read(10)
        assert same(file, photo()) and not file.closed
        assert same(file, photo())


def test_a_processor_takes_file_objects_too() -> None:
    processor = make_processor(byte_tokenizer())
    for wrap in (lambda one: one, lambda one: [one], lambda one: [[one]]):
        batch = processor(images=wrap(io.BytesIO(encoded(photo()))), text="<image> a", return_tensors="pt")
        assert torch.equal(batch["pixel_values"], torch.tensor(pixels_of(photo(), size=SIZE))[None])


def closed() -> Any:
    file = io.BytesIO(encoded(photo()))
    file.close()
    return file


class Upload:
    """An upload of a web framework, which is read by `await`; its `file` is what can be read here."""

    filename = "upload.png"

    async def read(self, size: int = -1) -> bytes:
        return b""


@pytest.mark.filterwarnings("error")  # of a coroutine that nobody awaited
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (closed, "closed"),
        (lambda: io.StringIO("text"), "binary mode"),
        (Upload, "binary mode"),
        (lambda: io.BytesIO(b"no picture"), "no format"),
        (lambda: io.BytesIO(b""), "BytesIO"),
        (lambda: io.BytesIO(encoded(photo())[:300]), "truncated"),
    ],
)
def test_file_objects_without_a_picture_get_a_sentence(make: Callable, named: str) -> None:
    with pytest.raises(ValueError, match="No image could be read from") as told:
        pixels_of(make())
    assert one_sentence(told.value) and named in str(told.value) and "0x" not in str(told.value)


def test_what_can_be_detached_is_not_yet_a_tensor() -> None:
    with pytest.raises(TypeError, match="An image of type SimpleNamespace cannot be read"):
        pixels_of(SimpleNamespace(detach=lambda: None))


# ---- addresses ------------------------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = encoded(photo()) if self.path == "/a.png" else b"<!DOCTYPE html><html>not here</html>"
        self.send_response(404 if self.path == "/gone.png" else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_read_by_name_and_as_a_response(address: str) -> None:
    assert same(f"{address}/a.png", photo())
    with urllib.request.urlopen(f"{address}/a.png") as response:
        assert same(response, photo())


@pytest.mark.parametrize(
    ("path", "named"), [("gone.png", "the address answers 404 Not Found"), ("page", "web page"), (None, "Connect")]
)
def test_an_address_without_a_picture_says_what_it_answers(address: str, path: str | None, named: str) -> None:
    with pytest.raises(ValueError, match="No image could be read from 'http://127") as told:
        pixels_of("http://127.0.0.1:9/a.png" if path is None else f"{address}/{path}")
    assert one_sentence(told.value) and named in str(told.value) and len(str(told.value)) < 400


@pytest.mark.parametrize("name", ["a.png", "with space.png", "50%41.png", "[v2] {a}*?#ü.png"])
def test_file_urls_are_read(name: str, tmp_path: Path) -> None:
    photo().save(tmp_path / name)
    assert same((tmp_path / name).as_uri(), photo())
    assert same(f"file://localhost{(tmp_path / name).as_uri()[7:]}", photo())


def test_file_urls_that_name_nothing_get_a_sentence(tmp_path: Path) -> None:
    for url, named in ((f"{tmp_path.as_uri()}/no.png", "no such file"), ("file://host/no.png", "the machine host")):
        with pytest.raises(ValueError, match=named) as told:
            pixels_of(url)
        assert one_sentence(told.value)


# ---- texts ----------------------------------------------------------------------------------------------------------


TEXT = base64.b64encode(encoded(photo())).decode()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TEXT.rstrip("="),
        TEXT.replace("+", "-").replace("/", "_"),
        base64.encodebytes(encoded(photo())).decode(),
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;charset=utf-8;BASE64,{TEXT}",
        f"data:image/png;base64,{TEXT}".replace("+", "%2B").replace("=", "%3D"),
    ],
    ids=["plain", "no padding", "for URLs", "lines", "data URI", "capitals", "quoted"],
)
def test_base64_is_read_in_all_its_forms(text: str) -> None:
    assert same(text, photo())
    assert inline_picture(text) == encoded(photo())


@pytest.mark.parametrize("text", ["a.png", "images/0001", "/a/" + "b" * 61, "http://a.test/b", "0" * 64, ""])
def test_paths_are_no_pictures(text: str) -> None:
    assert inline_picture(text) is None


DAMAGED = [
    TEXT[:1000],
    "A" * 5000,
    TEXT + "!",
    f"data:image/png;base64,{TEXT[:-200]}",
    f"data:image/png;base64,{TEXT}!",
    f"data:image/png,{TEXT}",
    {"bytes": None, "path": TEXT[:1001]},
    encoded(photo())[:200],
]


@pytest.mark.parametrize("source", DAMAGED, ids=range(len(DAMAGED)))
def test_no_error_prints_a_picture(source: Any) -> None:
    with pytest.raises(ValueError, match="No image could be read") as told:
        pixels_of(source)
    assert one_sentence(told.value) and len(str(told.value)) < 250
    assert TEXT[:20] not in str(told.value) and "A" * 20 not in str(told.value) and "\\x" not in str(told.value)


def test_paths_and_addresses_are_shown() -> None:
    for text in ("pictures/a.png", f"/{'folder/' * 20}a.png", "https://a.test/b.png", "data:,"):
        assert without_content(text) == text


# ---- thin arrays ----------------------------------------------------------------------------------------------------


HEIGHTS = [(3, 20), (4, 20), (1, 20), (20, 3), (20, 1), (20, 4), (2, 2), (3, 3), (1, 1), (4, 4), (1, 3), (3, 1)]
TENSOR = torch.from_numpy


def told_or_same(array: Any, expected: PIL.Image.Image) -> bool:
    """Whether an array gives the pixels of a picture; an error has to name the option that tells the layout."""
    try:
        return same(array, expected)
    except ValueError as error:
        assert one_sentence(error) and "input_data_format" in str(error) and str(tuple(array.shape)) in str(error)
        return False


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("size", HEIGHTS)
def test_thin_arrays_are_what_pillow_gives(size: tuple[int, int], channels: int) -> None:
    array = noise(*size, channels)
    picture = PIL.Image.fromarray(array)
    assert same(array, picture) and same(array[None], picture)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    assert same(first, picture, input_data_format="channels_first")
    assert same(TENSOR(array), picture, input_data_format="channels_last")


@pytest.mark.parametrize("size", HEIGHTS)
def test_thin_tensors_are_what_torch_gives(size: tuple[int, int]) -> None:
    array = noise(*size, 3)
    tensor = TENSOR(np.ascontiguousarray(array.transpose(2, 0, 1)))
    assert same(tensor, PIL.Image.fromarray(array)) and same(tensor[None], PIL.Image.fromarray(array))


@pytest.mark.parametrize(
    "array",
    [
        noise(1, 20, 1),  # a row, or a column
        noise(3, 20, 1),
        noise(4, 20, 1),
        TENSOR(noise(1, 20, 3)),
        TENSOR(noise(4, 20, 3)),
        TENSOR(noise(4, 20, 4)),
        TENSOR(noise(4, 20, 1)),
    ],
    ids=lambda array: f"{type(array).__name__} {tuple(array.shape)}",
)
def test_a_layout_that_nobody_can_know_has_to_be_told(array: Any) -> None:
    for one in (array, array[None]):
        with pytest.raises(ValueError, match=r"input_data_format=") as told:
            pixels_of(one)
        assert one_sentence(told.value) and str(tuple(array.shape)) in str(told.value)
    for layout in ("channels_first", "channels_last"):
        assert pixels_of(array, input_data_format=layout).shape == (3, 224, 224)


# ---- values of arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [np.asarray, TENSOR], ids=["numpy", "torch"])
def test_floats_between_whole_numbers_are_rounded(wrap: Callable) -> None:
    array = noise(23, 37, 3)
    shifted = np.clip(array + np.random.default_rng(1).uniform(-0.4, 0.4, array.shape), 0, 255)
    assert same(wrap(shifted.astype(np.float32)), photo())


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (noise(9, 9, 3).astype(np.float32) - 5.5, {}),
        (noise(9, 9, 3).astype(np.int64) * 3, {}),
        (np.full((9, 9, 3), np.nan, np.float32), {}),
        (noise(9, 9, 3) / np.float32(250), {"do_rescale": False}),
    ],
    ids=["normalized", "too large", "nan", "above one"],
)
def test_values_of_no_picture_get_a_sentence(array: np.ndarray, options: dict) -> None:
    with pytest.raises(ValueError, match="An image has values from") as told:
        pixels_of(array, **options)
    assert one_sentence(told.value) and len(str(told.value)) < 250


# ---- transparency ---------------------------------------------------------------------------------------------------


@pytest.fixture
def veiled() -> PIL.Image.Image:
    """Any opacity over any colour."""
    return PIL.Image.fromarray(noise(23, 37, 4))


def blended(image: PIL.Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    array = np.asarray(image.convert("RGBA")).astype(np.float64)
    opacity = array[..., 3:] / 255
    return array[..., :3] * opacity + np.array(color) * (1 - opacity)


TRANSPARENT: dict[str, Callable[[PIL.Image.Image], PIL.Image.Image]] = {
    "RGBA": lambda image: image,
    "LA": lambda image: image.convert("LA"),
    "PA": lambda image: photo("P").convert("PA"),
    "RGBa": lambda image: image.convert("RGBa"),
    "La": lambda image: image.convert("LA").convert("La"),
    "P, one colour": lambda image: PIL.Image.open(io.BytesIO(encoded(photo("P"), transparency=3))),
    "P, opacities": lambda image: PIL.Image.open(io.BytesIO(encoded(photo("P"), transparency=bytes(range(256))))),
    "L, one grey": lambda image: PIL.Image.open(io.BytesIO(encoded(photo("L"), transparency=90))),
    "RGB, one colour": lambda image: PIL.Image.open(io.BytesIO(encoded(photo(), transparency=(1, 2, 3)))),
    "GIF": lambda image: PIL.Image.open(io.BytesIO(encoded(photo("P"), "GIF", transparency=3))),
    "WebP": lambda image: PIL.Image.open(io.BytesIO(encoded(image, "WEBP", lossless=True))),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")  # Pillow, where opacities are several
@pytest.mark.parametrize("kind", TRANSPARENT)
@pytest.mark.parametrize("color", [(255, 255, 255), (10, 200, 30)])
def test_a_background_shows_through(kind: str, color: tuple[int, int, int], veiled: PIL.Image.Image) -> None:
    image = TRANSPARENT[kind](veiled)
    flat = np.asarray(open_image(image, background_color=color)).astype(np.float64)
    plain = image.convert("LA") if kind == "La" else image
    assert np.abs(flat - blended(plain, color)).max() <= 1  # the rounding of bytes
    picture = PIL.Image.fromarray(flat.astype(np.uint8))
    processor = MiniGPT4ImageProcessor(background_color=list(color))
    for sent in (image, processor.fetch_images(image), encoded(image) if kind == "RGBA" else image):
        assert np.array_equal(processor(sent)["pixel_values"][0], pixels_of(picture))
    assert np.array_equal(pixels_of(image, background_color=color), pixels_of(picture))
    assert (
        pixels_of(MiniGPT4ImageProcessor().fetch_images(image)).tobytes() == pixels_of(plain.convert("RGB")).tobytes()
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32, "scaled"])
@pytest.mark.parametrize("wrap", [np.asarray, TENSOR], ids=["numpy", "torch"])
@pytest.mark.parametrize("first", [False, True])
def test_arrays_of_four_channels_behave_alike(dtype: Any, wrap: Callable, first: bool, veiled: Any) -> None:
    array, options = np.asarray(veiled), {}
    if dtype == "scaled":
        array, options = array / np.float32(255), {"do_rescale": False}
    else:
        array = array.astype(dtype)
    array = np.ascontiguousarray(array.transpose(2, 0, 1)) if first else array
    # Bytes are rounded when they are blended and when they are resized; transformers cuts floats from 0 to 1 to bytes.
    bound = {np.uint8: 0, np.int64: 0, np.float32: 2, "scaled": 4}[dtype] / 255 / 0.26
    for color in (None, "white", (10, 200, 30)):
        found = pixels_of(wrap(array), background_color=color, **options)
        expected = pixels_of(veiled, background_color=color)
        assert np.abs(found - expected).max() <= bound


def test_a_background_is_saved_and_none_is_the_default(tmp_path: Path, veiled: PIL.Image.Image) -> None:
    MiniGPT4ImageProcessor(background_color="white").save_pretrained(tmp_path)
    loaded = MiniGPT4ImageProcessor.from_pretrained(tmp_path)
    assert loaded.background_color == [255, 255, 255]
    assert np.array_equal(loaded(veiled)["pixel_values"][0], pixels_of(veiled, background_color="white"))
    assert not np.array_equal(loaded(veiled)["pixel_values"][0], pixels_of(veiled))
    assert MiniGPT4ImageProcessor().background_color is None
    assert same(veiled, veiled.convert("RGB"))


def test_a_processor_hands_the_background_on(veiled: PIL.Image.Image) -> None:
    processor = make_processor(byte_tokenizer())
    expected = torch.tensor(pixels_of(veiled, size=SIZE, background_color="red"))[None]
    batch = processor(images=veiled, text="<image>", return_tensors="pt", background_color="red")
    assert torch.equal(batch["pixel_values"], expected)
    processor.image_processor.background_color = [255, 0, 0]
    assert torch.equal(processor(images=[veiled], text="<image>", return_tensors="pt")["pixel_values"], expected)
    content = [{"type": "image", "image": veiled}, {"type": "text", "text": "a"}]
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(chat["pixel_values"], expected)


@pytest.mark.parametrize("color", ["whitish", (1, 2), (1, 2, 300), (0.5, 0, 0), 7, [None] * 3])
def test_what_is_no_colour_gets_a_sentence(color: Any) -> None:
    for use in (
        lambda: MiniGPT4ImageProcessor(background_color=color),
        lambda: pixels_of(photo(), background_color=color),
    ):
        with pytest.raises(ValueError, match="`background_color` is") as told:
            use()
        assert one_sentence(told.value)


# ---- chats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [encoded(photo()), TEXT.encode(), {"image": TEXT}, [encoded(photo())], [[TEXT]]])
def test_no_error_about_a_chat_prints_a_picture(content: Any) -> None:
    for chat in ([{"role": "user", "content": content}], [content], [{"role": 3, "content": content}]):
        with pytest.raises(ValueError) as told:
            make_processor(byte_tokenizer()).apply_chat_template(chat)
        assert one_sentence(told.value) and TEXT[20:40] not in str(told.value) and "IHDR" not in str(told.value)
