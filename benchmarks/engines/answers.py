"""Metrics and intervals of cells whose images have been run, computed beside the next pass: each cell's in a process
forked for it, which shares the scores with its parent without copying them."""

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..records.files import Record
from ..scoring.measure import Unfinished
from .worker import output_to


@dataclass(frozen=True)
class Died:
    """A process that has left no record, and its exit code, where that is known."""

    exitcode: int | None


Done = Callable[[int, Record | Died], None]  # of a cell's number


class Answers:
    """The processes of one worker.

    A forked process must not touch an accelerator that its parent uses, and does not: scores are on the CPU.

    Args:
        processes: how many there are at most.
        memory: bytes of scores that all of them together may hold. One larger cell is answered alone.
        done: is called, from another thread, with what has come out.
    """

    def __init__(self, processes: int, memory: float, done: Done) -> None:
        self._processes, self._memory, self._done = processes, memory, done
        self._context = multiprocessing.get_context("fork")
        self._running: list[threading.Thread] = []
        self._held: dict[int, int] = {}  # bytes, by the cell's number
        self._room = threading.Condition()

    def wait(self, cell: Unfinished) -> None:
        """Wait until there is room for it."""
        with self._room:
            self._room.wait_for(lambda: self._fits(cell.scored.scores.nbytes))

    def give(self, number: int, cell: Unfinished, log: Path) -> None:
        """Compute what is left of a cell, when there is room for it; `log` gets what is printed. Where the system
        refuses another process, this one does it itself."""
        self.wait(cell)
        with self._room:
            self._held[number] = cell.scored.scores.nbytes
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, cell, log))
        try:
            process.start()
        except OSError as error:
            with output_to(log):
                print(f"no process for the metrics: {error}. They are computed where the images were.", flush=True)
                record = cell.finished()
            self._release(number)
            self._done(number, record)
            return
        finally:
            theirs.close()
        thread = threading.Thread(target=self._receive, args=(number, ours, process))
        self._running = [other for other in self._running if other.is_alive()] + [thread]
        thread.start()

    def join(self) -> None:
        """Wait for all of them."""
        for thread in self._running:
            thread.join()

    def _fits(self, size: int) -> bool:
        return not self._held or (len(self._held) < self._processes and sum(self._held.values()) + size <= self._memory)

    def _receive(self, number: int, ours: Any, process: Any) -> None:
        try:
            found: Record | Died | None = ours.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # it has died, maybe in the midst of its record
            found = None
        process.join()
        self._release(number)  # before anything that could wait for the engine
        self._done(number, Died(process.exitcode) if found is None else found)

    def _release(self, number: int) -> None:
        with self._room:
            del self._held[number]
            self._room.notify()


def _answer(connection: Any, cell: Unfinished, log: Path) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    with output_to(log):
        record = cell.finished()
    connection.send(record)


def end_with_parent() -> None:
    """End this process as soon as its parent has died."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
