"""Metrics in processes of their own: what becomes of those that die, or cannot be started."""

import multiprocessing
import os
import queue
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engines import answers
from benchmarks.engines.answers import Answers, Died
from benchmarks.records.phases import Phases
from benchmarks.scoring.cells import Cell, Options
from benchmarks.scoring.kept import Scored
from benchmarks.scoring.measure import Unfinished
from timm_csra.evaluation.scoring import PLAIN, Scores

pytestmark = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="metrics beside need processes that are forked"
)


class Told(Unfinished):
    """Says in which process it was computed."""

    def finished(self) -> dict[str, Any]:
        os.write(1, b"metrics\n")  # pytest has another stdout
        return {"process": os.getpid()}


@pytest.fixture
def cell() -> Told:
    scored = Scored(Scores(torch.zeros(4, 2), {}), torch.zeros(4), {})
    nothing: Cell = None  # type: ignore[assignment]
    return Told(nothing, Options((PLAIN,)), scored, Phases(), {}, 0.0)


@pytest.fixture
def found() -> queue.Queue[tuple[int, Any]]:
    return queue.Queue()


def one(found: queue.Queue[tuple[int, Any]], memory: float = 1e9) -> Answers:
    """Answers of one process at a time."""
    return Answers(1, memory, lambda *result: found.put(result))


def test_in_processes_of_their_own(cell: Told, found: queue.Queue[tuple[int, Any]], tmp_path: Path) -> None:
    beside = one(found, memory=1)  # less than a cell's scores: one at a time all the same
    for number in range(3):
        beside.give(number, cell, tmp_path / f"{number}.log")
    beside.join()
    results = dict(found.get(timeout=30) for _ in range(3))
    assert set(results) == {0, 1, 2}
    assert len({record["process"] for record in results.values()} | {os.getpid()}) == 4
    assert [(tmp_path / f"{number}.log").read_text() for number in range(3)] == ["metrics\n"] * 3


def half(connection: Any, cell: Unfinished, log: Path) -> None:
    """Announce a kilobyte, send ten bytes, and die."""
    os.write(connection.fileno(), struct.pack("!i", 1024) + b"x" * 10)
    os.kill(os.getpid(), signal.SIGKILL)


def nothing(connection: Any, cell: Unfinished, log: Path) -> None:
    os._exit(3)


@pytest.mark.parametrize(("what", "exitcode"), [(half, -signal.SIGKILL), (nothing, 3)])
def test_one_that_dies_makes_room(
    what: Any,
    exitcode: int,
    cell: Told,
    found: queue.Queue[tuple[int, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    beside = one(found)
    with monkeypatch.context() as patch:
        patch.setattr(answers, "_answer", what)
        beside.give(0, cell, tmp_path / "log")
        assert found.get(timeout=30) == (0, Died(exitcode))
    beside.give(1, cell, tmp_path / "log")
    number, record = found.get(timeout=30)
    assert number == 1 and record["process"] != os.getpid()
    beside.join()


def test_without_another_process_it_is_done_here(
    cell: Told,
    found: queue.Queue[tuple[int, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(process: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    beside = one(found)
    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", refused)
    for number in range(2):
        beside.give(number, cell, tmp_path / "log")
        assert found.get(timeout=1) == (number, {"process": os.getpid()})
    assert "cannot start a process for the metrics: [Errno 11] Resource" in capsys.readouterr().out
    assert (tmp_path / "log").read_text() == "metrics\n" * 2
