"""Pictures that clients of vLLM name by an address, fetched with the limits of `minigpt4 serve`."""

import asyncio
import json
import os

import PIL.Image
from vllm.multimodal.media import MediaConnector
from vllm.multimodal.media.image import ImageMediaIO

from recipes_minigpt4.serving.vllm_front import LIMITS
from recipes_minigpt4.utils.picture_fetching import FetchLimits, PictureError, fetch_picture, shown_name


class PictureConnector(MediaConnector):  # type: ignore[misc]
    """Fetches pictures in place of vLLM, which would fetch them from private addresses too."""

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> PIL.Image.Image:
        """
        The picture behind an `http:`, `https:` or `data:` address.

        Raises:
            ValueError: if there is none, or it is over a limit.
        """
        content = fetch_picture(image_url, FetchLimits(**json.loads(os.environ.get(LIMITS, "{}"))))
        reader = ImageMediaIO(**({"image_mode": image_mode} | self.media_io_kwargs.get("image", {})))
        try:
            return reader.load_bytes(content)
        except ValueError as error:
            reason = "is damaged or in no format that is known here" if error.__cause__ else f"is refused ({error})"
            raise PictureError(f"{shown_name(image_url)} {reason}.") from error

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> PIL.Image.Image:
        """The same, in a thread."""
        return await asyncio.to_thread(self.fetch_image, image_url, image_mode=image_mode)
