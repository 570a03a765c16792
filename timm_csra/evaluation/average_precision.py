"""Compute the mean average precision on many samples of the images at once."""

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
    """Mean of the average precision over classes that have a positive.

    Attributes:
        logits: logits of the setting, `(n, K)`, in parts.
        targets: `(n, K)`, see `metrics`.
        points: 11 for the interpolated form of Pascal VOC 2007: the mean, over the recalls 0, 0.1, ..., 1, of the
            highest precision at that recall or a higher one. None for the area under the steps,
            sum_g (R_g - R_{g-1}) * P_g.
        least: only classes with at least this many positives among all images are averaged.
    """

    logits: Logits
    targets: Tensor
    points: int | None = None
    least: int = 1

    @property
    def n(self) -> int:
        """Number of images: all of them, because an image without a label is a negative of every class."""
        return len(self.targets)

    @cached_property
    def positives(self) -> NDArray[np.intp]:
        """Number of positives of each class that is averaged."""
        positives = (self.targets > 0).sum(dim=0).numpy()
        return positives[positives >= self.least]

    @property
    def classes(self) -> int:
        return len(self.positives)

    @property
    def no_interval(self) -> str | None:
        """Why mAP has no interval, or None: with few positives, a bootstrap resample, which contains some positives
        twice and others not at all, has a higher average precision than new images would have."""
        median = np.median(self.positives) if self.classes else FEW
        if median >= FEW:
            return None
        return f"the median class of {self.classes} has {median:g} images; expected at least {FEW}: see mAP_{FEW}"

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        """Compute mAP on each sample. Each class is ranked once for all samples; images in no sample are skipped."""
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
    """Compute the average precision of one class for many weightings of the images.

    Precision is needed only at the scores of the G positives, u_1 < ... < u_G. The weights of images whose scores lie
    between two of these are summed first, since G is small compared with n.

    Args:
        scores: `(n,)`.
        targets: `(n,)`, 1 positive, 0 negative, -1 not judged.
        weights: how often each image is in each of B samples, `(n, B)`.
        points: see `MeanAveragePrecision`.

    Returns:
        `(B,)` in [0, 1]; NaN where no positive has weight.
    """
    positive = np.flatnonzero(targets > 0)
    if not len(positive):
        return np.full(weights.shape[1], np.nan)
    levels, level = np.unique(scores[positive], return_inverse=True)  # u, and the index in u of each positive
    reached = np.searchsorted(levels, scores, side="right")  # how many levels each image reaches, 0 to G
    reached[targets < 0] = 0
    gained = _sums(level, weights[positive], len(levels))
    positives = _from_the_top(gained)
    everything = _from_the_top(_sums(reached, weights, len(levels) + 1)[1:])
    # 0 where no image at this level or above has weight.
    precision = np.divide(positives, everything, out=np.zeros_like(positives), where=everything > 0)
    with np.errstate(invalid="ignore"):
        if points is None:
            return (gained * precision).sum(axis=0) / positives[0]
        highest = np.maximum.accumulate(precision, axis=0)  # a recall at least as high means this level or a lower one
        # Recall r is reached where positives * (points - 1) >= step * all positives: integers avoid rounding errors.
        steps = np.arange(points)[:, None] * positives[0]
        at = (positives[:, None] * (points - 1) >= steps).sum(axis=0) - 1  # the highest level that reaches it
        return np.where(positives[0] > 0, np.take_along_axis(highest, at, axis=0).mean(axis=0), np.nan)


def _sums(group: NDArray[np.intp], weights: Weights, groups: int) -> NDArray[np.float64]:
    """Sum the weights of the images in each group, `(groups, B)`; exact in float32 up to 2^24 images."""
    one = np.ones(len(group), dtype=np.float32)
    chooses = csc_array((one, group, np.arange(len(group) + 1)), shape=(groups, len(group)))
    return (chooses @ weights).astype(np.float64)


def _from_the_top(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over each level and all levels above it, `(groups, B)`. torch.cumsum takes a third of numpy's time here."""
    top: NDArray[np.float64] = torch.from_numpy(sums).flip(0).cumsum(0).flip(0).numpy()
    return top
