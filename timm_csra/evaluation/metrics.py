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
    """mAP of the classes with positives enough, where it does not suffice to look at all."""

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
    """Probability 0.5 of a sigmoid is logit 0."""

    def evaluate(logits: Logits, targets: Tensor) -> Evaluation:
        above = _by_images(lambda part, _: part > 0, logits, targets).numpy()
        return F1.of(csr_array(above.astype(np.int8)), targets, per_class)

    return evaluate


def _by_images(metric: Callable[[Tensor, Tensor], Tensor], logits: Logits, targets: Tensor) -> Tensor:
    """What a function says of the logits and targets of images one by one."""
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
