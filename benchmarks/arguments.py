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

EVERY_CELL = "cells"  # the value of --dry-run that lists each cell


def add_names(group: Any) -> None:
    group.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="names of the head's classes, one a line in the head's order, for checkpoints without them (default: "
        "label_names of the checkpoint, else ImageNet's if the number of classes is theirs, else folders named 0 to "
        "K-1, else K folders in the natural order of timm's train script)",
    )


def add_labels(group: Any) -> None:
    """Add the options that select images, labels and classes."""
    group.add_argument("--split", help="split of torch/, hfds/ (default: validation) or VOC (default: test)")
    group.add_argument("--data-dir", metavar="DIR", help="folder where torch/ and hfds/ keep their files")
    group.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="use a random sample of N images, by --seed, the same one for all checkpoints",
    )
    add_names(group)
    group.add_argument(
        "--class-map",
        metavar="MAP",
        help="for multilabel: maps each class of the data to synsets of the head; coco80-to-imagenet1k, or a JSON file "
        "of its form",
    )
    group.add_argument(
        "--score-classes",
        choices=SCORE_CLASSES,
        default=SCORE_CLASSES[0],
        help="compute metrics over the classes of the head that the data declares, or over all of them; the two give "
        "different figures on the same images (default: %(default)s)",
    )
    group.add_argument(
        "--class-scores",
        choices=COMBINE,
        default=COMBINE[0],
        help="score of a class with several synsets: the largest of their logits, or the log of the sum of their "
        "probabilities (default: %(default)s)",
    )


def add_scores(group: Any) -> None:
    group.add_argument(
        "--scores",
        default=",".join(SCORES),
        help="kinds of scores that are reduced over locations: logits (as in the paper), log_softmax "
        "(log-probabilities, for classifiers trained with softmax cross entropy), or both in the same pass (default: "
        "%(default)s)",
    )


def add_images(parser: argparse.ArgumentParser) -> None:
    """Add the options of the preprocessing."""
    images = parser.add_argument_group("images", "by default the preprocessing of the checkpoint")
    images.add_argument(
        "--img-size",
        default="1x",
        help="pixels, multiples of a checkpoint's own size, or test: the size (and crop_pct) at which timm validates "
        "it and publishes its figures, or its own size if there is none; e.g. 224 or 1x,2x,test (default: %(default)s)",
    )
    images.add_argument("--crop-mode", choices=("center", "squash", "border"), help="timm's crop_mode")
    images.add_argument("--crop-pct", type=share, metavar="SHARE", help="timm's crop_pct")
    images.add_argument("--grid", default="2", metavar="G", help="mosaics of G x G, e.g. 2,3 (default: %(default)s)")
    images.add_argument(
        "--skip-bad-images", action="store_true", help="skip images that cannot be read, and report how many"
    )


def add_reading(group: Any) -> None:
    group.add_argument("--batch-size", type=positive, help="images in a batch (default: 64, on a CPU 16)")
    group.add_argument(
        "--workers",
        type=natural,
        metavar="N",
        help="processes that read images, for each device, or for each job on a CPU; results do not depend on it "
        "(default: the available cores, divided among devices or jobs, at most 32)",
    )


def add_device(group: Any) -> None:
    """Add the options for device, precision and memory format."""
    group.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps|xpu", help="default: %(default)s")
    group.add_argument(
        "--amp",
        choices=(AUTO, *AMP),
        default=AUTO,
        help="precision of autocast; auto: bf16 on a GPU that supports it, else none (default: %(default)s)",
    )
    group.add_argument(
        "--no-channels-last",
        dest="channels_last",
        action="store_false",
        help="on an accelerator, do not convert convolutional models to channels_last",
    )


def parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=description,
        epilog=EXAMPLES + sources.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(also=tuple(FIXED.values()))
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--sample", action="store_true", help="measure the embedded sample: three checkpoints, seven photographs"
    )
    what.add_argument("--models", metavar="SPEC", help=find.HELP)
    what.add_argument("--data", nargs="+", metavar="DATA", help="one or more sets of photographs, see below")
    what.add_argument(
        "--calibration-data",
        metavar="DATA",
        help="pictures of ONE OBJECT EACH, in the forms of --data except streams, without or with labels: adds the "
        "protocol agreement, in which timm_csra.choose_lam chooses lam on them (log_softmax, T inf, 98 %% keep their "
        "top class). Pictures that are also among the images of --data are left out. The intervals of this protocol "
        "treat the chosen lam as fixed. --split and --data-dir apply to these pictures, too",
    )
    add_labels(what)
    what.add_argument("--task", metavar="TASKS", help=f"one or more of {','.join(TASKS)} (default: single)")
    what.add_argument(
        "--lams",
        default="0,0.02,0.05,0.1,0.2,0.3,0.5,1,2",
        help="default: %(default)s; T inf with lam 0, lam 0.1 on logits and lam 0.3 on log_softmax are always included",
    )
    what.add_argument(
        "--temperatures",
        default="1,5,inf",
        help="values of T; 1+inf is one setting, which averages the attention terms of both (default: %(default)s)",
    )
    add_scores(what)
    what.add_argument(
        "--activation",
        choices=("softmax", "sigmoid"),
        default="softmax",
        help="sigmoid is for heads trained with it: it adds CF1 and OF1 at probability 0.5, but not for log_softmax "
        "(default: %(default)s)",
    )
    what.add_argument(
        "--average-precision",
        choices=("continuous", "11-point"),
        default="continuous",
        help="11-point is the definition of VOC 2007 (default: %(default)s)",
    )
    what.add_argument(
        "--rivals",
        action="store_true",
        help="also measure alternatives to wrapping, and their compute: the plain model on five crops of each image "
        "(mean, max) at its own size, and on whole images at 2x",
    )
    add_images(parser)
    how = parser.add_argument_group("how to measure")
    how.add_argument("--out", type=Path, help="folder for records and summary (default: results, or results/sample)")
    how.add_argument(
        "--dry-run",
        nargs="?",
        const="summary",
        choices=("summary", EVERY_CELL),
        help="print which cells would run, which would not and why, and an estimate of the time, then stop. More than "
        f"50 cells are summarised; --dry-run {EVERY_CELL} lists each",
    )
    how.add_argument(
        "--yes", action="store_true", help="do not ask before --models all without accelerator, nor before pushing"
    )
    how.add_argument(
        "--time-plain",
        action="store_true",
        help="also time an evaluation pass of the plain model before and after each cell; `cost` of the record has the "
        "ratio",
    )
    how.add_argument("--retry-failed", action="store_true", help="measure cells again that failed before")
    how.add_argument("--keep-scores", action="store_true", help="keep the scores of every T in OUT/scores (float16)")
    how.add_argument(
        "--rescore",
        action="store_true",
        help="compute results for new --lams from kept scores, without forward passes, for --scores and --temperatures "
        "among the kept ones",
    )
    how.add_argument(
        "--expected",
        metavar="FILE_OR_URL",
        help="timm's results-imagenet.csv. If top-1 at lam = 0 on all 50,000 images differs from it by more than 0.1 "
        "points, the checkpoint is flagged and left out of the counts. The sweep also reports whether --amp changes "
        "top-1 by more than that",
    )
    how.add_argument("--prefetch", action="store_true", help="download the next checkpoint while one computes")
    how.add_argument(
        "--free-cache", action="store_true", help="after its cells, remove a checkpoint that this run downloaded"
    )
    how.add_argument(
        "--push-best",
        metavar="USER/PREFIX",
        help="at the end, after asking for confirmation, push each checkpoint to the Hub, as USER/PREFIX-NAME, whose "
        "cross-fitted gain at its own size is significant after Holm's correction, and which has no significant loss "
        "(docs/sweep.md)",
    )
    how.add_argument(
        "--cache-images",
        type=Path,
        metavar="DIR",
        help="cache decoded and resized images in DIR. The first cell of each data set and preprocessing writes them; "
        "all other cells, of later sweeps too, read them. Takes 7.5 GB for 50,000 images of 224 pixels. Results do not "
        "depend on it. Delete DIR when you no longer need it",
    )
    engine = parser.add_argument_group("where to run (docs/cluster.md)")
    engine.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this machine, or a cluster (default: %(default)s)"
    )
    engine.add_argument(
        "--devices",
        metavar="LIST",
        help="local: devices that cells run on, such as cuda:0,cuda:1; all means every accelerator of this machine",
    )
    engine.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="number of checkpoints at a time. On a CPU they divide its threads (default: 1; not for ray); on a GPU "
        "one runs images while the others load and read (default: 2 for each GPU)",
    )
    engine.add_argument(
        "--metric-workers",
        type=natural,
        metavar="N",
        help="local: processes, for each device, that compute metrics and intervals while the device runs the next "
        "cell; with 0 the device waits for them; results do not depend on it (default: on a GPU the available cores, "
        "divided among the devices; on a CPU 0)",
    )
    engine.add_argument(
        "--address",
        metavar="auto|ray://...",
        help="ray: address of the cluster (default: start one on this machine)",
    )
    engine.add_argument(
        "--cpus-per-cell",
        type=positive,
        default=2,
        metavar="N",
        help="ray: cores for each cell, and the default of --workers (default: %(default)s)",
    )
    add_reading(how)
    add_device(how)
    how.add_argument(
        "--seed", type=int, default=0, help="seed of samples, mosaics, halves, bootstrap (default: %(default)s)"
    )
    return parser
