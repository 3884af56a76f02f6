"""Opens the pictures that clients of the server and visitors of the page send."""

import io

import PIL.Image

from processing_minigpt4.image_opening_minigpt4 import open_image
from recipes_minigpt4.utils.picture_fetching import PictureError


FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # none that other programs open


def open_sent(content: bytes, shown: str, megapixels: float, background: str | None = None) -> PIL.Image.Image:
    """
    A picture of somebody else's, upright.

    Args:
        content: its file.
        shown: what it is called in what is told.
        megapixels: the most that it may have (10⁶ pixels), which is seen before it is decoded.
        background: what is behind it where it is transparent; if left out, it stays so, and the processor makes
            something of it.

    Raises:
        PictureError: if it is none, or damaged, or too large.
    """
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
        opened: PIL.Image.Image = open_image(image, background, keep_transparency=background is None)
    except ValueError as error:
        raise PictureError(f"{shown} is damaged.") from error
    return opened
