"""Convert pictures to RGB, for the benchmarks and the demo alike."""

import numpy as np
from PIL import Image


def in_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB with 8 bits a channel. The EXIF orientation is ignored, as in timm's own datasets. Of
    16-bit grey the upper 8 bits are taken, where Pillow alone would clip nearly all values to white.

    Raises:
        ValueError: the picture has 32 bits a pixel, whose range is unknown.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"found 32 bits a pixel (Pillow's mode {picture.mode}), expected 8 or 16")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")
