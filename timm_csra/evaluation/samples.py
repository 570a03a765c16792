"""Evaluate a metric of one setting on any samples of the images: on a part of them, or on bootstrap resamples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .scoring import ALL

Rows = NDArray[np.integer]  # indices of images; a resample repeats some
Weights = NDArray[np.float32]  # `(n, B)`: how often each of n images is in each of B samples of them, whole numbers


class Logits(Protocol):
    """A function that returns the logits of some images and classes, the same at every call."""

    def __call__(self, images: slice = ALL, classes: slice = ALL) -> Tensor:
        """Return the logits `(n, K)`, or the requested part of them."""


CHUNK = 2**20  # how many logits a metric processes at a time


class Evaluation(Protocol):
    """One metric of one setting, for any samples of the images, in percent."""

    @property
    def n(self) -> int:
        """Number of images that the metric counts."""

    @property
    def classes(self) -> int | None:
        """Number of classes that the metric is a mean over; None if it is not a mean over classes."""

    @property
    def no_interval(self) -> str | None:
        """Why the bootstrap gives no valid interval; None where it gives one."""

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        """Compute the metric on each of B samples of the images: `(B,)`, NaN where it is undefined."""


def weights_of(samples: Sequence[Rows] | NDArray[np.integer], count: int) -> Weights:
    """Count how often each of `count` images is in each sample; a sample is a sequence of image indices.

    Example:
        >>> weights_of([[0, 2], [1, 1, 1]], 3)
        array([[1., 0.],
               [0., 3.],
               [1., 0.]], dtype=float32)
    """
    weights = np.empty((len(samples), count), dtype=np.float32)
    for row, sample in zip(weights, samples, strict=True):
        row[:] = np.bincount(sample, minlength=count)
    return np.ascontiguousarray(weights.T)


@dataclass(frozen=True)
class PerImage:
    """A metric that is a mean over images.

    Attributes:
        values: the value of each image in percent, `(n,)`; NaN for images that the metric does not count.
        binary: whether each value is a hit (100) or a miss (0).
    """

    values: NDArray[np.float64]
    binary: bool = False
    classes: ClassVar[None] = None
    no_interval: ClassVar[None] = None

    @property
    def n(self) -> int:
        return int(np.count_nonzero(~np.isnan(self.values)))

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        return weighted_means(self.values[None], weights)[0]


def weighted_means(values: NDArray[np.float64], weights: Weights) -> NDArray[np.float64]:
    """Compute weighted means over images, `(S, B)`, of values `(S, n)`, NaN where not counted, and weights `(n, B)`."""
    counted = ~np.isnan(values)
    terms = np.concatenate([np.where(counted, values, 0.0), counted])
    parts = slices(*weights.shape)  # float64 sums, of some rows at a time to bound memory
    sums = sum((terms[:, rows] @ weights[rows] for rows in parts), np.zeros((len(terms), weights.shape[1])))
    with np.errstate(invalid="ignore"):
        return np.divide(*np.split(sums, 2))


def weighted(evaluations: Sequence[Evaluation], weights: Weights) -> NDArray[np.float64]:
    """Compute one metric of S settings on each of B samples, `(S, B)`. Images that are in no sample are skipped."""
    drawn = weights.any(axis=1)
    if all(isinstance(evaluation, PerImage) for evaluation in evaluations):
        values = np.stack([evaluation.values[drawn] for evaluation in evaluations])  # type: ignore[attr-defined]
        return weighted_means(values, weights[drawn])
    return np.stack([evaluation.weighted(weights) for evaluation in evaluations])


def slices(count: int, each: int) -> Iterator[slice]:
    """Divide `count` images or classes with `each` logits into slices of at most about `CHUNK` logits."""
    size = max(1, CHUNK // max(1, each))
    return (slice(start, start + size) for start in range(0, count, size))
