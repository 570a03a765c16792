"""Metrics in percent, with what comparing settings needs: any weighting of the images, be it a part or a resample.

Accuracy and calibration are torchmetrics'. The others are written here, and tested against torchmetrics and
scikit-learn, because 80 settings of 50,000 images and 1,000 classes need them in bulk: average precision of many
weightings of the images at once, ranking metrics without a loop over images. Two traps of torchmetrics are minded
thereby: its macro mAP counts a class without a positive as 0 (such classes are left out), and its multi-label metrics
pass logits through a sigmoid, which ties large ones.

Nothing of size `(n, K)` is made for a setting: metrics ask for the logits of some images or some classes at a time, and
ask again for a resample.

Targets: a class index for each image `(n,)`; or `(n, K)`, bool, or int8 with 1 present, 0 absent and -1 not judged (the
`difficult` objects of Pascal VOC): for that class the image is left out of mAP and F1, and in that image the class out
of the ranking.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from .scoring import ALL

Rows = NDArray[np.integer]  # which images, with repetitions in a resample
Weights = NDArray[np.float32]  # `(n, B)`: how often each of n images is in each of B samples of them, whole numbers


class Logits(Protocol):
    """Gives the logits of some images and classes, the same at every call."""

    def __call__(self, images: slice = ALL, classes: slice = ALL) -> Tensor:
        """`(n, K)`, or that part of it."""


CHUNK = 2**20  # logits that a metric looks at in one step
FEW = 5  # positives of the median class, below which mAP has no interval


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
    parts = _slices(*weights.shape)  # sums are made in float64, of some weights at a time
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
        for classes in _slices(len(targets), len(self.targets)):
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
    return np.cumsum(sums[::-1], axis=0)[::-1]


def _of_frequent_classes(points: int | None = None) -> "Metric":
    """mAP of the classes with positives enough, where it does not suffice to look at all."""

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation | None:
        found = MeanAveragePrecision(logits, targets, points, least=FEW)
        return found if found.classes and MeanAveragePrecision(logits, targets, points).no_interval else None

    return evaluate


@dataclass(frozen=True)
class F1:
    """F1 of the classes predicted for each image, in the two forms of the multi-label literature.

    `per_class` (CF1): the harmonic mean of the mean precision and the mean recall over classes, those without a
    positive left out; the precision of a class that is never predicted counts as 0. Otherwise (OF1) precision and
    recall of all decisions together. `guesses` and `hits` are the predictions that are judged, and the right ones
    among them, `positives` the labels: sparse, `(n, K)`.
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
        """All: in an image without a label every prediction is wrong."""
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


def _top_k_f1(k: int, per_class: bool) -> "Metric":
    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        top = _by_images(lambda part, _: part.topk(k, dim=1).indices, logits, targets).numpy()
        ones, starts = np.ones(top.size, dtype=np.int8), np.arange(0, top.size + 1, k)
        return F1.of(csr_array((ones, top.ravel(), starts), shape=targets.shape), targets, per_class)

    return evaluate


def _threshold_f1(per_class: bool) -> "Metric":
    """Probability 0.5 of a sigmoid is logit 0."""

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        above = _by_images(lambda part, _: part > 0, logits, targets).numpy()
        return F1.of(csr_array(above.astype(np.int8)), targets, per_class)

    return evaluate


