"""Image processor of MiniGPT-4: RGB, PIL bicubic to 224 × 224 without cropping, CLIP statistics."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_transforms import normalize, rescale, resize, to_channel_dimension_format
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.utils import is_torch_tensor

from .image_opening_minigpt4 import Color, as_color, logger, on_background, open_image


CHANNELS = (1, 3, 4)  # grey, RGB, RGBA


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
        background_color (`list[int]` or `str`, *optional*): what shows through transparent pixels, as red, green and
            blue from 0 to 255 or a name such as `"white"`, which `MiniGPT4Processor.from_backbones` chooses. By
            default, and where a saved file does not tell, transparency is dropped, as in the original: a transparent
            pixel becomes the colour that is stored under it, which is mostly black or white and may be anything.
            Pictures and arrays of four channels are treated alike. What opens pictures before they come here, such
            as the pipelines of transformers, drops it in any case.
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
        background_color: Color | None = None,
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
        self.background_color = None if background_color is None else list(as_color(background_color))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """
        Open paths, URLs, base64 strings and file objects, however nested; `open_image` tells what is taken and raised.

        Pictures come back in RGB, or in RGBA if they have transparency, for `preprocess` to deal with.
        """
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(entry) for entry in image_url_or_urls]
        return open_image(image_url_or_urls, keep_transparency=True)

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
        background_color: Color | None = None,
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
            input_data_format: `"channels_first"` or `"channels_last"`, the layout of arrays and tensors. If left out,
                it is found out from the shape; where both ends could be channels, as in (3, 20, 3), arrays are taken
                as channels last (NumPy's and Pillow's habit) and tensors as channels first (torch's).

        Raises:
            ValueError: if there is no image, one cannot be read, or its layout has to be told.
        """
        given = {key: value for key, value in locals().items() if value is not None}
        options = {name: given.get(name, getattr(self, name)) for name in _OPTIONS}
        options["size"] = _height_and_width(options["size"])
        color = options["background_color"]
        color = options["background_color"] = None if color is None else as_color(color)
        flat = flatten_images(images)
        if not flat:
            raise ValueError("There is no image to process; pass at least one.")
        pixels = [
            to_channel_dimension_format(
                self._pixels(open_image(image, color), input_data_format, **options),
                data_format,
                ChannelDimension.LAST,
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
        background_color: Any,
    ) -> np.ndarray:
        """One picture as an array of shape (H, W, 3), resized, rescaled and normalized as asked for."""
        last = {"input_data_format": ChannelDimension.LAST}
        is_picture = isinstance(image, PIL.Image.Image)  # in RGB, of 8 bits
        if not is_picture:
            image = _channels_last(image, input_data_format)
            full = 1 / rescale_factor if do_rescale else 1  # what a float of full brightness is
            image = _three_channels(image, background_color, full) if do_convert_rgb else image
            _warn_if_scaled(image, do_rescale)
            image = _resizable(image, do_rescale) if do_resize else image
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
    "background_color",
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
    is_tensor = is_torch_tensor(image)
    if is_tensor:
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
    layout = input_data_format or _layout(array.shape, is_tensor)
    return to_channel_dimension_format(array, ChannelDimension.LAST, layout)


def _layout(shape: tuple[int, ...], is_tensor: bool) -> ChannelDimension:
    """Where the channels of an array or tensor are; a guess that could exchange rows and channels is none."""
    first, _, last = shape
    if first not in CHANNELS and last not in CHANNELS:
        raise ValueError(
            f"An image has the shape {shape}, in which neither the first nor the last axis has 1, 3 or 4 channels; "
            "pass (height, width), (height, width, channels) or (channels, height, width)."
        )
    if first not in CHANNELS or last not in CHANNELS:
        return ChannelDimension.FIRST if first in CHANNELS else ChannelDimension.LAST
    # A picture of few rows or columns. Pillow never gives (H, W, 1), and few tensors of torch are RGBA.
    if is_tensor and (first == 3 or first == last == 1):
        return ChannelDimension.FIRST
    if not is_tensor and last in (3, 4):
        return ChannelDimension.LAST
    raise ValueError(
        f"An image has the shape {shape}, in which the first axis and the last could be its channels; pass "
        '`input_data_format="channels_last"` or `"channels_first"`.'
    )


def _three_channels(array: np.ndarray, background_color: Any, full: float) -> np.ndarray:
    """
    Grey repeated, and transparency as `open_image` treats it.

    Args:
        array: shape (H, W, C).
        background_color: see `open_image`.
        full: brightness of white in floats; in integers it is 255.
    """
    if array.shape[-1] == 1:
        return np.repeat(array, 3, axis=-1)
    if array.shape[-1] != 4 or background_color is None:
        return array[..., :3]
    if array.dtype.kind != "f":
        return np.asarray(on_background(PIL.Image.fromarray(array.astype(np.uint8)), background_color))
    opacity = array[..., 3:] / full
    ground = np.asarray(as_color(background_color), array.dtype) * (full / 255)
    return (array[..., :3] * opacity + ground * (1 - opacity)).astype(array.dtype)


def _resizable(array: np.ndarray, do_rescale: bool) -> np.ndarray:
    """
    An array that Pillow resizes as the picture it is, which it does in bytes.

    Raises:
        ValueError: if its values are none of a picture.
    """
    if array.dtype == np.uint8 or array.dtype.kind not in "fiu":
        return array
    low, high = array.min(), array.max()
    whole = array.dtype.kind != "f" or bool((array == np.rint(array)).all())
    if not (low >= 0 and high <= 255) or not (whole or do_rescale or high <= 1):  # the first is true of NaN
        raise ValueError(
            f"An image has values from {low:g} to {high:g}; pass pictures from 0 to 255, or floats from 0 to 1 with "
            "`do_rescale=False`."
        )
    return array if high <= 1 else np.rint(array).astype(np.uint8)


MiniGPT4ImageProcessor.register_for_auto_class()

__all__ = ["MiniGPT4ImageProcessor"]
