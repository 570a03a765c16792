"""The command line of the sweep. Other commands share groups of its options."""

import argparse
from pathlib import Path
from typing import Any

from timm_csra.accelerators import AMP, AUTO
from timm_csra.config import SCORES
from timm_csra.evaluation.statistics import FIXED

from .argument_types import natural, positive, share
from .checkpoints import find
from .data import sources
from .data.classes import COMBINE
from .scoring.cells import SCORE_CLASSES, TASKS

EXAMPLES = """
examples:
  python -m benchmarks.sweep --sample
  python -m benchmarks.sweep --models 'resnet50*' --data imagenet/val --task single,mosaic --img-size 1x,2x
  python -m benchmarks.sweep --models file:resnet50@output/train/model_best.pth.tar --data photos/val
  python -m benchmarks.sweep --models local-dir:my-checkpoint --data photos --task multilabel --device cuda
  python -m benchmarks.sweep --models all --data coco/annotations/instances_val2017.json --task multilabel \\
      --class-map coco80-to-imagenet1k
"""

EVERY_CELL = "cells"  # what --dry-run lists


def add_names(group: Any) -> None:
    group.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="names of the head's classes, one a line in its order, for checkpoints that do not bring them (default: "
        "label_names of the checkpoint, else ImageNet's where their number says so, else folders called 0 to K-1, else "
        "K folders in their natural order, as timm's train script has them)",
    )


def add_labels(group: Any) -> None:
    """Options about what is in the data."""
    group.add_argument("--split", help="of torch/, hfds/ (default: validation) and VOC (default: test)")
    group.add_argument("--data-dir", metavar="DIR", help="where torch/ and hfds/ keep their files")
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="a sample of N images by --seed, the same for all checkpoints",
    )
    add_names(group)
    group.add_argument(
        "--class-map",
        metavar="MAP",
        help="for multilabel: which synsets of the head stand for each class of the data, coco80-to-imagenet1k or a "
        "JSON file of its form",
    )
    group.add_argument(
        "--score-classes",
        choices=SCORE_CLASSES,
        default=SCORE_CLASSES[0],
        help="over which classes of the head metrics are: those that the data declares, or all of them; the same "
        "pictures give two figures (default: %(default)s)",
    )
    group.add_argument(
        "--class-scores",
        choices=COMBINE,
        default=COMBINE[0],
        help="how several synsets become one score: the largest logit, or the log of the summed probabilities "
        "(default: %(default)s)",
    )


