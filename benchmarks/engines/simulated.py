"""An engine that simulates nodes: cells take time on a virtual clock, compute nothing, and nodes are lost at random."""

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ..checkpoints.find import Checkpoint
from ..scoring.cells import Cell
from .estimate import START
from .local import Outcome

DEVICES = 8  # of each node


@dataclass(eq=False)
class _Device:
    """A device: the cell that it computes, when that began, and the checkpoint in its memory."""

    loaded: tuple[Checkpoint, object] | None = None
    cell: Cell | None = None
    began: float = 0.0
    attempt: int = 0  # distinguishes this cell's end from that of one lost before


@dataclass(eq=False)
class _Node:
    devices: list[_Device]
    up: bool = True


@dataclass
class Cluster:
    """A simulated cluster. All times are in seconds.

    Attributes:
        devices: number of devices of all nodes together.
        seconds: time of each cell, without loading its checkpoint.
        failures: share of the nodes that are lost in an hour.
        back: time until a new node replaces a lost one.
        load: time to load a checkpoint, or another size of it, that is not in memory.
        giving: time of the driver to submit a cell; outcomes that arrive meanwhile wait.
        ahead: number of submitted cells that wait for each device; the first device that is free takes the next one, as
            with Ray. None: no cell waits, and a cell goes to the device with its checkpoint, as with the local engine.
    """

    devices: int
    seconds: Callable[[Cell], float]
    failures: float = 0.01
    back: float = 600.0
    load: float = START
    giving: float = 0.0
    ahead: int | None = None
    seed: int = 0


@dataclass
class Spent:
    """Where the time went, in device seconds; `makespan` is in seconds of the clock.

    Attributes:
        computing: time of cells that finished.
        repeated: time spent on cells that were lost with their node.
        loading: time of loading checkpoints.
        longest: the longest time of one cell, including its time on nodes that were lost.
        lost_cells, lost_nodes: number of cells that were lost with their node, and of lost nodes.
    """

    makespan: float = 0.0
    computing: float = 0.0
    repeated: float = 0.0
    loading: float = 0.0
    longest: float = 0.0
    lost_cells: int = 0
    lost_nodes: int = 0
    before: dict[int, float] = field(default_factory=dict, repr=False)  # time spent on each lost cell


class SimulatedEngine:
    """An engine on a simulated `Cluster`; `spent` says where the time went."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self.spent, self.now = cluster, Spent(), 0.0
        sizes = [DEVICES] * (cluster.devices // DEVICES) + [cluster.devices % DEVICES] * bool(cluster.devices % DEVICES)
        self._nodes = [_Node([_Device() for _ in range(size)]) for size in sizes]
        self._idle = [device for node in self._nodes for device in node.devices]
        self._waiting: deque[Cell] = deque()
        self._computing = 0
        self._random, self._number = random.Random(cluster.seed), itertools.count()
        self._events: list[tuple[float, int, Callable[[], list[Outcome]]]] = []
        self._out: list[Outcome] = []  # finished while the driver was busy
        for node in self._nodes:
            self._plan_loss(node)

    def room(self) -> list[Checkpoint | None]:
        if self._cluster.ahead is None:
            return [device.loaded[0] if device.loaded else None for device in self._idle]
        up = sum(len(node.devices) for node in self._nodes if node.up)
        return [None] * (max(up, 1) * (1 + self._cluster.ahead) - self._computing - len(self._waiting))

    def submit(self, cell: Cell, log: Path) -> None:
        self.passes(self._cluster.giving)
        self._waiting.append(cell)
        self._give_out()

    def poll(self, seconds: float) -> list[Outcome]:
        """Return the finished cells; if there are none, advance the clock until one finishes, whatever `seconds`."""
        if not self._out:
            moment = self._events[0][0]
            self.passes(moment - self.now)
        outcomes, self._out = self._out, []
        return outcomes

    def passes(self, seconds: float) -> None:
        """Let time pass while the driver is busy; the nodes continue with their cells."""
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, then = heapq.heappop(self._events)
            self._out += then()
            self._give_out()
        self.now = until

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _at(self, moment: float, then: Callable[[], list[Outcome]]) -> None:
        heapq.heappush(self._events, (moment, next(self._number), then))

    def _give_out(self) -> None:
        while self._waiting and self._idle:
            cell = self._waiting.popleft()
            device = self._idle[0]
            if self._cluster.ahead is None:
                held = (d for d in self._idle if d.loaded and d.loaded[0] == cell.checkpoint)
                device = next(held, None) or next((d for d in self._idle if d.loaded is None), device)
            self._idle.remove(device)
            self._compute(device, cell)

    def _compute(self, device: _Device, cell: Cell) -> None:
        model = (cell.checkpoint, cell.size)
        load = 0.0 if device.loaded == model else self._cluster.load
        device.loaded, device.cell, device.began = model, cell, self.now + load
        device.attempt += 1
        attempt = device.attempt
        self._computing += 1
        self.spent.loading += load
        self._at(device.began + self._cluster.seconds(cell), lambda: self._done(device, attempt))

    def _done(self, device: _Device, attempt: int) -> list[Outcome]:
        if device.attempt != attempt:
            return []  # the cell was lost before it finished
        cell = device.cell
        assert cell is not None
        taken = self.now - device.began
        self.spent.makespan = self.now
        self.spent.computing += taken
        self.spent.longest = max(self.spent.longest, taken + self.spent.before.get(id(cell), 0.0))
        device.cell = None
        self._idle.append(device)
        self._computing -= 1
        return [Outcome(cell, {"status": "ok", "reason": None, "seconds": taken})]

    def _plan_loss(self, node: _Node) -> None:
        if self._cluster.failures:
            after = self._random.expovariate(self._cluster.failures / 3600)
            self._at(self.now + after, lambda: self._lost(node))

    def _lost(self, node: _Node) -> list[Outcome]:
        outcomes = []
        self.spent.lost_nodes += 1
        node.up = False
        for device in node.devices:
            device.attempt += 1
            device.loaded = None
            if device.cell is None:
                self._idle.remove(device)
                continue
            taken = max(0.0, self.now - device.began)
            self.spent.lost_cells += 1
            self.spent.repeated += taken
            self.spent.before[id(device.cell)] = self.spent.before.get(id(device.cell), 0.0) + taken
            record = {"status": "failed", "reason": "its node is lost", "seconds": taken}
            outcomes.append(Outcome(device.cell, record, lost="node"))
            device.cell = None
            self._computing -= 1
        self._at(self.now + self._cluster.back, lambda: self._joins(node))
        return outcomes

    def _joins(self, node: _Node) -> list[Outcome]:
        node.up = True
        self._idle += node.devices
        self._plan_loss(node)
        return []
