"""How near a sweep on many devices comes to the least time that it could take, by simulation.

The schedule is that of a sweep. It gives cells to nodes of eight devices that compute nothing: a cell takes the
multiply-accumulates of its images (docs/coverage.csv) at a given speed, on a virtual clock, and a checkpoint some seconds
to load. Nodes are lost at random; their cells come back unfinished, and minutes later another node takes the place.
Cells are the pretrained checkpoints of timm that have a classifier, again from the first where they are too few, on five
sets of photographs at 1x, 1.5x and 2x.

The least time is the larger of two: all computing, repeated work included, spread evenly over the devices; and the cell
that took longest, with what was lost of it.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
from rich.console import Console

from .argument_types import positive
from .checkpoints.downloads import Downloads
from .checkpoints.find import Checkpoint
from .data.datasets import ImageSet
from .engines.estimate import START, architectures, macs_of
from .engines.local import Outcome
from .engines.schedule import Schedule
from .engines.simulated import Cluster, SimulatedEngine, Spent
from .records.files import Record
from .scoring.cells import Cell

SETS, SIZES = 5, (1.0, 1.5, 2.0)


@dataclass(frozen=True)
class _Photographs(ImageSet):
    count: int = 0

    def __len__(self) -> int:
        return self.count


@dataclass
class _Memory:
    """A folder of records that nobody reads: their number, and that of the checkpoints that are open, are kept."""

    records: dict[int, Record]
    again: int = 0
    open: int = 0
    most_open: int = 0

    def work(self, cell: Cell) -> float:
        return cell.images * macs_of(cell)

    def state(self, cell: Cell, build: bool) -> tuple[str, str | None]:
        return "to do", None

    def settled(self, cell: Cell) -> Record | None:
        return None

    def lock(self, checkpoint: Checkpoint) -> "_Memory":
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        return self

    def release(self) -> None:
        self.open -= 1

    def wait_for(self, checkpoints: list[Checkpoint]) -> None:
        raise AssertionError(f"nobody else is there who could have locked {checkpoints[0].name}")

    def log_file(self, cell: Cell) -> Path:
        return Path()

    def write(self, outcome: Outcome, again: bool) -> None:
        self.again += again
        if not again:
            assert id(outcome.cell) not in self.records, "a cell was computed twice"
            self.records[id(outcome.cell)] = outcome.record


@dataclass(frozen=True)
class Simulation:
    """What a simulated sweep took.

    Attributes:
        lost: cells without a record of what they found.
        open: checkpoints that were locked at a time, at most.
        driver: seconds of the schedule's own, and of this simulation, on this machine.
    """

    cells: int
    devices: int
    largest: float
    spent: Spent
    lost: int
    open: int
    driver: float

    @property
    def even(self) -> float:
        """Seconds of all computing, repeated work included, spread evenly."""
        return (self.spent.computing + self.spent.repeated) / self.devices

    @property
    def ideal(self) -> float:
        return max(self.even, self.spent.longest)

    @property
    def ratio(self) -> float:
        return self.ideal / self.spent.makespan

    @property
    def plain_ratio(self) -> float:
        """Of the least time if no node were lost."""
        return max(self.spent.computing / self.devices, self.largest) / self.spent.makespan


def cells_of(count: int, images: int, seed: int) -> list[Cell]:
    """As many cells, checkpoint by checkpoint, in an order that the seed gives."""
    known = architectures()
    names = [name for name in timm.list_models(pretrained=True) if name.split(".")[0] in known]
    random.Random(seed).shuffle(names)
    data = [_Photographs(f"set {i}", (), (), (), count=images) for i in range(SETS)]
    cells: list[Cell] = []
    for number in range(-(-count // (SETS * len(SIZES)))):
        again, place = divmod(number, len(names))
        name = names[place] + (f"_{again}" if again else "")
        checkpoint, (height, width) = Checkpoint("timm", name), known[name.split(".")[0]]
        for factor in SIZES:
            size = round(factor * height), round(factor * width)
            cells += [Cell(checkpoint, images, "single", size) for images in data]
    return cells[:count]


def simulate(cells: list[Cell], cluster: Cluster) -> Simulation:
    """Run a sweep of the cells on a cluster that is only simulated."""
    groups: dict[Checkpoint, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.checkpoint, []).append(cell)
    store, began = _Memory({}), time.perf_counter()
    with SimulatedEngine(cluster) as engine, Downloads(False, False) as downloads:
        for _ in Schedule(store, groups, engine, downloads).pairs():
            pass
        found = sum(record["status"] == "ok" for record in store.records.values())
        largest = max(map(cluster.seconds, cells))
        taken = time.perf_counter() - began
        return Simulation(
            len(cells), cluster.devices, largest, engine.spent, len(cells) - found, store.most_open, taken
        )


def durations(cells: list[Cell], speed: float, spread: float, seed: int) -> Mapping[int, float]:
    """Seconds of each cell, by its id. With `spread`, checkpoints are faster and slower than their multiply-accumulates
    say: by a factor whose logarithm is normal with this deviation."""
    drawn = random.Random(seed)
    factors = {checkpoint: drawn.lognormvariate(0, spread) for checkpoint in dict.fromkeys(c.checkpoint for c in cells)}
    return {id(cell): factors[cell.checkpoint] * cell.images * macs_of(cell) / speed for cell in cells}


def main(arguments: list[str] | None = None) -> int:
    """Simulate and print. Returns 0, or 1 where a cell was lost."""
    args = _parser().parse_args(arguments)
    cells = cells_of(args.cells, args.images, args.seed)
    taken = durations(cells, args.speed, args.spread, args.seed)
    ahead = None if args.engine == "local" else args.ahead
    cluster = Cluster(
        args.devices, lambda cell: taken[id(cell)], args.failures / 100, 60 * args.back, args.load, ahead, args.seed
    )
    found = simulate(cells, cluster)
    spent, hour = found.spent, 3600.0
    screen = Console(highlight=False, soft_wrap=True)
    screen.print(f"makespan      {spent.makespan / hour:9.2f} h, {found.cells:,} cells on {found.devices} devices")
    screen.print(
        f"ideal         {found.ideal / hour:9.2f} h: all computing on {found.devices} devices {found.even / hour:.2f} h, "
        f"the longest cell {spent.longest / hour:.2f} h (alone {found.largest / hour:.2f} h)"
    )
    screen.print(f"ratio         {found.ratio:9.3f}; of the ideal without failures {found.plain_ratio:.3f}")
    screen.print(
        f"repeated work {spent.repeated / hour:9.2f} device hours of {spent.computing / hour:.2f}: {spent.lost_nodes} nodes "
        f"lost, and with them {spent.lost_cells} cells in flight"
    )
    screen.print(f"loading       {spent.loading / hour:9.2f} device hours")
    screen.print(f"cells lost    {found.lost:9}")
    screen.print(f"open at most  {found.open:9} checkpoints; the simulation took {found.driver:.1f} s")
    line = {
        "cells": found.cells,
        "devices": found.devices,
        "speed": args.speed,
        "failures": args.failures,
        "seed": args.seed,
        "engine": args.engine,
        "makespan_hours": round(spent.makespan / hour, 4),
        "ideal_hours": round(found.ideal / hour, 4),
        "ratio": round(found.ratio, 4),
        "ratio_without_failures": round(found.plain_ratio, 4),
        "repeated_device_hours": round(spent.repeated / hour, 4),
        "loading_device_hours": round(spent.loading / hour, 4),
        "nodes_lost": spent.lost_nodes,
        "cells_lost": found.lost,
    }
    print(json.dumps(line))
    return 1 if found.lost else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cells", type=positive, default=27_000, help="default: %(default)s")
    parser.add_argument("--devices", type=positive, default=256, help="default: %(default)s")
    parser.add_argument("--images", type=positive, default=50_000, help="of each set (default: %(default)s)")
    parser.add_argument(
        "--speed", type=float, default=1e13, help="multiply-accumulates a second of a device (default: %(default)g)"
    )
    parser.add_argument(
        "--spread", type=float, default=0.0,
        help="deviation of the logarithm of a checkpoint's speed, of which the schedule knows nothing (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--failures", type=float, default=1.0, help="percent of the nodes that are lost in an hour (default: %(default)g)"
    )
    parser.add_argument("--back", type=float, default=10.0, help="minutes until another node joins (default: %(default)g)")
    parser.add_argument("--load", type=float, default=START, help="seconds for a checkpoint (default: %(default)g)")
    parser.add_argument(
        "--engine", choices=("ray", "local"), default="ray",
        help="ray: whoever is free takes the next cell; local: a cell goes where its checkpoint is (default: ray)",
    )  # fmt: skip
    parser.add_argument(
        "--ahead", type=int, default=1, help="with ray: cells that wait, for each device (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    sys.exit(main())
