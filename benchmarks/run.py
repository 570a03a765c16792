"""From cells to records: what is finished is read, what is not is measured, checkpoint by checkpoint."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cells import Cell, Options
from .checkpoints import Checkpoint
from .downloads import Downloads
from .engines import run_cells
from .kept import scores_file
from .measure import failure
from .records import Record, read_record, record_path, write_record

BAR = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


@dataclass(frozen=True)
class Run:
    """A folder of records, and how the cells that it lacks are measured.

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

    def state(self, cell: Cell) -> str:
        """What a sweep would do with it."""
        record = self._finished(cell)
        if record is None:
            return "not to be had" if cell.checkpoint in self.missing else "to do"
        return "done" if record["status"] == "ok" else str(record["status"])

    def records(self, cells: Iterable[Cell], downloads: Downloads) -> Iterator[tuple[Cell, Record]]:
        """One record for each cell, read where it is finished and measured where it is not.

        Another sweep may work in the same folder: each checkpoint is locked while its cells are computed. What is
        locked comes last, and what the other has finished by then is read.
        """
        groups: dict[Checkpoint, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.checkpoint, []).append(cell)
        waiting = list(groups)
        with Progress(*BAR, console=self.log, transient=True) as progress:
            overall = progress.add_task("cells", total=sum(map(len, groups.values())))
            patience = 0.0
            while waiting:
                busy = []
                for place, checkpoint in enumerate(waiting):
                    lock = FileLock(self._lock_file(checkpoint))
                    try:
                        lock.acquire(timeout=patience)
                    except Timeout:
                        busy.append(checkpoint)
                        continue
                    try:
                        for pair in self._of_checkpoint(groups[checkpoint], downloads, waiting[place + 1 :], progress):
                            progress.advance(overall)
                            yield pair
                    finally:
                        lock.release()
                if busy and len(busy) == len(waiting) and not patience:
                    names = ", ".join(checkpoint.name for checkpoint in busy[:3])
                    self.log.print(f"Another sweep works on {names} in {self.out}: waiting for it.")
                patience = 1.0 if len(busy) == len(waiting) else 0.0
                waiting = busy

    def _of_checkpoint(
        self, cells: list[Cell], downloads: Downloads, following: list[Checkpoint], progress: Progress
    ) -> Iterator[tuple[Cell, Record]]:
        checkpoint = cells[0].checkpoint
        to_do = []
        for cell in cells:
            if (record := self._finished(cell)) is None:
                to_do.append(cell)
            else:
                yield cell, record
        if to_do and checkpoint in self.missing:
            reason = f"CheckpointError: not cached, and the Hub cannot be reached: {self.missing[checkpoint]}"
            yield from self._written(to_do, (failure(cell, self.options, reason) for cell in to_do))
        elif to_do:
            downloads.start(checkpoint, [other for other in following if other not in self.missing])
            images = progress.add_task(checkpoint.name, total=None)

            def show(cell: Cell, done: int, total: int) -> None:
                description = f"{checkpoint.name} {cell.data.name} {cell.task_name}"
                progress.update(images, description=description, completed=done, total=total)

            yield from self._written(to_do, run_cells(to_do, self.options, self._log_file, show))
            progress.remove_task(images)
        downloads.finish(checkpoint)

    def _finished(self, cell: Cell) -> Record | None:
        """The record of a cell for which nothing is left to do."""
        record = read_record(record_path(self.out, cell.key(self.options)))
        if record is None or (self.retry_failed and record["status"] == "failed"):
            return None
        file = scores_file(cell, self.options)
        absent = record["status"] == "ok" and file is not None and not self.options.rescore and not file.is_file()
        return None if absent else record

    def _written(self, cells: list[Cell], records: Iterable[Record]) -> Iterator[tuple[Cell, Record]]:
        for cell, record in zip(cells, records, strict=True):
            path = record_path(self.out, cell.key(self.options))
            write_record(path, record)
            if not self.log.is_terminal:  # a log file has no progress bar
                line = f"{path.stem}: {record['status']}, {record['seconds']:.1f} s"
                self.log.print(line, highlight=False, soft_wrap=True)
            yield cell, record

    def _lock_file(self, checkpoint: Checkpoint) -> Path:
        folder = self.out / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]}.lock"

    def _log_file(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{record_path(self.out, cell.key(self.options)).stem}.log"
