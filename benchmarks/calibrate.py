"""Simulate how often the intervals and verdicts of each protocol are right.

Samples of photographs are drawn from a population in which the gain of every setting is known: `null`, where all
settings rank classes as well as the plain model, though differently; and `effect`, where they rank better the larger
lam is. The metrics, protocols, intervals and tests are those of a sweep and of `tune`. The command prints for each
protocol how many of its intervals contain the true gain of the chosen settings (95 % is nominal), and how many of its
verdicts are better or worse.
"""

import argparse
import csv
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table as RichTable
from scipy.stats import binomtest
from torch import Tensor

from timm_csra.config import LOG_SOFTMAX, SCORES
from timm_csra.evaluation.metrics import MULTI_LABEL, SINGLE_LABEL, evaluate
from timm_csra.evaluation.samples import Evaluation
from timm_csra.evaluation.scoring import PLAIN, Setting, settings_grid
from timm_csra.evaluation.statistics import (
    AGREEMENT,
    FIXED,
    Comparison,
    Key,
    Table,
    crossfit,
    folds_of,
    on_all,
)
from timm_csra.evaluation.tuning import nested_gain

from .argument_types import positive
from .records.files import write_table

LAMS = (0.05, 0.1, 0.2, 0.3, 0.5)
TEMPERATURES = (5.0, float("inf"))
SETTINGS = tuple(settings_grid(LAMS, TEMPERATURES, SCORES))
METRICS = ("top1", "lrap", "mAP")
TRUTHS = ("null", "effect")
CLASSES, LABELS = 8, 2  # number of classes, and mean number of labels of a multi-label image
SIGNAL, GAIN = 1.5, 0.15  # logit of a class in the image, in standard deviations of the noise; its relative increase
POPULATION = 100_000
CALIBRATION, AGREED = 200, 0.9  # pictures for `agreement`, and the share that must agree: 98 % never do here
COLUMNS = ("metric", "truth", "images", "protocol", "runs", "intervals", "covered", "coverage", "coverage_low",
           "coverage_high", "better", "worse", "median_width")  # fmt: skip


@dataclass(frozen=True)
class Condition:
    """A condition of the simulation."""

    metric: str
    truth: str
    images: int

    @property
    def single(self) -> bool:
        return self.metric in SINGLE_LABEL


@dataclass(frozen=True)
class Outcome:
    """Interval and verdict of one protocol on one sample. `truth` is the gain of its settings in the population.

    Gains are in percentage points.
    """

    protocol: str
    truth: float
    interval: tuple[float, float] | None
    verdict: str


def drawn(condition: Condition, images: int, rng: np.random.Generator) -> tuple[Tensor, dict[Setting, Tensor]]:
    """Draw images from the population of a condition: targets, and the logits of each setting `(images, CLASSES)`.

    Logits are signal plus noise of variance 1. A share of the noise that grows with lam is independent of the plain
    model's. So under `null` each setting ranks as well as the plain model, though differently for large lam; under
    `effect` its signal is larger.
    """
    noise = [
        torch.from_numpy(rng.standard_normal((images, CLASSES), dtype=np.float32)) for _ in range(len(SETTINGS) + 1)
    ]
    plain, shared, own = noise[0], noise[1], noise[2:]
    if condition.single:
        targets = torch.from_numpy(rng.integers(0, CLASSES, images))
        present = torch.nn.functional.one_hot(targets, CLASSES)
    else:
        targets = present = torch.from_numpy(rng.random((images, CLASSES)) < LABELS / CLASSES).to(torch.int8)
    logits = {PLAIN: SIGNAL * present + plain}
    for setting, of_setting in zip((s for s in SETTINGS if s != PLAIN), own, strict=True):
        differs = 0.8 * setting.lam / max(LAMS)
        other = (shared + of_setting) / 2**0.5
        stands_out = SIGNAL * (1 + (GAIN * setting.lam / max(LAMS) if condition.truth == "effect" else 0))
        logits[setting] = stands_out * present + (1 - differs**2) ** 0.5 * plain + differs * other
    return targets, logits


