"""A metric of one setting on any samples of the images: on a part, or on resamples."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .scoring import ALL

Rows = NDArray[np.integer]  # which images, with repetitions in a resample
Weights = NDArray[np.float32]  # `(n, B)`: how often each of n images is in each of B samples of them, whole numbers


class Logits(Protocol):
    """Gives the logits of some images and classes, the same at every call."""

    def __call__(self, images: slice = ALL, classes: slice = ALL) -> Tensor:
        """`(n, K)`, or that part of it."""


CHUNK = 2**20  # logits that a metric looks at in one step


class Evaluation(Protocol):
    """One metric of one setting, for any samples of the images. Percent."""

    @property
    def n(self) -> int:
        """How many of the images count for it."""

    @property
    def classes(self) -> int | None:
        """How many classes it is a mean over; None where it is none over classes."""

    @property
    def no_interval(self) -> str | None:
        """Why resamples of the images say little about it; None where they give an interval."""

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        """The metric on each of B samples of the images: `(B,)`, NaN where it is undefined."""


def weights_of(samples: Sequence[Rows] | NDArray[np.integer], count: int) -> Weights:
    """Of samples, each a row of image indices below `count`.

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
    """A metric that is a mean over images. `values` `(n,)` in percent; NaN for images that it does not count.
    `binary` where each image is a hit (100) or a miss (0)."""

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
    """Means over images: of values `(S, n)`, NaN for images that are not counted, and weights `(n, B)`, `(S, B)`."""
    counted = ~np.isnan(values)
    terms = np.concatenate([np.where(counted, values, 0.0), counted])
    parts = slices(*weights.shape)  # sums are made in float64, of some weights at a time
    sums = sum((terms[:, rows] @ weights[rows] for rows in parts), np.zeros((len(terms), weights.shape[1])))
    with np.errstate(invalid="ignore"):
        return np.divide(*np.split(sums, 2))


def weighted(evaluations: Sequence[Evaluation], weights: Weights) -> NDArray[np.float64]:
    """One metric of S settings on each of B samples: `(S, B)`. Images in none of the samples are left aside."""
    drawn = weights.any(axis=1)
    if all(isinstance(evaluation, PerImage) for evaluation in evaluations):
        values = np.stack([evaluation.values[drawn] for evaluation in evaluations])  # type: ignore[attr-defined]
        return weighted_means(values, weights[drawn])
    return np.stack([evaluation.weighted(weights) for evaluation in evaluations])


def slices(count: int, each: int) -> Iterator[slice]:
    """Of `count` images or classes, with `each` logits, so that a bounded number of logits is looked at in one step."""
    size = max(1, CHUNK // max(1, each))
    return (slice(start, start + size) for start in range(0, count, size))
