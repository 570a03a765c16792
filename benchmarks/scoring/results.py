"""Compute the results of a cell from its scores: metrics, comparisons with the plain model, calibration."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from timm_csra.config import LOG_SOFTMAX, LOGITS
from timm_csra.evaluation.metrics import (
    ANY_LABEL,
    MULTI_LABEL,
    SIGMOID,
    VOC2007,
    Metric,
    calibration,
    evaluate,
)
from timm_csra.evaluation.samples import Evaluation, Logits
from timm_csra.evaluation.scoring import ALL, PLAIN, Scores, Setting
from timm_csra.evaluation.statistics import (
    AGREEMENT,
    FIXED,
    VERSUS,
    Comparison,
    Key,
    Table,
    best,
    crossfit,
    halves,
    on_all,
    without_choice,
)

from ..data.classes import COMBINE, combined
from ..records.files import Record
from ..records.phases import Phases
from ..records.resampled import packed
from .agreement import setting_of
from .cells import Cell, Options, show_temperature
from .kept import Scored

THRESHOLD = "compares each logit with 0; a log-probability, at most 0, lowers them all, and no threshold fits"


def results(cell: Cell, scored: Scored, options: Options, phases: Phases) -> Record:
    """Return fields of a cell's record: its facts, and the results of every setting of `options`."""
    scores, targets, facts = scored.scores, scored.targets, dict(scored.facts)
    chosen = setting_of(facts.get("agreement"))
    groups = facts.pop("groups")
    combine = options.class_map.combine if options.class_map else COMBINE[0]
    metrics = _metrics(cell, options, targets)
    ranking = metrics and {name: metric for name, metric in metrics.items() if name not in SIGMOID}

    def measured(logits: Logits, metrics: dict[str, Metric] | None = metrics) -> dict[str, Evaluation]:
        def grouped(images: slice = ALL, classes: slice = ALL) -> Tensor:
            return combined(logits(images), groups, combine)[:, classes]

        return evaluate(logits if groups is None else grouped, targets, metrics)

    def of_setting(setting: Setting) -> dict[str, Evaluation]:
        return measured(partial(scores.logits, setting), ranking if setting.scores == LOG_SOFTMAX else metrics)

    with phases("metrics"):
        evaluations: dict[Key, dict[str, Evaluation]] = {setting: of_setting(setting) for setting in options.settings}
        for name, logits in {"max_pool": scores.attention[LOGITS, math.inf], **scores.pooled}.items():
            evaluations[name] = measured(partial(_part, logits))
        images = np.arange(len(targets))
        tables = {
            metric: Table.of(metric, {key: of[metric] for key, of in evaluations.items() if metric in of}, [images])
            for metric in evaluations[PLAIN]
        }
        # In tables of their own, since crossfit and best must choose among the settings of the options only.
        chosen_tables = {}
        if chosen:
            for metric, evaluation in (evaluations.get(chosen) or of_setting(chosen)).items():
                pair: dict[Key, Evaluation] = {PLAIN: evaluations[PLAIN][metric], chosen: evaluation}
                chosen_tables[metric] = Table.of(metric, pair, [images])
        calibrated = _calibration(scores, targets, options.settings, chosen) if cell.task == "single" else None
    with phases("statistics"):
        independent = cell.task != "mosaic" or cell.data.tilings is None
        seed = options.seed if independent else None
        comparisons = [
            comparison
            for metric, table in tables.items()
            for comparison in _compare(table, targets, seed, chosen_tables.get(metric))
        ]
    return facts | {
        "results": [_result(comparison) for comparison in comparisons],
        "all_settings": [
            {"scores": s.scores, "lam": s.lam, "temperature": show_temperature(s)}
            | {name: _json(float(table.values[s][0])) for name, table in tables.items() if s in table.values}
            for s in options.settings
        ],
        "left_out": [
            {"metric": metric, "scores": LOG_SOFTMAX, "reason": THRESHOLD}
            for metric in tables
            if metric in SIGMOID and any(s.scores == LOG_SOFTMAX for s in (*options.settings, chosen) if s)
        ],
        "calibration": calibrated,
    }


def _part(logits: Tensor, images: slice = ALL, classes: slice = ALL) -> Tensor:
    return logits[images, classes]


def _metrics(cell: Cell, options: Options, targets: Tensor) -> dict[str, Metric] | None:
    if cell.task == "real":
        return ANY_LABEL
    if targets.ndim == 1:
        return None
    voc = VOC2007 if options.average_precision == "11-point" else {}
    return MULTI_LABEL | voc | (SIGMOID if options.activation == "sigmoid" else {})


def _calibration(scores: Scores, targets: Tensor, settings: Sequence[Setting], chosen: Setting | None) -> Record:
    """Measure the calibration of the softmax probabilities, for the fixed settings and the one chosen without labels.

    The paper's setting scales logits by about 1 + lam; dividing by 1 + lam corrects part of that.
    """
    logits = {"plain": scores.base}
    for protocol, setting in FIXED.items():
        if setting in settings:
            logits[protocol] = scores.logits(setting)
            if setting.scores == LOGITS:
                logits[f"{protocol}, logits / (1 + lam)"] = logits[protocol] / (1 + setting.lam)
    if chosen:
        logits[AGREEMENT] = scores.logits(chosen)
    return {
        name: {metric: _json(value) for metric, value in calibration(values, targets).items()}
        for name, values in logits.items()
    }


def _compare(table: Table, targets: Tensor, seed: int | None, of_chosen: Table | None) -> Iterator[Comparison]:
    """Yield all comparisons of a metric. `of_chosen` has the plain model and the setting chosen without labels."""
    before_looking = without_choice(table, seed)
    yield from (one for one in before_looking if one.protocol in (*FIXED, VERSUS))
    if of_chosen is not None:
        (setting,) = (s for s in of_chosen.settings if s != PLAIN)
        yield on_all(of_chosen, AGREEMENT, setting, seed)
    if seed is not None and len(targets) >= 4:
        split = halves(targets.numpy() if targets.ndim == 1 else len(targets), seed)
        yield crossfit(Table.of(table.metric, {s: table.evaluations[s] for s in table.settings}, split), seed)
    yield best(table)
    yield from (one for one in before_looking if one.protocol not in (*FIXED, VERSUS))


def _result(comparison: Comparison) -> Record:
    low, high = comparison.interval or (None, None)
    return {
        "metric": comparison.metric,
        "protocol": comparison.protocol,
        "n": comparison.n,
        "classes": comparison.classes,
        "scores": ";".join(setting.scores for setting in comparison.settings),
        "lam": ";".join(f"{setting.lam:g}" for setting in comparison.settings),
        "temperature": ";".join(map(show_temperature, comparison.settings)),
        "baseline": _json(comparison.baseline),
        "value": _json(comparison.value),
        "gain": _json(comparison.gain),
        "ci_low": low,
        "ci_high": high,
        "p_value": None if comparison.p_value is None else _json(comparison.p_value),
        "test": comparison.test,
        "no_interval": comparison.no_interval,
        "resampled": _packed(comparison),
    }


def _packed(comparison: Comparison) -> str | None:
    """Pack the resampled gains of protocols that are averaged over checkpoints; None for curves and rivals."""
    if comparison.resampled is None or comparison.protocol not in (*FIXED, VERSUS, AGREEMENT, "crossfit"):
        return None
    return packed(comparison.resampled)


def _json(value: float) -> float | None:
    """Replace NaN and infinity (the log-likelihood of a masked class), which JSON cannot express, by None."""
    return value if np.isfinite(value) else None
