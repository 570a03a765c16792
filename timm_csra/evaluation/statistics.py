"""Comparing settings with the plain model without fooling oneself.

Protocols, never mixed: `fixed` (the paper's: logits, lam 0.1, T inf) and `fixed_log_softmax` (lam 0.3, T inf), without
any choice on the data; `crossfit` (chosen on one half of the images, measured on the other, both ways) and `best`
(chosen on the very images it is measured on: optimistic, without interval or test). `log_softmax_vs_logits` compares
the two fixed settings with each other. Intervals and tests are paired: each image is seen by both settings.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, norm, ttest_1samp
from statsmodels.stats.contingency_tables import mcnemar

from ..config import SCORES
from .metrics import Evaluation, PerImage, Rows, weights_of
from .scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, Setting

CONFIDENCE = 0.95
RESAMPLES = 1000
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
        interval: 95 % bounds of the gain, or None.
        p_value: two-sided, of no gain at all, or None. It knows nothing of other comparisons.
        test: what gave it: `McNemar exact`, `paired t` or `bootstrap z`.
    """

    metric: str
    protocol: str
    settings: tuple[Setting, ...]
    baseline: float
    value: float
    n: int
    interval: tuple[float, float] | None = None
    p_value: float | None = None
    test: str | None = None

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
    choices = [_Choice(protocol, (setting,)) for protocol, setting in fixed.items()]
    if fixed.keys() == FIXED.keys():
        choices.append(_Choice(VERSUS, (DEFAULT_LOG_SOFTMAX,), DEFAULT))
    choices += [_Choice(rival, (rival,)) for rival in table.values if isinstance(rival, str)]
    curves = (s for s in table.settings if s.lam and s.temperature == DEFAULT.temperature)
    choices += [_Choice("curve", (setting,)) for setting in sorted(curves, key=lambda s: (SCORES.index(s.scores), s))]
    return _compare(table, choices, seed)


def crossfit(table: Table, seed: int) -> Comparison:
    """Chosen on each half, measured on the other. `table` is of `halves`."""
    on_first, on_second = ({setting: table.values[setting][half] for setting in table.settings} for half in (0, 1))
    return on_parts(table, "crossfit", (_best(on_second), _best(on_first)), seed)


def on_parts(table: Table, protocol: str, settings: Sequence[Setting], seed: int | None) -> Comparison:
    """A setting for each part of the images, against the plain model on the same parts: the metric is computed within
    each part and averaged, never on scores pooled from several settings, whose logits have different scales."""
    (comparison,) = _compare(table, [_Choice(protocol, settings)], seed)
    return comparison


def best(table: Table) -> Comparison:
    """The setting that looks best on all images, measured on them: optimistic, so neither interval nor test. `table` is
    of all images as one part."""
    values = {setting: float(table.values[setting][0]) for setting in table.settings}
    setting = _best(values)
    return Comparison(table.metric, "best", (setting,), values[PLAIN], values[setting], table.evaluations[PLAIN].n)


def _best(values: Mapping[Setting, float]) -> Setting:
    """The highest value, the smallest lam among equals; the plain model where the metric is undefined."""
    defined = {setting: value for setting, value in sorted(values.items()) if not np.isnan(value)}
    return max(defined, key=lambda setting: defined[setting], default=PLAIN)


class _Choice(NamedTuple):
    """What a protocol takes for every part of the images, and what it is compared with on the same parts."""

    protocol: str
    keys: Sequence[Key]
    baseline: Key = PLAIN


def _compare(table: Table, choices: Sequence[_Choice], seed: int | None) -> list[Comparison]:
    comparisons = [
        Comparison(
            table.metric,
            choice.protocol,
            tuple(key for key in choice.keys if isinstance(key, Setting)),
            float(table.values[choice.baseline].mean()),
            float(np.mean([table.values[key][part] for part, key in enumerate(choice.keys)])),
            table.evaluations[choice.baseline].n,
        )
        for choice in choices
    ]
    if seed is None or np.isnan(table.values[PLAIN].mean()) or any(len(rows) < 2 for rows in table.parts):
        return comparisons
    return [
        replace(
            comparison,
            interval=None if np.isnan(low) or np.isnan(high) else (float(low), float(high)),
            **({} if choice.protocol == "curve" else _tested(table, choice, comparison.gain, float(error))),
        )
        for comparison, choice, low, high, error in zip(
            comparisons, choices, *_bootstrap(table, choices, seed), strict=True
        )
    ]


def _bootstrap(
    table: Table, choices: Sequence[_Choice], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile bootstrap of the gain of each choice: low, high and standard error. Images are resampled within
    each part, the same for all choices, and what several choices use is evaluated once."""
    count = sum(map(len, table.parts))

    def gains(*samples: Rows, axis: int = -1) -> NDArray[np.float64]:
        total = np.zeros((len(choices), len(samples[0])))
        for part, rows in enumerate(samples):
            weights = weights_of(rows, count)
            used = dict.fromkeys(key for choice in choices for key in (choice.baseline, choice.keys[part]))
            values = {key: table.evaluations[key].weighted(weights) for key in used}
            total += [values[choice.keys[part]] - values[choice.baseline] for choice in choices]
        return total / len(samples)

    with warnings.catch_warnings():
        # With so few images that a resample leaves the metric undefined there is no interval: NaN says so.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        result = bootstrap(
            [rows.astype(np.int32) for rows in table.parts],
            gains,
            n_resamples=RESAMPLES,
            batch=max(1, min(RESAMPLES, BATCH // count)),
            vectorized=True,
            method="percentile",
            confidence_level=CONFIDENCE,
            axis=-1,
            rng=np.random.default_rng(seed),
        )
    low, high = result.confidence_interval
    return low, high, result.standard_error


def _tested(table: Table, choice: _Choice, gain: float, error: float) -> dict[str, Any]:
    """Two-sided p-value and its test: McNemar's exact one for hits and misses, the paired t-test for other means over
    images, and for what is no mean over images (mAP, F1) z = gain / bootstrap standard error."""
    evaluations, before = table.evaluations, table.evaluations[choice.baseline]
    used = [(before, evaluations[key], rows) for key, rows in zip(choice.keys, table.parts, strict=True)]
    if not all(isinstance(evaluation, PerImage) for evaluation in (used[0][0], used[0][1])):
        if np.isnan(error):
            return {}
        z = gain / error if error else np.copysign(np.inf, gain) if gain else 0.0
        return {"p_value": float(2 * norm.sf(abs(z))), "test": "bootstrap z"}
    base = np.concatenate([evaluation.values[rows] for evaluation, _, rows in used])  # type: ignore[attr-defined]
    value = np.concatenate([evaluation.values[rows] for _, evaluation, rows in used])  # type: ignore[attr-defined]
    counted = ~np.isnan(base)
    base, value = base[counted], value[counted]
    if used[0][0].binary:  # type: ignore[attr-defined]
        hits = (True, False)
        counts = [[np.sum(((base > 0) == a) & ((value > 0) == b)) for b in hits] for a in hits]
        return {"p_value": float(mcnemar(counts, exact=True).pvalue), "test": "McNemar exact"}
    difference = value - base
    if len(difference) < 2:
        return {}
    p = float(ttest_1samp(difference, 0).pvalue) if np.ptp(difference) else float(not difference.any())
    return {"p_value": p, "test": "paired t"}
