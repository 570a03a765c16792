"""Where simulation says that intervals hold the truth less often than they claim: see `benchmarks.calibrate`."""

import csv
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from timm_csra.evaluation.statistics import AGREEMENT, CONFIDENCE, FIXED, VERSUS

from ..records.files import Record

TABLE = Path(__file__).parents[2] / "docs" / "calibration.csv"
TOLERATED = 2.0  # points below nominal
SIMULATED = {**dict.fromkeys((*FIXED, VERSUS), "fixed"), AGREEMENT: AGREEMENT, "crossfit": "crossfit"}


def deficits(records: Iterable[Record]) -> list[str]:
    """Say, for the metrics and protocols of finished records, in how many of simulated samples of about as many images
    the interval holds the truth, where that is more than `TOLERATED` points below nominal."""
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
        f"In simulation the 95 % intervals of {protocol} for {metric} hold the truth in {share:.1f} % of samples of "
        f"{images} images (docs/calibration.csv)."
        for (metric, protocol, images), share in sorted(found.items())
    ]


@cache
def _covered() -> dict[tuple[str, str], dict[int, float]]:
    """The lowest share over null and effect, by metric and protocol, for each number of images."""
    covered: dict[tuple[str, str], dict[int, float]] = {}
    if TABLE.is_file():
        with TABLE.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                of = covered.setdefault((row["metric"], row["protocol"]), {})
                images, share = int(row["images"]), float(row["coverage"])
                of[images] = min(share, of.get(images, share))
    return covered
