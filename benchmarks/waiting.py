"""A sweep in which everything only waits: images, forward passes, metrics and intervals, each as long as it is told to.

What is measured with it is how well the sweep's own processes, queue and locks overlap these three; nothing but the
waiting is replaced. Forward passes wait as a GPU makes one wait: Python is a batch ahead of the device.
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
    """A classifier whose forward pass takes `seconds`, which nothing but waiting is done for."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.num_classes = seconds, CLASSES
        self.done = [0.0]  # when the last batch is; in place, since a head whose attributes change is examined anew
        self.head = nn.Linear(3, CLASSES)
        self.pretrained_cfg = {"input_size": (3, PIXELS, PIXELS), "num_classes": CLASSES}

    def forward_features(self, x: Tensor) -> Tensor:
        """Wait for the batch before, and give the images as their own features."""
        began = max(time.perf_counter(), self.done[0])
        self.done[0] = began + self.seconds
        time.sleep(max(0.0, began - time.perf_counter()))
        return x[..., ::16, ::16]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Average, and classify."""
        pooled = x.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        """Its linear layer."""
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
    """Images of which each takes `seconds` to read."""

    seconds: float

    def open(self, index: int) -> Image.Image:
        """Wait, and give a grey image."""
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
    """Run the images of a cell; what is left then waits, too."""
    found = compute(cell, options, models, track)
    return SlowMetrics(**vars(found)) if isinstance(found, Unfinished) else found


def passes(images: int, batch_size: int) -> int:
    """How many forward passes of a cell are waited for: of every batch but the last, behind which nothing waits, and
    two by which `score` checks the first."""
    return -(-images // batch_size) - 1 + 2


def cells(count: int, batches: int, seconds: float, batch_size: int) -> list[Cell]:
    """One for each of `count` checkpoints, all over the same images."""
    n = batches * batch_size
    store: Any = SlowImages(seconds / batch_size)
    labels = tuple((index % CLASSES,) for index in range(n))
    names = tuple(Path(str(index)) for index in range(n))
    data = ImageSet("waiting", names, labels, tuple(map(str, range(CLASSES))), store=store, content="waiting")
    torch.manual_seed(0)
    return [Cell(Waiting("timm", f"waiting{i}", seconds), data, "single", (PIXELS, PIXELS)) for i in range(count)]
