"""Turn the arguments of the sweep's command line into options and cells."""

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from timm_csra.accelerators import on_accelerator, precision
from timm_csra.config import LOGITS, SCORES
from timm_csra.evaluation.scoring import settings_grid
from timm_csra.trained import read_class_names

from .checkpoints.find import Checkpoint, find_checkpoints
from .data import sample
from .data.calibration import with_calibration
from .data.classes import ClassNames, load_class_map
from .data.datasets import ImageSet
from .data.sources import load_image_set, load_pictures
from .scoring.cells import TASKS, Cell, Options
from .sizes import check_sizes, own_size, sizes_of
from .workers import asked_loaders, usable_device

Task = tuple[str, int | None]  # a task, and the grid of a mosaic


def asked_options(args: argparse.Namespace, out: Path) -> Options:
    temperatures = [tuple(_numbers("--temperatures", part, "+")) for part in args.temperatures.split(",")]
    lams = _numbers("--lams", args.lams, ",")
    scores = args.scores.split(",")
    if unknown := [name for name in scores if name not in SCORES]:
        raise ValueError(f"--scores: found {', '.join(map(repr, unknown))}; expected some of {','.join(SCORES)}.")
    also = [setting for setting in args.also if setting.scores in (LOGITS, *scores)]  # logits are always included
    check_sizes(args.img_size)
    if any(not re.fullmatch(r"[1-9]\d*", part) for part in args.grid.split(",")):
        raise ValueError(f"--grid: found {args.grid!r}; expected whole numbers such as 2 or 2,3.")
    if args.class_map and args.score_classes == "head":
        raise ValueError(
            "--score-classes head and --class-map: expected one of them; a class map determines the scored classes."
        )
    if args.cache_images and args.rescore:
        raise ValueError("--cache-images and --rescore: expected one of them; --rescore reads no images.")
    cache = asked_folder("--cache-images", args.cache_images)
    device = usable_device(args.device if not args.devices or args.devices == "all" else args.devices.split(",")[0])
    return Options(
        settings=tuple(settings_grid(lams, temperatures, scores, also)),
        crop_mode=args.crop_mode,
        crop_pct=args.crop_pct,
        batch_size=args.batch_size or (16 if device == "cpu" else 64),
        workers=asked_loaders(args),
        device=device,
        amp=precision(args.amp, device),
        channels_last=args.channels_last and on_accelerator(device),
        seed=args.seed,
        activation=args.activation,
        average_precision=args.average_precision,
        class_map=load_class_map(args.class_map, args.class_scores) if args.class_map else None,
        score_classes=args.score_classes,
        class_names=asked_names(args.class_names),
        skip_bad_images=args.skip_bad_images,
        kept_scores=str(out / "scores") if args.keep_scores or args.rescore else None,
        rescore=args.rescore,
        cache_images=str(cache) if cache else None,
        rivals=args.rivals,
        time_plain=args.time_plain,
    )


def asked_folder(option: str, folder: Path | None) -> Path | None:
    """Return the absolute path of a folder that exists or can be created, or None if the option is not used.

    Raises:
        ValueError: the path is a file, or the folder is not writable.
    """
    if not folder:  # commands without the option set it to False
        return None
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"{option} {folder}: found the file {there}; expected a folder, or a new name.")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{option} {folder}: {there} is not writable; give another folder.")
    return folder.absolute()


def asked_names(file: Path | None) -> ClassNames | None:
    return ClassNames(file.name, read_class_names(file)) if file else None


def _numbers(option: str, text: str, separator: str) -> list[float]:
    try:
        return [float(part) for part in text.split(separator)]
    except ValueError:
        raise ValueError(f"{option}: found {text!r}; expected numbers separated by {separator!r}.") from None


def asked_what(args: argparse.Namespace) -> tuple[list[Checkpoint], list[ImageSet], list[Task]]:
    """Find the checkpoints, data sets and tasks that the arguments name.

    Raises:
        CheckpointError, DataError, ValueError: one of them does not exist or cannot be read.
    """
    if args.sample:
        if args.data or args.task or args.limit:
            raise ValueError("--sample has its own data and task; leave out --data, --task and --limit.")
        return find_checkpoints(args.models or "pypi:*"), [sample.load_sample()], [("mosaic", 2)]
    if not args.models or not args.data:
        raise ValueError("expected --models and --data, or --sample (which needs no data and no network).")
    tasks = (args.task or "single").split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"--task: found {', '.join(unknown)}; expected some of {','.join(TASKS)}.")
    data = [load_image_set(spec, args.limit, args.split, args.data_dir, args.seed) for spec in args.data]
    grids = [int(part) for part in args.grid.split(",")]
    return find_checkpoints(args.models), data, [(t, g) for t in tasks for g in (grids if t == "mosaic" else [None])]


def asked_calibration(args: argparse.Namespace, data: list[ImageSet]) -> list[ImageSet]:
    """Add the pictures of `--calibration-data` to the data sets; `without_measured` later removes duplicates."""
    if not args.calibration_data:
        return data
    return with_calibration(data, load_pictures(args.calibration_data, None, args.split, args.data_dir))


def asked_cells(
    model: Checkpoint,
    requests: str,
    data: list[ImageSet],
    tasks: list[Task],
    missing: dict[Checkpoint, str],
    crop_pct: float | None = None,
) -> Iterator[Cell]:
    """Yield the cells of one checkpoint, size by size, so that successive cells share the loaded model.

    Requests that give the same images give one cell. With `crop_pct`, `test` and another request of the same size do.
    """
    sizes, own = sizes_of(model, requests, missing, crop_pct), own_size(model, missing)
    tasks = sorted(tasks, key=lambda task: task[0] != "real")  # its pass scores all classes, and serves `single`
    mosaics: dict[Any, tuple[str, ...]] = {}  # requests by size alone, since mosaics are not cropped
    for (size, _), requested in sizes.items():
        mosaics[size] = (*mosaics.get(size, ()), *requested)
    for (size, test_crop), requested in sizes.items():
        once = mosaics.pop(size, None)
        for images in data:
            for task, grid in tasks:
                if task != "mosaic":
                    yield Cell(model, images, task, size, requested, grid, test_crop, own)
                elif once:
                    yield Cell(model, images, task, size, once, grid, own=own)
