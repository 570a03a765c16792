"""From cells to records: what is finished is read, what is not is computed by an engine and written here."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from .schedule import Schedule

try:
    import resource
except ModuleNotFoundError:  # Windows, which has no such limit
    resource = None  # type: ignore[assignment]

BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


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
        _allow_files(len(groups))
        with Progress(*BAR, console=self.log, transient=True) as progress:
            shown = _Shown(progress, sum(map(len, groups.values())))
            with start(shown.batches) as engine:
                for cell, record in Schedule(self, groups, engine, downloads).pairs():
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

    def work(self, cell: Cell) -> float:
        """Multiply-accumulates that a cell will take, as far as that is known now: for the order alone."""
        if cell.checkpoint in self.missing or self.applicability.why_not(cell, build=False):
            return 0.0
        there = record_path(self.out, cell.key(self.options)).name in self._written
        if there and (not self.retry_failed or self._finished(cell) is not None):
            return 0.0
        return cell.images * macs_of(cell)

    @cached_property
    def _written(self) -> set[str]:
        """Names of the records that were there at the start."""
        folder = self.out / "records"
        return set(os.listdir(folder)) if folder.is_dir() else set()

    def settled(self, cell: Cell) -> Record | None:
        """The record of a cell of which nothing is to be computed: it was finished before, its checkpoint cannot be
        had, or it has no answer. For none of these is anything downloaded or loaded."""
        record = self._finished(cell)
        if record is None and cell.checkpoint in self.missing:
            record = failure(cell, self.options, f"CheckpointError: {self.missing[cell.checkpoint]}")
            self.write(Outcome(cell, record))
        elif record is None and (reason := self.applicability.why_not(cell)):
            record = refusal(cell, self.options, reason)
            self.write(Outcome(cell, record))
        if record is None:
            return None
        if more := [word for word in cell.requested if word not in record["requested"]]:
            record["requested"] += more
            write_record(record_path(self.out, cell.key(self.options)), record)
        return record

    def write(self, outcome: Outcome, again: bool = False) -> None:
        """Write what has come out. That a node is lost says nothing about a cell which is computed `again`: it has no
        record."""
        record, key = outcome.record, outcome.cell.key(self.options)
        path = record_path(self.out, key)
        if not (again and outcome.lost == "node"):
            record["environment"]["commit"] = commit()
            record |= {**key, "key": key}  # to another node the data may look otherwise
            try:
                read_record(path)
            except RecordError as error:
                text = f"{error} It is replaced."
                self.log.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
            write_record(path, record)
        if not self.log.is_terminal:  # a log file has no progress bar
            said = f"{path.stem}: {record['status']}, {record['seconds']:.1f} s"
            more = f" ({record['reason']}); it is computed once more" if again else ""
            self.log.print(said + more, highlight=False, markup=False, soft_wrap=True)

    def lock(self, checkpoint: Checkpoint) -> FileLock | None:
        """Its lock; None while another sweep has it."""
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def wait_for(self, checkpoints: list[Checkpoint]) -> None:
        """Say that nothing is left but what another sweep works on."""
        names = ", ".join(checkpoint.name for checkpoint in checkpoints[:3])
        self.log.print(f"Another sweep works on {names} in {self.out}: waiting for it.")

    def log_file(self, cell: Cell) -> Path:
        """Where the output of a cell goes."""
        return self.out / "logs" / f"{record_path(self.out, cell.key(self.options)).stem}.log"


def _allow_files(checkpoints: int) -> None:
    """Raise the soft limit of open files, often 1,024, as far as the hard one allows: every checkpoint that is begun
    has its lock open, and on many devices most may be."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = checkpoints + 1024 if hard == resource.RLIM_INFINITY else min(checkpoints + 1024, hard)
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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
