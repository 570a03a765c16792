"""An engine of nodes that compute nothing: a cell takes its time on a virtual clock, and nodes are lost at random."""

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

DEVICES = 8  # of a node


@dataclass(eq=False)
class _Device:
    """What it computes, since when, and what is in its memory."""

    loaded: tuple[Checkpoint, object] | None = None
    cell: Cell | None = None
    began: float = 0.0
    attempt: int = 0  # tells the end of this cell from that of one which was lost


@dataclass(eq=False)
class _Node:
    devices: list[_Device]
    up: bool = True


@dataclass
class Cluster:
    """Nodes, and what happens to them. All times are in seconds.

    Attributes:
        devices: of all nodes together.
        seconds: what a cell takes without loading its checkpoint.
        failures: how many of the nodes are lost in an hour, as a share.
        back: until another node takes the place of a lost one.
        load: for a checkpoint and size that are not in memory.
        giving: of the driver, for each cell that it gives out. What comes out meanwhile waits for it.
        ahead: cells that wait where they are given out, for each device; the one that is free first takes the next, as
            Ray does. None: none waits, and a cell goes where its checkpoint is, as on one machine.
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
    """What became of the time: of devices, but for `makespan`, which is of the clock.

    Attributes:
        computing: of cells that came back.
        repeated: of cells that were lost with their node.
        loading: of checkpoints.
        longest: the longest time that one cell took, with what it took on nodes that were lost.
        lost: cells that were lost with their node, and nodes.
    """

    makespan: float = 0.0
    computing: float = 0.0
    repeated: float = 0.0
    loading: float = 0.0
    longest: float = 0.0
    lost_cells: int = 0
    lost_nodes: int = 0
    before: dict[int, float] = field(default_factory=dict, repr=False)  # of each lost cell


class SimulatedEngine:
    """See `Cluster`; `spent` says what became of the time."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self.spent, self.now = cluster, Spent(), 0.0
        sizes = [DEVICES] * (cluster.devices // DEVICES) + [cluster.devices % DEVICES] * bool(cluster.devices % DEVICES)
        self._nodes = [_Node([_Device() for _ in range(size)]) for size in sizes]
        self._idle = [device for node in self._nodes for device in node.devices]
        self._waiting: deque[Cell] = deque()
        self._computing = 0
        self._random, self._number = random.Random(cluster.seed), itertools.count()
        self._events: list[tuple[float, int, Callable[[], list[Outcome]]]] = []
        self._out: list[Outcome] = []  # while the driver did something else
        for node in self._nodes:
            self._will_be_lost(node)

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
        """What has come out, or else what comes out next: the clock goes on to then however far that is."""
        if not self._out:
            moment = self._events[0][0]
            self.passes(moment - self.now)
        outcomes, self._out = self._out, []
        return outcomes

    def passes(self, seconds: float) -> None:
        """Let time pass in which the driver does something else; nodes go on with what they have."""
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
            return []  # it was lost before
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

    def _will_be_lost(self, node: _Node) -> None:
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
        self._will_be_lost(node)
        return []
