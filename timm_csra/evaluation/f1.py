"""Compute F1 on many samples of the images at once."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor

from .samples import Weights


@dataclass(frozen=True)
class F1:
    """F1 of the classes predicted for each image, in the two forms of the multi-label literature.

    Attributes:
        guesses: the predictions that are judged, sparse `(n, K)`.
        hits: the correct ones among them, sparse `(n, K)`.
        positives: the labels, sparse `(n, K)`.
        per_class: True for CF1, the harmonic mean of the mean precision and the mean recall over classes that have a
            positive, where the precision of a class that is never predicted counts as 0. False for OF1, from precision
            and recall of all decisions together.
    """

    guesses: csr_array
    hits: csr_array
    positives: csr_array
    per_class: bool
    classes: ClassVar[None] = None
    no_interval: ClassVar[None] = None

    @classmethod
    def of(cls, predicted: csr_array, targets: Tensor, per_class: bool) -> "F1":
        judged = targets.to(torch.int8).numpy()
        guesses = predicted - predicted.multiply(judged < 0)
        return cls(guesses, csr_array(predicted.multiply(judged > 0)), csr_array(judged > 0), per_class)

    @property
    def n(self) -> int:
        """Number of images: all of them, because in an image without a label every prediction is wrong."""
        return int(self.positives.shape[0])

    def weighted(self, weights: Weights) -> NDArray[np.float64]:
        hits, guesses, positives = (
            (part.astype(np.float32).T @ weights).astype(np.float64).T
            for part in (self.hits, self.guesses, self.positives)
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.per_class:
                counted = positives > 0
                precision = _mean_of_counted(np.where(counted, hits / np.maximum(guesses, 1), np.nan))
                recall = _mean_of_counted(np.where(counted, hits / positives, np.nan))
            else:
                precision, recall = hits.sum(1) / guesses.sum(1), hits.sum(1) / positives.sum(1)
            f1 = 2 * precision * recall / (precision + recall)
        return 100 * np.where(hits.sum(1) > 0, f1, np.where(positives.sum(1) > 0, 0.0, np.nan))


def _mean_of_counted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute the mean over the last axis without NaN; NaN, and no warning, where all values are NaN."""
    counted = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0.0).sum(axis=-1) / counted.sum(axis=-1)
