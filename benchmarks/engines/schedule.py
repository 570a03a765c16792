"""Decide which cell is computed next, and which lost cells are computed again."""

import heapq
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..checkpoints.downloads import Downloads
from ..checkpoints.find import Checkpoint
from ..records.files import Record
from ..scoring.cells import Cell
from .local import Engine, Lost, Outcome

PATIENCE = 0.2  # seconds that one poll of the engine waits
LOOK_AGAIN = 1.0  # seconds between attempts to lock checkpoints that another sweep has locked
# Attempts for a cell, by what died: it is rarely the cell's fault if a node, or a worker that ran another cell, dies.
ATTEMPTS: dict[Lost, int] = {"worker": 2, "node": 10, "neighbour": 10}
SHARE = 0.25  # a cell with more than this share of one worker's remaining work starts at once


class Lock(Protocol):
    """A lock that keeps other sweeps in the same folder from computing a checkpoint's cells."""

    def release(self) -> None: ...


class Store(Protocol):
    """Writes records, and knows which cells need computing; see `Run`."""

    def work(self, cell: Cell) -> float: ...
    def state(self, cell: Cell, build: bool) -> tuple[str, str | None]: ...
    def settled(self, cell: Cell) -> Record | None: ...
    def lock(self, checkpoint: Checkpoint) -> Lock | None: ...
    def wait_for(self, checkpoints: list[Checkpoint]) -> None: ...
    def log_file(self, cell: Cell) -> Path: ...
    def write(self, outcome: Outcome, again: bool) -> None: ...


@dataclass
class _Group:
    """The cells of a checkpoint, which share its lock and, in one worker, the loaded model."""

    lock: Lock
    to_do: dict[int, Cell]  # ordered so that neighbours can share a pass or a model
    left: float  # work of the cells to do
    in_flight: int = 0


