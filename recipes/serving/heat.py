"""Maps over pictures: what a share of attention looks like."""

import numpy as np
import PIL.Image


STEPS = 256
LIGHTNESS, CHROMA, HUE = (
    (0.28, 0.92),
    (0.09, 0.16),
    (285.0, 95.0),
)  # from nothing to all, as OKLCH has them; violet–yellow


def _colors() -> np.ndarray:
    """
    From dark violet to bright yellow in steps that look alike, of shape (256, 3), in bytes of sRGB.

    They are even in OKLab (Björn Ottosson, "A perceptual color space for image processing", 2020), whose conversion
    this is. Also who sees no colours sees the order, for lightness only grows.
    """
    place = np.linspace(0, 1, STEPS)
    lightness, chroma, hue = (low + (high - low) * place for low, high in (LIGHTNESS, CHROMA, HUE))
    a, b = chroma * np.cos(np.radians(hue)), chroma * np.sin(np.radians(hue))
    cones = np.stack(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(to_rgb @ cones**3, 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(encoded.T * 255).astype(np.uint8)


COLORS = _colors()


def draw_heat(picture: PIL.Image.Image, shares: np.ndarray, full: float | None = None) -> PIL.Image.Image:
    """
    A map over a picture.

    Args:
        picture: upright, in RGB, whole as the model sees it.
        shares: of the patches, of shape (rows, columns), which cover the picture.
        full: the share that is drawn brightest; that of the greatest patch if left out.

    Returns:
        A picture of the same size: the old one in grey, and over it each patch as a square. The more it has, the
        brighter it is, and the less of the picture is covered by darkness.
    """
    full = float(shares.max()) if full is None else full
    level = np.clip(shares / full, 0, 1) if full > 0 else np.zeros(shares.shape)
    # Squares and no slopes between them: nothing is known of less than a patch.
    level = np.asarray(
        PIL.Image.fromarray(np.rint(level * (STEPS - 1)).astype(np.uint8)).resize(
            picture.size, PIL.Image.Resampling.NEAREST
        )
    )
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    strength = (0.45 + 0.25 * (level / (STEPS - 1)))[..., None]
    return PIL.Image.fromarray(np.rint(grey * (1 - strength) + COLORS[level] * strength).astype(np.uint8))
