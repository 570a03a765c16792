"""From a checkpoint and a picture to what the model says of it, for every lam, T and kind of scores."""

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from .. import score_maps
from ..accelerators import AUTO, autocast, precision
from ..attention import add_attention, class_attention
from ..config import LOG_SOFTMAX, LOGITS, CSRAConfig
from ..pictures import in_rgb
from .checkpoints import Checkpoint
from .told import Refused

FORMATS = ("JPEG", "PNG", "WEBP")  # that are accepted; Pillow would start other programs for some formats
PIXELS = 50_000_000  # of a picture; more is refused
SHOWN = 640  # pixels of the longer side
LEAST = 64  # pixels of the shorter side: longer pictures than 10:1 are shown in these proportions
_forward = threading.Lock()  # a model is one, its visitors are several


@dataclass(frozen=True)
class Seen:
    """What one forward pass says of one picture.

    Attributes:
        picture: for showing, in its own proportions.
        path: of the picture's file.
        base: the plain model's logits, `(K,)`.
        maps: class scores of every location, logits, `(K, rows, columns)`.
        names: of the classes.
        checkpoint: that said it.
    """

    picture: Image.Image
    path: str
    base: Tensor
    maps: Tensor
    names: tuple[str, ...]
    checkpoint: Checkpoint

    def logits(self, lam: float, temperature: float, scores: str = LOGITS) -> Tensor:
        """Return the logits of a wrapped model, `(K,)`."""
        config = CSRAConfig(lam, temperature, scores)
        if config.lam == 0:
            return self.base
        found = self.maps_of(config.scores).flatten(1).T[None]
        return add_attention(self.base[None], [class_attention(found, config.temperatures[0])], config.lam)[0]

    def maps_of(self, scores: str) -> Tensor:
        """Return the per-location scores of this kind, `(K, rows, columns)`."""
        return self.maps.log_softmax(dim=0) if scores == LOG_SOFTMAX else self.maps


def open_picture(path: str) -> Image.Image:
    """Open a picture in RGB: upright, as its EXIF orientation says, and on white where it is transparent.

    Raises:
        Refused: it is no picture, or too large a one.
    """
    try:
        with Image.open(path, formats=FORMATS) as file:
            if file.width * file.height <= PIXELS:
                return in_rgb(_on_white(ImageOps.exif_transpose(file)))
            size = f"{file.width} x {file.height}"
    except FileNotFoundError as error:
        raise Refused("The picture is no longer here: uploads are deleted after an hour. Upload it again.") from error
    except Image.DecompressionBombError:
        size = "far too many"
    except (OSError, SyntaxError, ValueError) as error:
        reason = str(error).replace(path, Path(path).name)  # not where the server keeps it
        raise Refused(f"This file cannot be read as a picture: {reason}. Expected JPEG, PNG or WebP.") from error
    raise Refused(f"The picture has {size} pixels; expected at most {PIXELS // 10**6} million. Make it smaller first.")


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def look(checkpoint: Checkpoint, path: str, names: tuple[str, ...]) -> Seen:
    """Run a picture through the model once, squashed to its input size, so that the maps cover the whole picture."""
    picture = open_picture(path)
    device = next(checkpoint.model.parameters()).device
    config = resolve_data_config(model=checkpoint.model) | {"crop_mode": "squash", "crop_pct": 1.0}
    x = create_transform(**config)(as_input(picture, config["input_size"]))[None].to(device)
    with _forward, torch.inference_mode(), autocast(device, precision(AUTO, device)):
        base, maps = (found[0].float().cpu() for found in (checkpoint.model(x), score_maps(checkpoint.model, x)))
    return Seen(for_showing(picture), path, base, maps, names, checkpoint)


def for_showing(picture: Image.Image) -> Image.Image:
    """Scale a picture for the page, so that a location can be outlined in the smallest and the longest one."""
    scale = SHOWN / max(picture.size)
    if scale > 1:  # small pictures stay small, but not too small
        scale = max(1.0, 4 * LEAST / max(picture.size))
    width, height = (max(LEAST, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def as_input(picture: Image.Image, size: tuple[int, int, int]) -> Image.Image:
    """Squash a picture to `(C, H, W)`."""
    _, height, width = size
    return picture.resize((width, height), Image.Resampling.BICUBIC)
