"""Where cells are computed: the cells of a checkpoint in a process of their own, so that none can end the sweep.

A segmentation fault, a kill for memory or a broken CUDA context ends that process alone: the cell in flight becomes a
failed record, and a fresh process does the rest. Records travel to the caller, who writes them.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .cells import Cell, Options
from .checkpoints import Checkpoint, CheckpointError
from .measure import Loaded, failure, run_cell
from .records import Record

Progress = Callable[[Cell, int, int], None]  # a cell, batches done, batches in all


def run_cells(
    cells: Sequence[Cell], options: Options, log: Callable[[Cell], Path], progress: Progress
) -> Iterator[Record]:
    """One record for each cell, in order, whatever happens.

    Args:
        cells: of one checkpoint; neighbours of the same size share the loaded model.
        options: how.
        log: where the output of a cell's process goes.
        progress: is called now and then while a cell is computed.
    """
    context = _context()
    done = 0
    while done < len(cells):
        receiver, sender = context.Pipe(duplex=False)
        rest = list(cells[done:])
        process = context.Process(target=_serve, args=(sender, rest, options, [log(cell) for cell in rest]))
        process.start()
        sender.close()
        started = time.perf_counter()
        try:
            for message in _messages(receiver):
                if isinstance(message, dict):
                    done += 1
                    yield message
                    started = time.perf_counter()
                else:
                    progress(cells[done], *message)
        finally:  # finished, dead, or no longer wanted (Ctrl-C)
            if done < len(cells):
                process.terminate()
            process.join()
        if done < len(cells):
            yield failure(cells[done], options, _why(process.exitcode), time.perf_counter() - started)
            done += 1


# glibc gives large tensors back to the system after every layer; page faults can then take half of the time on a CPU.
# Read when a process starts; nothing to other systems.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


def _context() -> Any:
    """Processes forked from a server that has imported everything and computed nothing: quick, and safe with CUDA."""
    for name, value in KEEP_MEMORY.items():
        os.environ.setdefault(name, value)
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _messages(receiver: Connection) -> Iterator[Any]:
    while True:
        try:
            yield receiver.recv()
        except (EOFError, ConnectionError):
            return


def _why(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (the system ran out of memory, or somebody killed it)" if name == "SIGKILL" else ""
        return f"the process of this checkpoint died of {name}{hint}; its output is in the log"
    return f"the process of this checkpoint ended with exit code {exitcode}; its output is in the log"


def _serve(sender: Connection, cells: list[Cell], options: Options, logs: list[Path]) -> None:
    """Compute cells and send their records: what runs in the process of a checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    if "fork" in multiprocessing.get_all_start_methods():
        # Loader workers are forked, as torch does by default: a second server would import everything again, and its
        # workers would not notice that this process has died.
        multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    models = _Models(options.device)
    for cell, log in zip(cells, logs, strict=True):
        with _output_to(log):
            record = run_cell(cell, partial(models.get, cell), options, partial(_track, sender))
        sender.send(record)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Everything that is printed, by C++ too, goes to the file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        kept = [os.dup(stream) for stream in (1, 2)]
        try:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
            yield
        finally:
            for stream, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, stream)
                os.close(copy)


def _track(sender: Connection, batches: Any) -> Iterable[Any]:
    total, told = len(batches), 0.0
    for done, batch in enumerate(batches):
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            sender.send((done, total))
        yield batch


class _Models:
    """The one model in memory: neighbouring cells of a checkpoint and size share it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._checkpoint: Checkpoint | None = None
        self._loaded: Loaded | None = None

    def get(self, cell: Cell) -> Loaded:
        if isinstance(cell.size, str):  # it could not be asked for its size; now the reason comes out
            cell.checkpoint.input_size()
            raise CheckpointError(f"could not tell the input size at first; run again for {cell.size}")
        if self._loaded is None or (self._checkpoint, self._loaded.size) != (cell.checkpoint, cell.size):
            self._loaded = None  # free the last one first
            self._loaded = Loaded(cell.checkpoint.create(cell.size).to(self.device), cell.size)
            self._checkpoint = cell.checkpoint
        return self._loaded
