"""Turn cells into records: read those of finished cells, let an engine compute the others, and write them."""

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
except ModuleNotFoundError:  # Windows
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
    """A folder of records, and how to compute the cells that have none.

    Attributes:
        options: how a cell is measured.
        out: the folder.
        missing: checkpoints that cannot be loaded, with the reason.
        retry_failed: measure cells again that failed before.
        log: the console for progress.
    """

    options: Options
    out: Path
    missing: Mapping[Checkpoint, str]
    retry_failed: bool
    log: Console

    def state(self, cell: Cell, build: bool = False) -> tuple[str, str | None]:
        """Return the state of a cell, and the reason if there is nothing to do. For `build` see `why_not`."""
        record = self._finished(cell)
        if record is not None:
            return (
                ("done", None) if record["status"] == "ok" else (record["status"].replace("_", " "), record["reason"])
            )
        if cell.checkpoint in self.missing:
            return "unavailable", self.missing[cell.checkpoint]
        reason = self.applicability.why_not(cell, build)
        return ("not applicable", reason) if reason else ("to do", None)

    @cached_property
    def applicability(self) -> Applicability:
        return Applicability(self.options)

    def records(
        self, cells: Iterable[Cell], start: Callable[[Callable[[Cell, int, int], None]], Engine], downloads: Downloads
    ) -> Iterator[tuple[Cell, Record]]:
        """Yield each cell with its record, as cells finish: read from the folder, or else computed.

        Several sweeps may share the folder: each locks a checkpoint while it computes the checkpoint's cells. Cells of
        checkpoints that another sweep has locked come last, and records that it has written by then are read.

        Args:
            cells: the cells.
            start: returns the engine; its argument is the function that shows the progress of a cell.
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
        """Write a finished record again with the present time, so that its weights count as the checkpoint's newest."""
        write_record(record_path(self.out, cell.key(self.options)), record | {"finished": now()})

    def _finished(self, cell: Cell) -> Record | None:
        """Return the record of a cell with nothing left to do, or None. A file that is no record does not count."""
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
        """Estimate the multiply-accumulates of a cell without loading it. Only the order of cells depends on this."""
        if cell.checkpoint in self.missing or self.applicability.why_not(cell, build=False):
            return 0.0
        there = record_path(self.out, cell.key(self.options)).name in self._written
        if there and (not self.retry_failed or self._finished(cell) is not None):
            return 0.0
        return cell.images * macs_of(cell)

    @cached_property
    def _written(self) -> set[str]:
        """File names of the records in the folder at the start."""
        folder = self.out / "records"
        return set(os.listdir(folder)) if folder.is_dir() else set()

    def settled(self, cell: Cell) -> Record | None:
        """Return the record of a cell that needs no computing, or None.

        Such a cell was finished before, its checkpoint is unavailable, or it does not apply. Nothing is downloaded or
        loaded to find out.
        """
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
        """Write the record of a cell, unless its node was lost and the cell will be computed `again`."""
        record, key = outcome.record, outcome.cell.key(self.options)
        path = record_path(self.out, key)
        if not (again and outcome.lost == "node"):
            record["environment"]["commit"] = commit()
            record |= {**key, "key": key}  # a node may compute another key, e.g. from other file times
            try:
                read_record(path)
            except RecordError as error:
                text = f"{error} It is replaced."
                self.log.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
            write_record(path, record)
        if not self.log.is_terminal:  # a terminal has a progress bar instead
            said = f"{path.stem}: {record['status']}, {record['seconds']:.1f} s"
            more = f" ({record['reason']}); it is computed once more" if again else ""
            self.log.print(said + more, highlight=False, markup=False, soft_wrap=True)

    def lock(self, checkpoint: Checkpoint) -> FileLock | None:
        """Lock a checkpoint; return None while another sweep has the lock."""
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return None
        return lock

    def wait_for(self, checkpoints: list[Checkpoint]) -> None:
        """Print that all remaining cells are locked by another sweep."""
        names = ", ".join(checkpoint.name for checkpoint in checkpoints[:3])
        self.log.print(f"Another sweep works on {names} in {self.out}: waiting for it.")

    def log_file(self, cell: Cell) -> Path:
        """Path of the log of a cell."""
        return self.out / "logs" / f"{record_path(self.out, cell.key(self.options)).stem}.log"


def _allow_files(checkpoints: int) -> None:
    """Raise the soft limit of open files, often 1,024, as far as the hard limit allows.

    The sweep holds a lock file open for each checkpoint in progress, and with many devices that may be most of them.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = checkpoints + 1024 if hard == resource.RLIM_INFINITY else min(checkpoints + 1024, hard)
    if resource.RLIM_INFINITY != soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class _Shown:
    """Progress bars: one for all cells, and one for the batches of each cell that is computed."""

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
