"""Simulate how close a sweep on many devices comes to the shortest possible time.

The schedule is that of a sweep, but its nodes, of eight devices each, compute nothing: on a virtual clock a cell takes
the time of its multiply-accumulates (docs/coverage.csv) at a given speed, and a checkpoint takes some seconds to load.
Nodes are lost at random; the sweep computes their cells again, and minutes later another node joins. The driver takes
time, too. Cells are the pretrained timm checkpoints with a classifier, repeated if there are too few, on five sets of
photographs at 1x, 1.5x and 2x.

The shortest possible time is the larger of two: that of all computing, including repeated work, spread evenly over the
devices; and that of the longest cell, including its lost attempts.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import timm
from rich.console import Console
from rich.table import Table

from .argument_types import above_zero, from_zero, natural, positive
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
HOUR = 3600.0
AHEAD = 1  # cells that wait for each device, as in `engines/cluster.py`, which cannot be imported without Ray


@dataclass(frozen=True)
class _Photographs(ImageSet):
    count: int = 0

    def __len__(self) -> int:
        return self.count


@dataclass
class _Memory:
    """Takes the place of `Run`: keeps records in memory, and counts the checkpoints that are open."""

    engine: SimulatedEngine
    asking: float
    records: dict[int, Record] = field(default_factory=dict)
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
        self.engine.passes(self.asking)
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        return self

    def release(self) -> None:
        self.open -= 1

    def wait_for(self, checkpoints: list[Checkpoint]) -> None:
        raise AssertionError(f"{checkpoints[0].name} is locked, although there is no other sweep")

    def log_file(self, cell: Cell) -> Path:
        return Path()

    def write(self, outcome: Outcome, again: bool) -> None:
        self.again += again
        if not again:
            assert id(outcome.cell) not in self.records, "a cell was computed twice"
            self.records[id(outcome.cell)] = outcome.record


@dataclass(frozen=True)
class Simulation:
    """The result of a simulation; times are in seconds.

    Attributes:
        lost: number of cells without a result.
        open: largest number of checkpoints that were open at a time.
        seconds: time that the simulation took on this machine.
    """

    cells: int
    devices: int
    largest: float
    spent: Spent
    lost: int
    open: int
    seconds: float

    @property
    def even(self) -> float:
        """Seconds of all computing, including repeated work, spread evenly over the devices."""
        return (self.spent.computing + self.spent.repeated) / self.devices

    @property
    def ideal(self) -> float:
        return max(self.even, self.spent.longest)

    @property
    def ratio(self) -> float:
        return self.ideal / self.spent.makespan

    @property
    def plain_ratio(self) -> float:
        """Shortest possible time without lost nodes, over the time of the sweep."""
        return max(self.spent.computing / self.devices, self.largest) / self.spent.makespan


def cells_of(count: int, images: int, seed: int) -> list[Cell]:
    """Return `count` cells, checkpoint by checkpoint, in random order."""
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


def simulate(cells: list[Cell], cluster: Cluster, asking: float = 0.0) -> Simulation:
    """Simulate a sweep of the cells on a cluster.

    Args:
        cells: the cells.
        cluster: the cluster.
        asking: seconds that the driver takes for each checkpoint to find out which of its cells apply.
    """
    groups: dict[Checkpoint, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.checkpoint, []).append(cell)
    began = time.perf_counter()
    with SimulatedEngine(cluster) as engine, Downloads(False, False) as downloads:
        store = _Memory(engine, asking)
        for _ in Schedule(store, groups, engine, downloads).pairs():
            pass
    found = sum(record["status"] == "ok" for record in store.records.values())
    largest = max(map(cluster.seconds, cells))
    taken = time.perf_counter() - began
    return Simulation(len(cells), cluster.devices, largest, engine.spent, len(cells) - found, store.most_open, taken)


def durations(cells: list[Cell], speed: float, spread: float, seed: int) -> Mapping[int, float]:
    """Return the seconds of each cell, by its id.

    With `spread`, the time of a checkpoint differs from that of its multiply-accumulates by a factor whose logarithm is
    normal with this standard deviation.
    """
    drawn = random.Random(seed)
    factors = {checkpoint: drawn.lognormvariate(0, spread) for checkpoint in dict.fromkeys(c.checkpoint for c in cells)}
    return {id(cell): factors[cell.checkpoint] * cell.images * macs_of(cell) / speed for cell in cells}


def main(arguments: list[str] | None = None) -> int:
    """Simulate and print. Returns 0, or 1 if a cell was lost."""
    args = _parser().parse_args(arguments)
    cells = cells_of(args.cells, args.images, args.seed)
    taken = durations(cells, args.speed, args.spread, args.seed)
    cluster = Cluster(
        devices=args.devices,
        seconds=lambda cell: taken[id(cell)],
        failures=args.failures / 100,
        back=60 * args.back,
        load=args.load,
        giving=args.giving,
        ahead=AHEAD if args.engine == "ray" else None,
        seed=args.seed,
    )
    found = simulate(cells, cluster, args.asking)
    _print(found, Console(highlight=False, soft_wrap=True))
    asked = {name: getattr(args, name) for name in ("cells", "devices", "speed", "failures", "engine", "seed")}
    figures = {
        "makespan_hours": found.spent.makespan / HOUR,
        "ideal_hours": found.ideal / HOUR,
        "ratio": found.ratio,
        "ratio_without_failures": found.plain_ratio,
        "repeated_device_hours": found.spent.repeated / HOUR,
        "loading_device_hours": found.spent.loading / HOUR,
    }
    counts = {"nodes_lost": found.spent.lost_nodes, "cells_lost": found.lost}
    print(json.dumps(asked | {name: round(figure, 4) for name, figure in figures.items()} | counts))
    return 1 if found.lost else 0


def _print(found: Simulation, screen: Console) -> None:
    spent = found.spent
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True)
    for row in (
        ("makespan", f"{spent.makespan / HOUR:.2f}", f"hours: {found.cells:,} cells on {found.devices} devices"),
        ("ideal", f"{found.ideal / HOUR:.2f}", "hours, the larger of"),
        ("  all", f"{found.even / HOUR:.2f}", "hours: computing, including repeated work, spread evenly"),
        (
            "  longest",
            f"{spent.longest / HOUR:.2f}",
            f"hours: the longest cell, {found.largest / HOUR:.2f} without lost attempts",
        ),
        ("ratio", f"{found.ratio:.3f}", f"{found.plain_ratio:.3f} of the ideal if no node were lost"),
        ("computing", f"{spent.computing / HOUR:,.1f}", "device hours"),
        (
            "repeated",
            f"{spent.repeated / HOUR:,.1f}",
            f"device hours: {spent.lost_cells} cells on {spent.lost_nodes} nodes",
        ),
        ("loading", f"{spent.loading / HOUR:,.1f}", "device hours"),
        ("cells lost", f"{found.lost}", ""),
        ("open", f"{found.open}", "checkpoints at most"),
        ("simulated in", f"{found.seconds:.1f}", "seconds"),
    ):
        table.add_row(*row)
    screen.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cells", type=positive, default=27_000, help="default: %(default)s")
    add("--devices", type=positive, default=256, help="default: %(default)s")
    add("--images", type=positive, default=50_000, help="images of each set (default: %(default)s)")
    add("--speed", type=above_zero, default=1e13, help="multiply-accumulates a second of a device (default: 1e13)")
    add("--spread", type=from_zero, default=0.0, help="standard deviation of the logarithm of a checkpoint's speed, "
        "which the schedule does not know (default: 0)")  # fmt: skip
    add("--failures", type=from_zero, default=1.0, help="percent of the nodes that are lost in an hour (default: 1)")
    add("--back", type=from_zero, default=10.0, help="minutes until another node joins (default: 10)")
    add("--load", type=from_zero, default=START, help="seconds for loading a checkpoint (default: %(default)g)")
    add("--asking", type=from_zero, default=2.0, help="seconds that the driver takes for each checkpoint to find out "
        "which of its cells apply (default: 2)")  # fmt: skip
    add(
        "--giving",
        type=from_zero,
        default=0.005,
        help="seconds that the driver takes to submit a cell (default: 0.005)",
    )
    add("--engine", choices=("ray", "local"), default="ray", help="ray: the first free device takes the next cell, "
        "one waits for each device; local: a cell goes to the device with its checkpoint (default: ray)")  # fmt: skip
    add("--seed", type=natural, default=0, help="seed of checkpoints and failures (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
