"""Compare two reductions of log-probabilities over locations: that of the library, and log-mean-exp.

With p_c(j) the probability of class c at location j, s = log p and a finite T, the attention term is

    softmax-weighted mean   sum_j softmax_j(T * s_c(j)) * s_c(j)    wrap(model, temperature=T, scores="log_softmax")
    log-mean-exp            log(mean_j p_c(j)^T) / T

Both approach the mean of s for T -> 0 and its maximum for T = inf, and the second at T is the average of the first over
all temperatures from 0 to T. Each image runs once for both. For each of the two, lam and T are chosen from the same
grid on one half of the images and measured on the other, both ways. Metrics are mAP and lrap on photographs with
several labels, and lrap on mosaics of photographs with one label each.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from timm_csra.attention import Attention
from timm_csra.config import LOG_SOFTMAX
from timm_csra.evaluation.metrics import MULTI_LABEL, evaluate
from timm_csra.evaluation.samples import weights_of
from timm_csra.evaluation.scoring import ALL, PLAIN, Scores, Setting, Term
from timm_csra.evaluation.statistics import CONFIDENCE, RESAMPLES, Comparison, Table, crossfit, halves
from timm_csra.evaluation.tuning import LAMS
from timm_csra.layouts import spatial_features
from timm_csra.locations import as_kind, location_scores
from timm_csra.patching import check_supported, plain_head

from .arguments import add_images, add_labels, add_reading
from .asked import asked_cells, asked_options, asked_what
from .checkpoints import find
from .checkpoints.find import CheckpointError
from .data import sources
from .data.classes import COMBINE, NotApplicableError, combined
from .data.datasets import DataError
from .engines.worker import Models
from .scoring.cells import Cell, Options, show_temperature
from .scoring.loading import Loaded, describe_bad_images, readable
from .scoring.measure import load_images

LOG_MEAN_EXP = "log_mean_exp"  # takes the place of the kind of scores in `Setting` and `Term`
KINDS, NAMES = (LOG_SOFTMAX, LOG_MEAN_EXP), ("softmax-weighted mean", "log-mean-exp")
METRICS = {"mosaic": ("lrap",), "multilabel": ("mAP", "lrap")}
COLUMNS = "{:24}  {:13}  {:10}  {:>4}  {:6}  {:>4}  {:>5}  {:>40}  {:>40}  {:>20}".format
NOTE = """
log-mean-exp less softmax-weighted mean, each cross-fitted, in percentage points: the unweighted mean over checkpoints,
with the 95 % interval of a paired bootstrap over images. In each resample all checkpoints see the same images, and lam
and T stay as they were chosen."""


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison. Returns 0, or 2 if something could not be measured."""
    args = _parser().parse_args(arguments)
    log = Console(stderr=True)
    pooled: dict[tuple[str, ...], list[NDArray[np.float64]]] = {}
    try:
        options = asked_options(args, Path())
        if any(math.isinf(T) for setting in options.settings if setting.lam for T in setting.temperature):
            raise ValueError(
                "--temperatures: found inf; expected finite values, since at inf both terms are the maximum."
            )
        models, data, mosaics = asked_what(args)
        every = (c for m in models for c in asked_cells(m, args.img_size, data, [("multilabel", None), *mosaics], {}))
        cells = [cell for cell in every if (cell.task == "multilabel") == cell.data.multilabel]
        memory = Models(options.device, options.channels_last)
        print(COLUMNS("checkpoint", "data", "task", "size", "metric", "n", "plain", *NAMES, "difference"))
        for cell in cells:
            progress = partial(track, description=cell.checkpoint.name, console=log, transient=True)
            for gains, difference in compare(cell, memory.get(cell), options, progress):
                plain = gains[0]
                where = (cell.data.name, cell.task_name, "/".join(cell.requested), plain.metric, str(plain.n))
                values = (f"{plain.baseline:.2f}", *map(_show_gain, gains), _show(difference))
                print(COLUMNS(cell.checkpoint.id.rsplit("/", 1)[-1], *where, *values), flush=True)
                pooled.setdefault(where, []).append(difference)
    except (CheckpointError, DataError, NotApplicableError, ValueError) as error:
        log.print(f"benchmarks.log_mean_exp: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    print(NOTE)
    for (*what, n), differences in pooled.items():
        print(*what, f"(n = {n}), {len(differences)} checkpoints:", _show(np.mean(differences, axis=0)))
    return 0


def compare(
    cell: Cell, loaded: Loaded, options: Options, progress: Any = iter
) -> list[tuple[list[Comparison], NDArray[np.float64]]]:
    """Cross-fit both terms on one cell.

    Returns:
        For each metric the gains over the plain model, in the order of `KINDS`, and the second gain minus the first,
        `(1 + RESAMPLES,)`: on the images, then in bootstrap resamples drawn within each half.
    """
    loader, _, alignment = load_images(cell, loaded, options)
    bad: list[int] = []
    grid = [setting for setting in options.settings if setting.lam]
    temperatures = sorted({T for setting in grid for T in setting.temperature})
    batches = readable(progress(loader), loader, bad)
    scores, targets = score_both(loaded.model, batches, temperatures, alignment.columns, options.device)
    if bad and not options.skip_bad_images:
        raise DataError(describe_bad_images(loader.dataset, bad))
    if len(targets) < 4:
        raise DataError(f"{cell.data.name}: found {len(targets)} images, expected at least 4, two for each half.")
    combine = options.class_map.combine if options.class_map else COMBINE[0]

    def logits(setting: Setting, images: slice = ALL, classes: slice = ALL) -> Tensor:
        every = scores.logits(setting, images)
        return (every if alignment.groups is None else combined(every, alignment.groups, combine))[:, classes]

    parts = halves(len(targets), options.seed)
    rng = np.random.default_rng(options.seed)
    samples = [weights_of([half, *rng.choice(half, (RESAMPLES, len(half)))], len(targets)) for half in parts]
    settings = [[PLAIN, *(setting._replace(scores=kind) for setting in grid)] for kind in KINDS]
    metrics = {metric: MULTI_LABEL[metric] for metric in METRICS[cell.task]}
    found = {setting: evaluate(partial(logits, setting), targets, metrics) for setting in {*settings[0], *settings[1]}}
    results = []
    for metric in metrics:
        tables = [Table.of(metric, {setting: found[setting][metric] for setting in kind}, parts) for kind in settings]
        gains = [crossfit(table, options.seed) for table in tables]
        both = [[found[s][metric].weighted(w) for s, w in zip(gain.settings, samples, strict=True)] for gain in gains]
        results.append((gains, np.subtract(*np.mean(both[::-1], axis=1))))
    return results


def score_both(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    temperatures: Sequence[float],
    columns: Sequence[int],
    device: str = "cpu",
) -> tuple[Scores, Tensor]:
    """Run every image `(N, C, H, W)` once.

    Returns:
        The logits and both terms for each T, of the classes in `columns`; and the targets.
    """
    check_supported(model)
    head, kept, targets = cast(Callable[..., Tensor], plain_head(model)), [], []
    for images, target in batches:
        with torch.inference_mode():
            features = spatial_features(model, images.to(device))
            (located,) = location_scores(model, head, features)
            terms = reductions(as_kind(LOG_SOFTMAX, located), temperatures)
            kept.append(torch.stack([head(features), *terms.values()])[..., list(columns)].cpu())
        targets.append(target)
    base, *attention = torch.cat(kept, dim=1)
    if not all(x.isfinite().all() for x in (base, *attention)):
        raise ValueError("found NaN or infinite logits; expected finite ones.")
    return Scores(base, dict(zip(terms, attention, strict=True))), torch.cat(targets)


def reductions(scores: Tensor, temperatures: Sequence[float]) -> dict[Term, Tensor]:
    """Reduce log-probabilities `(N, L, K)` over the L locations in both ways, for each finite T: `(N, K)` each."""
    parts, found = Attention.of(scores, temperatures), {}
    for T, mean, weights in zip(temperatures, parts.terms(temperatures), parts.weights, strict=True):
        found[LOG_SOFTMAX, T] = mean
        found[LOG_MEAN_EXP, T] = parts.highest + (weights / scores.shape[1]).log() / T
    return found


def _show(values: NDArray[np.float64]) -> str:
    low, high = np.quantile(values[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return f"{values[0]:+.2f} [{low:+.2f}, {high:+.2f}]"


def _show_gain(gain: Comparison) -> str:
    low, high = gain.interval or (math.nan, math.nan)
    lams, temperatures = (";".join(f"{s.lam:g}" for s in gain.settings), ";".join(map(show_temperature, gain.settings)))
    return f"{gain.gain:+.2f} [{low:+.2f}, {high:+.2f}] lam {lams} T {temperatures}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.log_mean_exp",
        description=__doc__,
        epilog=sources.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", metavar="SPEC", required=True, help=find.HELP)
    parser.add_argument("--data", nargs="+", metavar="DATA", required=True, help="labelled photographs, see below")
    parser.add_argument("--lams", default=",".join(f"{lam:g}" for lam in LAMS), help="default: 0 and %(default)s")
    parser.add_argument("--temperatures", default="1,5", help="finite values of T (default: %(default)s)")
    add_labels(parser)
    add_images(parser)
    add_reading(parser)
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of samples, mosaics, halves, bootstrap (default: %(default)s)"
    )
    unused = ("sample", "devices", "keep_scores", "rescore", "cache_images", "rivals", "time_plain")
    parser.set_defaults(also=(), activation="softmax", average_precision="continuous", engine="local")
    parser.set_defaults(**dict.fromkeys(unused, False))
    parser.set_defaults(task="mosaic", scores=LOG_SOFTMAX, amp="none", channels_last=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
