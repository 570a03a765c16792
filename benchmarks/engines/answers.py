"""Compute metrics and intervals of a cell in a forked process, while the worker runs the images of the next cell.

The forked process shares the scores with the worker without copying them.
"""

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
    """A process ended without sending a record. `exitcode` is None where the system did not report it."""

    exitcode: int | None


Done = Callable[[int, Record | Died], None]  # gets the number of the cell


class Answers:
    """The metric processes of one worker.

    A forked process must not touch an accelerator that its parent uses, and does not: scores are on the CPU.

    Args:
        processes: largest number of processes at a time.
        memory: bytes of scores that all of them together may hold. A cell with more scores than that runs alone.
        done: is called from another thread with the cell's number and its record, or `Died`.
    """

    def __init__(self, processes: int, memory: float, done: Done) -> None:
        self._processes, self._memory, self._done = processes, memory, done
        self._context = multiprocessing.get_context("fork")
        self._running: list[threading.Thread] = []
        self._held: dict[int, int] = {}  # bytes, by the cell's number
        self._room = threading.Condition()

    def wait(self, cell: Unfinished) -> None:
        """Wait until a process and enough memory are free for the cell."""
        with self._room:
            self._room.wait_for(lambda: self._fits(cell.scored.scores.nbytes))

    def give(self, number: int, cell: Unfinished, log: Path) -> None:
        """Compute metrics and intervals of a cell in a process of its own, once `wait` returns.

        What the process prints goes to `log`. If the system refuses another process, this one computes them itself.
        """
        self.wait(cell)
        with self._room:
            self._held[number] = cell.scored.scores.nbytes
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, cell, log))
        try:
            process.start()
        except OSError as error:
            with output_to(log):
                print(f"cannot start a process for the metrics: {error}. The worker computes them itself.", flush=True)
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
        """Wait until all processes have ended."""
        for thread in self._running:
            thread.join()

    def _fits(self, size: int) -> bool:
        return not self._held or (len(self._held) < self._processes and sum(self._held.values()) + size <= self._memory)

    def _receive(self, number: int, ours: Any, process: Any) -> None:
        try:
            found: Record | Died | None = ours.recv()
        except (EOFError, OSError, pickle.UnpicklingError):  # the process died, perhaps while sending its record
            found = None
        process.join()
        self._release(number)  # before `done`, which may block
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
    """End this process as soon as its parent dies."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
