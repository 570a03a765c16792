"""The loop of a local worker process: it computes cells and sends back their records until the connection is closed."""

import multiprocessing
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..scoring.cells import Options
from ..scoring.measure import Unfinished
from .answers import Answers, end_with_parent
from .worker import Compute, Models, output_to, turns

BATCHES, PASSED, RECORD = "batches", "passed", "record"  # kinds of messages; the cell's number follows


def serve(
    connection: Connection,
    options: Options,
    threads: int | None,
    compute: Compute,
    turn: Path | None,
    answering: int,
    memory: float,
) -> None:
    """Compute the cells that arrive on the connection.

    Each job is a tuple: the cell's number, the number of its image set, the set itself the first time, the cell, and
    the path of its log.

    Args:
        connection: the connection to the engine.
        options: how cells are computed.
        threads: number of torch's threads; None leaves torch's default.
        compute: runs the images of a cell.
        turn: lock file that serialises the workers of one device; the system releases it if a worker dies.
        answering: number of processes for metrics; with 0 this process computes them itself.
        memory: bytes of scores that those processes may hold.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and ends this process
    forks = "fork" in multiprocessing.get_all_start_methods()
    if forks:
        # Fork the loader's workers: those of a second fork server would import everything again, and would not notice
        # if this process died.
        multiprocessing.set_start_method("fork", force=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    if threads is not None:
        torch.set_num_threads(threads)
    one_at_a_time = threading.Lock()

    def send(what: str, number: int, found: Any = None) -> None:
        with one_at_a_time:
            connection.send((what, number, found))

    def track(number: int, batches: Any) -> Iterable[Any]:
        total, told = len(batches), 0.0
        for done, batch in enumerate(batches):
            if time.monotonic() - told > 0.2:
                told = time.monotonic()
                send(BATCHES, number, (done, total))
            yield batch

    models = Models(options.device, options.channels_last, turns(turn) if turn else nullcontext)
    answers = Answers(answering, memory, partial(send, RECORD)) if answering and forks else None
    data = {}
    while True:
        try:
            number, name, news, cell, log = connection.recv()
        except EOFError:
            break
        if news is not None:
            data[name] = news
        with output_to(log):
            found = compute(replace(cell, data=data[name]), options, models, partial(track, number))
            if isinstance(found, Unfinished) and answers is None:
                found = found.finished()
        if isinstance(found, Unfinished):
            assert answers is not None
            answers.wait(found)
            send(PASSED, number)
            answers.give(number, found, log)
        else:
            send(RECORD, number, found)
    if answers is not None:
        answers.join()
