"""Where a picture comes from – file, address, text, bytes, upload – and what it is opened as: upright and in RGB."""

import base64
import binascii
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageColor
import PIL.ImageOps
from transformers import image_utils
from transformers.utils import is_torch_tensor, logging


logger = logging.get_logger(__name__)

Color = str | list[int] | tuple[int, ...]  # a name that Pillow knows, or red, green and blue from 0 to 255

_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\r\n]{40,}={0,2}\s*")  # no picture's is shorter
_ENCODED = ("iVBORw", "/9j/", "R0lGOD", "UklGR")  # how PNG, JPEG, GIF and WebP begin in base64
_LONGEST_PATH = 4096
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")


def open_image(image: Any, background_color: Color | None = None, keep_transparency: bool = False) -> Any:
    """
    Turn whatever names a picture into the picture itself, upright and in RGB.

    Args:
        image: a path, URL (`http`, `https`, `file`), base64 string or data URI; raw bytes; a file object that is
            open in binary mode, such as an upload's `file`; an undecoded `datasets` picture (a dict with `bytes` and
            `path`); a PIL image; or an array or tensor of shape (H, W), (H, W, C) or (C, H, W). As in Pillow, a
            file object is read from its start if it can seek, and it is left open.
        background_color: what shows through transparent pixels, as three numbers from 0 to 255 or a name that Pillow
            knows. By default transparency is dropped: pixels show the colour that is stored under it, mostly black
            or white, as with `PIL.Image.convert("RGB")`.
        keep_transparency: leave transparency to whoever comes next; a picture that has it comes back in RGBA.

    Returns:
        A PIL image of mode RGB, turned as its EXIF orientation says, as transformers' `load_image` does; arrays and
        tensors come back as they are. An animated picture gives its first frame. 16-bit greys are clipped at 255 by
        `PIL.Image.convert("RGB")`, which is warned about because it turns most such pictures white.

    Raises:
        ValueError: if the file, URL or string holds no picture that Pillow can open.
        TypeError: if it is of another type.
    """
    source = image
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, np.ndarray) or is_torch_tensor(image):
        return image
    if isinstance(image, (str, bytes, bytearray, memoryview, os.PathLike, PIL.Image.Image)) or _is_file(image):
        try:
            opened = image if isinstance(image, PIL.Image.Image) else _open_source(image)
            return _upright_rgb(opened, background_color, keep_transparency)
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise ValueError(
                f"No image could be read from {_named(source)} ({_reason(error)}); pass a file, URL or base64 string "
                "that holds a picture Pillow can open."
            ) from error
    raise TypeError(
        f"An image of type {type(image).__name__} cannot be read; pass a PIL image, an array or tensor, a path, a "
        "URL, a base64 string or a file object."
    )


def _is_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


# ---- colours --------------------------------------------------------------------------------------------------------


def _upright_rgb(image: PIL.Image.Image, background_color: Any, keep_transparency: bool) -> PIL.Image.Image:
    # Pillow copies the whole picture in both conversions even if there is nothing to change.
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    _warn_if_clipped(image)
    if (keep_transparency or background_color is not None) and _has_transparency(image):
        image = image.convert("LA") if image.mode == "La" else image  # which Pillow turns into nothing else
        image = image.convert("RGBA")
        return image if keep_transparency else on_background(image, background_color)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # a damaged file is told here
    return image


def _has_transparency(image: PIL.Image.Image) -> bool:
    """Whether pixels have an opacity, or one colour is marked as transparent."""
    return image.mode in _ALPHA_MODES or ("transparency" in image.info and image.mode in ("1", "L", "P", "RGB"))


def on_background(image: PIL.Image.Image, color: Color) -> PIL.Image.Image:
    """A picture of mode RGBA in front of a colour, in RGB."""
    ground = PIL.Image.new("RGBA", image.size, (*as_color(color), 255))
    return PIL.Image.alpha_composite(ground, image).convert("RGB")


def as_color(color: Any) -> tuple[int, ...]:
    """
    Red, green and blue, 0 to 255, of a colour's name or numbers.

    Raises:
        ValueError: if it is no colour.
    """
    try:
        numbers = PIL.ImageColor.getrgb(color)[:3] if isinstance(color, str) else tuple(color)
        if len(numbers) == 3 and all(int(number) == number and 0 <= number <= 255 for number in numbers):
            return tuple(int(number) for number in numbers)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"`background_color` is {str(color)[:60]!r}; give red, green and blue from 0 to 255, such as [255, 255, 255], "
        'or the name of a colour, such as "white".'
    )


def _warn_if_clipped(image: PIL.Image.Image) -> None:
    """Warn once if converting to 8 bits loses brightness: Pillow clips greys of 16 and 32 bits, it does not scale."""
    if image.mode.startswith(("I", "F")) and image.getextrema()[1] > 255:
        logger.warning_once(
            f"A picture of mode {image.mode} has grey values above 255, which Pillow clips to white; scale it to "
            "0–255 yourself before passing it if that is not what you want."
        )


# ---- sources --------------------------------------------------------------------------------------------------------


