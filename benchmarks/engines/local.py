"""Where cells are computed. An engine takes cells and gives back records; which cells, in which order, and what becomes
of the records is the caller's affair (`run.py`). Here is the one of this machine: worker processes, which run images on
their device; metrics and intervals may be computed beside, in processes of their own (`answers.py`).

A segmentation fault, a kill for memory or a broken CUDA context ends a worker, and nothing else: another takes its
place, and its cells come back as lost: the one whose images it ran, and those whose metrics were computed beside. A
worker in which a cell has failed is
replaced too, so that no cell inherits a damaged process.
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
Lost = Literal["worker", "node", "neighbour"]  # of a neighbour: its metrics were computed, under a worker that died
SCORES_SHARE = 1 / 8  # of the memory, for scores whose metrics are computed beside: that takes some three times as much


class EngineError(RuntimeError):
    """The engine cannot be started, or not go on; the text says what was found, what was expected and what to do."""


@dataclass(frozen=True)
class Outcome:
    """The record of a cell; `lost`: what has died under it."""

    cell: Cell
    record: Record
    lost: Lost | None = None


class Engine(Protocol):
    """A context manager; leaving it ends what is still computed."""

    def room(self) -> list[Checkpoint | None]:
        """One entry for each cell that `submit` would take now: the checkpoint that is in memory there, or None."""

    def submit(self, cell: Cell, log: Path) -> None:
        """Compute a cell; `log` gets what is printed meanwhile."""

    def poll(self, seconds: float) -> list[Outcome]:
        """What has come out, after waiting for it no longer than this."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


@dataclass(eq=False)
class _Worker:
    """A process and what it is doing."""

    options: Options
    turn: Path | None = None
    process: Any = None
    connection: Connection | None = None
    sent: set[int] = field(default_factory=set)  # ids of the image sets that it has
    checkpoint: Checkpoint | None = None
    number: int | None = None  # of the cell whose images it runs; None: it has none
    cells: dict[int, tuple[Cell, float]] = field(default_factory=dict)  # without a record, and when they were begun


class LocalEngine:
    """Worker processes on this machine.

    Args:
        workers: the options of each worker; they differ in `device` alone.
        progress: is called now and then while a cell is computed.
        compute: the function that workers run, for measuring the engine itself.
        take_turns: workers of one device run images one after the other. While one does, another loads the next
            checkpoint and reads its first images.
        answering: for each worker, how many processes compute metrics and intervals beside its next pass; with 0 it
            computes them itself, before that.
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
        self._leaving: list[_Worker] = []  # they finish what they have, and get nothing more
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
        # The one that has the checkpoint in memory, else one that has none.
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
            except (EOFError, OSError, pickle.UnpicklingError):  # maybe in the midst of a message
                outcomes += self._died(worker)
                continue
            if what == BATCHES:
                self._progress(worker.cells[number][0], *found)
            elif what == RECORD:
                outcomes += self._come_out(worker, number, found)
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
        news = None if data in worker.sent else cell.data  # 50,000 paths travel once
        worker.sent.add(data)
        with suppress(ConnectionError):  # it has died meanwhile: `poll` finds that out
            job = (worker.number, data, news, replace(cell, data=None), log)  # type: ignore[arg-type]
            worker.connection.send(job)

    def _come_out(self, worker: _Worker, number: int, found: Record | Died) -> list[Outcome]:
        """What there is of a cell: its record, or how the process has ended that computed its metrics."""
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
        """Another process takes its place, at once; metrics that it still computes are waited for."""
        if worker.cells:
            self._leaving.append(replace(worker))
            worker.process = worker.connection = worker.checkpoint = None
            worker.cells = {}
        else:
            self._end(worker)

    def _end(self, worker: _Worker) -> None:
        if worker.process is not None:
            assert worker.connection is not None
            worker.connection.close()  # which it takes as the end
            self._ending = [process for process in self._ending if process.is_alive()] + [worker.process]
        worker.process = worker.connection = worker.number = worker.checkpoint = None
        worker.cells = {}


# glibc gives large tensors back to the system after every layer; page faults can then take half of the time on a CPU.
# Read when a process starts; nothing to other systems.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def keep_memory() -> None:
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)


def _context() -> Any:
    """Processes forked from a server that has imported everything and computed nothing: quick, and safe with CUDA."""
    keep_memory()
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _physical_memory() -> float:
    """Bytes of this machine; without a limit where the system does not say it."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return math.inf
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _why(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (the system ran out of memory, or somebody killed it)" if name == "SIGKILL" else ""
        return f"the process of this cell died of {name}{hint}; its output is in the log"
    return f"the process of this cell ended with exit code {exitcode}; its output is in the log"
