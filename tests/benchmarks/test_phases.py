"""Where the time of a cell goes."""

import time
from collections.abc import Iterator

import pytest

from benchmarks.records.phases import NAMES, Phases, where_the_time_went


def test_a_phase_within_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    phases = Phases()

    def images() -> Iterator[int]:
        for number in range(3):
            now[0] += 2
            yield number

    with phases("model"):
        for _ in phases.waiting(images()):
            now[0] += 1
    assert phases.seconds == pytest.approx({"wait": 6, "model": 3})


def test_a_phase_that_fails_is_counted() -> None:
    phases = Phases()
    with pytest.raises(ValueError, match="no"), phases("load"):
        raise ValueError("no")
    assert phases.seconds["load"] > 0


def test_the_line_for_all_records() -> None:
    records = [{"phases": {"model": 30.0, "wait": 10.0}}, {"phases": {"metrics": 60.0}}, {"status": "failed"}]
    line = where_the_time_went(records)
    assert line == (f"100.0 s of computing: {NAMES['wait']} 10%, {NAMES['model']} 30%, {NAMES['metrics']} 60%")
    assert where_the_time_went([{"status": "failed"}]) is None
