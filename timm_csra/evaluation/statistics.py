"""Compare settings with the plain model: gains, confidence intervals and tests.

Each comparison follows one protocol:

- `fixed` (the paper's setting: logits, lam 0.1, T inf) and `fixed_log_softmax` (lam 0.3, T inf): nothing is chosen on
  the data.
- `crossfit`: a setting is chosen on one half of the images and measured on the other half, both ways.
- `best`: the setting is chosen on the images that it is measured on. This is optimistic, so there is no interval or
  test.
- `agreement`: lam is chosen without labels on other pictures, see `timm_csra.choose_lam`.
- `log_softmax_vs_logits`: compares the two fixed settings with each other.

Intervals and tests are paired: both settings are evaluated on the same images. Where a setting is chosen on the data,
it is chosen again in every bootstrap resample, see `chosen`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, norm, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar

from ..config import SCORES
from .samples import Evaluation, PerImage, Rows, Weights, weighted, weights_of
from .scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, Setting

CONFIDENCE = 0.95
RESAMPLES = 1000
RESAMPLES_KEPT = 200  # enough for a standard error, which needs fewer resamples than quantiles
BATCH = 2**24  # number of images in all resamples that are processed at a time, to bound memory
FIXED = {"fixed": DEFAULT, "fixed_log_softmax": DEFAULT_LOG_SOFTMAX}  # protocols without any choice on the data
VERSUS = "log_softmax_vs_logits"  # gain of `fixed_log_softmax` over `fixed`
AGREEMENT = "agreement"  # lam is chosen without labels on other pictures, see `timm_csra.choose_lam`


@dataclass(frozen=True)
class Comparison:
    """The gain of a setting over the plain model in one metric under one protocol, in percent and percentage points.

    Attributes:
        metric: `top1`, `mAP`, ...
        protocol: one of `FIXED`, `VERSUS`, `AGREEMENT`, `crossfit` or `best`; `curve` for one lam of a curve; `nested`
            for `tune`; or the name of a rival.
        settings: the setting that was measured; for `crossfit` and `nested`, the setting chosen for each part.
        baseline: the metric at lam = 0 on the same images (averaged over parts, if there are several); for `VERSUS`,
            the metric of `fixed`.
        value: the metric with `settings`.
        n: number of images that the metric counts: all images, or those that have enough labels for it.
        classes: number of classes that the metric is a mean over; None if it is not a mean over classes.
        interval: bounds of the 95 % confidence interval of the gain, or None.
        p_value: two-sided p-value of the hypothesis that there is no gain, not corrected for multiple comparisons; or
            None.
        test: the test of the p-value: `McNemar exact`, `paired t` or `bootstrap z`; or None.
        no_interval: why there is no interval and no test although there are enough images, or None.
        resampled: the gain in each of `RESAMPLES_KEPT` resamples of the images, where there is an interval. Two
            comparisons on the same number of images with the same seed and protocol use the same resamples.
    """

    metric: str
    protocol: str
    settings: tuple[Setting, ...]
    baseline: float
    value: float
    n: int
    classes: int | None = None
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    test: str | None = None
    no_interval: str | None = None
    resampled: NDArray[np.float64] | None = field(default=None, compare=False, repr=False)

    @property
    def gain(self) -> float:
        return self.value - self.baseline


Key = Setting | str  # a setting, or the name of a rival, which is another way to use the plain model


@dataclass(frozen=True)
class Table:
    """One metric of every setting and rival on parts of the images.

    Attributes:
        metric: name of the metric.
        evaluations: evaluation of each setting, including `PLAIN`, and of each rival.
        parts: indices of the images in each part; the parts are disjoint and together contain all n images.
        values: the metric on each part, `(P,)`, for each setting and rival.
    """

    metric: str
    evaluations: Mapping[Key, Evaluation]
    parts: Sequence[Rows]
    values: Mapping[Key, NDArray[np.float64]]

    @classmethod
    def of(cls, metric: str, evaluations: Mapping[Key, Evaluation], parts: Sequence[Rows]) -> "Table":
        weights = weights_of(parts, sum(map(len, parts)))
        return cls(metric, evaluations, parts, {key: one.weighted(weights) for key, one in evaluations.items()})

    @property
    def settings(self) -> list[Setting]:
        """The settings in the table, in order of lam. They need not be all settings that were scored."""
        return sorted(key for key in self.values if isinstance(key, Setting))


def folds_of(strata: NDArray[np.integer] | int, seed: int, count: int) -> list[Rows]:
    """Split images at random into folds, and each class evenly among the folds.

    Args:
        strata: class of every image, `(n,)`; or n if there are no classes to balance.
        seed: random seed of the split.
        count: number of folds.

    Returns:
        Sorted image indices of each fold. If n is not a multiple of `count`, the first folds have one image more.
    """
    classes = np.zeros(strata, dtype=int) if isinstance(strata, int) else strata
    order = np.lexsort((np.random.default_rng(seed).random(len(classes)), classes))
    return [np.sort(order[fold::count]) for fold in range(count)]


def halves(strata: NDArray[np.integer] | int, seed: int) -> tuple[Rows, Rows]:
    """Split images into two folds, see `folds_of`."""
    first, second = folds_of(strata, seed, 2)
    return first, second


def without_choice(table: Table, seed: int | None) -> list[Comparison]:
    """Compare everything that was not chosen on the data, on all images and with the same resamples.

    These are each of `FIXED` that the table contains, `VERSUS` if it contains both, each rival under its own name, and
    every lam with T = inf for each kind of scores (`curve`). All except `VERSUS` are compared with the plain model.

    The intervals of a curve hold for each lam by itself, not for the whole curve at once, and a curve has no tests.

    Args:
        table: a table with all images as one part.
        seed: random seed of the bootstrap; None for no intervals and no tests.
    """
    fixed = {protocol: setting for protocol, setting in FIXED.items() if setting in table.values}
    choices = [_Choice(protocol, setting) for protocol, setting in fixed.items()]
    if fixed.keys() == FIXED.keys():
        choices.append(_Choice(VERSUS, DEFAULT_LOG_SOFTMAX, DEFAULT))
    choices += [_Choice(rival, rival) for rival in table.values if isinstance(rival, str)]
    curves = (s for s in table.settings if s.lam and s.temperature == DEFAULT.temperature)
    choices += [_Choice("curve", setting) for setting in sorted(curves, key=lambda s: (SCORES.index(s.scores), s))]
    return _compare(table, choices, seed)


Rule = Callable[[NDArray[np.float64]], NDArray[np.intp]]
"""Chooses a setting for each part of the images. A rule takes the metric of S settings on P parts in B resamples,
`(S, P, B)`, and returns indices of settings, `(P, B)`. The settings are those of a `Table`, in order of lam."""


def crossfit(table: Table, seed: int | None) -> Comparison:
    """Choose a setting on each half and measure it on the other. The parts of `table` are those of `halves`."""
    return chosen(table, "crossfit", _best_of_the_other, seed)


def _best_of_the_other(values: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.stack([_best_of(values[:, 1]), _best_of(values[:, 0])])


def _best_of(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the index of the highest value along S (the first in a tie); 0, the plain model, where all are NaN."""
    return np.where(np.isnan(values), -np.inf, values).argmax(axis=0)