def _open_source(source: Any) -> PIL.Image.Image:
    """Open a path, URL, base64 string, raw bytes or a file object."""
    # Local files are opened here and not by transformers, so that 16-bit pictures are seen before its conversion.
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _open_bytes(bytes(source))
    if _is_file(source):
        return _open_file(source)
    source = os.fspath(source)
    if isinstance(source, bytes):
        return PIL.Image.open(os.fsdecode(source))
    if source.startswith(("http://", "https://")):
        return _open_bytes(_fetch(source))
    if source.startswith("file://"):
        return PIL.Image.open(path_of_url(source))
    if not source.startswith("data:") and os.path.isfile(source):
        return PIL.Image.open(source)
    content = inline_content(source)
    if content is None:
        raise ValueError("it is neither an existing file nor base64 of a picture")
    return _open_bytes(content)


def _open_bytes(content: bytes) -> PIL.Image.Image:
    try:
        return PIL.Image.open(BytesIO(content))
    except PIL.UnidentifiedImageError as error:
        if not content:
            raise PIL.UnidentifiedImageError("it is empty") from error
        if content[:512].lstrip()[:1] == b"<":
            raise PIL.UnidentifiedImageError("it is a web page or other markup instead of a picture") from error
        raise


def _open_file(file: Any) -> PIL.Image.Image:
    """Open a file object, which Pillow reads from its start if it can seek."""
    if getattr(file, "closed", False):
        raise ValueError("the file object is closed; read the picture while it is open")
    start = file.read(0)
    if not isinstance(start, (bytes, bytearray)):
        kind = "text" if isinstance(start, str) else type(start).__name__
        if hasattr(start, "close"):
            start.close()  # a coroutine, which would complain that nobody awaited it
        raise ValueError(f"the file object gives {kind} instead of bytes; open it in binary mode")
    return PIL.Image.open(file)


def _fetch(url: str) -> bytes:
    """What an address answers, asked for by the library that transformers uses."""
    if hasattr(image_utils, "httpx"):  # of transformers 5
        answer = image_utils.httpx.get(url, timeout=60, follow_redirects=True)
    else:
        answer = image_utils.requests.get(url, timeout=60)
    answer.raise_for_status()
    return bytes(answer.content)


def path_of_url(url: str) -> str:
    """The path that a `file://` URL names on this machine."""
    parts = urllib.parse.urlsplit(url.replace("?", "%3F").replace("#", "%23"))
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"it lies on the machine {parts.netloc}; a file URL has three slashes")
    return urllib.request.url2pathname(parts.path)


def inline_content(text: str) -> bytes | None:
    """
    The bytes that a data URI or base64 text holds, or None for a text that is neither.

    Raises:
        ValueError: if it is a data URI that cannot be decoded.
    """
    if text[:5].lower() == "data:":
        head, _, content = text.partition(",")
        if not head.lower().endswith(";base64"):
            return urllib.parse.unquote_to_bytes(content)
        return _decode(urllib.parse.unquote(content))
    return _decode(text) if _BASE64.fullmatch(text) else None


def _decode(text: str) -> bytes:
    text = "".join(text.split()).rstrip("=").translate({ord("-"): "+", ord("_"): "/"})
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise ValueError("its base64 is damaged") from error


def inline_picture(text: str) -> bytes | None:
    """
    The bytes of a picture that stands in a column of text, or None if the text is its path or address.

    Whatever begins as a data URI, or is too long for a path, is no path, and may then be damaged.
    """
    if text[:5].lower() != "data:" and not _BASE64.fullmatch(text):
        return None
    try:
        content = inline_content(text) or b""
    except ValueError:
        content = text.encode()  # which is no picture either
    if text[:5].lower() == "data:" or len(text) > _LONGEST_PATH:
        return content
    try:
        PIL.Image.open(BytesIO(content))  # reads the header only
    except Exception:  # Pillow's decoders raise errors of many types
        return None
    return content


# ---- errors ---------------------------------------------------------------------------------------------------------


def _named(source: Any) -> str:
    """What an error calls a picture that cannot be read."""
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, PIL.Image.Image):
        source = getattr(source, "filename", "") or "the PIL image"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} bytes"
    if _is_file(source):
        name = getattr(source, "name", None) or getattr(source, "filename", None)
        return f"the file object {name!r}" if isinstance(name, str) else f"a {type(source).__name__}"
    text = without_content(str(source))
    return text if text != str(source) else repr(text if len(text) <= 200 else text[:197] + "...")


def without_content(text: str) -> str:
    """A path, address or other text as an error may show it: what stands for the content of a picture is left out."""
    if text[:5].lower() == "data:" and len(text) > 40:  # a shorter one holds no picture
        return f"a data URI of {len(text)} characters"
    encoded = text.startswith(_ENCODED) or _BASE64.fullmatch(text) or re.match(r"[\w+/=-]{200}", text)
    return f"a text of {len(text)} characters" if encoded and not os.path.isfile(text) else text


def _reason(error: Exception) -> str:
    """Why a picture cannot be read, in a few words and without its content."""
    if isinstance(error, PIL.UnidentifiedImageError) and str(error).startswith("cannot identify"):
        return "it is in no format that Pillow knows"
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    answer = getattr(error, "response", None)
    if (status := getattr(answer, "status_code", None)) is not None:
        said = getattr(answer, "reason_phrase", None) or getattr(answer, "reason", None) or ""
        return f"the address answers {status} {said}".rstrip()
    text = getattr(error, "strerror", None) or str(error)
    text = " ".join(str(text).split()).rstrip(".")
    # Of a connection that fails, libraries tell objects and addresses in memory.
    return text if text and len(text) <= 200 and " at 0x" not in text else type(error).__name__


__all__ = ["Color", "as_color", "inline_picture", "on_background", "open_image", "path_of_url", "without_content"]
