"""How a picture is opened, in the benchmarks and in the demo alike."""

import numpy as np
from PIL import Image


def in_rgb(picture: Image.Image) -> Image.Image:
    """A picture in 8 bits of red, green and blue, its pixels in the order in which they are stored: as timm's own
    datasets, it takes no notice of an orientation in the EXIF tags. Of 16 bits of grey the upper 8 are taken, where
    Pillow alone would make them white.

    Raises:
        ValueError: values of 32 bits, whose range nobody knows.
    """
    if picture.mode in ("I", "F"):
        raise ValueError(f"found 32 bits a pixel (Pillow's mode {picture.mode}), expected 8 or 16")
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")