def chosen(table: Table, protocol: str, rule: Rule, seed: int | None) -> Comparison:
    """Compare the settings that a rule chooses for each part of the images with the plain model on the same parts.

    The metric is computed within each part and then averaged, because pooled logits of several settings would have
    different scales. A rule that chooses on the other parts makes the gains of the parts depend on each other, so an
    interval for fixed choices would be too narrow. Therefore the images of each part are resampled and the rule chooses
    again in every resample. The interval is the gain -+ 1.96 standard deviations, over resamples, of the error of the
    measured gain. In a resample this error is known only if all parts come from one population. Therefore, before the
    rule chooses, the metric of each setting is shifted in each part, by the same constant in all resamples, so that it
    varies around its mean over all parts. `python -m benchmarks.calibrate` simulates the coverage of these intervals.

    Args:
        table: a table of parts, with the plain model among its settings.
        protocol: name of the comparison.
        rule: see `Rule`; it may not use a part to choose for the same part.
        seed: random seed of the resamples; None for no interval and no test.
    """
    settings = table.settings
    values = np.stack([table.values[setting] for setting in settings])
    keys = [settings[number] for number in rule(values[..., None])[:, 0]]
    comparison = Comparison(
        table.metric,
        protocol,
        tuple(keys),
        float(table.values[PLAIN].mean()),
        float(np.mean([table.values[key][part] for part, key in enumerate(keys)])),
        table.evaluations[PLAIN].n,
        table.evaluations[PLAIN].classes,
    )
    if seed is None or np.isnan(comparison.baseline) or any(len(rows) < 2 for rows in table.parts):
        return comparison
    if reason := table.evaluations[PLAIN].no_interval:
        return replace(comparison, no_interval=reason)
    errors = _errors_of_choice(table, settings, values, rule, seed)
    error = float(errors.std(ddof=1))
    if np.isnan(error):  # there are so few images that the metric is undefined in some resample
        return comparison
    reach = float(norm.ppf((1 + CONFIDENCE) / 2)) * error
    return replace(
        comparison,
        interval=(comparison.gain - reach, comparison.gain + reach),
        resampled=comparison.gain + errors,
        **_z_test(comparison.gain, error),
    )


