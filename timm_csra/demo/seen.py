"""Run a checkpoint on a picture once, and compute its logits for every lam, T and kind of scores."""

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
from ..pictures import UNREADABLE, WEB_FORMATS, in_rgb
from .checkpoints import Checkpoint
from .told import Refused

PIXELS = 50_000_000  # largest picture
SHOWN = 640  # longer side of the shown picture, in pixels
LEAST = 64  # shorter side in pixels: pictures longer than 10:1 are shown as 10:1
_forward = threading.Lock()  # visitors share the models, which run one picture at a time


@dataclass(frozen=True)
class Seen:
    """The result of one forward pass on one picture.

    Attributes:
        picture: the picture at the size of the page, in its own proportions.
        path: file of the picture.
        base: the plain model's logits, `(K,)`.
        maps: per-location logits, `(K, rows, columns)`.
        names: the K class names.
        checkpoint: the checkpoint that was run.
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
    """Open a picture in RGB, rotated by its EXIF orientation, and on white where it is transparent.

    Raises:
        Refused: the file is not a picture that can be read, or has too many pixels.
    """
    try:
        with Image.open(path, formats=WEB_FORMATS) as file:
            if file.width * file.height <= PIXELS:
                return in_rgb(_on_white(ImageOps.exif_transpose(file)))
            size = f"{file.width} x {file.height}"
    except FileNotFoundError as error:
        raise Refused("The picture is no longer here: uploads are deleted after an hour. Upload it again.") from error
    except Image.DecompressionBombError:
        size = "far too many"
    except UNREADABLE as error:
        reason = str(error).replace(path, Path(path).name)  # not where the server keeps it
        raise Refused(f"This file cannot be read as a picture: {reason}. Expected JPEG, PNG or WebP.") from error
    raise Refused(f"The picture has {size} pixels; expected at most {PIXELS // 10**6} million. Make it smaller first.")


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)


def look(checkpoint: Checkpoint, path: str, names: tuple[str, ...]) -> Seen:
    """Run the model once on a picture, squashed to the input size, so that the maps cover the whole picture."""
    picture = open_picture(path)
    device = next(checkpoint.model.parameters()).device
    config = resolve_data_config(model=checkpoint.model) | {"crop_mode": "squash", "crop_pct": 1.0}
    x = create_transform(**config)(as_input(picture, config["input_size"]))[None].to(device)
    with _forward, torch.inference_mode(), autocast(device, precision(AUTO, device)):
        both = score_maps(checkpoint.model, x, return_logits=True)
    maps, base = (tensor[0].float().cpu() for tensor in both)
    return Seen(for_showing(picture), path, base, maps, names, checkpoint)


def for_showing(picture: Image.Image) -> Image.Image:
    """Scale a picture for the page. Very small and very long pictures get a minimum size, to outline a location."""
    scale = SHOWN / max(picture.size)
    if scale > 1:  # enlarge small pictures only to the minimum
        scale = max(1.0, 4 * LEAST / max(picture.size))
    width, height = (max(LEAST, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def as_input(picture: Image.Image, size: tuple[int, int, int]) -> Image.Image:
    """Resize a picture to an input size `(C, H, W)`, without keeping its proportions."""
    _, height, width = size
    return picture.resize((width, height), Image.Resampling.BICUBIC)
