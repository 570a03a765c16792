"""Draw the score map of a class over the picture. Needs matplotlib (extra `demo`)."""

from importlib.util import find_spec

if find_spec("matplotlib") is None:
    raise ModuleNotFoundError(
        "timm_csra.visualize needs matplotlib, which is not installed: pip install 'timm-csra[demo]'", name="matplotlib"
    )

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor


def overlay(
    image: Image.Image,
    score_map: Tensor,
    *,
    low: float | None = None,
    high: float | None = None,
    alpha: float = 0.6,
    cmap: str = "inferno",
) -> Image.Image:
    """Draw the score map of one class over the picture that it was computed from.

    Args:
        image: the picture, cropped as the model saw it.
        score_map: `(rows, columns)`, one class of `score_maps`. Each location is drawn as a rectangle of the picture,
            without smoothing, because there are no scores between two locations.
        low: score at the lower end of the colour map; None for the lowest score of this map. Give the same `low` and
            `high` to maps that are to be compared.
        high: score at the upper end of the colour map; None for the highest score of this map.
        alpha: opacity of the colours, 0 to 1.
        cmap: name of a matplotlib colour map.

    Returns:
        An RGB image of the size of `image`.

    Raises:
        ValueError: `score_map` is not `(rows, columns)`, or has values that are not finite.

    Example:
        >>> import torch
        >>> overlay(Image.new("RGB", (224, 224)), torch.rand(7, 7)).size
        (224, 224)
    """
    if score_map.ndim != 2 or not score_map.isfinite().all():
        shape = tuple(score_map.shape)
        raise ValueError(f"score_map: found {shape}, expected finite scores (rows, columns) of one class.")
    scores = score_map.detach().float().cpu().numpy()
    low = float(scores.min()) if low is None else low
    high = float(scores.max()) if high is None else high
    share = np.clip((scores - low) / (high - low), 0, 1) if high > low else np.zeros_like(scores)
    colours = Image.fromarray((255 * colormaps[cmap](share)[..., :3]).round().astype(np.uint8))
    return Image.blend(image.convert("RGB"), colours.resize(image.size, Image.Resampling.NEAREST), alpha)
