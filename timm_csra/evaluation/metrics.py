"""Metrics in percent, from torchmetrics, with what comparing settings needs: subsets and resamples of the images.

Two traps are minded. Macro mAP of torchmetrics counts a class without a positive as 0: such classes are left out.
And its multi-label metrics pass logits through a sigmoid, which ties large ones: they get ranks instead, which are
strictly monotone in the logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multilabel_average_precision,
    multilabel_ranking_average_precision,
)
from torchmetrics.functional.retrieval import retrieval_r_precision

Rows = NDArray[np.intp]  # which images, with repetitions in a resample


class Evaluation(Protocol):
    """One metric of one setting, for any choice of images. Percent."""

    def value(self, rows: Rows) -> float:
        """The metric on the images `rows` `(m,)`; NaN where it is undefined."""

    def resampled(self, rows: Rows) -> NDArray[np.float64]:
        """The metric on each of B resamples `(B, m)` of the images: `(B,)`."""


@dataclass(frozen=True)
class PerImage:
    """A metric that is a mean over images. `values` `(n,)` in percent; NaN for images that it does not count."""

    values: NDArray[np.float64]

    def value(self, rows: Rows) -> float:
        return float(self.resampled(rows[None])[0])

    def resampled(self, rows: Rows) -> NDArray[np.float64]:
        return _mean_of_counted(self.values[rows])


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Mean over classes of the average precision, classes without a positive among the images left out."""

    logits: Tensor
    targets: Tensor

    def value(self, rows: Rows) -> float:
        index = torch.from_numpy(rows)
        targets = self.targets[index]
        positive = targets.any(dim=0)
        if not positive.any():
            return float("nan")
        ranks = _ranks(self.logits[index][:, positive], dim=0)
        precisions = multilabel_average_precision(
            ranks, targets[:, positive].long(), num_labels=ranks.shape[1], average=None, validate_args=False
        )
        return 100 * float(precisions.mean())

    def resampled(self, rows: Rows) -> NDArray[np.float64]:
        """A resample is a weight for each image, so that each class is sorted once for all resamples."""
        count = len(self.targets)
        weights = np.stack([np.bincount(sample, minlength=count) for sample in rows]).astype(np.float64)
        precisions = [
            weighted_average_precision(logits, targets, weights)
            for logits, targets in zip(self.logits.T.numpy(), self.targets.T.numpy(), strict=True)
            if targets.any()
        ]
        if not precisions:
            return np.full(len(rows), np.nan)
        return 100 * _mean_of_counted(np.stack(precisions, axis=-1))


def weighted_average_precision(
    scores: NDArray[np.floating], targets: NDArray[np.bool_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision of one class, sum_g (R_g - R_{g-1}) * P_g over groups g of equal scores, for many weightings.

    Args:
        scores: `(n,)`.
        targets: `(n,)`, which are positive.
        weights: `(B, n)`, how often each image counts.

    Returns:
        `(B,)` in [0, 1]; NaN where no positive has weight.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_group = np.append(np.diff(scores[order]) != 0, True)
    positives = np.cumsum(weights[:, order] * targets[order], axis=1)[:, last_of_group]
    everything = np.cumsum(weights[:, order], axis=1)[:, last_of_group]
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(positives / everything)  # 0 / 0 where the first images have no weight
        gained = np.diff(positives, axis=1, prepend=0)
        return (gained * precision).sum(axis=1) / positives[:, -1]


def _mean_of_counted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN, and no warning, where nothing is left."""
    counted = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0.0).sum(axis=-1) / counted.sum(axis=-1)


def _ranks(logits: Tensor, dim: int) -> Tensor:
    """Dense ranks of `logits` along `dim`, in (0, 1): torchmetrics takes them for probabilities as they are."""
    ranks = rankdata(logits.numpy(), method="dense", axis=dim)
    return torch.from_numpy(ranks / (logits.shape[dim] + 1.0))


def _accuracy(top_k: int) -> Callable[[Tensor, Tensor], Evaluation]:
    def evaluate(logits: Tensor, targets: Tensor) -> Evaluation:
        correct = multiclass_accuracy(
            logits[..., None],
            targets[:, None],
            num_classes=logits.shape[1],
            average="micro",
            top_k=top_k,
            multidim_average="samplewise",
            validate_args=False,
        )
        return PerImage(100.0 * correct.double().numpy())

    return evaluate


def _per_labelled_image(metric: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Evaluation]:
    """Mean over the images that have a label; the others are not counted."""

    def evaluate(logits: Tensor, targets: Tensor) -> Evaluation:
        values = np.full(len(targets), np.nan)
        ranks = _ranks(logits, dim=1)
        for row in targets.any(dim=1).nonzero().flatten().tolist():
            values[row] = 100 * float(metric(ranks[row], targets[row].long()))
        return PerImage(values)

    return evaluate


def _lrap(ranks: Tensor, target: Tensor) -> Tensor:
    return multilabel_ranking_average_precision(ranks[None], target[None], num_labels=len(target), validate_args=False)


# Metrics of single-label targets `(n,)` and of multi-label targets `(n, K)`, as (logits (n, K), targets) -> Evaluation.
SINGLE_LABEL: dict[str, Callable[[Tensor, Tensor], Evaluation]] = {"top1": _accuracy(1), "top5": _accuracy(5)}
MULTI_LABEL: dict[str, Callable[[Tensor, Tensor], Evaluation]] = {
    "mAP": MeanAveragePrecision,
    "lrap": _per_labelled_image(_lrap),  # label ranking average precision
    "recall_at_k": _per_labelled_image(retrieval_r_precision),  # k = number of labels of the image
}


def evaluate(logits: Tensor, targets: Tensor) -> dict[str, Evaluation]:
    """Every metric that applies.

    Args:
        logits: `(n, K)`.
        targets: class indices `(n,)`, or which classes are in the image `(n, K)` bool.

    Returns:
        By metric id: `top1` and, with K > 5, `top5`; or `mAP`, `lrap` and `recall_at_k`.
    """
    if targets.ndim == 2:
        return {name: metric(logits, targets) for name, metric in MULTI_LABEL.items()}
    applicable = {"top1"} if logits.shape[1] <= 5 else {"top1", "top5"}
    return {name: metric(logits, targets) for name, metric in SINGLE_LABEL.items() if name in applicable}
