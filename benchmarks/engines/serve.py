"""What a worker process of this machine does: it computes cells and sends what has come of them, until the other end is
closed."""

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

BATCHES, PASSED, RECORD = "batches", "passed", "record"  # what a message is about; a cell's number and more follow


def serve(
    connection: Connection,
    options: Options,
    threads: int | None,
    compute: Compute,
    turn: Path | None,
    answering: int,
    memory: float,
) -> None:
    """Compute cells, each a number, an image set's number, the set if it is new, the cell, and where its output goes.

    Args:
        connection: to the engine.
        options: how cells are computed.
        threads: of torch; None leaves what it finds.
        compute: runs the images of a cell.
        turn: a lock file for which workers of one device wait before they use it; the system frees it when one dies.
        answering: how many processes compute metrics beside; 0: this one does it itself.
        memory: bytes of scores that these may hold.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    forks = "fork" in multiprocessing.get_all_start_methods()
    if forks:
        # Loader workers are forked, as torch does by default: a second server would import everything again, and its
        # workers would not notice that this process has died.
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
