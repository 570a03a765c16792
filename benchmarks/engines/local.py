"""The interface of engines, and the local engine, which computes cells in worker processes of this machine.

An engine takes cells and returns records; its caller (`run.py`) decides which cells, in which order, and writes the
records. A worker runs images on its device; metrics and intervals may be computed in processes of their own meanwhile
(`answers.py`).

A segmentation fault, a kill for lack of memory or a broken CUDA context ends one worker and nothing else. The engine
starts another worker, and returns the cells of the dead one as lost: the cell whose images it ran, and those whose
metrics its processes computed. It also replaces a worker in which a cell failed, so that no cell runs in a damaged
process.
"""

import itertools
import math
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch

from ..checkpoints.find import Checkpoint
from ..data.datasets import ImageSet
from ..records.files import Record
from ..scoring.cells import Cell, Options
from ..scoring.measure import failure
from .answers import Died
from .serve import BATCHES, RECORD, serve
from .worker import Compute, compute

Progress = Callable[[Cell, int, int], None]  # a cell, batches done, batches in all
Lost = Literal["worker", "node", "neighbour"]  # neighbour: its metrics were being computed when its worker died
SCORES_SHARE = 1 / 8  # of main memory, for scores in metric processes, which take about three times their size


class EngineError(RuntimeError):
    """The engine cannot start or continue; the text says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Outcome:
    """The record of a cell; `lost` says what died while it was computed."""

    cell: Cell
    record: Record
    lost: Lost | None = None


class Engine(Protocol):
    """Computes cells. A context manager: leaving it ends all cells that are still computed."""

    def room(self) -> list[Checkpoint | None]:
        """Return an entry for each cell that `submit` takes now: the checkpoint in that worker's memory, or None."""

    def submit(self, cell: Cell, log: Path) -> None:
        """Begin to compute a cell; what it prints goes to `log`."""

    def poll(self, seconds: float) -> list[Outcome]:
        """Return the cells that have finished, after waiting at most this long for one."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


@dataclass(eq=False)
class _Worker:
    """A worker process and its cells."""

    options: Options
    turn: Path | None = None
    process: Any = None
    connection: Connection | None = None
    sent: set[int] = field(default_factory=set)  # ids of the image sets that the process already has
    checkpoint: Checkpoint | None = None
    number: int | None = None  # of the cell whose images it runs; None if it is idle
    cells: dict[int, tuple[Cell, float]] = field(default_factory=dict)  # without a record yet, and their start times


class LocalEngine:
    """An engine of worker processes on this machine.

    Args:
        workers: the options of each worker; they differ in `device` alone.
        progress: is called while a cell is computed, with the cell, the batches done and all its batches.
        compute: the function that workers run; benchmarks of the engine replace it.
        take_turns: let workers that share a device run images one at a time. While one does, another loads the next
            checkpoint and reads its first images.
        answering: number of processes, for each worker, that compute metrics and intervals while it runs the next
            cell's images. With 0 the worker computes them itself before it starts the next cell.
    """

    def __init__(
        self,
        workers: Sequence[Options],
        progress: Progress = lambda *_: None,
        compute: Compute = compute,
        take_turns: bool = False,
        answering: int = 0,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="timm_csra_")
        turns = {o.device: Path(self._folder.name) / f"{number}.lock" for number, o in enumerate(workers)}
        self._workers = [_Worker(options, turns[options.device] if take_turns else None) for options in workers]
        self._leaving: list[_Worker] = []  # finish the metrics they still compute, and get no more cells
        self._threads = max(1, torch.get_num_threads() // len(workers)) if len(workers) > 1 else None
        self._progress, self._compute = progress, compute
        self._limits = (answering, _physical_memory() * SCORES_SHARE / max(1, len(workers)))
        self._context = _context()
        self._data: dict[int, ImageSet] = {}  # kept, so that ids stay unique
        self._numbers = itertools.count()
        self._ending: list[Any] = []

    def room(self) -> list[Checkpoint | None]:
        return [worker.checkpoint for worker in self._workers if worker.number is None]

    def submit(self, cell: Cell, log: Path) -> None:
        idle = [worker for worker in self._workers if worker.number is None]
        # Prefer the worker with this checkpoint in memory, then one with an empty memory.
        worker = min(idle, key=lambda w: 0 if w.checkpoint == cell.checkpoint else 1 if w.checkpoint is None else 2)
        self._start(worker, cell, log)

    def poll(self, seconds: float) -> list[Outcome]:
        busy = {worker.connection: worker for worker in (*self._workers, *self._leaving) if worker.cells}
        outcomes = []
        for connection in wait(list(busy), seconds):  # type: ignore[arg-type]
            worker = busy[connection]  # type: ignore[index]
            assert worker.connection is not None
            try:
                what, number, found = worker.connection.recv()
            except (EOFError, OSError, pickle.UnpicklingError):  # the worker died, perhaps while sending a message
                outcomes += self._died(worker)
                continue
            if what == BATCHES:
                self._progress(worker.cells[number][0], *found)
            elif what == RECORD:
                outcomes += self._finished(worker, number, found)
            else:
                worker.number = None
        return outcomes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in (*self._workers, *self._leaving):
            if worker.cells:
                worker.process.terminate()
            self._end(worker)
        for process in self._ending:
            process.join()
        self._folder.cleanup()

    def _start(self, worker: _Worker, cell: Cell, log: Path) -> None:
        worker.number = next(self._numbers)
        worker.cells[worker.number] = cell, time.perf_counter()
        worker.checkpoint = cell.checkpoint
        if worker.process is None:
            worker.connection, theirs = self._context.Pipe()
            arguments = (theirs, worker.options, self._threads, self._compute, worker.turn, *self._limits)
            worker.process = self._context.Process(target=serve, args=arguments)
            worker.process.start()
            theirs.close()
            worker.sent = set()
        assert worker.connection is not None
        data = id(cell.data)
        self._data[data] = cell.data
        news = None if data in worker.sent else cell.data  # a list of 50,000 paths is sent once only
        worker.sent.add(data)
        with suppress(ConnectionError):  # the worker has died; `poll` will notice
            job = (worker.number, data, news, replace(cell, data=None), log)  # type: ignore[arg-type]
            worker.connection.send(job)

    def _finished(self, worker: _Worker, number: int, found: Record | Died) -> list[Outcome]:
        """Return the outcome of a cell: its record, or a failure if the process that computed its metrics died."""
        cell, began = worker.cells.pop(number)
        of_the_pass = worker.number == number
        if of_the_pass:
            worker.number = None
        if worker in self._leaving:
            if not worker.cells:
                self._leaving.remove(worker)
                self._end(worker)
        elif of_the_pass and isinstance(found, dict) and found["status"] == "failed":
            self._replace(worker)
        return [self._lost(worker, cell, began, found.exitcode) if isinstance(found, Died) else Outcome(cell, found)]

    def _died(self, worker: _Worker) -> list[Outcome]:
        worker.process.join()
        outcomes = [
            self._lost(worker, *begun, worker.process.exitcode, "worker" if number == worker.number else "neighbour")
            for number, begun in worker.cells.items()
        ]
        if worker in self._leaving:
            self._leaving.remove(worker)
        self._end(worker)
        return outcomes

    def _lost(self, worker: _Worker, cell: Cell, began: float, exitcode: int | None, lost: Lost = "worker") -> Outcome:
        record = failure(cell, worker.options, _why(exitcode), time.perf_counter() - began)
        return Outcome(cell, record, lost)

    def _replace(self, worker: _Worker) -> None:
        """Let a new process replace the worker's at once; the old one finishes the metrics that it still computes."""
        if worker.cells:
            self._leaving.append(replace(worker))
            worker.process = worker.connection = worker.checkpoint = None
            worker.cells = {}
        else:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        if worker.process is not None:
            assert worker.connection is not None
            worker.connection.close()  # makes the process end
            self._ending = [process for process in self._ending if process.is_alive()] + [worker.process]
        worker.process = worker.connection = worker.number = worker.checkpoint = None
        worker.cells = {}


# Without these glibc returns large tensors to the system after every layer, and page faults can take half of the time
# on a CPU. glibc reads them when a process starts; other C libraries ignore them.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def keep_memory() -> None:
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)


def _context() -> Any:
    """Fork workers from a server that has imported everything and computed nothing: fast, and safe with CUDA."""
    keep_memory()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _physical_memory() -> float:
    """Bytes of main memory; infinity where the system does not report it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _why(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (the system ran out of memory, or it was killed)" if name == "SIGKILL" else ""
        return f"the process of this cell died of {name}{hint}; its output is in the log"
    return f"the process of this cell ended with exit code {exitcode}; its output is in the log"
