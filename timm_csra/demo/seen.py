"""From a checkpoint and a picture to what the model says of it, for every lam, T and kind of scores."""

from dataclasses import dataclass
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from .. import score_maps
from ..accelerators import AUTO, autocast, precision
from ..attention import add_attention, class_attention
from ..config import LOG_SOFTMAX, LOGITS, CSRAConfig
from ..pictures import in_rgb
from .checkpoints import Checkpoint

PIXELS = 50_000_000  # of a picture; more is refused
SHOWN = 640  # pixels of the longer side


@dataclass(frozen=True)
class Seen:
    """What one forward pass says of one picture.

    Attributes:
        picture: for showing, in its own proportions.
        base: the plain model's logits, `(K,)`.
        maps: class scores of every location, logits, `(K, rows, columns)`.
        names: of the classes.
        checkpoint: that said it.
    """

    picture: Image.Image
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
    """Open a picture in RGB.

    Raises:
        gr.Error: it is no picture, or too large a one. The page shows the text.
    """
    try:
        with Image.open(path) as file:
            if file.width * file.height > PIXELS:
                raise gr.Error(
                    f"The picture has {file.width} x {file.height} pixels; expected at most {PIXELS // 10**6} million. "
                    "Make it smaller first."
                )
            return in_rgb(file)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(path, Path(path).name)  # not where the server keeps it
        raise gr.Error(f"This file cannot be read as a picture: {reason}. Expected JPEG, PNG or WebP.") from error


def look(checkpoint: Checkpoint, path: str, names: tuple[str, ...]) -> Seen:
    """Run a picture through the model once, squashed to its input size, so that the maps cover the whole picture."""
    picture = open_picture(path)
    device = next(checkpoint.model.parameters()).device
    config = resolve_data_config(model=checkpoint.model) | {"crop_mode": "squash", "crop_pct": 1.0}
    x = create_transform(**config)(as_input(picture, config["input_size"]))[None].to(device)
    with torch.inference_mode(), autocast(device, precision(AUTO, device)):
        base, maps = (found[0].float().cpu() for found in (checkpoint.model(x), score_maps(checkpoint.model, x)))
    picture.thumbnail((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    return Seen(picture, base, maps, names, checkpoint)


def as_input(picture: Image.Image, size: tuple[int, int, int]) -> Image.Image:
    """Squash a picture to `(C, H, W)`."""
    _, height, width = size
    return picture.resize((width, height), Image.Resampling.BICUBIC)
