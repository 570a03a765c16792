"""`benchmarks.tune --without-labels`: choose lam on pictures of one object each, by `timm_csra.choose_lam`."""

import argparse
import warnings
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

import timm_csra
from timm_csra.accelerators import autocast
from timm_csra.agreement import LAMS
from timm_csra.config import LOG_SOFTMAX, SCORES

from .argument_types import only, share
from .asked import asked_cells, asked_options
from .checkpoints.find import find_checkpoints
from .data.presented import Unlabelled
from .data.sources import load_pictures
from .engines.worker import Models
from .reporting.tables import origins
from .scoring.cells import Cell
from .scoring.loading import describe_bad_images, unlabelled

UNLABELLED_LAMS = ",".join(f"{lam:g}" for lam in LAMS)

# Options that apply only with labels, and only without, by their names in the parsed arguments.
WITH_LABELS = ("task", "metric", "folds", "class_map", "class_scores", "class_names", "score_classes", "grid")
WITHOUT_LABELS = ("agreement",)


def add_without_labels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("without labels")
    group.add_argument(
        "--without-labels",
        action="store_true",
        help="choose lam by the top classes of the plain model on --data, any folder of pictures of ONE OBJECT EACH, "
        "or another form below, whose labels are not used",
    )
    group.add_argument(
        "--agreement",
        type=share,
        metavar="SHARE",
        help="share of pictures that must keep their top class (default: 0.98)",
    )


def check_options(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Raise ValueError for an option that applies only with labels if there are none, or the other way round."""
    wrong, advice = (
        (WITH_LABELS, "needs labels; leave it out with --without-labels")
        if args.without_labels
        else (WITHOUT_LABELS, "needs --without-labels; add that, or leave it out")
    )
    for name in wrong:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name.replace('_', '-')}: {advice}.")


def choose_without_labels(args: argparse.Namespace, screen: Console, log: Console) -> int:
    """Print the chosen lam; with --save, save the checkpoint wrapped with it. Returns 0.

    Raises:
        CheckpointError, DataError, ValueError: an argument is wrong, or something cannot be read; before a picture is
            run where possible.
    """
    args.lams = UNLABELLED_LAMS if args.lams is None else args.lams
    args.temperatures = "inf" if args.temperatures is None else args.temperatures
    args.scores = LOG_SOFTMAX if args.scores is None else args.scores
    if args.scores not in SCORES:
        raise ValueError(f"--scores: found {args.scores}; expected one of {', '.join(SCORES)} with --without-labels.")
    options = asked_options(args, Path())
    lams = [float(lam) for lam in args.lams.split(",")]
    temperatures = args.temperatures.split(",")
    if len(temperatures) != 1:
        raise ValueError(f"--temperatures: found {args.temperatures}; expected one with --without-labels, such as inf.")
    temperature = tuple(float(T) for T in temperatures[0].split("+"))
    cell = _cell(args)
    loaded = Models(options.device, options.channels_last).get(cell)
    given = {} if args.agreement is None else {"agreement": args.agreement}
    shown = partial(track, description=cell.checkpoint.name, console=log, transient=True)
    bad: list[int] = []
    with warnings.catch_warnings(record=True) as told, autocast(options.device, options.amp):
        result = timm_csra.choose_lam(
            loaded.model,
            unlabelled(cell.data, loaded, cell.prepared(options), bad, shown),
            lams=lams,
            temperature=temperature,
            scores=args.scores,
            **given,
        )
    if bad:
        told_of = describe_bad_images(Unlabelled(cell.data), bad)
        log.print(f"left out: {told_of}", markup=False, highlight=False, soft_wrap=True)
    screen.print(f"{cell.checkpoint.name} on {cell.data.name}, {loaded.size[0]} x {loaded.size[1]} pixels")
    screen.print(str(result), markup=False)
    for line in origins([{"model": cell.checkpoint.name, "weights_from": cell.checkpoint.weights_from}]):
        screen.print(line, style="dim", markup=False)
    for warning in told:
        log.print(f"benchmarks.tune: {warning.message}", markup=False, highlight=False, soft_wrap=True)
    if args.save:
        timm_csra.save_pretrained(result.apply(loaded.model), args.save)
        screen.print(f"saved with lam={result.lam:g} to {args.save}", markup=False)
    return 0


def _cell(args: argparse.Namespace) -> Cell:
    models = find_checkpoints(args.models)
    data = load_pictures(args.data[0], args.limit, args.split, args.data_dir, args.seed)
    cells = [
        cell
        for model in models
        for cell in asked_cells(model, args.img_size, [data], [("single", None)], {}, args.crop_pct)
    ]
    return only(cells, "combinations of checkpoint and size")
