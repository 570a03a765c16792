"""Estimate how long a sweep will take, from the multiply-accumulates of its cells and the speed of the device."""

import csv
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import timm
import torch
from timm.models import split_model_name_tag

import timm_csra
from timm_csra.accelerators import autocast, to_device

from ..checkpoints.find import Checkpoint
from ..scoring.cells import Cell, Options

TABLE = Path(__file__).parents[2] / "docs" / "coverage.csv"
DEFAULT = 4.1e9  # a checkpoint whose configuration is unknown counts as a ResNet-50 at 224 pixels
START = 5.0  # seconds for loading a checkpoint and starting its process, measured on small ones
PROBE = ("resnet50", 4)  # architecture, and number of images, of the batch that is timed


@dataclass(frozen=True)
class Estimate:
    """`seconds` for forward passes and starting; reading images and downloading add to it where they are slower."""

    cells: int
    images: int
    macs: float
    seconds: float
    calibration: int = 0  # pictures for choosing lam without labels

    def __str__(self) -> str:
        pictures = f" and {self.calibration} calibration pictures" if self.calibration else ""
        hours, minutes = divmod(round(self.seconds / 60), 60)
        return (
            f"{self.cells} cells, {self.images} images{pictures}, {self.macs / 1e12:.1f} T multiply-accumulates: about "
            f"{f'{hours} h {minutes} min' if hours else f'{minutes} min' if minutes else f'{self.seconds:.0f} s'} of "
            "forward passes, with reading and downloading on top where they are slower."
        )


def estimate(cells: Iterable[Cell], options: Options) -> Estimate:
    """Estimate from `docs/coverage.csv` where it has the architecture, else from the model on the meta device."""
    cells = list(cells)
    if not cells:
        return Estimate(0, 0, 0.0, 0.0)
    images = [cell.images for cell in cells]
    macs = sum(count * macs_of(cell) for cell, count in zip(cells, images, strict=True))
    passes = {
        (cell.checkpoint, cell.size, cell.data.calibration.left_out): (cell, len(cell.data.calibration.pictures))
        for cell in cells
        if cell.data.calibration and not cell.data.calibration.reason
    }
    macs += sum(count * macs_of(cell) for cell, count in passes.values())
    speed = _macs_per_second(options.device, options.amp, options.channels_last)
    seconds = macs / speed + START * len({cell.checkpoint for cell in cells})
    return Estimate(len(cells), sum(images), macs, seconds, sum(count for _, count in passes.values()))


def macs_of(cell: Cell) -> float:
    """Multiply-accumulates of one image, with wrapping.

    They grow with the number of pixels, and faster than that where tokens attend to each other.
    """
    name = split_model_name_tag(cell.checkpoint.id)[0]
    row = _table().get(name)
    if isinstance(cell.size, str) or (row is not None and not row["input_size"]):  # no input_size: no classifier
        return DEFAULT
    if row is None:
        return _measured(cell.checkpoint, cell.size)
    height, width = map(int, row["input_size"].split("x")[-2:])
    pixels = cell.size[0] * cell.size[1] / (height * width)
    return pixels * (float(row["macs"] or 0) + float(row["extra_macs"] or 0))


def memory_of(cell: Cell, options: Options) -> float:
    """Bytes of main memory that a cell may take: for the libraries, for the model, and three times for its scores (as
    batches, concatenated, and in the metrics)."""
    terms = {term for setting in cell.scored_settings(options) for term in setting.terms}
    classes = max(len(cell.data.classes), 1)
    if options.score_classes == "head" and not isinstance(cell.size, str):
        classes = cell.checkpoint.num_classes()
    return 2 * 2**30 + 3 * 4.0 * cell.images * classes * (1 + len(terms))


def architectures() -> dict[str, tuple[int, int]]:
    """Input height and width of each architecture whose multiply-accumulates are in `docs/coverage.csv`."""
    rows = ((name, row["input_size"]) for name, row in _table().items() if row["input_size"] and row["macs"])
    return {name: (int(size.split("x")[-2]), int(size.split("x")[-1])) for name, size in rows}


@cache
def _table() -> dict[str, dict[str, str]]:
    if not TABLE.is_file():
        return {}
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {row["architecture"]: row for row in csv.DictReader(file)}


@cache
def _measured(checkpoint: Checkpoint, size: tuple[int, int]) -> float:
    try:
        with torch.device("meta"):
            explanation = timm_csra.explain(checkpoint.architecture(), size)
    except Exception:  # the cell fails with the same error and records it
        return DEFAULT
    return float(explanation.macs + explanation.extra_macs) or DEFAULT


@cache
def _macs_per_second(device: str, amp: str, channels_last: bool) -> float:
    """Speed of the device on a convolutional network, after one batch to warm up."""
    name, images = PROBE
    model = to_device(timm.create_model(name).eval(), device, channels_last)
    x = torch.randn(images, 3, 224, 224, device=device)
    macs = timm_csra.explain(model, 224).macs
    seconds = []
    with torch.inference_mode(), autocast(device, amp):
        for _ in range(3):
            started = time.perf_counter()
            model(x).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - started)
    return macs * images / min(seconds[1:])
