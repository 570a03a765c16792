"""Figures of a whole run: what their points are, and that they are drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.records.resampled import packed
from benchmarks.reporting.figures import ways, write_figures
from benchmarks.reporting.summary import rows_of


def record(model: str, size: str, gain: float, macs: float, **more: Any) -> dict[str, Any]:
    key = {"model": model, "data": "d", "task": "single", "img_size": 64 if size == "1x" else 128, "grid": None}
    base = 60.0 if size == "1x" else 63.0
    same = {
        "metric": "top1",
        "baseline": base,
        "n": 9,
        "temperature": "inf",
        "p_value": 0.1,
        "ci_low": -1,
        "ci_high": 2,
    }
    same["resampled"] = packed(np.linspace(-1, 1, 200))

    def result(protocol: str, gain: float, scores: str = "logits", lam: str = "0.1") -> dict[str, Any]:
        return same | {"protocol": protocol, "gain": gain, "value": base + gain, "scores": scores, "lam": lam}

    results = [
        result("fixed", gain),
        result("fixed_log_softmax", 2 * gain, "log_softmax", "0.3"),
        result("log_softmax_vs_logits", gain),
        result("curve", gain),
        result("curve", 2 * gain, "log_softmax"),
    ]
    if size == "1x":
        results.append(result("five_crops_mean", 1.0))
    about = {"status": "ok", "n": 9, "requested": [size], "kind": "exact", "head_classes": 1000, "macs": macs}
    about |= {"extra_macs": macs / 10, "rival_macs": {"five_crops_mean": 5 * macs} if size == "1x" else {}}
    return {**key, "weights": model, "key": key | {"weights": model}, **about, "results": results, **more}


@pytest.fixture
def records() -> list[dict[str, Any]]:
    sizes = [("1x", 1.0), ("2x", 4.0)]
    mine = [record(m, s, g, 1e9 * c) for m, g in (("a", 1.0), ("b", 3.0)) for s, c in sizes]
    return [*mine, record("ten", "1x", 50.0, 1e9, head_classes=10)]


def test_ways_are_compared_with_the_plain_model_at_its_own_size(records: list[dict[str, Any]]) -> None:
    rows = [row for row in rows_of(records) if row["head_classes"] == 1000]
    found = {(way["way"], way["size"]): (way["cost"], way["gain"]) for way in ways(rows)}
    expected = {
        ("plain", "1x"): (1, 0),
        ("logits, lam 0.1", "1x"): (1.1, 2),  # the mean of 1 and 3
        ("log_softmax, lam 0.3", "1x"): (1.1, 4),
        ("five crops, mean", "1x"): (5, 1),
        ("plain", "2x"): (4, 3),  # 63 instead of 60
        ("logits, lam 0.1", "2x"): (4.4, 5),
        ("log_softmax, lam 0.3", "2x"): (4.4, 7),
    }
    assert found.keys() == expected.keys()
    for way, (cost, gain) in expected.items():
        assert found[way] == (pytest.approx(cost), pytest.approx(gain)), way


def test_a_checkpoint_that_lacks_a_size_is_left_out_of_all_means(records: list[dict[str, Any]]) -> None:
    rows = rows_of([*records[:4], record("c", "1x", 90.0, 1e9)])
    assert {way["checkpoints"] for way in ways(rows)} == {2}


def test_they_are_drawn(records: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [row for row in rows_of(records) if row["gain"] is not None]
    written = write_figures(records, rows, tmp_path)
    assert [path.name for path in written] == ["heads.svg", "scores.svg", "lam.svg", "compute.svg"]
    for path in written:
        assert "d, single, top1" in path.read_text()
        assert path.with_suffix(".png").stat().st_size > 1000
        assert ">50<" not in path.read_text()  # the gain of the checkpoint that knows ten classes
    assert write_figures([], [], tmp_path) == []
