"""Opens the pictures that clients send."""

import io

import PIL.Image

from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.utils.picture_fetching import PictureError


FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that other programs open


def open_picture(content: bytes, address: str, megapixels: float) -> PIL.Image.Image:
    """
    A picture, upright, with its transparency, of which the processor makes something.

    Args:
        content: its file.
        address: where it comes from, for what is told.
        megapixels: the most that it may have (10⁶ pixels), which is seen before it is decoded.

    Raises:
        PictureError: if it is none, or damaged, or too large.
    """
    shown = "A picture in a data URI" if address[:5].lower() == "data:" else f"The picture {address[:200]}"
    PIL.Image.init()
    try:
        image = PIL.Image.open(io.BytesIO(content), formats=[name for name in FORMATS if name in PIL.Image.OPEN])
    except PIL.Image.DecompressionBombError as error:
        raise PictureError(f"{shown} has far too many pixels; {megapixels:g} million is the most.") from error
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise PictureError(f"{shown} is in no format that is known here ({', '.join(FORMATS)}).") from error
    if image.width * image.height > megapixels * 1e6:
        raise PictureError(f"{shown} has {image.width} x {image.height} pixels; {megapixels:g} million is the most.")
    try:
        opened: PIL.Image.Image = open_image(image, keep_transparency=True)
    except ValueError as error:
        raise PictureError(f"{shown} is damaged.") from error
    return opened
