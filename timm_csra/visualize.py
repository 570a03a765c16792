"""Where a class was seen, laid over the picture. Needs matplotlib (extra `demo`)."""

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
    """Lay the scores of a class over the picture that they are of.

    Args:
        image: the picture, as the model saw it: the same crop.
        score_map: `(rows, columns)`, one class of `score_maps`. Each location is shown as the rectangle of the picture
            that it stands for, not smoothed: nothing is known between two locations.
        low: score at the lower end of the colour map; None for the lowest of this map. Maps that are to be compared
            need the same.
        high: likewise, at the upper end.
        alpha: how much of the colour is seen, 0 to 1.
        cmap: a colour map of matplotlib.

    Returns:
        RGB, of the size of `image`.

    Raises:
        ValueError: a map that is not `(rows, columns)`, or holds values that are not finite.

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