def _evaluations(condition: Condition, targets: Tensor, logits: dict[Setting, Tensor]) -> dict[Key, Evaluation]:
    metric = {condition.metric: (SINGLE_LABEL | MULTI_LABEL)[condition.metric]}
    return {setting: evaluate(of_setting, targets, metric)[condition.metric] for setting, of_setting in logits.items()}


@cache
def gains(metric: str, truth: str) -> dict[Setting, float]:
    """Return the gain of each setting in the population, in percentage points: exactly 0 under the null."""
    if truth == "null":
        return dict.fromkeys(SETTINGS, 0.0)
    condition = Condition(metric, truth, POPULATION)
    evaluations = _evaluations(condition, *drawn(condition, POPULATION, np.random.default_rng(0)))
    table = Table.of(metric, evaluations, [np.arange(POPULATION)])
    return {setting: float(table.values[setting][0] - table.values[PLAIN][0]) for setting in SETTINGS}


def run(condition: Condition, seed: int) -> list[Outcome]:
    """Draw one sample of images, and return the outcome of every protocol on it."""
    rng = np.random.default_rng([seed, condition.images])
    targets, logits = drawn(condition, condition.images, rng)
    evaluations = _evaluations(condition, targets, logits)
    whole = Table.of(condition.metric, evaluations, [np.arange(condition.images)])
    strata = targets.numpy() if condition.single else condition.images
    halves, folds = (Table.of(condition.metric, evaluations, folds_of(strata, seed, count)) for count in (2, 5))
    comparisons = [
        on_all(whole, "fixed", FIXED["fixed"], seed),
        on_all(whole, AGREEMENT, _agreed(condition, rng), seed),
        crossfit(halves, seed),
        nested_gain(folds, seed),
    ]
    return [_outcome(condition, comparison) for comparison in comparisons]


def _agreed(condition: Condition, rng: np.random.Generator) -> Setting:
    """Return the setting with the largest lam up to which enough other pictures keep the plain model's top class."""
    _, logits = drawn(condition, CALIBRATION, rng)
    agreed = PLAIN
    for setting in sorted(s for s in SETTINGS if s.scores == LOG_SOFTMAX and s.temperature == (float("inf"),)):
        same = logits[setting].argmax(dim=1) == logits[PLAIN].argmax(dim=1)
        if same.float().mean() < AGREED:
            break
        agreed = setting
    return agreed


def _outcome(condition: Condition, comparison: Comparison) -> Outcome:
    of_setting = gains(condition.metric, condition.truth)
    truth = float(np.mean([of_setting[setting] for setting in comparison.settings]))
    says = "no evidence"
    if comparison.protocol == "nested" and comparison.interval is not None:  # `tune` decides by the interval
        low, high = comparison.interval
        says = "better" if low > 0 else "worse" if high < 0 else says
    elif comparison.p_value is not None and comparison.p_value < 0.05:
        says = "better" if comparison.gain > 0 else "worse"
    return Outcome("tune" if comparison.protocol == "nested" else comparison.protocol, truth, comparison.interval, says)


def _runs(condition: Condition, seeds: range) -> list[list[Outcome]]:
    return [run(condition, seed) for seed in seeds]


def summed(condition: Condition, outcomes: list[list[Outcome]]) -> Iterator[dict[str, object]]:
    """Yield one row for each protocol."""
    for of_protocol in zip(*outcomes, strict=True):
        intervals = [(one.interval, one.truth) for one in of_protocol if one.interval is not None]
        # The tolerance is for rounding: if lam = 0 was chosen, the interval is the point 0.
        covered = sum(low - 1e-9 <= truth <= high + 1e-9 for (low, high), truth in intervals)
        yield {
            "metric": condition.metric,
            "truth": condition.truth,
            "images": condition.images,
            "protocol": of_protocol[0].protocol,
            "runs": len(of_protocol),
            "intervals": len(intervals),
            "covered": covered,
            **_shares(covered, len(intervals)),
            "better": _percent(sum(one.verdict == "better" for one in of_protocol), len(of_protocol)),
            "worse": _percent(sum(one.verdict == "worse" for one in of_protocol), len(of_protocol)),
            "median_width": float(np.median([high - low for (low, high), _ in intervals])) if intervals else None,
        }


