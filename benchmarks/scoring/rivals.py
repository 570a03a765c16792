"""Run the plain model for comparison: on five crops of each image, and for the time of one pass."""

import time
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader

from timm_csra.accelerators import autocast

from ..data.classes import Alignment
from ..data.presented import FiveCrops
from ..records.files import Record
from .cells import Options
from .loading import loaders


def plain_seconds(model: nn.Module, loader: Any, options: Options) -> float:
    """Time one evaluation pass of the plain model over the loader, in seconds."""
    started = time.perf_counter()
    for images, *_ in loader:
        with torch.inference_mode(), autocast(options.device, options.amp):
            model(images.to(options.device, non_blocking=True)).float().cpu()
    return time.perf_counter() - started


def five_crops(
    model: nn.Module, size: tuple[int, int], images: Any, preprocessing: Record, alignment: Alignment, options: Options
) -> dict[str, Tensor]:
    """Run the plain model on five crops of each image: the mean and the maximum of its logits over the crops.

    This is an alternative to wrapping for pictures with several objects, at five times the cost.
    """
    larger = tuple(round(FiveCrops.SCALE * side) for side in size)
    dataset = FiveCrops(images, create_transform((3, *larger), **preprocessing), size)
    batch_size = max(1, options.batch_size // 5)
    columns = torch.as_tensor(alignment.columns)
    kept: list[Tensor] = []
    workers = loaders(options, len(dataset), batch_size)
    for crops, index in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
        with torch.inference_mode(), autocast(options.device, options.amp):
            logits = model(crops.flatten(0, 1).to(options.device))
        kept.append(logits.float().cpu()[:, columns].unflatten(0, (-1, 5))[index >= 0])
    every = torch.cat(kept)
    return {"five_crops_mean": every.mean(dim=1), "five_crops_max": every.amax(dim=1)}
