"""Note where simulated intervals contain the true gain less often than 95 %, see `benchmarks.calibrate`."""

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from timm_csra.evaluation.statistics import AGREEMENT, CONFIDENCE, FIXED, VERSUS

from ..records.files import Record

TABLE = Path(__file__).parents[2] / "docs" / "calibration.csv"
TOLERATED = 2.0  # percentage points below the nominal coverage
SIMULATED = {**dict.fromkeys((*FIXED, VERSUS), "fixed"), AGREEMENT: AGREEMENT, "crossfit": "crossfit"}


def deficits(records: Iterable[Record]) -> list[str]:
    """Report the simulated coverage of the intervals in records, if it is more than `TOLERATED` points below nominal.

    The coverage is that of the largest simulated sample with at most as many images.
    """
    found: dict[tuple[str, str, int], float] = {}
    for record in records:
        for result in record["results"]:
            protocol = SIMULATED.get(result["protocol"])
            simulated = _covered().get((result["metric"], protocol or ""), {})
            if not simulated or result["ci_low"] is None or not result.get("n"):
                continue
            images = max((n for n in simulated if n <= result["n"]), default=min(simulated))
            if simulated[images] < 100 * CONFIDENCE - TOLERATED:
                found[result["metric"], str(protocol), images] = simulated[images]
    return [
        f"In simulation the 95 % intervals of {protocol} for {metric} contain the true gain in {share:.1f} % of "
        f"samples of {images} images (docs/calibration.csv)."
        for (metric, protocol, images), share in sorted(found.items())
    ]


@cache
def _covered() -> dict[tuple[str, str], dict[int, float]]:
    """Return the coverage in percent by metric, protocol and number of images: the lower one of null and effect."""
    covered: dict[tuple[str, str], dict[int, float]] = {}
    if TABLE.is_file():
        with TABLE.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                of = covered.setdefault((row["metric"], row["protocol"]), {})
                images, share = int(row["images"]), float(row["coverage"])
                of[images] = min(share, of.get(images, share))
    return covered
