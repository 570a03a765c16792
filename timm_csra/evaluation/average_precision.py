"""Mean average precision on many samples of the images at once."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csc_array
from torch import Tensor

from .samples import Logits, Weights, slices

FEW = 5  # positives of the median class, below which mAP has no interval


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Mean over classes of the average precision, classes without a positive among the images left out.

    `points=11` is the interpolated form of Pascal VOC 2007: the mean, over recalls 0, 0.1, ..., 1, of the highest
    precision at that recall or more. None is the area under the steps, sum_g (R_g - R_{g-1}) * P_g. Classes with fewer
    positives than `least` among all images are left out.
    """

    logits: Logits
    targets: Tensor
    points: int | None = None
    least: int = 1

    @property
    def n(self) -> int:
        """All: an image without a label is a negative of every class."""
        return len(self.targets)

    @cached_property
    def positives(self) -> NDArray[np.intp]:
        """Of each class that is counted."""
        positives = (self.targets > 0).sum(dim=0).numpy()
        return positives[positives >= self.least]

    @property
    def classes(self) -> int:
        return len(self.positives)

    @property
    def no_interval(self) -> str | None:
        """With few positives the average precision of a resample, which draws some of them twice and leaves others out,
        lies above that of other images."""
        median = np.median(self.positives) if self.classes else FEW
        if median >= FEW:
            return None
        return f"the median class of {self.classes} has {median:g} images; expected at least {FEW}: see mAP_{FEW}"

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        """Each class is ranked once for all samples, and images that are in none of them are left aside."""
        drawn = weights.any(axis=1)
        targets, weights = self.targets.to(torch.int8).T.numpy(), weights[drawn]
        total, counted = np.zeros(weights.shape[1]), np.zeros(weights.shape[1], dtype=int)
        for classes in slices(len(targets), len(self.targets)):
            some = self.logits(classes=classes).T.contiguous().numpy()
            for scores, target in zip(some, targets[classes], strict=True):
                if np.count_nonzero(target > 0) < self.least:
                    continue
                precision = weighted_average_precision(scores[drawn], target[drawn], weights, self.points)
                total += np.nan_to_num(precision)
                counted += ~np.isnan(precision)
        with np.errstate(invalid="ignore"):
            return 100 * total / counted


def weighted_average_precision(
    scores: NDArray[np.floating],
    targets: NDArray[np.integer],
    weights: Weights,
    points: int | None = None,
) -> NDArray[np.float64]:
    """Average precision of one class, for many weightings of the images.

    Precision changes its meaning only at the scores of positives, u_1 < ... < u_G: those of the images between two of
    them are added up before anything else is done, G being small beside n.

    Args:
        scores: `(n,)`.
        targets: `(n,)`, 1 positive, 0 negative, -1 not judged.
        weights: `(n, B)`.
        points: see `MeanAveragePrecision`.

    Returns:
        `(B,)` in [0, 1]; NaN where no positive has weight.
    """
    positive = np.flatnonzero(targets > 0)
    if not len(positive):
        return np.full(weights.shape[1], np.nan)
    levels, level = np.unique(scores[positive], return_inverse=True)  # u, and the one of each positive
    reached = np.searchsorted(levels, scores, side="right")  # how many of u an image reaches, 0 to G
    reached[targets < 0] = 0
    gained = _sums(level, weights[positive], len(levels))
    positives = _from_the_top(gained)
    everything = _from_the_top(_sums(reached, weights, len(levels) + 1)[1:])
    # 0 where what is above has no weight.
    precision = np.divide(positives, everything, out=np.zeros_like(positives), where=everything > 0)
    with np.errstate(invalid="ignore"):
        if points is None:
            return (gained * precision).sum(axis=0) / positives[0]
        highest = np.maximum.accumulate(precision, axis=0)  # at this recall or more: this level or a lower one
        # Recall r is reached where positives * (points - 1) >= step * all positives: in integers, without rounding.
        steps = np.arange(points)[:, None] * positives[0]
        at = (positives[:, None] * (points - 1) >= steps).sum(axis=0) - 1  # the highest level that reaches it
        return np.where(positives[0] > 0, np.take_along_axis(highest, at, axis=0).mean(axis=0), np.nan)


def _sums(group: NDArray[np.intp], weights: Weights, groups: int) -> NDArray[np.float64]:
    """Weights of the images of each group, `(groups, B)`: exact in float32 up to 2^24 images."""
    one = np.ones(len(group), dtype=np.float32)
    chooses = csc_array((one, group, np.arange(len(group) + 1)), shape=(groups, len(group)))
    return (chooses @ weights).astype(np.float64)


def _from_the_top(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each level and all above it, `(groups, B)`. Torch's cumsum over rows takes a third of numpy's time."""
    top: NDArray[np.float64] = torch.from_numpy(sums).flip(0).cumsum(0).flip(0).numpy()
    return top
