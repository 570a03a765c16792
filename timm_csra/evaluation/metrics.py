"""Compute metrics in percent for any weighting of the images: all of them, a part, or a bootstrap resample.

Accuracy and calibration error are torchmetrics'. The other metrics are implemented here, and tested against
torchmetrics and scikit-learn, because evaluating 80 settings on 50,000 images and 1,000 classes needs them in bulk:
average precision for many weightings of the images at once, and ranking metrics without a loop over images. They differ
from torchmetrics in two ways: mAP leaves out a class without a positive, which torchmetrics counts as 0, and logits do
not pass through a sigmoid, which makes large logits equal.

No array of size `(n, K)` is made for a setting: metrics request the logits of some images or some classes at a time,
and request them again for a resample.

Targets are a class index for each image, `(n,)`, or `(n, K)`: bool, or int8 with 1 present, 0 absent and -1 not judged
(the `difficult` objects of Pascal VOC). Where a class is not judged in an image, mAP and F1 of the class skip the
image, and the ranking metrics of the image skip the class.
"""

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from .average_precision import FEW, MeanAveragePrecision
from .f1 import F1
from .samples import CHUNK, Evaluation, Logits, PerImage, slices
from .scoring import ALL


def _of_frequent_classes(points: int | None = None) -> "Metric":
    """Return the metric mAP over classes with at least `FEW` positives; it applies where mAP has no interval."""

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation | None:
        found = MeanAveragePrecision(logits, targets, points, least=FEW)
        return found if found.classes and MeanAveragePrecision(logits, targets, points).no_interval else None

    return evaluate


def _top_k_f1(k: int, per_class: bool) -> "Metric":
    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        top = _by_images(lambda part, _: part.topk(k, dim=1).indices, logits, targets).numpy()
        ones, starts = np.ones(top.size, dtype=np.int8), np.arange(0, top.size + 1, k)
        return F1.of(csr_array((ones, top.ravel(), starts), shape=targets.shape), targets, per_class)

    return evaluate


def _threshold_f1(per_class: bool) -> "Metric":
    """Return the F1 of the classes whose sigmoid is above 0.5, which means a logit above 0."""

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        above = _by_images(lambda part, _: part > 0, logits, targets).numpy()
        return F1.of(csr_array(above.astype(np.int8)), targets, per_class)

    return evaluate


def _by_images(metric: Callable[[Tensor, Tensor], Tensor], logits: Logits, targets: Tensor) -> Tensor:
    """Apply a function of logits and targets, `(m, K)` and `(m, ...)`, to all images, some at a time."""
    classes = logits(slice(0, 1)).shape[1]
    return torch.cat([metric(logits(images), targets[images]) for images in slices(len(targets), classes)])


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
    """Evaluate whether the top class is one of the image's labels; images without a label are not counted."""

    def right(part: Tensor, labels: Tensor) -> Tensor:
        return (labels > 0).gather(1, part.argmax(dim=1, keepdim=True))[:, 0]

    values = 100.0 * _by_images(right, logits, targets).double().numpy()
    return PerImage(np.where((targets > 0).any(dim=1).numpy(), values, np.nan), binary=True)


def _ranking(metric: Callable[[Tensor, Tensor], Tensor], at_least: int = 1) -> "Metric":
    """Return the mean of a metric over the images that have at least `at_least` labels. The metric takes logits, with
    -inf for classes that are not judged, and labels, both `(m, K)`."""

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
    """Compute the label ranking average precision, `(n,)`: for each label, the share of labels among the classes that
    score at least as high; then the mean over the image's labels."""
    image, label = labels.nonzero(as_tuple=True)
    values = torch.zeros(len(scores), dtype=torch.float64)
    for some in torch.arange(len(image)).split(max(1, CHUNK // scores.shape[1])):
        i, reached = image[some], scores[image[some]] >= scores[image[some], label[some], None]
        values.index_add_(0, i, (reached & labels[i]).sum(1) / reached.sum(1, dtype=torch.float64))
    return values / labels.sum(dim=1)


def _r_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Compute the R-precision, `(n,)`: the share of labels among the R highest classes, with R the number of labels."""
    count = labels.sum(dim=1)
    highest = scores.topk(int(count.max()), dim=1).indices
    hits = labels.gather(1, highest).cumsum(dim=1).gather(1, count[:, None] - 1)[:, 0]
    return hits.double() / count


Metric = Callable[[Logits, Tensor], Evaluation | None]
"""A metric; it returns None where it does not apply to the targets."""

SINGLE_LABEL: dict[str, Metric] = {"top1": _accuracy(1), "top5": _accuracy(5)}
MULTI_LABEL: dict[str, Metric] = {
    "mAP": MeanAveragePrecision,
    f"mAP_{FEW}": _of_frequent_classes(),  # applies where mAP has no interval
    "lrap": _ranking(_lrap),  # label ranking average precision
    "r_precision": _ranking(_r_precision),  # precision at R, the number of labels of the image
    "CF1_top3": _top_k_f1(3, per_class=True),
    "OF1_top3": _top_k_f1(3, per_class=False),
}
# For images whose object may have several correct labels (ImageNet ReaL): whether the top class is one of them, and how
# the labels are ranked in images that have two or more.
ANY_LABEL: dict[str, Metric] = {
    "top1": _any_label,
    "lrap": _ranking(_lrap, at_least=2),
    "r_precision": _ranking(_r_precision, at_least=2),
}
SIGMOID: dict[str, Metric] = {"CF1": _threshold_f1(per_class=True), "OF1": _threshold_f1(per_class=False)}
VOC2007: dict[str, Metric] = {"mAP": partial(MeanAveragePrecision, points=11), f"mAP_{FEW}": _of_frequent_classes(11)}

_LEAST_CLASSES = {"top5": 6, "CF1_top3": 4, "OF1_top3": 4}  # with fewer classes, every class would be predicted


def evaluate(
    logits: Tensor | Logits, targets: Tensor, metrics: Mapping[str, Metric] | None = None
) -> dict[str, Evaluation]:
    """Compute all metrics that apply.

    Args:
        logits: `(n, K)`; or a function that returns parts of them, see `Logits`, so that they need not be in memory.
        targets: class indices `(n,)`, or labels `(n, K)`; see the docstring of this module.
        metrics: metrics by id; None for `SINGLE_LABEL` or `MULTI_LABEL`, depending on the targets.

    Returns:
        An evaluation for each metric that applies to these targets and to K classes, by metric id.
    """
    if isinstance(logits, Tensor):
        every = logits
        return evaluate(lambda images=ALL, classes=ALL: every[images, classes], targets, metrics)
    chosen = metrics if metrics is not None else SINGLE_LABEL if targets.ndim == 1 else MULTI_LABEL
    classes = logits(slice(0, 1)).shape[1]
    found = {name: m(logits, targets) for name, m in chosen.items() if classes >= _LEAST_CLASSES.get(name, 1)}
    return {name: evaluation for name, evaluation in found.items() if evaluation is not None}


def calibration(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Compute the calibration of softmax probabilities for single labels `(n,)`: `ece`, the expected calibration error
    in percent (15 bins, l1), and `nll`, the mean negative log-likelihood in nats."""
    ece = multiclass_calibration_error(
        logits.softmax(dim=1), targets, num_classes=logits.shape[1], n_bins=15, norm="l1", validate_args=False
    )
    return {"ece": 100 * float(ece), "nll": float(F.cross_entropy(logits.double(), targets))}
