"""Measure the overhead of the engines with cells that compute nothing, and check that none is lost or run twice.

What takes time is submitting cells, returning their records and writing them, with everything that a sweep does around
it (locks, atomic records, logs). First each engine runs many trivial cells: the command reports the time for each and
the driver's memory, and checks that every cell has one record and was computed once. Then each engine runs cells that
wait, on 1 to N workers: ideally N workers take the time of one, divided by N.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from timm_csra.evaluation.scoring import DEFAULT, PLAIN

from .argument_types import positive
from .checkpoints.downloads import Downloads
from .checkpoints.find import Checkpoint
from .data.datasets import ImageSet
from .engines.local import LocalEngine
from .engines.run import Run
from .engines.worker import Models
from .memory import in_process, peak_of
from .records.files import Record, read_records
from .scoring.cells import Cell, Options
from .scoring.measure import failure

OPTIONS = Options((PLAIN, DEFAULT))


class Named(Checkpoint):
    """A checkpoint that is never loaded."""

    @cached_property
    def fingerprint(self) -> str | None:
        return None


@dataclass(frozen=True)
class Cost:
    """Cost of one run.

    Attributes:
        seconds: time from the first submitted cell to the last record, without `start_seconds`, the engine's start.
        driver_mb: peak memory of the driver above its memory before the run.
        records, computed: number of records, and of computed cells.
        twice: number of cells that were computed again.
    """

    engine: str
    workers: int
    cells: int
    wait: float
    start_seconds: float
    seconds: float
    driver_mb: float
    records: int
    computed: int
    twice: int

    @property
    def each(self) -> float:
        """Seconds of a worker for each cell, without the time that the cell waits."""
        return self.seconds * self.workers / self.cells - self.wait


def wait(computed: str, seconds: float, cell: Cell, options: Options, models: Models, track: Any) -> Record:
    """Compute a cell that only waits, and append a line to the file `computed`."""
    if seconds:
        time.sleep(seconds)
    descriptor = os.open(computed, os.O_WRONLY | os.O_APPEND | os.O_CREAT)  # appending a short line is atomic
    os.write(descriptor, f"{cell.checkpoint.id}\n".encode())
    os.close(descriptor)
    return failure(cell, options, "") | {"status": "ok", "reason": None}


def measure(name: str, workers: int, count: int, seconds: float) -> Cost:
    """Measure one run, after one cell for each worker that starts it."""
    data = ImageSet("nothing", (), (), ("a", "b"))
    cells = [Cell(Named("timm", f"m{i}"), data, "single", (64, 64)) for i in range(count)]
    first = [replace(cell, checkpoint=Named("timm", f"first{i}")) for i, cell in enumerate(cells[:workers])]
    with tempfile.TemporaryDirectory() as folder:
        computed = str(Path(folder) / "computed")
        run = Run(OPTIONS, Path(folder), {}, False, Console(quiet=True, force_terminal=True))
        began = time.perf_counter()
        with _start(name, workers, partial(wait, computed, seconds)) as engine, peak_of(torch.device("cpu")) as peak:
            keep: Any = nullcontext(engine)  # keeps the engine open for the next run
            list(run.records(first, lambda _: keep, Downloads(False, False)))
            started = time.perf_counter()
            for _ in run.records(cells, lambda _: keep, Downloads(False, False)):
                pass
            taken = time.perf_counter() - started
        lines = Path(computed).read_text().splitlines()
        mine = [line for line in lines if not line.startswith("first")]
        records = {record["model"] for record in read_records(Path(folder))} - {cell.checkpoint.name for cell in first}
    lost_or_twice = len(mine) - len(set(mine))
    return Cost(
        name,
        workers,
        count,
        seconds,
        started - began,
        taken,
        peak.megabytes,
        len(records),
        len(set(mine)),
        lost_or_twice,
    )


def _start(name: str, workers: int, compute: Any) -> Any:
    if name == "local":
        return LocalEngine([OPTIONS] * workers, compute=compute)
    import ray

    from .engines.cluster import RayEngine

    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return _Ray(RayEngine(OPTIONS, cpus=1, compute=compute))


class _Ray:
    """Stops the cluster that was started for one run."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __enter__(self) -> Any:
        return self.engine.__enter__()

    def __exit__(self, *error: object) -> None:
        import ray

        self.engine.__exit__(*error)
        ray.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write OUT. Returns 0, or 1 if a cell was lost or computed twice."""
    args = _parser().parse_args(arguments)
    screen, log = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    plans = [(name, args.trivial_workers, args.cells, 0.0) for name in args.engines.split(",")]
    plans += [
        (name, workers, args.waiting, args.wait)
        for name in args.engines.split(",")
        for workers in map(int, args.workers.split(","))
    ]
    costs = []
    for plan in plans:
        costs.append(in_process(measure, *plan))  # to measure the driver's memory
        log.print(str(costs[-1]), highlight=False, soft_wrap=True)
    screen.print(_table(costs))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    screen.print(machine, highlight=False)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"machine": machine, "costs": [asdict(c) for c in costs]}, indent=1) + "\n")
    wrong = [cost for cost in costs if not cost.records == cost.computed == cost.cells or cost.twice]
    return 1 if wrong else 0


def _table(costs: list[Cost]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in (
        "engine",
        "workers",
        "cells",
        "wait",
        "start",
        "time",
        "for each",
        "speed-up",
        "driver",
        "records",
        "twice",
    ):
        table.add_column(name, justify="left" if name == "engine" else "right", no_wrap=True)
    alone = {(cost.engine, cost.wait): cost.seconds for cost in costs if cost.workers == 1}
    for cost in costs:
        one = alone.get((cost.engine, cost.wait))
        table.add_row(
            cost.engine,
            str(cost.workers),
            f"{cost.cells:,}",
            f"{cost.wait:g} s",
            f"{cost.start_seconds:.1f} s",
            f"{cost.seconds:.1f} s",
            f"{1e3 * cost.each:.1f} ms",
            f"{one / cost.seconds:.2f}" if one and cost.wait else "-",
            f"{cost.driver_mb:.0f} MB",
            f"{cost.records:,}",
            str(cost.twice),
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--engines", default="local,ray", help="default: %(default)s")
    parser.add_argument("--cells", type=positive, default=10_000, help="number of trivial cells (default: %(default)s)")
    parser.add_argument(
        "--trivial-workers", type=positive, default=2, help="workers for trivial cells (default: %(default)s)"
    )
    parser.add_argument("--waiting", type=positive, default=64, help="number of cells that wait (default: %(default)s)")
    parser.add_argument("--wait", type=float, default=1.0, help="seconds that they wait (default: %(default)s)")
    parser.add_argument("--workers", default="1,2,4,8,16", help="workers for cells that wait (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


if __name__ == "__main__":
    from benchmarks.engine_cost import main as run  # not __main__: workers import the module by name

    sys.exit(run())
