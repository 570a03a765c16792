"""Where cells are computed. An engine takes cells and gives back records; which cells, in which order, and what becomes
of the records is the caller's affair (`run.py`). Here is the one of this machine: a worker process for each device.

A segmentation fault, a kill for memory or a broken CUDA context ends a worker, and nothing else: another takes its
place, and the cell in flight comes back as lost. A worker in which a cell has failed is
replaced too, so that no cell inherits a damaged process.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch

from ..checkpoints.find import Checkpoint
from ..data.datasets import ImageSet
from ..records.files import Record
from ..scoring.cells import Cell, Options
from ..scoring.measure import failure
from .worker import Compute, Models, compute, output_to

Progress = Callable[[Cell, int, int], None]  # a cell, batches done, batches in all
Lost = Literal["worker", "node"]


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


@dataclass
class _Worker:
    """A process and what it is doing."""

    options: Options
    process: Any = None
    connection: Connection | None = None
    sent: set[int] = field(default_factory=set)  # ids of the image sets that it has
    checkpoint: Checkpoint | None = None
    cell: Cell | None = None
    started: float = 0.0


class LocalEngine:
    """Worker processes on this machine.

    Args:
        workers: the options of each worker; they differ in `device` alone.
        progress: is called now and then while a cell is computed.
        compute: the function that workers run, for measuring the engine itself.
    """

    def __init__(
        self, workers: Sequence[Options], progress: Progress = lambda *_: None, compute: Compute = compute
    ) -> None:
        self._workers = [_Worker(options) for options in workers]
        self._threads = max(1, torch.get_num_threads() // len(workers)) if len(workers) > 1 else None
        self._progress, self._compute = progress, compute
        self._context = _context()
        self._data: dict[int, ImageSet] = {}  # kept, so that ids stay unique
        self._ending: list[Any] = []

    def room(self) -> list[Checkpoint | None]:
        return [worker.checkpoint for worker in self._workers if worker.cell is None]

    def submit(self, cell: Cell, log: Path) -> None:
        idle = [worker for worker in self._workers if worker.cell is None]
        # The one that has the checkpoint in memory, else one that has none.
        worker = min(idle, key=lambda w: 0 if w.checkpoint == cell.checkpoint else 1 if w.checkpoint is None else 2)
        self._start(worker, cell, log)

    def poll(self, seconds: float) -> list[Outcome]:
        busy = {worker.connection: worker for worker in self._workers if worker.cell is not None}
        outcomes = []
        for connection in wait(list(busy), seconds):  # type: ignore[arg-type]
            worker = busy[connection]  # type: ignore[index]
            assert worker.connection is not None and worker.cell is not None
            try:
                message = worker.connection.recv()
            except (EOFError, ConnectionError):
                outcomes.append(self._died(worker))
                continue
            if isinstance(message, dict):
                outcomes.append(Outcome(worker.cell, message))
                worker.cell = None
                if message["status"] == "failed":
                    self._retire(worker)
            else:
                self._progress(worker.cell, *message)
        return outcomes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            if worker.cell is not None:
                worker.process.terminate()
            self._retire(worker)
        for process in self._ending:
            process.join()

    def _start(self, worker: _Worker, cell: Cell, log: Path) -> None:
        worker.cell, worker.started = cell, time.perf_counter()
        worker.checkpoint = cell.checkpoint
        if worker.process is None:
            worker.connection, theirs = self._context.Pipe()
            arguments = (theirs, worker.options, self._threads, self._compute)
            worker.process = self._context.Process(target=_serve, args=arguments)
            worker.process.start()
            theirs.close()
            worker.sent = set()
        assert worker.connection is not None
        number = id(cell.data)
        self._data[number] = cell.data
        news = None if number in worker.sent else cell.data  # 50,000 paths travel once
        worker.sent.add(number)
        with suppress(ConnectionError):  # it has died meanwhile: `poll` finds that out
            worker.connection.send((number, news, replace(cell, data=None), log))  # type: ignore[arg-type]

    def _died(self, worker: _Worker) -> Outcome:
        assert worker.cell is not None
        worker.process.join()
        cell, why = worker.cell, _why(worker.process.exitcode)
        worker.cell = None
        self._retire(worker)
        return Outcome(cell, failure(cell, worker.options, why, time.perf_counter() - worker.started), lost="worker")

    def _retire(self, worker: _Worker) -> None:
        """Another process will take its place."""
        if worker.process is not None:
            assert worker.connection is not None
            worker.connection.close()  # which it takes as the end
            self._ending = [process for process in self._ending if process.is_alive()] + [worker.process]
        worker.process = worker.connection = worker.cell = worker.checkpoint = None


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


def _why(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (the system ran out of memory, or somebody killed it)" if name == "SIGKILL" else ""
        return f"the process of this cell died of {name}{hint}; its output is in the log"
    return f"the process of this cell ended with exit code {exitcode}; its output is in the log"


def _serve(connection: Connection, options: Options, threads: int | None, compute: Compute) -> None:
    """Compute cells and send their records, until the other end is closed: what a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    if "fork" in multiprocessing.get_all_start_methods():
        # Loader workers are forked, as torch does by default: a second server would import everything again, and its
        # workers would not notice that this process has died.
        multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    models, data = Models(options.device, options.channels_last), {}
    while True:
        try:
            number, news, cell, log = connection.recv()
        except EOFError:
            return
        if news is not None:
            data[number] = news
        with output_to(log):
            record = compute(replace(cell, data=data[number]), options, models, partial(_track, connection))
        connection.send(record)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _track(connection: Connection, batches: Any) -> Iterable[Any]:
    total, told = len(batches), 0.0
    for done, batch in enumerate(batches):
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            connection.send((done, total))
        yield batch
