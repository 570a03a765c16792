"""Which cell is computed next, which go on with what a worker has in memory, and what is computed once more."""

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

PATIENCE = 0.2  # seconds between two looks at what else could be done
LOOK_AGAIN = 1.0  # seconds until a checkpoint is looked at again that another sweep worked on
# Of a cell; that a node is lost, or a worker that runs another one's images, is hardly its doing.
ATTEMPTS: dict[Lost, int] = {"worker": 2, "node": 10, "neighbour": 10}
SHARE = 0.25  # of the work that is left for each worker: a larger cell is begun at once


class Lock(Protocol):
    """What other sweeps in the same folder respect."""

    def release(self) -> None: ...


class Store(Protocol):
    """Where records go, and what is known of cells before they are computed; see `Run`."""

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
    to_do: dict[int, Cell]  # in the order in which neighbours share most
    left: float  # work of those
    in_flight: int = 0


class Schedule:
    """The order of cells.

    Checkpoints are begun one after the other, and a worker keeps the one that it has in memory. For several workers the
    largest is begun first; a cell that would be late if it waited is computed at once, wherever there is room: its
    checkpoint may be divided between workers. When no checkpoint is left to begin, or as many are open as there are
    workers, a worker that has nothing in memory helps with the one that has most left.
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
        self.locked: set[Checkpoint] = set()  # by other sweeps, when they were looked at
        self.look_again, self.told = 0.0, False
        self.to_do = set(self.work)  # what is not given out, of checkpoints that are waiting, too
        self.left = sum(self.work.values())
        self.by_size = [(-self.work[id(cell)], number, cell) for number, cell in enumerate(cells)] if several else []
        heapq.heapify(self.by_size)
        self.aside: list[tuple[float, int, Cell]] = []  # of `by_size`, what is locked
        self.in_flight = 0
        self.lost: Counter[tuple[int, Lost]] = Counter()
        self.ready: deque[tuple[Cell, Record]] = deque()  # of cells that were not computed

    def pairs(self) -> Iterator[tuple[Cell, Record]]:
        """Compute; give each cell with its last record, as they come."""
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
        """Give the engine what it has room for."""
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
        """The largest cell, if it may not wait."""
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
        """The next checkpoint that no other sweep works on, with something to do."""
        for checkpoint in list(self.waiting):
            if (group := self._opened(checkpoint)) is not None:
                return group
        return None

    def _opened(self, checkpoint: Checkpoint) -> _Group | None:
        """The checkpoint, begun now if it was not before; None where another sweep works on it, and where nothing of it
        is to do. What needs no computing is `ready`."""
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
        """The next checkpoint whose weights will be needed."""
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
        """Write what has come out; give whether its cell is done with. Else it is given out again."""
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
