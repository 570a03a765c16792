"""Metrics in percent, from torchmetrics, with what comparing settings needs: subsets and resamples of the images.

Two traps are minded. Macro mAP of torchmetrics counts a class without a positive as 0: such classes are left out.
And its multi-label metrics pass logits through a sigmoid, which ties large ones: they get ranks instead, which are
strictly monotone in the logits.

Targets: a class index for each image `(n,)`; or `(n, K)`, bool, or int8 with 1 present, 0 absent and -1 not judged (the
`difficult` objects of Pascal VOC): for that class the image is left out of mAP and F1, and in that image the class out
of the ranking.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
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
    """A metric that is a mean over images. `values` `(n,)` in percent; NaN for images that it does not count.
    `binary` where each image is a hit (100) or a miss (0)."""

    values: NDArray[np.float64]
    binary: bool = False

    def value(self, rows: Rows) -> float:
        return float(self.resampled(rows[None])[0])

    def resampled(self, rows: Rows) -> NDArray[np.float64]:
        return _mean_of_counted(self.values[rows])


@dataclass(frozen=True)
class MeanAveragePrecision:
    """Mean over classes of the average precision, classes without a positive among the images left out.

    `points=11` is the interpolated form of Pascal VOC 2007: the mean, over recalls 0, 0.1, ..., 1, of the highest
    precision at that recall or more. None is the area under the steps, sum_g (R_g - R_{g-1}) * P_g.
    """

    logits: Tensor
    targets: Tensor
    points: int | None = None

    def value(self, rows: Rows) -> float:
        index = torch.from_numpy(rows)
        targets = self.targets[index].to(torch.int8)
        if self.points is not None or (targets < 0).any():
            return float(self.resampled(rows[None])[0])
        positive = (targets > 0).any(dim=0)
        if not positive.any():
            return float("nan")
        ranks = _ranks(self.logits[index][:, positive], dim=0)
        precisions = multilabel_average_precision(
            ranks, targets[:, positive].long(), num_labels=ranks.shape[1], average=None, validate_args=False
        )
        return 100 * float(precisions.mean())

    def resampled(self, rows: Rows) -> NDArray[np.float64]:
        """A resample is a weight for each image, so that each class is sorted once for all resamples."""
        weights = _weights(rows, len(self.targets))
        targets = self.targets.to(torch.int8).numpy()
        precisions = [
            weighted_average_precision(logits[judged], target[judged] > 0, weights[:, judged], self.points)
            for logits, target in zip(self.logits.T.numpy(), targets.T, strict=True)
            if (target > 0).any()
            for judged in [target >= 0]
        ]
        if not precisions:
            return np.full(len(rows), np.nan)
        return 100 * _mean_of_counted(np.stack(precisions, axis=-1))


def weighted_average_precision(
    scores: NDArray[np.floating],
    targets: NDArray[np.bool_],
    weights: NDArray[np.float64],
    points: int | None = None,
) -> NDArray[np.float64]:
    """Average precision of one class over groups g of equal scores, for many weightings.

    Args:
        scores: `(n,)`.
        targets: `(n,)`, which are positive.
        weights: `(B, n)`, how often each image counts.
        points: see `MeanAveragePrecision`.

    Returns:
        `(B,)` in [0, 1]; NaN where no positive has weight.
    """
    order = np.argsort(-scores, kind="stable")
    last_of_group = np.append(np.diff(scores[order]) != 0, True)
    positives = np.cumsum(weights[:, order] * targets[order], axis=1)[:, last_of_group]
    everything = np.cumsum(weights[:, order], axis=1)[:, last_of_group]
    with np.errstate(invalid="ignore"):
        precision = np.nan_to_num(positives / everything)  # 0 / 0 where the first images have no weight
        if points is None:
            gained = np.diff(positives, axis=1, prepend=0)
            return (gained * precision).sum(axis=1) / positives[:, -1]
        highest = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # Recall r is reached where positives * (points - 1) >= step * all positives: in integers, without rounding.
        steps = np.arange(points)[:, None, None] * positives[None, :, -1:]
        reached = (positives[None] * (points - 1) >= steps).argmax(axis=2)
        mean = np.take_along_axis(highest, reached.T, axis=1).mean(axis=1)
        return np.where(positives[:, -1] > 0, mean, np.nan)


@dataclass(frozen=True)
class F1:
    """F1 of the classes `predicted` for each image, in the two forms of the multi-label literature.

    `per_class` (CF1): the harmonic mean of the mean precision and the mean recall over classes, those without a
    positive left out; the precision of a class that is never predicted counts as 0. Otherwise (OF1) precision and
    recall of all decisions together.
    """

    predicted: Tensor
    targets: Tensor
    per_class: bool

    def value(self, rows: Rows) -> float:
        return float(self.resampled(rows[None])[0])

    def resampled(self, rows: Rows) -> NDArray[np.float64]:
        weights = _weights(rows, len(self.targets))
        targets = self.targets.to(torch.int8).numpy()
        predicted = self.predicted.numpy() & (targets >= 0)
        hits, guesses, positives = (
            weights @ m.astype(np.float64) for m in (predicted & (targets > 0), predicted, targets > 0)
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


def _top_k_f1(k: int, per_class: bool) -> Callable[[Tensor, Tensor], Evaluation]:
    def evaluate(logits: Tensor, targets: Tensor) -> Evaluation:
        predicted = torch.zeros(logits.shape, dtype=torch.bool)
        return F1(predicted.scatter_(1, logits.topk(k, dim=1).indices, True), targets, per_class)

    return evaluate


def _threshold_f1(per_class: bool) -> Callable[[Tensor, Tensor], Evaluation]:
    """Probability 0.5 of a sigmoid is logit 0."""
    return lambda logits, targets: F1(logits > 0, targets, per_class)


def _weights(rows: Rows, count: int) -> NDArray[np.float64]:
    """How often each of `count` images is in each resample, `(B, count)`."""
    return np.stack([np.bincount(sample, minlength=count) for sample in rows]).astype(np.float64)


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
        return PerImage(100.0 * correct.double().numpy(), binary=True)

    return evaluate


def _any_label(logits: Tensor, targets: Tensor) -> Evaluation:
    """Whether the top class is one of the image's labels; images without a label are not counted."""
    correct = (targets > 0).gather(1, logits.argmax(dim=1, keepdim=True))[:, 0]
    values = 100.0 * correct.double().numpy()
    return PerImage(np.where((targets > 0).any(dim=1).numpy(), values, np.nan), binary=True)


