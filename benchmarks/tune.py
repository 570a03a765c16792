"""Choose lam, T and scores for a checkpoint on your own labelled pictures, or recommend the plain model.

Every picture runs once and is scored for every setting, on logits and on log-probabilities. The setting is chosen by
cross-validation (of the kind of scores that does best, the smallest lam within one standard error of the best), and the
gain of the choice is measured on folds that were not used for it. The command recommends lam = 0 unless the 95 %
interval of that gain lies above 0.

With --without-labels it chooses lam alone, on pictures of one object each, like those that the checkpoint was trained
on: the largest lam at which nearly all of them keep the plain model's top class. Labels are neither needed nor used:
any folder of such pictures will do. Do not use pictures of several objects, whose top class wrapping may improve.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import track

import timm_csra
from timm_csra.config import SCORES
from timm_csra.evaluation.tuning import LAMS, TEMPERATURES, choose

from .argument_types import only, positive
from .arguments import add_device, add_images, add_labels, add_reading
from .asked import asked_cells, asked_options, asked_what
from .checkpoints import find
from .checkpoints.find import CheckpointError
from .data import sources
from .data.classes import COMBINE, NotApplicableError, combined
from .data.datasets import DataError
from .engines.worker import Models
from .reporting.summary import task
from .reporting.tables import origins
from .scoring.applicable import Applicability
from .scoring.measure import score_cell
from .without_labels import UNLABELLED_LAMS, add_without_labels, check_options, choose_without_labels

EPILOG = """
examples:
  python -m benchmarks.tune --models file:resnet50@output/train/model_best.pth.tar --data photos/val
  python -m benchmarks.tune --models local-dir:my-checkpoint --data my-photos --task multilabel --metric lrap
  python -m benchmarks.tune --models 'pypi:tf_efficientnet_lite0' --data imagenet/val --save tuned-checkpoint
  python -m benchmarks.tune --models resnet50 --data single-objects --without-labels
"""


def main(arguments: list[str] | None = None) -> int:
    """Print the recommendation. Returns 0, or 2 if an argument is wrong or something cannot be read."""
    parser = _parser()
    args = parser.parse_args(arguments)
    log, screen = Console(stderr=True), Console(soft_wrap=True, highlight=False)
    try:
        check_options(args, parser)
        if args.without_labels:
            return choose_without_labels(args, screen, log)
        args.lams = args.lams or DEFAULT_LAMS
        args.temperatures = args.temperatures or DEFAULT_TEMPERATURES
        args.scores = args.scores or DEFAULT_SCORES
        options = asked_options(args, Path())
        models, data, tasks = asked_what(args)
        cells = [cell for model in models for cell in asked_cells(model, args.img_size, data, tasks, {}, args.crop_pct)]
        cell = only(cells, "combinations of checkpoint, data and task")
        if reason := Applicability(options).why_not(cell):
            raise NotApplicableError(reason)
        loaded = Models(options.device, options.channels_last).get(cell)
        found = score_cell(
            cell,
            loaded,
            options,
            lambda batches: track(batches, cell.checkpoint.name, console=log, transient=True),
        )
        groups = found.facts["groups"]
        how = options.class_map.combine if options.class_map else COMBINE[0]
        result = choose(
            found.scores,
            found.targets,
            options.settings,
            metric=args.metric,
            folds=args.folds,
            seed=args.seed,
            combine=(lambda logits: logits) if groups is None else (lambda logits: combined(logits, groups, how)),
        )
    except (CheckpointError, DataError, NotApplicableError, ValueError) as error:
        log.print(f"benchmarks.tune: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    about = task({"task": cell.task, "grid": cell.grid, "score_classes": options.score_classes})
    screen.print(f"{cell.checkpoint.name} on {cell.data.name}, {about}, {loaded.size[0]} x {loaded.size[1]} pixels")
    screen.print(str(result), markup=False)
    for line in origins([found.facts | {"model": cell.checkpoint.name}]):
        screen.print(line, style="dim", markup=False)
    if args.save:
        model = result.apply(loaded.model)
        if options.class_names:
            model.pretrained_cfg = {  # type: ignore[assignment]
                **cast(dict[str, Any], model.pretrained_cfg),
                "label_names": list(options.class_names.names),
                "label_descriptions": None,  # the descriptions are of the old names
            }
        timm_csra.save_pretrained(model, args.save)
        screen.print(f"saved with lam={result.lam:g}, scores={result.scores!r} to {args.save}", markup=False)
    return 0


DEFAULT_LAMS = ",".join(f"{lam:g}" for lam in LAMS)
DEFAULT_SCORES = ",".join(SCORES)
DEFAULT_TEMPERATURES = ",".join(f"{temperature:g}" for temperature in TEMPERATURES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune",
        description=__doc__,
        epilog=EPILOG + sources.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", metavar="SPEC", required=True, help=f"one of: {find.HELP}")
    parser.add_argument("--data", nargs=1, metavar="DATA", required=True, help="labelled photographs, see below")
    add_without_labels(parser)
    parser.add_argument("--task", choices=("single", "multilabel", "mosaic"), help="default: single")
    parser.add_argument(
        "--metric", help="top1, top5, mAP, lrap, r_precision, CF1_top3, OF1_top3 (default: top1 or mAP)"
    )
    parser.add_argument("--lams", help=f"default: {DEFAULT_LAMS}; without labels {UNLABELLED_LAMS}")
    parser.add_argument(
        "--temperatures",
        help=f"1+inf averages the terms of both (default: {DEFAULT_TEMPERATURES}; without labels only one, inf)",
    )
    parser.add_argument(
        "--scores", help=f"kinds of scores to try (default: {DEFAULT_SCORES}; without labels only one, log_softmax)"
    )
    parser.add_argument(
        "--folds", type=positive, default=5, help="folds of the cross-validation (default: %(default)s)"
    )
    parser.add_argument(
        "--save",
        type=Path,
        metavar="FOLDER",
        help="save the checkpoint with the recommended setting, and with --class-names",
    )
    add_labels(parser)
    add_images(parser)
    add_reading(parser)
    add_device(parser)
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of --limit, folds and bootstrap (default: %(default)s)"
    )
    sweeps = ("sample", "devices", "keep_scores", "rescore", "cache_images", "rivals", "time_plain")
    parser.set_defaults(also=(), activation="softmax", average_precision="continuous", engine="local")
    parser.set_defaults(**dict.fromkeys(sweeps, False))
    return parser


if __name__ == "__main__":
    sys.exit(main())