def _percent(count: int, of: int) -> float:
    return round(100 * count / of, 2)


def _shares(covered: int, count: int) -> dict[str, object]:
    if not count:
        return {"coverage": None, "coverage_low": None, "coverage_high": None}
    bounds = binomtest(covered, count).proportion_ci(method="wilson")
    low, high = round(100 * float(bounds.low), 2), round(100 * float(bounds.high), 2)
    return {"coverage": _percent(covered, count), "coverage_low": low, "coverage_high": high}


def main(arguments: list[str] | None = None) -> int:
    """Simulate, print and write. Returns 0, or 2 if --out has other columns or another number of runs."""
    args = _parser().parse_args(arguments)
    screen, log = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    try:
        rows = _finished(args.out, args.runs)
    except ValueError as error:
        log.print(f"benchmarks.calibrate: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    every = [Condition(*one) for one in product(args.metrics, args.truth, args.images)]
    done_before = {(row["metric"], row["truth"], int(str(row["images"]))) for row in rows}
    conditions = [one for one in every if astuple(one) not in done_before]
    each = max(1, min(20, args.runs // args.jobs))
    parts = [range(start, min(start + each, args.runs)) for start in range(0, args.runs, each)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for condition in conditions:
            words = f"{condition.metric}, {condition.truth}, {condition.images} images"
            done = track(pool.map(partial(_runs, condition), parts), words, len(parts), console=log, transient=True)
            rows += summed(condition, [outcome for part in done for outcome in part])
            if args.out:
                write_table(args.out, COLUMNS, rows)
    screen.print(_table(rows))
    return 0


def _finished(out: Path | None, runs: int) -> list[dict[str, object]]:
    """Return the rows that an interrupted run has written to `out`.

    Raises:
        ValueError: the file has other columns, or is of another number of runs.
    """
    if out is None or not out.exists():
        return []
    with out.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = [dict[str, object](row) for row in reader]
    if tuple(reader.fieldnames or ()) != COLUMNS or any(row["runs"] != str(runs) for row in rows):
        raise ValueError(
            f"--out {out}: found other columns, or conditions of another number of runs than {runs}; name another file."
        )
    return rows


def _table(rows: list[dict[str, object]]) -> RichTable:
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for name in ("metric", "truth", "images", "protocol", "runs", "coverage %", "better %", "worse %", "width"):
        table.add_column(name, justify="left" if name in ("metric", "truth", "protocol") else "right", no_wrap=True)
    for row in rows:
        first = [str(row[name]) for name in ("metric", "truth", "images", "protocol", "runs")]
        numbers = ("coverage", "coverage_low", "coverage_high", "better", "worse", "median_width")
        coverage, low, high, *others = (
            f"{float(str(row[name])):.2f}" if row[name] not in (None, "") else "-" for name in numbers
        )
        table.add_row(*first, f"{coverage} [{low}, {high}]", *others)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibrate",
        description=__doc__,
        epilog="example:\n  python -m benchmarks.calibrate --runs 200 --metrics top1 --images 100",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=positive, default=1000, help="samples of each condition (default: %(default)s)")
    parser.add_argument("--images", type=positive, nargs="+", default=(100, 500, 2000), metavar="N",
                        help="images in a sample (default: 100 500 2000)")  # fmt: skip
    parser.add_argument("--metrics", choices=METRICS, nargs="+", default=METRICS, help="default: all")
    parser.add_argument("--truth", choices=TRUTHS, nargs="+", default=TRUTHS, help="default: both")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--out", type=Path, help="a CSV file; conditions that it already has are not run again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
