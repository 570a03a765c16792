"""The batches of somebody else's loader: what is expected of them."""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import describe
from ..inputs import as_weights


def checked(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], any_targets: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of somebody else's loader that are not empty, images `as_weights`. The first that does not fit is
    refused, before more of it is run."""
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
                f"{values}; expected for each image a class index (N,) from 0 to {classes - 1}, or (N, {classes}) with "
                "1 for each class in the picture, 0 for the others, -1 for what is not to be judged; the same in all "
                "batches."
            )
        yield images, targets if any_targets or targets.ndim > 1 else targets.long()


def _width(model: nn.Module, images: Tensor) -> int:
    """How many classes the head gives: `num_classes` knows nothing of a classifier that was put in its place."""
    with torch.inference_mode():
        logits = cast(Tensor, model(images[:1]))
    return logits.shape[1]


def _fit(targets: Tensor, classes: int) -> bool:
    allowed = torch.arange(classes) if targets.ndim == 1 else torch.tensor([-1, 0, 1])
    return targets.shape[1:] in ((), (classes,)) and bool(torch.isin(targets.cpu().double(), allowed.double()).all())
