"""Open pictures and convert them to RGB, for the benchmarks, the demo and the examples alike."""

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

# Formats that Pillow decodes itself; to read an EPS file it would start Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
WEB_FORMATS = ("JPEG", "PNG", "WEBP")  # accepted from visitors of a server
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for a broken file


def open_upright(source: str | Path | IO[bytes]) -> Image.Image:
    """Open a picture of one of `FORMATS` in RGB, rotated as its EXIF orientation says.

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: it cannot be read as a picture.
    """
    with Image.open(source, formats=FORMATS) as picture:
        return in_rgb(ImageOps.exif_transpose(picture))


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
