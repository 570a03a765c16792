"""What is said beside intervals that hold the truth too seldom."""

import csv
from typing import Any

from benchmarks.reporting.nominal import TABLE, deficits


def record(metric: str, protocol: str, n: int, low: float | None = -1.0) -> dict[str, Any]:
    return {"results": [{"metric": metric, "protocol": protocol, "n": n, "ci_low": low}]}


def lowest(metric: str, protocol: str, images: int) -> float:
    with TABLE.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["metric"], row["protocol"]) == (metric, protocol)]
    return min(float(row["coverage"]) for row in rows if row["images"] == str(images))


def test_the_deficit_is_that_of_the_simulation_with_as_many_images_or_fewer() -> None:
    share = lowest("top1", "agreement", 100)
    assert share < 93
    expected = (
        f"In simulation the 95 % intervals of agreement for top1 contain the true gain in {share:.1f} % of samples of "
        "100 images (docs/calibration.csv)."
    )
    for n in (26, 100, 499):
        assert deficits([record("top1", "agreement", n)] * 2) == [expected]


def test_nothing_is_said_where_the_interval_is_good_absent_or_not_simulated() -> None:
    assert lowest("top1", "crossfit", 500) >= 93
    good = record("top1", "crossfit", 600)
    absent = record("top1", "agreement", 100, None)
    other = record("r_precision", "fixed", 100)
    assert deficits([good, absent, other, record("top1", "best", 100)]) == []
