"""Image processor of MiniGPT-4: RGB, PIL bicubic to 224 × 224 without cropping, CLIP statistics."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_transforms import normalize, rescale, resize, to_channel_dimension_format
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
    infer_channel_dimension_format,
    load_image,
)
from transformers.utils import logging


logger = logging.get_logger(__name__)


def open_image(image: Any) -> Any:
    """
    Turn whatever names a picture into the picture itself, upright and in RGB.

    Args:
        image: a path, URL, base64 string or data URI; raw bytes; an undecoded `datasets` picture (a dict with `bytes`
            and `path`); a PIL image; or an array or tensor of shape (H, W), (H, W, C) or (C, H, W).

    Returns:
        A PIL image of mode RGB, turned as its EXIF orientation says, as transformers' `load_image` does; arrays and
        tensors come back as they are. An animated picture gives its first frame. Colours are converted as
        `PIL.Image.convert("RGB")` does: transparency is dropped, and 16-bit greys are clipped at 255, which is warned
        about because it turns most such pictures white.

    Raises:
        ValueError: if the file, URL or string holds no picture that Pillow can open.
        TypeError: if it is of another type.
    """
    source = image
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, (str, bytes, bytearray, pathlib.Path, PIL.Image.Image)):
        try:
            return _upright_rgb(image if isinstance(image, PIL.Image.Image) else _open_source(image))
        except Exception as error:  # Pillow's decoders raise errors of many types
            raise ValueError(
                f"No image could be read from {_named(source)} ({_reason(error)}); pass a file, URL or base64 string "
                "that holds a picture Pillow can open."
            ) from error
    if isinstance(image, np.ndarray) or hasattr(image, "detach"):
        return image
    raise TypeError(
        f"An image of type {type(image).__name__} cannot be read; pass a PIL image, an array or tensor, a path, a URL "
        "or a base64 string."
    )


def _upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    # Pillow copies the whole picture in both conversions even if there is nothing to change.
    if image.getexif().get(PIL.ExifTags.Base.Orientation, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    _warn_if_clipped(image)
    if image.mode != "RGB":
        return image.convert("RGB")
    image.load()  # a damaged file is told here
    return image


def _open_source(source: "str | bytes | bytearray | pathlib.Path") -> PIL.Image.Image:
    """Open a path, URL, base64 string or raw bytes."""
    # Local files are opened here and not by `load_image`, so that 16-bit pictures are seen before its conversion.
    if isinstance(source, (bytes, bytearray)):
        return PIL.Image.open(BytesIO(source))
    source = os.fspath(source)
    if not source.startswith(("http://", "https://")) and os.path.isfile(source):
        return PIL.Image.open(source)
    return load_image(source)


def _named(source: Any) -> str:
    """What an error calls a picture that cannot be read."""
    if isinstance(source, Mapping):
        source = source.get("path") or source.get("bytes")
    if isinstance(source, PIL.Image.Image):
        source = getattr(source, "filename", "") or "the PIL image"
    if isinstance(source, (bytes, bytearray)):
        return f"{len(source)} bytes"
    text = str(source)
    return repr(text if len(text) <= 200 else text[:197] + "...")


def _reason(error: Exception) -> str:
    """Why a picture cannot be read, in a few words and without its content."""
    if isinstance(error, PIL.UnidentifiedImageError):
        return "it is in no format that Pillow knows"
    if type(error) is ValueError and str(error).startswith("Incorrect image source"):
        return "it is neither an existing file nor base64 of a picture"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _warn_if_clipped(image: PIL.Image.Image) -> None:
    """Warn once if converting to 8 bits loses brightness: Pillow clips greys of 16 and 32 bits, it does not scale."""
    if image.mode.startswith(("I", "F")) and image.getextrema()[1] > 255:
        logger.warning_once(
            f"A picture of mode {image.mode} has grey values above 255, which Pillow clips to white; scale it to "
            "0–255 yourself before passing it if that is not what you want."
        )


def flatten_images(images: Any) -> list[Any]:
    """
    Flatten nested lists of images into one list, in reading order.

    An array or tensor of 4 dimensions (a batch) is split into its images.
    """
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flatten_images(entry)]
    if getattr(images, "ndim", 3) == 4:
        return list(images)
    return [] if images is None else [images]


class MiniGPT4ImageProcessor(BaseImageProcessor):
    r"""
    Resize to a fixed size, without cropping and without keeping the aspect ratio, then rescale and normalize.

    The defaults are MiniGPT-4's (and BLIP-2's): bicubic, 224 × 224, mean and standard deviation of CLIP. Pictures are
    resized by Pillow and scaled in float32 in the order of the original, so the values equal those of
    `torchvision.transforms` (`Resize`, `ToTensor`, `Normalize`) to the last bit.

    Args:
        do_convert_rgb (`bool`, defaults to `True`): convert to three channels as `PIL.Image.convert("RGB")` does.
        do_resize (`bool`, defaults to `True`): resize to `size`.
        size (`dict`, *optional*): `{"height": pixels, "width": pixels}`; 224 × 224 by default.
        resample (`int`, defaults to bicubic): a filter of `PIL.Image.Resampling`.
        do_rescale (`bool`, defaults to `True`): multiply by `rescale_factor`; switch it off for arrays in 0–1.
        rescale_factor (`float`, defaults to 1/255).
        do_normalize (`bool`, defaults to `True`): subtract `image_mean` and divide by `image_std`, per channel.
        image_mean, image_std (`list[float]`, *optional*): those of CLIP by default.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: "Mapping[str, int] | int | Sequence[int] | None" = None,
        resample: int = PILImageResampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: "float | Sequence[float] | None" = None,
        image_std: "float | Sequence[float] | None" = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.do_convert_rgb = do_convert_rgb
        self.do_resize = do_resize
        self.size = _height_and_width(size if size is not None else 224)
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(OPENAI_CLIP_MEAN) if image_mean is None else image_mean
        self.image_std = list(OPENAI_CLIP_STD) if image_std is None else image_std

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths, URLs and base64 strings, however nested; see `open_image` for what is accepted and raised."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        return open_image(image_url_or_urls)

    def preprocess(
        self,
        images: Any,
        do_convert_rgb: bool | None = None,
        do_resize: bool | None = None,
        size: "Mapping[str, int] | int | Sequence[int] | None" = None,
        resample: int | None = None,
        do_rescale: bool | None = None,
        rescale_factor: float | None = None,
        do_normalize: bool | None = None,
        image_mean: "float | Sequence[float] | None" = None,
        image_std: "float | Sequence[float] | None" = None,
        return_tensors: str | None = None,
        data_format: "str | ChannelDimension" = ChannelDimension.FIRST,
        input_data_format: "str | ChannelDimension | None" = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Turn images into `pixel_values` of shape (images, 3, height, width), float32; options as in `__init__`.

        Args:
            images: one image or nested lists of images, of any kind that `open_image` takes.
            return_tensors (`str`, *optional*): `"pt"` or `"np"`; a list of arrays otherwise.
            data_format: `"channels_first"` (default) or `"channels_last"`, of the result.
            input_data_format: layout of arrays and tensors; found out from their shape if left out.

        Raises:
            ValueError: if there is no image, or one cannot be read.
        """
        given = {key: value for key, value in locals().items() if value is not None}
        options = {name: given.get(name, getattr(self, name)) for name in _OPTIONS}
        options["size"] = _height_and_width(options["size"])
        flat = flatten_images(images)
        if not flat:
            raise ValueError("There is no image to process; pass at least one.")
        pixels = [
            to_channel_dimension_format(
                self._pixels(open_image(image), input_data_format, **options), data_format, ChannelDimension.LAST
            )
            for image in flat
        ]
        return BatchFeature(data={"pixel_values": pixels}, tensor_type=return_tensors)

    def pixel_table(self) -> np.ndarray:
        """
        What the bytes 0 to 255 of a picture become with the own settings, of shape (3, 256).

        `preprocess` with `do_rescale=False, do_normalize=False` gives bytes, a quarter of the size, to look up in it.
        """
        mean = self.image_mean if self.do_normalize else None
        return _table(self.rescale_factor if self.do_rescale else None, mean, self.image_std)

    def _pixels(
        self,
        image: Any,
        input_data_format: "str | ChannelDimension | None",
        do_convert_rgb: bool,
        do_resize: bool,
        size: dict[str, int],
        resample: int,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
    ) -> np.ndarray:
        """One picture as an array of shape (H, W, 3), resized, rescaled and normalized as asked for."""
        last = {"input_data_format": ChannelDimension.LAST}
        is_picture = isinstance(image, PIL.Image.Image)  # in RGB, of 8 bits
        if not is_picture:
            image = _channels_last(image, input_data_format)
            image = _three_channels(image) if do_convert_rgb else image
            _warn_if_scaled(image, do_rescale)
        if do_resize:
            size_of = (size["height"], size["width"])
            image = resize(image, size_of, resample, data_format=ChannelDimension.LAST, **last)
        array = np.asarray(image)
        scale = (rescale_factor if do_rescale else None, image_mean if do_normalize else None, image_std)
        if is_picture and (do_rescale or do_normalize):
            return _look_up(array, *scale)
        return _scaled(array, *scale)


def _warn_if_scaled(array: np.ndarray, do_rescale: bool) -> None:
    if do_rescale and array.dtype.kind == "f" and array.size and array.max() <= 1:
        logger.warning_once(
            "An image of floats has no value above 1, so it looks as if it were scaled to 0–1 already; pass "
            "`do_rescale=False` for such images, or they come out nearly black."
        )


def _scaled(array: np.ndarray, rescale_factor: float | None, mean: Any, std: Any) -> np.ndarray:
    """An array of shape (H, W, C), rescaled and normalized; `None` leaves either out."""
    if rescale_factor is not None:
        array = rescale(array, rescale_factor, input_data_format=ChannelDimension.LAST)
    if mean is not None:
        array = normalize(array, mean=mean, std=std, input_data_format=ChannelDimension.LAST)
    return array


def _look_up(array: np.ndarray, rescale_factor: float | None, mean: Any, std: Any) -> np.ndarray:
    """
    The same as `_scaled` for an array of bytes of shape (H, W, 3), to the last bit and several times faster.

    A channel has 256 values only, so each of them is computed once.
    """
    table = _table(rescale_factor, mean, std)
    scaled = np.empty((3, *array.shape[:2]), table.dtype)  # as the model wants it
    for channel in range(3):
        np.take(table[channel], array[..., channel], out=scaled[channel], mode="clip")
    return scaled.transpose(1, 2, 0)


def _table(rescale_factor: float | None, mean: Any, std: Any) -> np.ndarray:
    """The values that bytes 0 to 255 become in each channel, of shape (3, 256)."""
    values = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, axis=-1)  # (256, 1, 3)
    return np.ascontiguousarray(_scaled(values, rescale_factor, mean, std)[:, 0].T)


_OPTIONS = (
    "do_convert_rgb",
    "do_resize",
    "size",
    "resample",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def _height_and_width(size: Any) -> dict[str, int]:
    """`size` in its one form, height and width in pixels; a single number means a square."""
    if not isinstance(size, (int, list, tuple)):
        size = dict(size)
    size = get_size_dict(size)
    if set(size) != {"height", "width"}:
        raise ValueError(
            f"`size` is {dict(size)}, but MiniGPT-4 resizes without keeping the aspect ratio; give "
            '{"height": pixels, "width": pixels}.'
        )
    return {"height": size["height"], "width": size["width"]}


def _channels_last(image: Any, input_data_format: "str | ChannelDimension | None") -> np.ndarray:
    """An array or tensor as an array of shape (H, W, C)."""
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()  # NumPy has no bfloat16
    array = np.asarray(image)
    if array.size == 0:
        raise ValueError(f"An image has the shape {array.shape}, which holds no pixel; leave it out.")
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise ValueError(
            f"An image has the shape {array.shape}; it must be (height, width), (height, width, channels) or "
            "(channels, height, width)."
        )
    layout = input_data_format
    if layout is None:
        try:
            layout = infer_channel_dimension_format(array, num_channels=(1, 3, 4))
        except ValueError as error:
            raise ValueError(
                f"An image has the shape {array.shape}, in which neither the first nor the last axis has 1, 3 or 4 "
                "channels; pass (height, width), (height, width, channels) or (channels, height, width)."
            ) from error
    return to_channel_dimension_format(array, ChannelDimension.LAST, layout)


def _three_channels(array: np.ndarray) -> np.ndarray:
    """Grey repeated, transparency dropped, as Pillow's conversion to RGB does; `array` is of shape (H, W, C)."""
    return np.repeat(array, 3, axis=-1) if array.shape[-1] == 1 else array[..., :3]


MiniGPT4ImageProcessor.register_for_auto_class()

__all__ = ["MiniGPT4ImageProcessor"]
