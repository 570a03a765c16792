"""From cells to records: what is finished is read, what is not is computed by an engine and written here."""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ..checkpoints.downloads import Downloads
from ..checkpoints.find import Checkpoint
from ..records.files import Record, RecordError, now, read_record, record_path, write_record
from ..scoring.applicable import Applicability
from ..scoring.cells import Cell, Options
from ..scoring.environment import commit
from ..scoring.kept import scores_file
from ..scoring.measure import failure, refusal
from .estimate import macs_of
from .local import Engine, Outcome

BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)
PATIENCE = 0.2  # seconds between two looks at what else could be done


@dataclass
class _Group:
    """The cells of a checkpoint, which share its lock and, in one worker, the loaded model."""

    cells: list[Cell]
    lock: FileLock
    to_do: deque[Cell] = field(default_factory=deque)
    in_flight: int = 0


@dataclass(frozen=True)
class Run:
    """A folder of records, and how the cells that it lacks are computed.

    Attributes:
        options: how a cell is measured.
        out: the folder.
        missing: checkpoints that cannot be had, with the reason.
        retry_failed: whether a failed cell is measured again.
        log: where progress goes.
    """

    options: Options
    out: Path
    missing: Mapping[Checkpoint, str]
    retry_failed: bool
    log: Console

    def state(self, cell: Cell, build: bool = False) -> tuple[str, str | None]:
        """What a sweep would do with a cell, and why, where that is nothing. `build` as in `Applicability.why_not`."""
        record = self._finished(cell)
        if record is not None:
            return (
                ("done", None) if record["status"] == "ok" else (record["status"].replace("_", " "), record["reason"])
            )
        if cell.checkpoint in self.missing:
            return "not to be had", self.missing[cell.checkpoint]
        reason = self.applicability.why_not(cell, build)
        return ("not applicable", reason) if reason else ("to do", None)

    @cached_property
    def applicability(self) -> Applicability:
        return Applicability(self.options)

    def records(
        self, cells: Iterable[Cell], start: Callable[[Callable[[Cell, int, int], None]], Engine], downloads: Downloads
    ) -> Iterator[tuple[Cell, Record]]:
        """One record for each cell, read where it is finished and computed where it is not, as they come.

        Another sweep may work in the same folder: each checkpoint is locked while its cells are computed. What is
        locked comes last, and what the other has finished by then is read.

        Args:
            cells: what to compute.
            start: gives the engine, to which it hands a function that shows the progress of a cell.
            downloads: the cache of weights.
        """
        groups: dict[Checkpoint, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.checkpoint, []).append(cell)
        with Progress(*BAR, console=self.log, transient=True) as progress:
            shown = _Shown(progress, sum(map(len, groups.values())))
            with start(shown.batches) as engine:
                for cell, record in _Schedule(self, groups, engine, downloads).pairs():
                    shown.finished(cell)
                    yield cell, record

    def confirm(self, cell: Cell, record: Record) -> None:
        """Write a finished record anew, as one of the weights that its checkpoint has now."""
        write_record(record_path(self.out, cell.key(self.options)), record | {"finished": now()})

    def _finished(self, cell: Cell) -> Record | None:
        """The record of a cell for which nothing is left to do. What is no record does not make a cell finished."""
        try:
            record = read_record(record_path(self.out, cell.key(self.options)))
        except RecordError:
            return None
        if record is None or (self.retry_failed and record["status"] == "failed"):
            return None
        file = scores_file(cell, self.options)
        absent = record["status"] == "ok" and file is not None and not self.options.rescore and not file.is_file()
        return None if absent else record

    def _write(self, outcome: Outcome) -> None:
        record, key = outcome.record, outcome.cell.key(self.options)
        record["environment"]["commit"] = commit()
        record |= {**key, "key": key}  # to another node the data may look otherwise
        path = record_path(self.out, key)
        try:
            read_record(path)
        except RecordError as error:
            self.log.print(f"{error} It is replaced.", style="yellow", markup=False, highlight=False, soft_wrap=True)
        write_record(path, record)
        if not self.log.is_terminal:  # a log file has no progress bar
            again = "" if outcome.final else "; it is computed once more"
            line = f"{path.stem}: {record['status']}, {record['seconds']:.1f} s{again}"
            self.log.print(line, highlight=False, soft_wrap=True)

    def _lock(self, checkpoint: Checkpoint) -> FileLock:
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]}.lock")

    def _log_file(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{record_path(self.out, cell.key(self.options)).stem}.log"


class _Schedule:
    """Which cell is computed next. Checkpoints are begun one after the other, for several workers the largest first, so
    that no long one is left for the end; a worker keeps the checkpoint that it has in memory, and when none is left to
    begin it helps with the one that has most left."""

    def __init__(self, run: Run, groups: dict[Checkpoint, list[Cell]], engine: Engine, downloads: Downloads) -> None:
        self.run, self.engine, self.downloads = run, engine, downloads
        names = list(groups)
        if len(engine.room()) > 1:
            names.sort(key=lambda checkpoint: -sum(map(self._work, groups[checkpoint])))
        self.groups = groups
        self.waiting = deque(names)
        self.open: dict[Checkpoint, _Group] = {}
        self.ready: deque[tuple[Cell, Record]] = deque()  # finished before
        self.look_again = 0.0
        self.told = False

    def pairs(self) -> Iterator[tuple[Cell, Record]]:
        try:
            while self.waiting or self.open:
                self._fill()
                while self.ready:
                    yield self.ready.popleft()
                if any(group.in_flight for group in self.open.values()):
                    for outcome in self.engine.poll(PATIENCE):
                        self.run._write(outcome)
                        if outcome.final:
                            self._finish(outcome.cell.checkpoint)
                            yield outcome.cell, outcome.record
                elif self.waiting and not self.open:
                    time.sleep(max(0.0, self.look_again - time.monotonic()))
        finally:
            for group in self.open.values():
                group.lock.release()

    def _work(self, cell: Cell) -> float:
        return 0.0 if self.run.applicability.why_not(cell, build=False) else cell.images * macs_of(cell)

    def _fill(self) -> None:
        """Give the engine what it has room for."""
        room: list[Checkpoint | None] = self.engine.room()
        while room:
            # First those that go on with what they have in memory.
            held = next((c for c in room if c is not None and c in self.open and self.open[c].to_do), None)
            if held is not None:
                room.remove(held)
                group = self.open[held]
            elif (found := self._begin() or self._most_left()) is None:
                return
            else:
                room.pop()
                group = found
            cell = group.to_do.popleft()
            group.in_flight += 1
            self.engine.submit(cell, self.run._log_file(cell))

    def _begin(self) -> _Group | None:
        """The next checkpoint that no other sweep works on, with something to do. What is finished is `ready`."""
        if not self.waiting or time.monotonic() < self.look_again:
            return None
        for _ in range(len(self.waiting)):
            checkpoint = self.waiting[0]
            lock = self.run._lock(checkpoint)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.waiting.rotate(-1)
                continue
            self.waiting.popleft()
            group = _Group(self.groups[checkpoint], lock)
            self._sort(checkpoint, group)
            if not group.to_do:
                self._close(checkpoint, group)
                continue
            self.downloads.start(checkpoint, self._following() if self.downloads.prefetch else None)
            self.open[checkpoint] = group
            return group
        self.look_again = time.monotonic() + 1.0
        if self.waiting and not self.open and not self.told:
            self.told = True
            names = ", ".join(checkpoint.name for checkpoint in list(self.waiting)[:3])
            self.run.log.print(f"Another sweep works on {names} in {self.run.out}: waiting for it.")
        return None

    def _following(self) -> Checkpoint | None:
        """The next checkpoint whose weights will be needed."""
        for checkpoint in self.waiting:
            if any(self.run.state(cell, build=True)[0] == "to do" for cell in self.groups[checkpoint]):
                return checkpoint
        return None

    def _sort(self, checkpoint: Checkpoint, group: _Group) -> None:
        """What is to be computed is put on the group's list, and all else has a record: it was finished before, its
        checkpoint cannot be had, or it has no answer. For none of these is anything downloaded or loaded."""
        for cell in group.cells:
            record = self.run._finished(cell)
            if record is None and checkpoint in self.run.missing:
                record = failure(cell, self.run.options, f"CheckpointError: {self.run.missing[checkpoint]}")
                self.run._write(Outcome(cell, record))
            elif record is None and (reason := self.run.applicability.why_not(cell)):
                record = refusal(cell, self.run.options, reason)
                self.run._write(Outcome(cell, record))
            if record is None:
                group.to_do.append(cell)
                continue
            if more := [word for word in cell.requested if word not in record["requested"]]:
                record["requested"] += more
                write_record(record_path(self.run.out, cell.key(self.run.options)), record)
            self.ready.append((cell, record))

    def _most_left(self) -> _Group | None:
        group = max(self.open.values(), key=lambda group: len(group.to_do), default=None)
        return group if group is not None and group.to_do else None

    def _finish(self, checkpoint: Checkpoint) -> None:
        group = self.open[checkpoint]
        group.in_flight -= 1
        if not group.to_do and not group.in_flight:
            self._close(checkpoint, self.open.pop(checkpoint))

    def _close(self, checkpoint: Checkpoint, group: _Group) -> None:
        self.downloads.finish(checkpoint)
        group.lock.release()


class _Shown:
    """Progress on the terminal: all cells, and the batches of each that is computed."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.overall = progress.add_task("cells", total=total)
        self.cells: dict[int, TaskID] = {}

    def batches(self, cell: Cell, done: int, total: int) -> None:
        if id(cell) not in self.cells:
            description = f"{cell.checkpoint.name} {cell.data.name} {cell.task_name}"
            self.cells[id(cell)] = self.progress.add_task(description, total=total)
        self.progress.update(self.cells[id(cell)], completed=done, total=total)

    def finished(self, cell: Cell) -> None:
        self.progress.advance(self.overall)
        if id(cell) in self.cells:
            self.progress.remove_task(self.cells.pop(id(cell)))