def _errors_of_choice(
    table: Table, settings: Sequence[Setting], values: NDArray[np.float64], rule: Rule, seed: int
) -> NDArray[np.float64]:
    """Compute the error of the mean gain over parts in each resample, `(RESAMPLES_KEPT,)`: see `chosen`."""
    rng = np.random.default_rng(seed)
    evaluations = [table.evaluations[setting] for setting in settings]
    count = sum(map(len, table.parts))
    size = max(1, min(RESAMPLES_KEPT, BATCH // count))
    errors = []
    for start in range(0, RESAMPLES_KEPT, size):
        resamples = min(size, RESAMPLES_KEPT - start)
        drawn = [weighted(evaluations, _drawn(rng, rows, resamples, count)) for rows in table.parts]
        noise = np.stack(drawn, axis=1) - values[..., None]
        choice = rule(values.mean(axis=1)[:, None, None] + noise)
        plain = settings.index(PLAIN)
        errors.append((np.take_along_axis(noise, choice[None], axis=0)[0] - noise[plain]).mean(axis=0))
    return np.concatenate(errors)


def _drawn(rng: np.random.Generator, rows: Rows, resamples: int, count: int) -> Weights:
    return weights_of(rng.choice(rows, (resamples, len(rows))), count)


def on_all(table: Table, protocol: str, setting: Setting, seed: int | None) -> Comparison:
    """Compare a setting that was chosen on other data with the plain model. `table` has all images as one part."""
    (comparison,) = _compare(table, [_Choice(protocol, setting)], seed)
    return comparison


def best(table: Table) -> Comparison:
    """Compare the best setting on all images with the plain model on the same images. This is optimistic, so there is
    no interval or test. `table` has all images as one part."""
    values = np.array([table.values[setting][0] for setting in table.settings])
    setting = table.settings[_best_of(values)]
    plain, highest = float(table.values[PLAIN][0]), float(table.values[setting][0])
    evaluation = table.evaluations[PLAIN]
    return Comparison(table.metric, "best", (setting,), plain, highest, evaluation.n, evaluation.classes)


class _Choice(NamedTuple):
    """A protocol, the setting or rival that it measures, and what it is compared with."""

    protocol: str
    key: Key
    baseline: Key = PLAIN


def _compare(table: Table, choices: Sequence[_Choice], seed: int | None) -> list[Comparison]:
    """Make comparisons on all images, which `table` has as one part."""
    comparisons = [
        Comparison(
            table.metric,
            choice.protocol,
            (choice.key,) if isinstance(choice.key, Setting) else (),
            float(table.values[choice.baseline][0]),
            float(table.values[choice.key][0]),
            table.evaluations[choice.baseline].n,
            table.evaluations[choice.baseline].classes,
        )
        for choice in choices
    ]
    (rows,) = table.parts
    if seed is None or np.isnan(table.values[PLAIN][0]) or len(rows) < 2:
        return comparisons
    if reason := table.evaluations[PLAIN].no_interval:
        return [replace(comparison, no_interval=reason) for comparison in comparisons]
    gains, intervals = _bootstrap(table, choices, seed)
    return [
        replace(
            comparison,
            interval=None if np.isnan(interval).any() else (float(interval[0]), float(interval[1])),
            resampled=None if np.isnan(interval).any() else of_choice[:RESAMPLES_KEPT],
            **({} if choice.protocol == "curve" else _tested(table, choice, comparison.gain, of_choice)),
        )
        for comparison, choice, of_choice, interval in zip(comparisons, choices, gains, intervals, strict=True)
    ]


def _bootstrap(table: Table, choices: Sequence[_Choice], seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the gain of each choice in each resample, and its 95 % percentile interval. All choices use the same
    resamples, and a setting that several choices share is evaluated once."""
    (rows,) = table.parts
    keys = list(dict.fromkeys(key for choice in choices for key in (choice.baseline, choice.key)))
    evaluations = [table.evaluations[key] for key in keys]
    over = [(keys.index(choice.key), keys.index(choice.baseline)) for choice in choices]

    def gains(sample: Rows, axis: int = -1) -> NDArray[np.float64]:
        values = weighted(evaluations, weights_of(sample, len(rows)))
        return np.stack([values[key] - values[baseline] for key, baseline in over])

    with warnings.catch_warnings():
        # Where there are so few images that the metric is undefined in some resample, the interval is NaN.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            [rows.astype(np.int32)],
            gains,
            n_resamples=RESAMPLES,
            batch=max(1, min(RESAMPLES, BATCH // len(rows))),
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            axis=-1,
            rng=np.random.default_rng(seed),
        )
    return result.bootstrap_distribution, np.stack(result.confidence_interval, axis=-1)


def _tested(table: Table, choice: _Choice, gain: float, resampled: NDArray[np.float64]) -> dict[str, Any]:
    """Compute the two-sided p-value: McNemar's exact test for hits and misses, the paired t-test for other means over
    images, and a z-test with the bootstrap standard error for metrics that are not means over images (mAP, F1)."""
    before, after = table.evaluations[choice.baseline], table.evaluations[choice.key]
    if not (isinstance(before, PerImage) and isinstance(after, PerImage)):
        error = float(resampled.std(ddof=1))
        return {} if np.isnan(error) else _z_test(gain, error)
    counted = ~np.isnan(before.values)
    base, value = before.values[counted], after.values[counted]
    if before.binary:
        hits = (True, False)
        counts = [[np.sum(((base > 0) == a) & ((value > 0) == b)) for b in hits] for a in hits]
        return {"p_value": float(mcnemar(counts, exact=True).pvalue), "test": "McNemar exact"}
    difference = value - base
    if len(difference) < 2:
        return {}
    p = float(ttest_1samp(difference, 0).pvalue) if np.ptp(difference) else float(not difference.any())
    return {"p_value": p, "test": "paired t"}


def _z_test(gain: float, error: float) -> dict[str, Any]:
    z = gain / error if error else np.copysign(np.inf, gain) if gain else 0.0
    return {"p_value": float(2 * norm.sf(abs(z))), "test": "bootstrap z"}