class Schedule:
    """Gives cells to an engine in an order that keeps workers busy and loads few checkpoints twice.

    It opens checkpoints one after the other, and a worker continues with the checkpoint that it has in memory. With
    several workers it opens the checkpoint with the most work first. A cell so large that it would finish last if it
    waited is computed at once by any free worker; so several workers may share a checkpoint. When all checkpoints are
    open, or as many as there are workers, a worker with nothing in memory helps with the one that has most work left.
    """

    def __init__(
        self, store: Store, groups: Mapping[Checkpoint, list[Cell]], engine: Engine, downloads: Downloads
    ) -> None:
        self.store, self.engine, self.downloads, self.groups = store, engine, downloads, groups
        several = len(engine.room()) > 1
        cells = [cell for group in groups.values() for cell in group]
        self.work = {id(cell): store.work(cell) if several else 0.0 for cell in cells}
        largest_first = sorted(groups, key=lambda c: -sum(self.work[id(cell)] for cell in groups[c]))
        self.waiting = dict.fromkeys(largest_first)
        self.open: dict[Checkpoint, _Group] = {}
        self.locked: set[Checkpoint] = set()  # by other sweeps, at the last attempt
        self.look_again, self.told = 0.0, False
        self.to_do = set(self.work)  # ids of all cells not given to the engine
        self.left = sum(self.work.values())
        self.by_size = [(-self.work[id(cell)], number, cell) for number, cell in enumerate(cells)] if several else []
        heapq.heapify(self.by_size)
        self.aside: list[tuple[float, int, Cell]] = []  # entries of `by_size` whose checkpoint is locked
        self.in_flight = 0
        self.lost: Counter[tuple[int, Lost]] = Counter()
        self.ready: deque[tuple[Cell, Record]] = deque()  # cells that needed no computing

    def pairs(self) -> Iterator[tuple[Cell, Record]]:
        """Yield each cell with its final record, as cells finish."""
        try:
            while self.waiting or self.open:
                self._fill()
                while self.ready:
                    yield self.ready.popleft()
                if self.open:
                    for outcome in self.engine.poll(PATIENCE):
                        if self._is_last(outcome):
                            yield outcome.cell, outcome.record
                elif self.waiting:
                    time.sleep(max(0.0, self.look_again - time.monotonic()))
        finally:
            for group in self.open.values():
                group.lock.release()

    def _fill(self) -> None:
        """Submit cells until the engine has no room."""
        if time.monotonic() >= self.look_again:
            self.look_again = time.monotonic() + LOOK_AGAIN
            self.locked.clear()
            for entry in self.aside:
                heapq.heappush(self.by_size, entry)
            self.aside.clear()
        while (room := self.engine.room()) and (cell := self._next(room)) is not None:
            self._take(cell)
            group = self.open[cell.checkpoint]
            group.in_flight += 1
            self.in_flight += 1
            self.engine.submit(cell, self.store.log_file(cell))
        if self.locked and not self.open and not self.told:
            self.told = True
            self.store.wait_for(list(self.waiting))

    def _next(self, room: list[Checkpoint | None]) -> Cell | None:
        workers = len(room) + self.in_flight
        if (cell := self._late(workers)) is not None:
            return cell
        held = next((c for c in room if c is not None and c in self.open and self.open[c].to_do), None)
        if held is not None:
            group: _Group | None = self.open[held]
        else:
            divided = sum(bool(group.to_do) for group in self.open.values())
            group = (self._begin() if divided < workers else None) or self._most_left()
        return next(iter(group.to_do.values())) if group is not None else None

    def _late(self, workers: int) -> Cell | None:
        """Return the largest cell if it has to start now, else None."""
        while self.by_size:
            work, _, cell = self.by_size[0]
            if id(cell) not in self.to_do:
                heapq.heappop(self.by_size)
            elif -work <= SHARE * self.left / workers:
                return None
            elif self._opened(cell.checkpoint) is None and cell.checkpoint in self.waiting:
                self.aside.append(heapq.heappop(self.by_size))
            elif id(cell) in self.to_do:
                return cell
        return None

    def _begin(self) -> _Group | None:
        """Open the next checkpoint that has cells to do and that no other sweep has locked."""
        for checkpoint in list(self.waiting):
            if (group := self._opened(checkpoint)) is not None:
                return group
        return None

    def _opened(self, checkpoint: Checkpoint) -> _Group | None:
        """Return the group of a checkpoint, opening it if need be; None if another sweep has it or no cell is to do.

        Cells that need no computing go to `ready`.
        """
        if checkpoint in self.open or checkpoint in self.locked:
            return self.open.get(checkpoint)
        lock = self.store.lock(checkpoint)
        if lock is None:
            self.locked.add(checkpoint)
            return None
        del self.waiting[checkpoint]
        group = _Group(lock, {}, 0.0)
        for cell in self.groups[checkpoint]:
            record = self.store.settled(cell)
            if record is None:
                group.to_do[id(cell)] = cell
                group.left += self.work[id(cell)]
            else:
                self.ready.append((cell, record))
                self.to_do.discard(id(cell))
                self.left -= self.work[id(cell)]
        if not group.to_do:
            self._close(checkpoint, group)
            return None
        self.open[checkpoint] = group
        self.downloads.start(checkpoint, self._following() if self.downloads.prefetch else None)
        return group

    def _following(self) -> Checkpoint | None:
        """Return the next checkpoint whose weights will be needed, or None."""
        for checkpoint in self.waiting:
            if any(self.store.state(cell, build=True)[0] == "to do" for cell in self.groups[checkpoint]):
                return checkpoint
        return None

    def _most_left(self) -> _Group | None:
        groups = (group for group in self.open.values() if group.to_do)
        return max(groups, key=lambda group: (group.left, len(group.to_do)), default=None)

    def _take(self, cell: Cell) -> None:
        group, work = self.open[cell.checkpoint], self.work[id(cell)]
        del group.to_do[id(cell)]
        self.to_do.discard(id(cell))
        group.left -= work
        self.left -= work

    def _put_back(self, cell: Cell) -> None:
        group, work = self.open[cell.checkpoint], self.work[id(cell)]
        group.to_do = {id(cell): cell, **group.to_do}
        self.to_do.add(id(cell))
        group.left += work
        self.left += work
        if self.by_size or work:
            heapq.heappush(self.by_size, (-work, -sum(self.lost.values()), cell))

    def _is_last(self, outcome: Outcome) -> bool:
        """Write the record of an outcome. Return False if its cell was lost and will be computed again."""
        cell, group = outcome.cell, self.open[outcome.cell.checkpoint]
        group.in_flight -= 1
        self.in_flight -= 1
        again = False
        if outcome.lost is not None:
            self.lost[id(cell), outcome.lost] += 1
            again = self.lost[id(cell), outcome.lost] < ATTEMPTS[outcome.lost]
            outcome.record["attempts"] = sum(self.lost[id(cell), lost] for lost in ATTEMPTS)
        self.store.write(outcome, again)
        if again:
            self._put_back(cell)
        elif not group.to_do and not group.in_flight:
            self._close(cell.checkpoint, self.open.pop(cell.checkpoint))
        return not again

    def _close(self, checkpoint: Checkpoint, group: _Group) -> None:
        self.downloads.finish(checkpoint)
        group.lock.release()
