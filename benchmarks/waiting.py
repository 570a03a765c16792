"""Cells whose images, forward passes, metrics and intervals only wait for a given time.

They measure how well the processes, the queue and the locks of a sweep overlap these three; everything else is as in a
real sweep. Forward passes wait as with a GPU: Python is one batch ahead of the device.
"""

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from .checkpoints.find import Checkpoint
from .data.datasets import ImageSet
from .engines.worker import Models, compute
from .records.files import Record
from .scoring.cells import Cell, Options
from .scoring.measure import Unfinished
from .scoring.passes import Track

PIXELS, CLASSES = 32, 10


class Device(nn.Module):
    """A classifier whose forward pass waits for `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.num_classes = seconds, CLASSES
        self.done = [
            0.0
        ]  # end of the last batch; a list, since changing an attribute would make timm_csra examine the head again
        self.head = nn.Linear(3, CLASSES)
        self.pretrained_cfg = {"input_size": (3, PIXELS, PIXELS), "num_classes": CLASSES}

    def forward_features(self, x: Tensor) -> Tensor:
        """Wait for the previous batch, and return subsampled images as features."""
        began = max(time.perf_counter(), self.done[0])
        self.done[0] = began + self.seconds
        time.sleep(max(0.0, began - time.perf_counter()))
        return x[..., ::16, ::16]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average the features, and classify."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        """Return the linear layer."""
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


@dataclass(frozen=True)
class Waiting(Checkpoint):
    """A checkpoint whose forward pass of one batch takes `seconds`."""

    seconds: float = 0.0

    @cached_property
    def fingerprint(self) -> str | None:
        return self.id

    def input_size(self) -> tuple[int, int]:
        return PIXELS, PIXELS

    def create(self, size: tuple[int, int]) -> nn.Module:
        return Device(self.seconds).eval()


@dataclass(frozen=True)
class SlowImages:
    """Images that take `seconds` each to read."""

    seconds: float

    def open(self, index: int) -> Image.Image:
        """Wait, and return a grey image."""
        time.sleep(self.seconds)
        return Image.new("RGB", (PIXELS, PIXELS), (index % 256,) * 3)


@dataclass(frozen=True)
class SlowMetrics(Unfinished):
    """Metrics that take as long as all forward passes did."""

    def finished(self) -> Record:
        started = time.perf_counter()
        record = super().finished()
        batches = -(-len(self.scored.targets) // self.options.batch_size)
        seconds = batches * self.cell.checkpoint.seconds  # type: ignore[attr-defined]
        with self.phases("statistics"):
            time.sleep(max(0.0, seconds - (time.perf_counter() - started)))
        return record


def waiting(cell: Cell, options: Options, models: Models, track: Track) -> Record | Unfinished:
    """Run the images of a cell, and return it with metrics that wait, too."""
    found = compute(cell, options, models, track)
    return SlowMetrics(**vars(found)) if isinstance(found, Unfinished) else found


def passes(images: int, batch_size: int) -> int:
    """Return the number of forward passes that a cell waits for.

    These are one for each batch except the last, since no batch follows it, and the two with which `score` checks the
    first batch.
    """
    return -(-images // batch_size) - 1 + 2


def cells(count: int, batches: int, seconds: float, batch_size: int) -> list[Cell]:
    """Return one cell for each of `count` checkpoints, all with the same images."""
    n = batches * batch_size
    store: Any = SlowImages(seconds / batch_size)
    labels = tuple((index % CLASSES,) for index in range(n))
    names = tuple(Path(str(index)) for index in range(n))
    data = ImageSet("waiting", names, labels, tuple(map(str, range(CLASSES))), store=store, content="waiting")
    torch.manual_seed(0)
    return [Cell(Waiting("timm", f"waiting{i}", seconds), data, "single", (PIXELS, PIXELS)) for i in range(count)]
