"""Comparing settings with the plain model without fooling oneself.

Protocols, never mixed: `fixed` (the paper's: logits, lam 0.1, T inf) and `fixed_log_softmax` (lam 0.3, T inf), without
any choice on the data; `crossfit` (chosen on one half of the images, measured on the other, both ways) and `best`
(chosen on the very images it is measured on: optimistic, without interval or test). `log_softmax_vs_logits` compares
the two fixed settings with each other. Intervals and tests are paired: each image is seen by both settings. Where a
setting is chosen on the data, the choice is made again in every resample: see `chosen`.
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
RESAMPLES_KEPT = 200  # of which a standard error is taken, which needs fewer than quantiles do
BATCH = 2**24  # images of all resamples at a time, so that memory stays bounded
FIXED = {"fixed": DEFAULT, "fixed_log_softmax": DEFAULT_LOG_SOFTMAX}  # protocols without any choice on the data
VERSUS = "log_softmax_vs_logits"  # the second of them over the first
AGREEMENT = "agreement"  # lam chosen without labels, on other pictures; see `timm_csra.choose_lam`


@dataclass(frozen=True)
class Comparison:
    """One metric under one protocol, percent and percentage points.

    Attributes:
        metric: `top1`, `mAP`, ...
        protocol: one of `FIXED`, `VERSUS`, `AGREEMENT`, `crossfit` or `best`; `curve` for one lam of a curve; `nested`
            of `tune`; or a rival.
        settings: the setting that was measured; for `crossfit` and `nested` the one chosen for each part.
        baseline: the metric at lam = 0 on the same images (of several parts, their mean); for `VERSUS` that of `fixed`.
        value: the metric with `settings`.
        n: how many images the metric counts: of all images, or of those that have labels enough for it.
        classes: how many classes the metric is a mean over, or None where it is none over classes.
        interval: 95 % bounds of the gain, or None.
        p_value: two-sided, of no gain at all, or None. It knows nothing of other comparisons.
        test: what gave it: `McNemar exact`, `paired t` or `bootstrap z`.
        no_interval: why there is neither interval nor test although there are images enough, or None.
        resampled: the gain in each of `RESAMPLES_KEPT` resamples of the images, where there is an interval. Two
            comparisons of as many images, with one seed and protocol, have the same images in the same resample.
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


Key = Setting | str  # a setting, or another way to use the plain model, by its name


@dataclass(frozen=True)
class Table:
    """One metric of every setting, and of its rivals, on parts of the images.

    Attributes:
        metric: its name.
        evaluations: of each setting, `PLAIN` among them, and rival.
        parts: images; together they are all n, once each.
        values: the metric on every part.
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
        """In order of lam. A metric need not have a value for all that were scored."""
        return sorted(key for key in self.values if isinstance(key, Setting))


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


def without_choice(table: Table, seed: int | None) -> list[Comparison]:
    """Everything that was set before looking, on all images and the same resamples: each of `FIXED` that the table has,
    `VERSUS` where it has both, then each rival under its own name, then T = inf with every lam, for each kind of scores
    (`curve`). All but `VERSUS` are compared with the plain model.

    A curve's intervals make a band that holds point by point, not for the whole curve at once, and it has no tests: it
    shows, the others decide.

    Args:
        table: of all images as one part.
        seed: of the bootstrap, None for neither interval nor test.
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
"""Chooses a setting for each part of the images: from the metric of S settings on P parts in B resamples, `(S, P, B)`,
its number `(P, B)`. The settings are those of a `Table`, in order of lam."""


def crossfit(table: Table, seed: int | None) -> Comparison:
    """Choose on each half, measure on the other. `table` is of `halves`."""
    return chosen(table, "crossfit", _best_of_the_other, seed)


def _best_of_the_other(values: NDArray[np.float64]) -> NDArray[np.intp]:
    return np.stack([_best_of(values[:, 1]), _best_of(values[:, 0])])


def _best_of(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """The first of the highest along S; the first of all, the plain model, where the metric is undefined."""
    return np.where(np.isnan(values), -np.inf, values).argmax(axis=0)


def chosen(table: Table, protocol: str, rule: Rule, seed: int | None) -> Comparison:
    """Compare what a rule chooses for each part of the images with the plain model on the same parts.

    The metric is computed within each part and averaged, never on scores pooled from several settings, whose logits
    have different scales. A rule that chooses on the other parts makes the gains of the parts depend on each other, so
    that an interval which holds the choices fixed is too narrow. Here the images of each part are resampled and the
    rule chooses again: the interval is the gain -+ 1.96 standard deviations, over the resamples, of what a choice is
    measured to gain beyond what it does gain. For that, all parts have to come from one population: before the rule
    chooses, the metric of each setting is moved, in every part by the same for all resamples, so that its mean over
    them is the one over all parts. `python -m benchmarks.calibrate` simulates how often these intervals are right.

    Args:
        table: of parts, and settings with the plain model among them.
        protocol: name of the comparison.
        rule: see `Rule`; it may not look at a part to choose for it.
        seed: of the resamples, None for neither interval nor test.
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
    if np.isnan(error):  # so few images that a resample leaves the metric undefined
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
    """In each resample, by how much the mean gain over parts is measured wrong: see `chosen`."""
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
    """Compare a setting that was chosen elsewhere with the plain model. `table` is of all images as one part."""
    (comparison,) = _compare(table, [_Choice(protocol, setting)], seed)
    return comparison


def best(table: Table) -> Comparison:
    """The setting that looks best on all images, measured on them: optimistic, so neither interval nor test. `table` is
    of all images as one part."""
    values = np.array([table.values[setting][0] for setting in table.settings])
    setting = table.settings[_best_of(values)]
    plain, highest = float(table.values[PLAIN][0]), float(table.values[setting][0])
    evaluation = table.evaluations[PLAIN]
    return Comparison(table.metric, "best", (setting,), plain, highest, evaluation.n, evaluation.classes)


class _Choice(NamedTuple):
    """What a protocol takes without looking, and what it is compared with."""

    protocol: str
    key: Key
    baseline: Key = PLAIN


def _compare(table: Table, choices: Sequence[_Choice], seed: int | None) -> list[Comparison]:
    """On all images, which `table` has as one part."""
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
    """Give the gain of each choice in each resample, and its 95 % percentile intervals. Images are resampled the same
    for all choices, and what several choices use is evaluated once."""
    (rows,) = table.parts
    keys = list(dict.fromkeys(key for choice in choices for key in (choice.baseline, choice.key)))
    evaluations = [table.evaluations[key] for key in keys]
    over = [(keys.index(choice.key), keys.index(choice.baseline)) for choice in choices]

    def gains(sample: Rows, axis: int = -1) -> NDArray[np.float64]:
        values = weighted(evaluations, weights_of(sample, len(rows)))
        return np.stack([values[key] - values[baseline] for key, baseline in over])

    with warnings.catch_warnings():
        # With so few images that a resample leaves the metric undefined there is no interval: NaN says so.
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
    """Two-sided p-value and its test: McNemar's exact one for hits and misses, the paired t-test for other means over
    images, and for what is no mean over images (mAP, F1) z = gain / bootstrap standard error."""
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