def _mean_of_counted(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the last axis without NaN; NaN, and no warning, where nothing is left."""
    counted = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(counted, values, 0.0).sum(axis=-1) / counted.sum(axis=-1)


def _slices(count: int, each: int) -> Iterator[slice]:
    """Of `count` images or classes, with `each` logits, so that a bounded number of logits is looked at in one step."""
    size = max(1, CHUNK // max(1, each))
    return (slice(start, start + size) for start in range(0, count, size))


def _by_images(metric: Callable[[Tensor, Tensor], Tensor], logits: Logits, targets: Tensor) -> Tensor:
    """What a function says of the logits and targets of images one by one."""
    classes = logits(slice(0, 1)).shape[1]
    return torch.cat([metric(logits(images), targets[images]) for images in _slices(len(targets), classes)])


def _accuracy(top_k: int) -> "Metric":
    def hits(logits: Tensor, targets: Tensor) -> Tensor:
        return multiclass_accuracy(
            logits[..., None],
            targets[:, None],
            num_classes=logits.shape[1],
            average="micro",
            top_k=top_k,
            multidim_average="samplewise",
            validate_args=False,
        ).double()

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        return PerImage(100.0 * _by_images(hits, logits, targets).numpy(), binary=True)

    return evaluate


def _any_label(logits: Logits, targets: Tensor) -> Evaluation:
    """Whether the top class is one of the image's labels; images without a label are not counted."""

    def right(part: Tensor, labels: Tensor) -> Tensor:
        return (labels > 0).gather(1, part.argmax(dim=1, keepdim=True))[:, 0]

    values = 100.0 * _by_images(right, logits, targets).double().numpy()
    return PerImage(np.where((targets > 0).any(dim=1).numpy(), values, np.nan), binary=True)


def _ranking(metric: Callable[[Tensor, Tensor], Tensor], at_least: int = 1) -> "Metric":
    """Mean over the images that have this many labels; the others are not counted. The metric gets the logits, with
    what is not judged below everything else, and the labels."""

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        targets = targets.to(torch.int8)

        def of_images(scores: Tensor, target: Tensor) -> Tensor:
            values = torch.full((len(target),), torch.nan, dtype=torch.float64)
            counted = (target > 0).sum(dim=1) >= at_least
            if counted.any():
                judged = scores.masked_fill(target < 0, -torch.inf)
                values[counted] = 100 * metric(judged[counted], target[counted] > 0)
            return values

        return PerImage(_by_images(of_images, logits, targets).numpy())

    return evaluate


def _lrap(scores: Tensor, labels: Tensor) -> Tensor:
    """Label ranking average precision: of each label, how many of the classes that score as high are labels; the mean
    over an image's labels, `(n,)`."""
    image, label = labels.nonzero(as_tuple=True)
    values = torch.zeros(len(scores), dtype=torch.float64)
    for some in torch.arange(len(image)).split(max(1, CHUNK // scores.shape[1])):
        i, reached = image[some], scores[image[some]] >= scores[image[some], label[some], None]
        values.index_add_(0, i, (reached & labels[i]).sum(1) / reached.sum(1, dtype=torch.float64))
    return values / labels.sum(dim=1)


def _r_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """R-precision: how many of the R highest classes are labels, as a share of R, the number of labels: `(n,)`."""
    count = labels.sum(dim=1)
    highest = scores.topk(int(count.max()), dim=1).indices
    hits = labels.gather(1, highest).cumsum(dim=1).gather(1, count[:, None] - 1)[:, 0]
    return hits.double() / count


Metric = Callable[[Logits, Tensor], Evaluation | None]
"""None where it has nothing to say of such targets."""

SINGLE_LABEL: dict[str, Metric] = {"top1": _accuracy(1), "top5": _accuracy(5)}
MULTI_LABEL: dict[str, Metric] = {
    "mAP": MeanAveragePrecision,
    f"mAP_{FEW}": _of_frequent_classes(),  # where mAP has no interval
    "lrap": _ranking(_lrap),  # label ranking average precision
    "r_precision": _ranking(_r_precision),  # precision at R, the number of labels of the image
    "CF1_top3": _top_k_f1(3, per_class=True),
    "OF1_top3": _top_k_f1(3, per_class=False),
}
# Where one object may have several right names (ImageNet ReaL): is the top class one of them; and how are they ranked
# in images that have two or more.
ANY_LABEL: dict[str, Metric] = {
    "top1": _any_label,
    "lrap": _ranking(_lrap, at_least=2),
    "r_precision": _ranking(_r_precision, at_least=2),
}
SIGMOID: dict[str, Metric] = {"CF1": _threshold_f1(per_class=True), "OF1": _threshold_f1(per_class=False)}
VOC2007: dict[str, Metric] = {"mAP": partial(MeanAveragePrecision, points=11), f"mAP_{FEW}": _of_frequent_classes(11)}

_LEAST_CLASSES = {"top5": 6, "CF1_top3": 4, "OF1_top3": 4}  # with fewer they count every class as predicted


def evaluate(
    logits: Tensor | Logits, targets: Tensor, metrics: Mapping[str, Metric] | None = None
) -> dict[str, Evaluation]:
    """Every metric that applies.

    Args:
        logits: `(n, K)`; or what gives them in parts, see `Logits`, so that they need not be kept.
        targets: class indices `(n,)`, or which classes are in the image `(n, K)`, see the head of this module.
        metrics: by id; None for `SINGLE_LABEL` or `MULTI_LABEL`, as the targets are.

    Returns:
        By metric id, those that K classes allow and that say something of such targets.
    """
    if isinstance(logits, Tensor):
        every = logits
        return evaluate(lambda images=ALL, classes=ALL: every[images, classes], targets, metrics)
    chosen = metrics if metrics is not None else SINGLE_LABEL if targets.ndim == 1 else MULTI_LABEL
    classes = logits(slice(0, 1)).shape[1]
    found = {name: m(logits, targets) for name, m in chosen.items() if classes >= _LEAST_CLASSES.get(name, 1)}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def calibration(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """How far softmax probabilities can be believed: `ece`, the expected calibration error in percent (15 bins, l1),
    and `nll`, the mean negative log-likelihood in nats, of single labels `(n,)`."""
    ece = multiclass_calibration_error(
        logits.softmax(dim=1), targets, num_classes=logits.shape[1], n_bins=15, norm="l1", validate_args=False
    )
    return {"ece": 100 * float(ece), "nll": float(F.cross_entropy(logits.double(), targets))}
