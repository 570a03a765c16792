"""Metrics and intervals of cells whose images have been run, computed beside the next pass: each cell's in a process
forked for it, which shares the scores with its parent without copying them."""

import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..records.files import Record
from ..scoring.measure import Unfinished
from .worker import output_to

Done = Callable[[int, Record | int | None], None]  # a cell's number, and its record or else the exit code


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

    def give(self, number: int, cell: Unfinished, log: Path) -> None:
        """Compute what is left of a cell, after waiting until there is room for it; `log` gets what is printed."""
        size = cell.scored.scores.nbytes
        with self._room:
            self._room.wait_for(lambda: self._fits(size))
            self._held[number] = size
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_answer, args=(theirs, cell, log))
        process.start()
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
            found: Record | int | None = ours.recv()
        except EOFError:
            found = None
        process.join()
        with self._room:
            del self._held[number]
            self._room.notify()
        self._done(number, process.exitcode if found is None else found)


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
