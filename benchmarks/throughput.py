"""Measure how fast a sweep is, for which share of the time the device is busy, and which step limits it.

The command runs a sweep of a few checkpoints with random weights over generated photographs, with the options of
`python -m benchmarks.sweep` on how to run (--device, --jobs, --workers, --amp, --batch-size, ...). Then it runs each
step alone: reading images, copying them, the model, the attention terms and copying the logits back, metrics and
intervals, writing a record. The device is busy from the first kernel of a batch to the last, by its own clock; a CPU is
busy for the time that Python takes for a batch. The time does not include the start of processes, but includes the last
cell's metrics.

With --fake nothing is computed: reading the images of a batch, its forward pass, and its share of metrics and intervals
each wait for that long. This measures how well the sweep overlaps them, and `busy_share` counts the waiting of forward
passes alone. The last line of the output is JSON.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from timm.models import save_for_hf

from timm_csra.accelerators import AMP, autocast, on_accelerator
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, score

from . import waiting
from .argument_types import above_zero, positive
from .arguments import parser
from .asked import asked_options
from .checkpoints.downloads import Downloads
from .checkpoints.find import Checkpoint
from .data.datasets import ImageSet
from .data.sources import load_image_set
from .engines.local import LocalEngine
from .engines.run import Run
from .engines.worker import Models, compute
from .records.files import Record, write_record
from .records.phases import NAMES
from .scoring.cells import Cell, Options
from .scoring.measure import begin_cell, load_images
from .workers import JOBS, asked_answering, asked_workers

CLASSES = 10


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Returns 0; 1 if a cell failed; 2 if an argument is wrong or a device cannot be used."""
    args, of_sweep = _parser().parse_known_args(arguments)
    args.checkpoints = args.checkpoints or (16 if args.fake else 3)
    args.batches = args.batches or (200 if args.fake else 100)
    asked = parser("").parse_args(["--sample", *of_sweep])
    screen = Console(width=None if sys.stdout.isatty() else 120)
    try:
        options = asked_options(asked, Path())
        if not args.fake and not timm.is_model(args.model):
            raise ValueError(f"--model {args.model}: timm has no such architecture.")
        if args.fake:
            options = replace(options, settings=(PLAIN, DEFAULT), batch_size=asked.batch_size or 1)
        workers = [replace(options, device=w.device, workers=w.workers) for w in asked_workers(asked, options)]
    except ValueError as error:
        Console(stderr=True).print(f"benchmarks.throughput: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if args.fake:
            workers = workers if asked.jobs else workers * JOBS
            cells = waiting.cells(args.checkpoints + len(workers), args.batches, args.fake, options.batch_size)
            function: Any = waiting.waiting
        else:
            count = args.batches * options.batch_size
            cells = _cells(args.model, args.checkpoints + len(workers), _photographs(Path(folder), count), Path(folder))
            function = compute
        sharing = bool(args.fake) or on_accelerator(options.device)
        answering = asked_answering(asked, workers)
        if args.fake and asked.metric_workers is None:
            answering = 1
        engine = LocalEngine(workers, compute=function, take_turns=sharing, answering=answering)
        with engine:
            run = Run(workers[0], Path(folder) / "results", {}, False, Console(quiet=True, force_terminal=True))
            _records(run, cells[: len(workers)], engine)  # starts every process
            started = time.perf_counter()
            records = _records(run, cells[len(workers) :], engine)
            seconds = time.perf_counter() - started
        if failed := [record["reason"] for record in records if record["status"] != "ok"]:
            screen.print(f"{len(failed)} of {len(records)} cells have no result: {failed[0]}", highlight=False)
            return 1
        images = sum(record["n"] for record in records)
        if args.fake:
            busy = args.fake * sum(waiting.passes(record["n"], options.batch_size) for record in records)
        else:
            busy = sum(record["device_seconds"] for record in records)
        alone = {} if args.fake else _alone(cells[0], workers[0], records[0], Path(folder))
    found = {
        "busy_share": round(busy / seconds, 4),
        "images_per_second": round(images / seconds, 1),
        "seconds": round(seconds, 3),
        "images": images,
        "checkpoints": len(records),
        "phases": {name: round(sum(r["phases"].get(name, 0.0) for r in records), 3) for name in NAMES},
        "alone_ms_per_image": alone,
        "fake_ms": 1e3 * args.fake if args.fake else None,
        "device": workers[0].device,
        "amp": workers[0].amp,
        "jobs": len(workers),
        "workers": workers[0].workers,
        "metric_workers": answering,
        "batch_size": workers[0].batch_size,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }
    screen.print(_table(found))
    print(json.dumps(found))
    return 0


def _records(run: Run, cells: list[Cell], engine: LocalEngine) -> list[Record]:
    keep: Any = nullcontext(engine)  # keeps the engine open for the next run
    return [record for _, record in run.records(cells, lambda _: keep, Downloads(False, False))]


def _photographs(folder: Path, count: int) -> ImageSet:
    """Write `count` JPEG files of ImageNet's usual size in ten classes; they are copies of forty pictures."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (40, 24, 32, 3), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).resize((500, 375), Image.Resampling.BICUBIC) for pixels in small]
    for label in range(CLASSES):
        (folder / "photographs" / str(label)).mkdir(parents=True)
    for index in range(count):
        pictures[index % len(pictures)].save(folder / "photographs" / str(index % CLASSES) / f"{index}.jpg", quality=90)
    return load_image_set(folder / "photographs")


def _cells(architecture: str, count: int, data: ImageSet, folder: Path) -> list[Cell]:
    """Return one cell for each of `count` checkpoints with random weights, which are saved in `folder`."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        there = folder / f"{architecture}{seed}"
        save_for_hf(timm.create_model(architecture, num_classes=CLASSES), there, safe_serialization=True)
        checkpoint = Checkpoint("local-dir", str(there))
        found.append(Cell(checkpoint, data, "single", checkpoint.input_size()))
    return found


def _alone(cell: Cell, options: Options, record: Record, folder: Path) -> dict[str, float]:
    """Time each step when nothing else runs, with the device synchronised, in milliseconds an image."""
    device = torch.device(options.device)
    steps: dict[str, float] = {}
    models = Models(options.device, options.channels_last)
    loaded = models.get(cell)
    loader, *_ = load_images(cell, loaded, options)
    iter(loader)  # starts the loader's processes
    with _timed(steps, "decode", record["n"], device):
        batches = [images for images, *_ in loader][:8]
    x, model = batches[0], loaded.model
    here = x.to(device)

    def forward() -> Any:
        with torch.inference_mode(), autocast(options.device, options.amp):
            return model(here)

    def scored() -> Any:
        targets = torch.zeros(len(here))
        return score(model, [(here, targets)] * 8, options.settings, device=device, amp_dtype=AMP[options.amp])

    for _ in range(3):
        forward()
        scored()
    repeated: list[tuple[str, Callable[[], Any], int]] = [
        ("copy to the device", lambda: [images.to(device) for images in batches], sum(map(len, batches))),
        ("forward", lambda: [forward() for _ in range(8)], 8 * len(x)),
        ("forward, attention, copy back", scored, 8 * len(x)),
    ]
    for name, function, images in repeated:
        with _timed(steps, name, images, device):
            function()
    left = begin_cell(cell, partial(models.get, cell), options)
    with _timed(steps, "metrics and intervals", record["n"], device):
        done = left if isinstance(left, dict) else left.finished()
    with _timed(steps, "disk", record["n"], device):
        write_record(folder / "record.json", done)
    return {name: round(milliseconds, 4) for name, milliseconds in steps.items()}


@contextmanager
def _timed(steps: dict[str, float], name: str, images: int, device: torch.device) -> Iterator[None]:
    if on_accelerator(device):
        torch.accelerator.synchronize()
    started = time.perf_counter()
    yield
    if on_accelerator(device):
        torch.accelerator.synchronize()
    steps[name] = 1e3 * (time.perf_counter() - started) / images


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("the device is busy", f"{found['busy_share']:.0%} of the time")
    table.add_row("images a second", f"{found['images_per_second']:,.0f}")
    every = sum(found["phases"].values())
    for name, seconds in found["phases"].items():
        if seconds:
            table.add_row(NAMES[name], f"{seconds / every:.0%} of the time of all processes")
    for name, milliseconds in found["alone_ms_per_image"].items():
        table.add_row(f"{name}, alone", f"{milliseconds:.3f} ms an image")
    return table


def _length(text: str) -> float:
    """Parse `4ms` or `0.5s` into seconds."""
    for unit, factor in (("ms", 1e-3), ("s", 1.0)):
        if text.endswith(unit):
            return factor * above_zero(text.removesuffix(unit))
    raise argparse.ArgumentTypeError(f"found {text!r}; expected a time with its unit, such as 4ms or 0.5s.")


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--fake", type=_length, metavar="TIME", help="wait that long for each batch, e.g. 4ms")
    found.add_argument("--model", default="test_resnet", help="architecture (default: %(default)s)")
    found.add_argument(
        "--checkpoints", type=positive, metavar="N", help="number of checkpoints (default: 3, with --fake 16)"
    )
    found.add_argument(
        "--batches", type=positive, metavar="N", help="batches of each checkpoint (default: 100, with --fake 200)"
    )
    return found


if __name__ == "__main__":
    from benchmarks.throughput import main as run  # not __main__: workers import the module by name

    sys.exit(run())
