"""Comparing settings with the plain model without fooling oneself.

Three protocols, never mixed: `fixed` (lam 0.1, T inf, set before looking), `crossfit` (chosen on one half of the
images, measured on the other, both ways) and `best` (chosen on the very images it is measured on: optimistic, without
interval or test). Intervals and tests are paired: each image is seen by both settings.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, norm, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar

from .metrics import Evaluation, PerImage, Rows
from .scoring import DEFAULT, PLAIN, Setting

CONFIDENCE = 0.95
RESAMPLES = 1000
BATCH = 2**24  # images of all resamples at a time, so that memory stays bounded


@dataclass(frozen=True)
class Comparison:
    """One metric under one protocol, percent and percentage points.

    Attributes:
        metric: `top1`, `mAP`, ...
        protocol: `fixed`, `crossfit` or `best`; `curve` for one lam of the curve; `nested` of `tune`.
        settings: the setting that was measured; for `crossfit` and `nested` the one chosen for each part.
        baseline: the metric at lam = 0 on the same images (of several parts, their mean).
        value: the metric with `settings`.
        interval: 95 % bounds of the gain, or None.
        p_value: two-sided, of no gain at all, or None. It knows nothing of other comparisons.
        test: what gave it: `McNemar exact`, `paired t` or `bootstrap z`.
    """

    metric: str
    protocol: str
    settings: tuple[Setting, ...]
    baseline: float
    value: float
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    test: str | None = None

    @property
    def gain(self) -> float:
        return self.value - self.baseline


# Evaluations of one metric for every setting, on all n images.
Grid = Mapping[Setting, Evaluation]


def folds_of(strata: NDArray[np.integer] | int, seed: int, count: int) -> list[Rows]:
    """Split images at random into folds, each class evenly.

    Args:
        strata: class of every image `(n,)`, or n where there are no classes to balance.
        seed: of the random split.
        count: of folds.

    Returns:
        Sorted image indices of each fold; the first ones have one more where n is no multiple of `count`.
    """
    classes = np.zeros(strata, dtype=int) if isinstance(strata, int) else strata
    order = np.lexsort((np.random.default_rng(seed).random(len(classes)), classes))
    return [np.sort(order[fold::count]) for fold in range(count)]


def halves(strata: NDArray[np.integer] | int, seed: int) -> tuple[Rows, Rows]:
    """`folds_of` two."""
    first, second = folds_of(strata, seed, 2)
    return first, second


def on_parts(
    metric: str, protocol: str, grid: Grid, parts: Sequence[Rows], settings: tuple[Setting, ...], seed: int
) -> Comparison:
    """A setting for each part of the images, against the plain model on the same parts: the metric is computed within
    each part and averaged, never on scores pooled from several settings, whose logits have different scales."""
    (comparison,) = _compare(metric, protocol, grid, parts, [settings], seed)
    return comparison


def fixed(metric: str, grid: Grid, count: int, seed: int | None) -> Comparison:
    """`DEFAULT` against `PLAIN` on all images; `seed` of the bootstrap, None for neither interval nor test."""
    (comparison,) = _compare(metric, "fixed", grid, [np.arange(count)], [(DEFAULT,)], seed)
    return comparison


def curve(metric: str, grid: Grid, count: int, seed: int | None) -> list[Comparison]:
    """The gain at every lam of the grid with the temperature of `DEFAULT`, each with its interval: a band over lam.

    The same resamples serve all of them. The band holds point by point, not for the whole curve at once, and there are
    no tests: it shows, `fixed` and `crossfit` decide.
    """
    settings = [(setting,) for setting in sorted(grid) if setting.lam and setting.temperature == DEFAULT.temperature]
    return _compare(metric, "curve", grid, [np.arange(count)], settings, seed)


def crossfit(metric: str, grid: Grid, split: tuple[Rows, Rows], seed: int) -> Comparison:
    """Chosen on each half, measured on the other."""
    on_halves = {setting: evaluation.resampled(split) for setting, evaluation in grid.items()}
    on_first, on_second = ({setting: values[half] for setting, values in on_halves.items()} for half in (0, 1))
    chosen = (_best(on_second), _best(on_first))
    return on_parts(metric, "crossfit", grid, split, chosen, seed)


def best(metric: str, values: Mapping[Setting, float]) -> Comparison:
    """The setting that looks best on all images, measured on them: optimistic, so neither interval nor test. `values`
    of the metric on all images, for every setting."""
    setting = _best(values)
    return Comparison(metric, "best", (setting,), values[PLAIN], values[setting])


def _best(values: Mapping[Setting, float]) -> Setting:
    """The highest value, the smallest lam among equals; the plain model where the metric is undefined."""
    defined = {setting: value for setting, value in sorted(values.items()) if not np.isnan(value)}
    return max(defined, key=lambda setting: defined[setting], default=PLAIN)


def _compare(
    metric: str,
    protocol: str,
    grid: Grid,
    parts: Sequence[Rows],
    choices: Sequence[tuple[Setting, ...]],
    seed: int | None,
) -> list[Comparison]:
    """Each choice of one setting for each part of the images, against the plain model on the same parts."""
    baseline = float(np.mean([grid[PLAIN].value(rows) for rows in parts]))
    values = [
        float(np.mean([grid[setting].value(rows) for setting, rows in zip(choice, parts, strict=True)]))
        for choice in choices
    ]
    comparisons = [
        Comparison(metric, protocol, choice, baseline, value) for choice, value in zip(choices, values, strict=True)
    ]
    if seed is None or np.isnan(baseline) or not choices or any(len(rows) < 2 for rows in parts):
        return comparisons
    return [
        replace(
            comparison,
            interval=None if np.isnan(low) or np.isnan(high) else (float(low), float(high)),
            **({} if protocol == "curve" else _tested(grid, parts, comparison, float(error))),
        )
        for comparison, low, high, error in zip(comparisons, *_bootstrap(grid, parts, choices, seed), strict=True)
    ]


def _bootstrap(
    grid: Grid, parts: Sequence[Rows], choices: Sequence[tuple[Setting, ...]], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile bootstrap of the gain of each choice: low, high and standard error. Images are resampled within
    each part, for all settings alike."""

    def gains(*samples: Rows, axis: int = -1) -> NDArray[np.float64]:
        plain = [grid[PLAIN].resampled(rows) for rows in samples]
        return np.stack(
            [
                np.mean(
                    [grid[s].resampled(rows) - base for s, rows, base in zip(choice, samples, plain, strict=True)],
                    axis=0,
                )
                for choice in choices
            ]
        )

    with warnings.catch_warnings():
        # With so few images that a resample leaves the metric undefined there is no interval: NaN says so.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            list(parts),
            gains,
            n_resamples=RESAMPLES,
            batch=max(1, min(RESAMPLES, BATCH // sum(map(len, parts)))),
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            axis=-1,
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    return low, high, result.standard_error


def _tested(grid: Grid, parts: Sequence[Rows], comparison: Comparison, error: float) -> dict[str, Any]:
    """Two-sided p-value and its test: McNemar's exact one for hits and misses, the paired t-test for other means over
    images, and for what is no mean over images (mAP, F1) z = gain / bootstrap standard error."""
    used = [(grid[PLAIN], grid[setting], rows) for setting, rows in zip(comparison.settings, parts, strict=True)]
    if not all(isinstance(evaluation, PerImage) for evaluation in (used[0][0], used[0][1])):
        if np.isnan(error):
            return {}
        z = comparison.gain / error if error else np.copysign(np.inf, comparison.gain) if comparison.gain else 0.0
        return {"p_value": float(2 * norm.sf(abs(z))), "test": "bootstrap z"}
    plain = np.concatenate([evaluation.values[rows] for evaluation, _, rows in used])  # type: ignore[attr-defined]
    value = np.concatenate([evaluation.values[rows] for _, evaluation, rows in used])  # type: ignore[attr-defined]
    counted = ~np.isnan(plain)
    plain, value = plain[counted], value[counted]
    if used[0][0].binary:  # type: ignore[attr-defined]
        hits = (True, False)
        table = [[np.sum(((plain > 0) == a) & ((value > 0) == b)) for b in hits] for a in hits]
        return {"p_value": float(mcnemar(table, exact=True).pvalue), "test": "McNemar exact"}
    difference = value - plain
    if len(difference) < 2:
        return {}
    p = float(ttest_1samp(difference, 0).pvalue) if np.ptp(difference) else float(not difference.any())
    return {"p_value": p, "test": "paired t"}
