"""Compare both kinds of scores on new linear heads, trained with a sigmoid or with softmax on the same features.

A checkpoint's backbone runs once over photographs with several labels, or mosaics of photographs with one. Then, for
each of several random splits, two linear heads are trained on one half of the images: with binary cross entropy
(`sigmoid`), and with softmax cross entropy on the labels divided by their number (`softmax`). Each is wrapped by the
library, and measured on the other half by mAP. The heads have the classes with at least 5 positives in the test half
and at least one in the training half.

The recipe was fixed before anything was measured, and is that of scikit-learn's LogisticRegression (C=1): features
standardised, the losses of all images summed, half the squared weights added, L-BFGS until it has converged.

  fixed   logits: lam 0.1; log_softmax: lam 0.3
  tuned   lam as `timm_csra.tune` chooses it for each of the two on the training half, by scores from 5-fold
          cross-validation, since a head ranks nearly all of its own training images correctly

All with T inf. Splits share images: the spread over them shows how much a result depends on the split, and is not a
confidence interval. Example: python -m benchmarks.probe --models resnet50 --data photos --out probe.csv
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from scipy.optimize import minimize
from torch import Tensor, nn

from timm_csra.config import LOG_SOFTMAX, LOGITS, SCORES
from timm_csra.errors import describe
from timm_csra.evaluation.metrics import FEW, MeanAveragePrecision
from timm_csra.evaluation.samples import Rows
from timm_csra.evaluation.scoring import DEFAULT, DEFAULT_LOG_SOFTMAX, PLAIN, Scores, Setting, settings_grid
from timm_csra.evaluation.statistics import folds_of, halves
from timm_csra.evaluation.tuning import LAMS, choose
from timm_csra.layouts import spatial_features
from timm_csra.locations import location_attention
from timm_csra.patching import check_supported, plain_head

from .argument_types import only, positive
from .arguments import add_images, add_reading
from .asked import asked_cells, asked_options, asked_what
from .checkpoints import find
from .checkpoints.find import CheckpointError
from .data import sources
from .data.classes import Alignment, NotApplicableError
from .data.datasets import DataError
from .engines.worker import Models
from .records.files import write_table
from .scoring.cells import Cell, Options, show_size
from .scoring.loading import Loaded, describe_bad_images, readable
from .scoring.measure import load_images

FIXED = {LOGITS: DEFAULT, LOG_SOFTMAX: DEFAULT_LOG_SOFTMAX}
SETTINGS = settings_grid(LAMS, (math.inf,), SCORES, FIXED.values())
FOLDS = 5
COLUMNS = ("model", "size", "data", "task", "images", "split", "loss", "classes", "plain", *SCORES,
           *(f"tuned_{kind}{of}" for kind in SCORES for of in ("", "_lam")))  # fmt: skip
LINE = "{:24} {:>4}  {:6} {:10} {:>6} {:>22} {:>22} {:>22}".format
NOTE = """
{data}, {task}, {images} images: mAP of the held-out half, and gains over the plain model in points, mean +- standard
deviation over {splits} splits (number of splits with a gain). Splits share images, so this is no confidence interval.
The difference is that of the sigmoid's figures minus the softmax's, split by split."""
Row = dict[str, Any]


def sigmoid(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy, summed over images and classes; negative targets are ignored."""
    judged = (targets >= 0).to(logits)
    return F.binary_cross_entropy_with_logits(logits, targets.clamp(min=0).to(logits), judged, reduction="sum")


def softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Softmax cross entropy, summed over images; images without a label are ignored."""
    labels = targets.clamp(min=0).to(logits)
    return F.cross_entropy(logits, labels / labels.sum(dim=1, keepdim=True).clamp(min=1), reduction="sum")


Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {"sigmoid": sigmoid, "softmax": softmax}


def fit(features: Tensor, targets: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """Train a linear head by the recipe above. Returns weight `(K, C)` and bias `(K,)` for the features `(n, C)`, which
    need not be standardised."""
    features, classes = features.double().cpu(), targets.shape[1]
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    deviation[deviation == 0] = 1
    # The optimal weights are in the span of the images, so that n directions are enough.
    left, values, directions = torch.linalg.svd((features - mean) / deviation, full_matrices=False)
    inputs = F.pad(left * values, (0, 1), value=1)  # the last column is for the bias

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        weight = torch.from_numpy(flat).view(classes, -1).requires_grad_()
        value = loss(inputs @ weight.T, targets) + weight[:, :-1].square().sum() / 2
        value.backward()
        return value.item(), weight.grad.numpy().ravel()  # type: ignore[union-attr]

    found = minimize(
        objective,
        np.zeros(classes * inputs.shape[1]),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 10_000, "maxfun": 10_000, "gtol": 1e-4, "ftol": 1e-12},
    )
    trained = torch.from_numpy(found.x).view(classes, -1)
    weight = trained[:, :-1] @ directions / deviation
    return weight, trained[:, -1] - weight @ mean


@dataclass(frozen=True)
class Frozen:
    """A model, and features of n images: `maps`, as `forward_features` returns them, and the `pooled` features `(n, C)`
    that the classifier gets."""

    model: nn.Module
    maps: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], device: str) -> tuple["Frozen", Tensor]:
        """Run every image once, and return the features and the targets.

        The model is copied, since its classifier will be replaced.

        Raises:
            ValueError: the features are not one tensor, or the classifier is not one linear layer.
        """
        model, maps, pooled, targets = copy.deepcopy(model), [], [], []
        check_supported(model)
        for images, target in batches:
            with torch.inference_mode():
                features = spatial_features(model, images.to(device))
                if not isinstance(features, Tensor):
                    raise ValueError(f"{describe(model)}: found features in several parts; expected one tensor.")
                pooled.append(cast(Tensor, plain_head(model)(features, pre_logits=True)))
            maps.append(features)
            targets.append(target)
        found = model.get_classifier()  # type: ignore[operator]
        if not isinstance(found, nn.Linear) or pooled[0].shape[1:] != (found.in_features,):
            raise ValueError(
                f"{describe(model)}: found a {type(found).__name__} as classifier; expected one linear layer."
            )
        return cls(model, torch.cat(maps), torch.cat(pooled)), torch.cat(targets)

    def scores(self, rows: Rows, head: tuple[Tensor, Tensor]) -> Scores:
        """Score some images, the `rows`, for all `SETTINGS`, by the model with this head."""
        weight, bias = head
        self.model.reset_classifier(len(weight))  # type: ignore[operator]
        classifier = self.model.to(self.maps.device).eval().get_classifier()  # type: ignore[operator]
        classifier.load_state_dict({"weight": weight, "bias": bias})
        terms, kept = sorted({term for one in SETTINGS for term in one.terms}), []
        plain = cast(Callable[[Tensor], Tensor], plain_head(self.model))
        with torch.inference_mode():
            for some in self.maps[torch.from_numpy(rows)].split(64):
                (attention,) = location_attention(self.model, plain, some, terms)
                kept.append(torch.stack([plain(some), *attention]).float().cpu())
        base, *attention = torch.cat(kept, dim=1)
        return Scores(base, dict(zip(terms, attention, strict=True)))


def out_of_fold(frozen: Frozen, rows: Rows, targets: Tensor, loss: Loss, seed: int) -> Scores:
    """Score the images in `rows` by cross-validation: each fold by a head that was trained on the other folds.

    The folds are those of `choose`, so that no metric mixes the scores of several heads.
    """
    folds, parts = folds_of(len(rows), seed, FOLDS), []
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(rows)), fold)
        parts.append(frozen.scores(rows[fold], fit(frozen.pooled[rows[rest]], targets[rest], loss)))
    order = torch.from_numpy(np.concatenate(folds)).argsort()
    attention = {term: torch.cat([part.attention[term] for part in parts])[order] for term in parts[0].attention}
    return Scores(torch.cat([part.base for part in parts])[order], attention)


def probe(frozen: Frozen, targets: Tensor, data: str, seed: int) -> Iterator[Row]:
    """Train both heads on one random half of the images, and measure them on the other. Yields a row for each head.

    Raises:
        DataError: fewer than two classes have enough positives in both halves.
    """
    trained, held_out = halves(len(targets), seed)
    enough = ((targets[trained] > 0).sum(dim=0) >= 1) & ((targets[held_out] > 0).sum(dim=0) >= FEW)
    if (count := int(enough.sum())) < 2:
        raise DataError(
            f"{data}: found {count} classes with {FEW} positives among {len(held_out)} held-out images and one among "
            f"{len(trained)} others; expected 2 or more."
        )
    learned, judged = targets[trained][:, enough], targets[held_out][:, enough]
    for name, loss in LOSSES.items():
        scores = frozen.scores(held_out, fit(frozen.pooled[trained], learned, loss))
        for_choice = out_of_fold(frozen, trained, learned, loss, seed)
        row: Row = {"loss": name, "classes": count, "plain": mean_average_precision(scores, judged, PLAIN)}
        for kind in SCORES:
            tried = [setting for setting in SETTINGS if setting == PLAIN or setting.scores == kind]
            tuned = choose(for_choice, learned, tried, metric="mAP", folds=FOLDS, seed=seed).chosen
            for column, setting in ((kind, FIXED[kind]), (f"tuned_{kind}", tuned)):
                row[column] = mean_average_precision(scores, judged, setting) - row["plain"]
            row[f"tuned_{kind}_lam"] = tuned.lam
        yield row


def mean_average_precision(scores: Scores, targets: Tensor, setting: Setting) -> float:
    everything = np.ones((len(targets), 1), dtype=np.float32)
    return float(MeanAveragePrecision(partial(scores.logits, setting), targets).weighted(everything)[0])


def probe_cell(cell: Cell, loaded: Loaded, options: Options, splits: int, progress: Callable[..., Any]) -> list[Row]:
    """Measure one cell; returns one row for each split and loss."""
    count = len(cell.data.classes)
    own = Alignment(tuple(range(count)), {label: label for label in range(count)})
    loader, _, _ = load_images(cell, loaded, options, own)
    bad: list[int] = []
    frozen, targets = Frozen.of(loaded.model, readable(progress(loader), loader, bad), options.device)
    if bad and not options.skip_bad_images:
        raise DataError(describe_bad_images(loader.dataset, bad))
    if len(targets) < 4 * FOLDS:
        raise DataError(f"{cell.data.name}: found {len(targets)} images; expected {4 * FOLDS} or more.")
    about = {"model": cell.checkpoint.id.rsplit("/", 1)[-1], "size": show_size(loaded.size), "data": cell.data.name}
    about |= {"task": cell.task_name, "images": len(targets)}
    return [
        about | {"split": split} | row
        for split in progress(range(splits))
        for row in probe(frozen, targets, cell.data.name, options.seed + split)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write. Returns 0, or 2 if something could not be measured."""
    args = _parser().parse_args(arguments)
    log, rows = Console(stderr=True), []
    try:
        options = asked_options(args, Path())
        models, data, tasks = asked_what(args)
        only(tasks, "grids")
        memory = Models(options.device)
        print(LINE("checkpoint", "size", "lam", "loss", "plain", *SCORES, " - ".join(SCORES)))
        for cell in (cell for model in models for cell in asked_cells(model, args.img_size, data, tasks, {})):
            progress = partial(track, description=cell.checkpoint.name, console=log, transient=True)
            found = probe_cell(cell, memory.get(cell), options, args.splits, progress)
            print(summary(found), flush=True)
            rows += found
            if args.out:
                write_table(args.out, COLUMNS, rows)
    except (CheckpointError, DataError, NotApplicableError, ValueError) as error:
        log.print(f"benchmarks.probe: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    print(NOTE.format(**rows[0], splits=args.splits))
    return 0


def summary(rows: Sequence[Row]) -> str:
    """Format the rows of one checkpoint: a line for each loss and for their difference, with fixed and tuned lam."""
    lines = []
    for how, prefix in (("fixed", ""), ("tuned", "tuned_")):
        names = ("plain", *(prefix + kind for kind in SCORES))
        of = {loss: np.array([[row[name] for name in names] for row in rows if row["loss"] == loss]) for loss in LOSSES}
        of["difference"] = np.subtract(*of.values())
        for what, (plain, *gains) in ((loss, values.T) for loss, values in of.items()):
            about = (rows[0]["model"], rows[0]["size"], how, what, f"{plain.mean():.2f}")
            lines.append(LINE(*about, *map(_show, (*gains, np.subtract(*gains)))))
    return "\n".join(lines)


def _show(gains: NDArray[np.float64]) -> str:
    spread = gains.std(ddof=1) if len(gains) > 1 else math.nan
    return f"{gains.mean():+.2f} +- {spread:.2f} ({(gains > 0).sum()}/{len(gains)})"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.probe",
        description=__doc__,
        epilog=sources.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", metavar="SPEC", required=True, help=find.HELP)
    parser.add_argument("--data", nargs=1, metavar="DATA", required=True, help="labelled photographs, see below")
    parser.add_argument("--task", choices=("multilabel", "mosaic"), default="multilabel", help="default: %(default)s")
    parser.add_argument(
        "--splits", type=positive, default=10, metavar="N", help="number of random splits (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="a CSV file with two rows for each split, one for each loss")
    parser.add_argument("--limit", type=positive, metavar="N", help="use a random sample of N photographs, by --seed")
    add_images(parser)
    add_reading(parser)
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples, mosaics, splits (default: %(default)s)")
    unused = ("sample", "devices", "keep_scores", "rescore", "cache_images", "rivals", "time_plain", "class_map",
              "class_names", "split", "data_dir")  # fmt: skip
    parser.set_defaults(also=(), activation="softmax", average_precision="continuous", **dict.fromkeys(unused))
    parser.set_defaults(lams="0.1", temperatures="inf", scores=LOGITS, amp="none", score_classes="data")
    parser.set_defaults(engine="local", channels_last=False)
    return parser


if __name__ == "__main__":
    sys.exit(main())
