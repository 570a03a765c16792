"""Comparing settings with the plain model without fooling oneself.

Three protocols, never mixed: `fixed` (lam 0.1, T inf, set before looking), `crossfit` (chosen on one half of the
images, measured on the other, both ways) and `best` (chosen on the very images it is measured on: optimistic, without
interval). Intervals are paired: each resample of the images is seen by both settings.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from .metrics import Evaluation, Rows
from .scoring import DEFAULT, PLAIN, Setting

CONFIDENCE = 0.95
RESAMPLES = 1000
BATCH = 100  # resamples at a time, so that memory stays bounded


@dataclass(frozen=True)
class Comparison:
    """One metric under one protocol, percent and percentage points.

    Attributes:
        metric: `top1`, `mAP`, ...
        protocol: `fixed`, `crossfit` or `best`.
        settings: the setting that was measured; for `crossfit` the one chosen for each half.
        baseline: the metric at lam = 0 on the same images (for `crossfit`, mean of the halves).
        value: the metric with `settings`.
        interval: 95 % bounds of the gain, or None.
    """

    metric: str
    protocol: str
    settings: tuple[Setting, ...]
    baseline: float
    value: float
    interval: tuple[float, float] | None = None

    @property
    def gain(self) -> float:
        return self.value - self.baseline


# Evaluations of one metric for every setting, on all n images.
Grid = Mapping[Setting, Evaluation]


def halves(strata: NDArray[np.integer] | int, seed: int) -> tuple[Rows, Rows]:
    """Split images at random into two halves, each class evenly.

    Args:
        strata: class of every image `(n,)`, or n where there are no classes to balance.
        seed: of the random split.

    Returns:
        Sorted image indices of the two halves; the first has one more where n is odd.
    """
    classes = np.zeros(strata, dtype=int) if isinstance(strata, int) else strata
    order = np.lexsort((np.random.default_rng(seed).random(len(classes)), classes))
    return np.sort(order[0::2]), np.sort(order[1::2])


def fixed(metric: str, grid: Grid, count: int, seed: int | None) -> Comparison:
    """`DEFAULT` against `PLAIN` on all images; `seed` of the bootstrap, None for no interval."""
    return _compare(metric, "fixed", grid, [(DEFAULT, np.arange(count))], seed)


def crossfit(metric: str, grid: Grid, split: tuple[Rows, Rows], seed: int) -> Comparison:
    """Chosen on each half, measured on the other. The metric is computed within each half and averaged, never on
    scores pooled from two settings, whose logits have different scales."""
    first, second = split
    return _compare(metric, "crossfit", grid, [(_best(grid, second), first), (_best(grid, first), second)], seed)


def best(metric: str, grid: Grid, count: int) -> Comparison:
    """The setting that looks best on all images, measured on them: optimistic, so neither interval nor test."""
    rows = np.arange(count)
    return _compare(metric, "best", grid, [(_best(grid, rows), rows)], None)


def _best(grid: Grid, rows: Rows) -> Setting:
    """The highest value, the smallest lam among equals; the plain model where the metric is undefined."""
    values = {setting: evaluation.value(rows) for setting, evaluation in sorted(grid.items())}
    defined = {setting: value for setting, value in values.items() if not np.isnan(value)}
    return max(defined, key=lambda setting: defined[setting], default=PLAIN)


def _compare(
    metric: str, protocol: str, grid: Grid, parts: Sequence[tuple[Setting, Rows]], seed: int | None
) -> Comparison:
    baseline = np.mean([grid[PLAIN].value(rows) for _, rows in parts])
    value = np.mean([grid[setting].value(rows) for setting, rows in parts])
    interval = None if seed is None or np.isnan(value) else _interval(grid, parts, seed)
    return Comparison(metric, protocol, tuple(setting for setting, _ in parts), float(baseline), float(value), interval)


def _interval(grid: Grid, parts: Sequence[tuple[Setting, Rows]], seed: int) -> tuple[float, float] | None:
    """95 % percentile bootstrap of the gain: images are resampled within each part, for both settings alike."""
    if any(len(rows) < 2 for _, rows in parts):
        return None

    def gain(*samples: Rows, axis: int = -1) -> NDArray[np.float64]:
        gains: list[NDArray[np.float64]] = [
            grid[setting].resampled(rows) - grid[PLAIN].resampled(rows)
            for (setting, _), rows in zip(parts, samples, strict=True)
        ]
        return np.asarray(np.mean(gains, axis=0))

    with warnings.catch_warnings():
        # With so few images that a resample leaves the metric undefined there is no interval: None says so below.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            [rows for _, rows in parts],
            gain,
            n_resamples=RESAMPLES,
            batch=BATCH,
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            axis=-1,
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    return None if np.isnan(low) or np.isnan(high) else (float(low), float(high))
