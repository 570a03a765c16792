"""Measure time and memory of metrics and intervals, and how they grow with images, classes and settings.

The scores are synthetic; the metrics, protocols, intervals and tests are those of the sweep. Every size runs in a
process of its own, which measures seconds, and the peak memory above the scores themselves. The default, the size of
ImageNet's validation set, takes a while.
"""

import argparse
import json
import math
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from timm_csra.config import LOGITS
from timm_csra.evaluation.scoring import DEFAULT, Scores, Setting, settings_grid

from .argument_types import positive
from .checkpoints.find import Checkpoint
from .data.datasets import ImageSet
from .engines.local import keep_memory
from .memory import in_process, peak_of
from .records.phases import Phases
from .scoring.cells import Cell, Options
from .scoring.kept import Scored
from .scoring.results import results

TEMPERATURES = (1.0, 5.0, 20.0, math.inf)
HEADS: tuple[float | tuple[float, ...], ...] = (
    *TEMPERATURES,
    *((temperature, math.inf) for temperature in TEMPERATURES[:3]),
    (1.0, 5.0, math.inf),
)
POSITIVES = 3  # labels of each image for the task multilabel


@dataclass(frozen=True)
class Size:
    task: str
    images: int
    classes: int
    settings: int


@dataclass(frozen=True)
class Cost:
    """Seconds of both phases, memory of the scores, and peak memory above that, in MiB."""

    size: Size
    metrics_seconds: float
    statistics_seconds: float
    scores_mb: float
    extra_mb: float


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write OUT. Returns 0."""
    args = _parser().parse_args(arguments)
    screen, log = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    keep_memory()
    sizes = [size for task in args.task.split(",") for size in _sizes(task, args)]
    costs = []
    for size in track(sizes, "sizes", console=log, transient=True):
        costs.append(in_process(measure, size))
        log.print(str(costs[-1]), highlight=False, soft_wrap=True)
    screen.print(_table(costs))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    screen.print(f"{machine}. Memory does not include the scores.", highlight=False)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "costs": [asdict(c) for c in costs]}, indent=1) + "\n")
    return 0


def _sizes(task: str, args: argparse.Namespace) -> list[Size]:
    """Return the size of the arguments, and with --grow the sizes with half as many images, classes or settings."""
    full = Size(task, args.images, args.classes, args.settings)
    if not args.grow:
        return [full]
    return [
        full,
        Size(task, args.images // 2, args.classes, args.settings),
        Size(task, args.images, args.classes // 2, args.settings),
        Size(task, args.images, args.classes, args.settings // 2),
    ]


def synthetic(size: Size) -> tuple[Scored, tuple[Setting, ...]]:
    """Return random scores, with larger logits for the correct classes, and the settings."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(size.classes, (size.images, 1 if size.task == "single" else POSITIVES), generator=generator)
    present = torch.zeros(size.images, size.classes, dtype=torch.bool).scatter_(1, labels, True)

    def logits() -> torch.Tensor:
        return torch.randn(size.images, size.classes, generator=generator).add_(present, alpha=2)

    scores = Scores(logits(), {(LOGITS, temperature): logits() for temperature in TEMPERATURES})
    lams = [0.1 * (1 + i) for i in range(max(1, size.settings // len(HEADS)))]
    facts: dict[str, Any] = {"groups": None}
    settings = settings_grid(lams, HEADS, also=[DEFAULT])
    return Scored(scores, labels[:, 0] if size.task == "single" else present, facts), tuple(settings)


def measure(size: Size) -> Cost:
    scored, settings = synthetic(size)
    data = ImageSet("synthetic", (), (), tuple(map(str, range(size.classes))), multilabel=size.task == "multilabel")
    cell = Cell(Checkpoint("timm", "synthetic"), data, size.task, (224, 224))
    held = [scored.scores.base, *scored.scores.attention.values(), scored.targets]
    with peak_of(torch.device("cpu")) as peak:
        results(cell, scored, Options(settings), phases := Phases())
    return Cost(
        Size(size.task, size.images, size.classes, len(settings)),
        phases.seconds["metrics"],
        phases.seconds["statistics"],
        sum(tensor.nbytes for tensor in held) / 2**20,
        peak.megabytes,
    )


def _table(costs: list[Cost]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "images", "classes", "settings", "metrics", "intervals, tests", "scores", "memory"):
        table.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    for cost in costs:
        size = (f"{count:,}" for count in (cost.size.images, cost.size.classes, cost.size.settings))
        times = (f"{seconds:.1f} s" for seconds in (cost.metrics_seconds, cost.statistics_seconds))
        table.add_row(cost.size.task, *size, *times, f"{cost.scores_mb:,.0f} MB", f"{cost.extra_mb:,.0f} MB")
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", default="single,multilabel", help="default: %(default)s")
    parser.add_argument("--images", type=positive, default=50_000, help="default: %(default)s")
    parser.add_argument("--classes", type=positive, default=1000, help="default: %(default)s")
    parser.add_argument("--settings", type=positive, default=80, help="default: %(default)s")
    parser.add_argument("--grow", action="store_true", help="also with half as many images, classes or settings")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