def _per_labelled_image(
    metric: Callable[[Tensor, Tensor], Tensor], at_least: int = 1
) -> Callable[[Tensor, Tensor], Evaluation]:
    """Mean over the images that have this many labels; the others are not counted."""

    def evaluate(logits: Tensor, targets: Tensor) -> Evaluation:
        values = np.full(len(targets), np.nan)
        targets = targets.to(torch.int8)
        for row in ((targets > 0).sum(dim=1) >= at_least).nonzero().flatten().tolist():
            judged = targets[row] >= 0
            ranks = _ranks(logits[row : row + 1, judged], dim=1)[0]
            values[row] = 100 * float(metric(ranks, targets[row, judged].long()))
        return PerImage(values)

    return evaluate


def _lrap(ranks: Tensor, target: Tensor) -> Tensor:
    return multilabel_ranking_average_precision(ranks[None], target[None], num_labels=len(target), validate_args=False)


Metric = Callable[[Tensor, Tensor], Evaluation]

SINGLE_LABEL: dict[str, Metric] = {"top1": _accuracy(1), "top5": _accuracy(5)}
MULTI_LABEL: dict[str, Metric] = {
    "mAP": MeanAveragePrecision,
    "lrap": _per_labelled_image(_lrap),  # label ranking average precision
    "recall_at_k": _per_labelled_image(retrieval_r_precision),  # k = number of labels of the image
    "CF1_top3": _top_k_f1(3, per_class=True),
    "OF1_top3": _top_k_f1(3, per_class=False),
}
# Where one object may have several right names (ImageNet ReaL): is the top class one of them; and how are they ranked
# in images that have two or more.
ANY_LABEL: dict[str, Metric] = {
    "top1": _any_label,
    "lrap": _per_labelled_image(_lrap, at_least=2),
    "recall_at_k": _per_labelled_image(retrieval_r_precision, at_least=2),
}
SIGMOID: dict[str, Metric] = {"CF1": _threshold_f1(per_class=True), "OF1": _threshold_f1(per_class=False)}
VOC2007: dict[str, Metric] = {"mAP": partial(MeanAveragePrecision, points=11)}

_LEAST_CLASSES = {"top5": 6, "CF1_top3": 4, "OF1_top3": 4}  # with fewer they count every class as predicted


def evaluate(logits: Tensor, targets: Tensor, metrics: dict[str, Metric] | None = None) -> dict[str, Evaluation]:
    """Every metric that applies.

    Args:
        logits: `(n, K)`.
        targets: class indices `(n,)`, or which classes are in the image `(n, K)`, see the head of this module.
        metrics: by id; None for `SINGLE_LABEL` or `MULTI_LABEL`, as the targets are.

    Returns:
        By metric id, those that K classes allow.
    """
    chosen = metrics if metrics is not None else SINGLE_LABEL if targets.ndim == 1 else MULTI_LABEL
    classes = logits.shape[1]
    return {name: m(logits, targets) for name, m in chosen.items() if classes >= _LEAST_CLASSES.get(name, 1)}


def calibration(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """How far softmax probabilities can be believed: `ece`, the expected calibration error in percent (15 bins, l1),
    and `nll`, the mean negative log-likelihood in nats, of single labels `(n,)`."""
    ece = multiclass_calibration_error(
        logits.softmax(dim=1), targets, num_classes=logits.shape[1], n_bins=15, norm="l1", validate_args=False
    )
    return {"ece": 100 * float(ece), "nll": float(F.cross_entropy(logits.double(), targets))}