def add_scores(group: Any) -> None:
    group.add_argument(
        "--scores",
        default=",".join(SCORES),
        help="what is compared over locations: logits (the paper's), log_softmax (log-probabilities, for classifiers "
        "trained with softmax cross entropy), or both in the same pass (default: %(default)s)",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Options about what a model gets to see of an image."""
    images = parser.add_argument_group("images", "from the checkpoint, unless given")
    images.add_argument(
        "--img-size",
        default="1x",
        help="pixels, multiples of a checkpoint's own size, or test: the size (and crop_pct) at which timm validates "
        "it and publishes its figures, its own size where it has none; e.g. 224 or 1x,2x,test (default: %(default)s)",
    )
    images.add_argument("--crop-mode", choices=("center", "squash", "border"))
    images.add_argument("--crop-pct", type=share, metavar="SHARE")
    images.add_argument("--grid", default="2", metavar="G", help="mosaics of G x G, e.g. 2,3 (default: %(default)s)")
    images.add_argument(
        "--skip-bad-images", action="store_true", help="leave out what cannot be read, and say how many"
    )


def add_reading(group: Any) -> None:
    group.add_argument("--batch-size", type=positive, help="default: 64, on a CPU 16")
    group.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="processes that read images, for each device, or each job on a CPU: results do not depend on it (default: "
        "the cores that may be used divided among them, at most 32)",
    )


def add_device(group: Any) -> None:
    """Options about where a model runs, and how."""
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps|xpu", help="default: %(default)s")
    group.add_argument(
        "--amp",
        choices=(AUTO, *AMP),
        default=AUTO,
        help="autocast. auto: bf16 on a GPU that computes in it, none on others and on a CPU (default: %(default)s)",
    )
    group.add_argument(
        "--no-channels-last",
        dest="channels_last",
        action="store_false",
        help="leave the layout of convolutional models as it is, which on an accelerator is channels_last otherwise",
    )


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=description,
        epilog=EXAMPLES + sources.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(also=tuple(FIXED.values()))
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--sample", action="store_true", help="the embedded default: three checkpoints and seven photographs"
    )
    what.add_argument("--models", metavar="SPEC", help=find.HELP)
    what.add_argument("--data", nargs="+", metavar="DATA", help="one or several sets of photographs, see below")
    what.add_argument(
        "--calibration-data",
        metavar="DATA",
        help="pictures of ONE OBJECT EACH, in the forms of --data but no stream, no labels needed: adds the protocol "
        "agreement, lam by timm_csra.choose_lam on them (log_softmax, T inf, 98 %% keep their top class). Those that "
        "also stand among the pictures measured are left out. Its intervals hold the chosen lam fixed. --split and "
        "--data-dir apply to them too",
    )
    add_labels(what)
    what.add_argument("--task", metavar="TASKS", help=f"some of {','.join(TASKS)} (default: single)")
    what.add_argument(
        "--lams",
        default="0,0.02,0.05,0.1,0.2,0.3,0.5,1,2",
        help="default: %(default)s; always 0, 0.1 on logits and 0.3 on log_softmax, with T inf",
    )
    what.add_argument(
        "--temperatures", default="1,5,inf", help="1+inf is one setting of two heads (default: %(default)s)"
    )
    add_scores(what)
    what.add_argument(
        "--activation",
        choices=("softmax", "sigmoid"),
        default="softmax",
        help="sigmoid, for a head trained so, adds CF1 and OF1 at probability 0.5, which log_softmax has not (default: "
        "%(default)s)",
    )
    what.add_argument(
        "--average-precision",
        choices=("continuous", "11-point"),
        default="continuous",
        help="11-point is that of VOC 2007 (default: %(default)s)",
    )
    what.add_argument(
        "--rivals",
        action="store_true",
        help="also the plain model on five crops of a picture (mean, max) at its own size, and at 2x, at their cost",
    )
    add_images(parser)
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, help="folder of records and summary (default: results, or results/sample)")
    how.add_argument(
        "--dry-run",
        nargs="?",
        const="summary",
        choices=("summary", EVERY_CELL),
        help="say what would run, what would not and why, with an estimate, and stop. More than 50 cells are summed "
        f"up: --dry-run {EVERY_CELL} lists each",
    )
    how.add_argument(
        "--yes", action="store_true", help="do not ask before --models all without accelerator, nor before pushing"
    )
    how.add_argument(
        "--time-plain",
        action="store_true",
        help="also time a plain evaluation pass before and after each cell: the record's `cost` has the ratio",
    )
    how.add_argument("--retry-failed", action="store_true", help="measure again what has failed before")
    how.add_argument("--keep-scores", action="store_true", help="keep all scores, of every T, in OUT/scores (float16)")
    how.add_argument(
        "--rescore", action="store_true", help="new lams from kept scores, with no forward pass; same --scores, T"
    )
    how.add_argument(
        "--expected",
        metavar="FILE_OR_URL",
        help="timm's results-imagenet.csv: lam = 0 on all 50,000 images must agree with it within 0.1 points of top-1, "
        "else the checkpoint is flagged and kept out of the counts; whether --amp moves top-1 by as much is said too",
    )
    how.add_argument("--prefetch", action="store_true", help="download the next checkpoint while one computes")
    how.add_argument("--free-cache", action="store_true", help="after its cells remove what this run has downloaded")
    how.add_argument(
        "--push-best",
        metavar="USER/PREFIX",
        help="afterwards, and after asking, push to the Hub as USER/PREFIX-NAME each checkpoint whose cross-fitted "
        "gain at its own size is significant after Holm's correction, and that loses on nothing (docs/sweep.md)",
    )
    how.add_argument(
        "--cache-images",
        type=Path,
        metavar="DIR",
        help="keep decoded and resized images in DIR, built by the first cell of each data set and preprocessing and "
        "read by all others, of later sweeps too: 7.5 GB for 50,000 images of 224 pixels. No figure depends on it. "
        "Delete DIR when you no longer need it",
    )
    engine = parser.add_argument_group("where (docs/cluster.md)")
    engine.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster (default: %(default)s)"
    )
    engine.add_argument(
        "--devices",
        metavar="LIST",
        help="local: one worker for each of cuda:0,cuda:1, or all for every accelerator of this machine",
    )
    engine.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="checkpoints at a time: on a CPU they divide its threads (default: 1; not for ray), on a GPU one runs "
        "images while the others load and read (default: 2 for each)",
    )
    engine.add_argument(
        "--metric-workers",
        type=natural,
        metavar="N",
        help="local: processes that compute metrics and intervals beside the next images, for each device; with 0 the "
        "device waits for them; results do not depend on it (default: on a GPU the cores that may be used, divided "
        "among the devices; on a CPU 0)",
    )
    engine.add_argument(
        "--address", metavar="auto|ray://...", help="ray: of the cluster (default: start one on this machine)"
    )
    engine.add_argument(
        "--cpus-per-cell",
        type=positive,
        default=2,
        metavar="N",
        help="ray: for each cell, and its --workers unless given (default: %(default)s)",
    )
    add_reading(how)
    add_device(how)
    how.add_argument(
        "--seed", type=int, default=0, help="of samples, mosaics, halves, bootstrap (default: %(default)s)"
    )
    return parser
