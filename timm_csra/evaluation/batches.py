"""Check the batches of a user's loader."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import describe
from ..inputs import as_weights


def checked(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], any_targets: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a user's loader that are not empty, with images on the device and in the dtype of the model.

    Args:
        model: the model that will run on the images.
        loader: yields `(images, targets)`.
        any_targets: accept targets of any values, for a metric of the user's own.

    Raises:
        TypeError: a batch is not two tensors, or its images are not floats `(N, C, H, W)`.
        ValueError: targets do not fit the images, the classes of the model, or the earlier batches.
    """
    classes, shape = 0, None
    for batch in loader:
        parts = batch if isinstance(batch, (tuple, list)) else [batch]
        if len(parts) != 2 or not all(isinstance(part, Tensor) for part in parts):
            found = ", ".join(type(part).__name__ for part in parts)
            raise TypeError(f"{describe(model)}: the loader gave {found}; expected two tensors: (images, targets).")
        images, targets = as_weights(model, parts[0]), parts[1]
        if not len(images) and targets.shape[:1] == (0,):
            continue
        classes = classes or _width(model, images)
        shape = targets.shape[1:] if shape is None else shape
        if (
            targets.shape[:1] != images.shape[:1]
            or targets.shape[1:] != shape
            or not (any_targets or _fit(targets, classes))
        ):
            values = ", ".join(f"{value:g}" for value in targets.unique()[:4].tolist())
            raise ValueError(
                f"{describe(model)}: found targets {tuple(targets.shape)} for {len(images)} images, with values "
                f"{values}; expected class indices (N,) from 0 to {classes - 1}, or (N, {classes}) with 1 for each "
                "class in the picture, 0 for the others and -1 for classes that are not judged, and the same form in "
                "all batches."
            )
        yield images, targets if any_targets or targets.ndim > 1 else targets.long()


def _width(model: nn.Module, images: Tensor) -> int:
    """Count the classes that the head returns: `num_classes` is wrong after a classifier has been replaced by hand."""
    with torch.inference_mode():
        logits = cast(Tensor, model(images[:1]))
    return logits.shape[1]


def _fit(targets: Tensor, classes: int) -> bool:
    allowed = torch.arange(classes) if targets.ndim == 1 else torch.tensor([-1, 0, 1])
    return targets.shape[1:] in ((), (classes,)) and bool(torch.isin(targets.cpu().double(), allowed.double()).all())
