"""One cell of a sweep: a checkpoint on one data set, task and image size. Scored once, measured for every setting."""

import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import create_loader, create_transform, resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader

import timm_csra
from timm_csra import UnsupportedModelError
from timm_csra.evaluation import statistics
from timm_csra.evaluation.metrics import (
    ANY_LABEL,
    MULTI_LABEL,
    SIGMOID,
    VOC2007,
    Evaluation,
    Metric,
    calibration,
    evaluate,
)
from timm_csra.evaluation.scoring import DEFAULT, PLAIN, Scores, Setting, other_pools, score

from .checkpoints import Checkpoint, weights_sha256
from .classes import COMBINE, Alignment, ClassMap, NotApplicableError, align, combined
from .datasets import DataError, FiveCrops, ImageSet, Mosaics, Photographs, Streamed, real_labels, tilings
from .records import Record, record_path

TASKS = ("single", "real", "multilabel", "mosaic")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """How cells are run; everything here that can change a result is part of a record's key.

    `scores` is the folder where scores are kept, if they are; with `rescore` they are read from there.
    """

    settings: tuple[Setting, ...]
    crop_mode: str | None = None
    crop_pct: float | None = None
    batch_size: int = 64
    workers: int = 2
    device: str = "cpu"
    amp: str = "none"
    seed: int = 0
    activation: str = "softmax"
    average_precision: str = "continuous"
    class_map: ClassMap | None = None
    skip_bad_images: bool = False
    scores: str | None = None
    rescore: bool = False
    rivals: bool = False
    time_plain: bool = False


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        size: `(H, W)` in pixels, or a multiple of the checkpoint's own that is not known yet.
        requested: the size in the words of the request, `1x` or `320`: cells of one request are compared with each
            other, and corrected for it, although the checkpoints' own sizes differ.
        grid: of a mosaic, None for the other tasks.
    """

    checkpoint: Checkpoint
    data: ImageSet
    task: str
    size: tuple[int, int] | str
    requested: str = "1x"
    grid: int | None = None

    def key(self, options: Options) -> Record:
        """Everything that determines the result, with plain JSON values."""
        size = self.size if isinstance(self.size, str) else show_size(self.size)
        return {
            "model": self.checkpoint.name,
            "weights": self.checkpoint.fingerprint,
            "data": self.data.name,
            "data_fingerprint": self.data.fingerprint,
            "task": self.task,
            "img_size": size,
            "grid": self.grid,
            "settings": [show_setting(setting) for setting in options.settings],
            "crop_mode": options.crop_mode,
            "crop_pct": options.crop_pct,
            "seed": options.seed,
            "device": torch.device(options.device).type,
            "amp": options.amp,
            "activation": options.activation,
            "average_precision": options.average_precision,
            "class_map": options.class_map.fingerprint if options.class_map else None,
            "skip_bad_images": options.skip_bad_images,
            "scores": "float16" if options.rescore else None,
            "rivals": options.rivals,
            "versions": {package: version(package) for package in ("timm", "torch")}
            | {"timm_csra": timm_csra.__version__},
        }


def show_size(size: tuple[int, int]) -> int | str:
    return size[0] if size[0] == size[1] else f"{size[0]}x{size[1]}"


def show_setting(setting: Setting) -> list[Any]:
    """JSON knows no infinity."""
    return [setting.lam, show_temperature(setting)]


def show_temperature(setting: Setting) -> str:
    """`1+inf`, as `--temperatures` takes it."""
    return "+".join(f"{temperature:g}" for temperature in setting.temperature)


def run_cell(
    cell: Cell,
    load: Callable[[], nn.Module],
    options: Options,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Record:
    """Measure one cell. Whatever goes wrong becomes a record: `not_applicable` with a reason, or `failed`.

    Args:
        cell: what to measure.
        load: gives the checkpoint on `options.device`, in eval mode; when it fails, the cell has failed.
        options: how.
        track: wraps the batches, to show progress.
    """
    started = time.perf_counter()
    record: Record = {"batch_size": options.batch_size}
    while True:
        try:
            record |= {"status": "ok", "reason": None} | _measure(cell, load, options, track)
        except NotApplicableError as reason:
            record |= {"status": "not_applicable", "reason": str(reason)}
        except Exception as error:
            if _out_of_memory(error) and options.batch_size > 1:
                print(f"out of memory at batch size {options.batch_size}: half of it is tried", file=sys.stderr)
                options = replace(options, batch_size=options.batch_size // 2)
                record |= {"batch_size": options.batch_size}
                continue  # outside of `except` the traceback, and what it holds, is gone
            traceback.print_exc()
            record |= {
                "status": "failed",
                "reason": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            }
        return _complete(cell, options, record, time.perf_counter() - started)


def failure(cell: Cell, options: Options, reason: str, seconds: float = 0.0) -> Record:
    """The record of a cell that could not report itself."""
    return _complete(cell, options, {"status": "failed", "reason": reason}, seconds)


def _complete(cell: Cell, options: Options, record: Record, seconds: float) -> Record:
    key = cell.key(options)
    nothing: Record = {"n": len(cell.data), "columns": None, "kind": None, "results": []}
    about: Record = {"requested": cell.requested, "seconds": seconds, "environment": environment(options)}
    return {**key, **nothing, **record, "key": key, **about}


def _out_of_memory(error: Exception) -> bool:
    told = isinstance(error, RuntimeError) and re.search("not enough memory|can't allocate memory", str(error))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(told)


@dataclass(frozen=True)
class Scored:
    """All that a cell's forward passes gave: what results are computed from, for any settings of the same T.

    Attributes:
        scores: of the scored classes, in the data's images.
        targets: see `timm_csra.evaluation.metrics`.
        facts: fields of the record that do not depend on the settings.
    """

    scores: Scores
    targets: Tensor
    facts: Record


def _measure(
    cell: Cell, load: Callable[[], nn.Module], options: Options, track: Callable[[Iterable[Any]], Iterable[Any]]
) -> Record:
    started = time.perf_counter()
    file = scores_file(cell, options)
    if options.rescore:
        scored = read_scores(file, options.settings)
    else:
        # A size that is not known yet is for `load` to explain.
        if not isinstance(cell.size, str) and (reason := cell.checkpoint.why_not_at(cell.size)):
            raise NotApplicableError(f"the model cannot be built for {show_size(cell.size)} pixels: {reason}")
        scored = _score(cell, _loaded(cell, load), options, track)
        if file is not None:
            write_scores(file, scored)
    return _results(cell, scored, options, time.perf_counter() - started)


def _loaded(cell: Cell, load: Callable[[], nn.Module]) -> nn.Module:
    try:
        return load()
    except RuntimeError as error:
        if "size mismatch" in str(error) and cell.size != cell.checkpoint.input_size():
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise NotApplicableError(
                f"{len(lines)} weights do not fit the model built for another size than its own: {lines[0]}"
            ) from error
        raise


def _score(cell: Cell, model: nn.Module, options: Options, track: Callable[[Iterable[Any]], Iterable[Any]]) -> Scored:
    assert not isinstance(cell.size, str)
    if not model.num_classes:
        raise NotApplicableError("the checkpoint has no classifier (num_classes=0)")
    loader, preprocessing, alignment = _load(cell, model, options)
    if len(loader.dataset) == 0 and cell.data.stream is None:
        raise NotApplicableError(f"{len(cell.data)} images are too few for one mosaic of {cell.grid}x{cell.grid}")
    explanation = timm_csra.explain(model, cell.size)
    if explanation.unsupported:
        raise UnsupportedModelError(explanation.unsupported)
    bad: list[int] = []
    before = _plain_seconds(model, loader, options) if options.time_plain else None
    started = time.perf_counter()
    scores, targets = score(
        model,
        _readable(track(loader), loader, bad),
        options.settings,
        columns=alignment.columns,
        device=options.device,
        amp_dtype=AMP[options.amp],
        pools=other_pools(explanation),
    )
    seconds = time.perf_counter() - started
    cost = None
    if before is not None:
        plain = (before + _plain_seconds(model, loader, options)) / 2
        cost = {"plain_seconds": plain, "score_seconds": seconds, "ratio": seconds / plain}
    if bad and not options.skip_bad_images:
        raise DataError(_bad_images(loader.dataset, bad))
    if (missing := len(cell.data) - len(targets)) and cell.data.stream and len(cell.data):
        if not options.skip_bad_images:
            raise DataError(
                f"{cell.data.name}: found {len(targets)} images, expected {len(cell.data)}: timm's reader passes over "
                "those that it cannot read (see the log). Mend them, or accept that with --skip-bad-images."
            )
        print(f"{missing} images of the stream could not be read", file=sys.stderr)
    if options.rivals and cell.grid is None and cell.data.stream is None:
        scores.pooled.update(_five_crops(cell, model, loader.dataset, preprocessing, alignment, options))
    facts: Record = {
        "n": len(targets),
        "columns": alignment.count,
        "classes_left_out": list(alignment.left_out),
        "groups": alignment.groups,
        "kind": explanation.kind,
        "macs": explanation.macs,
        "extra_macs": explanation.extra_macs,
        "rival_macs": {name: 5 * explanation.macs for name in scores.pooled if name.startswith("five_crops")},
        "weights_sha256": weights_sha256(model),
        "preprocessing": preprocessing,
        "bad_images": [loader.dataset.name(index) for index in bad],
        "missing_images": missing if cell.data.stream and len(cell.data) else 0,
        "cost": cost,
    }
    return Scored(scores, targets, facts)


def _autocast(options: Options) -> AbstractContextManager[Any]:
    amp = AMP[options.amp]
    return torch.autocast(torch.device(options.device).type, amp) if amp else nullcontext()


@torch.inference_mode()
def _plain_seconds(model: nn.Module, loader: Any, options: Options) -> float:
    """One evaluation pass of the plain model over the same loader."""
    started = time.perf_counter()
    for images, *_ in loader:
        with _autocast(options):
            model(images.to(options.device, non_blocking=True)).float().cpu()
    return time.perf_counter() - started


@torch.inference_mode()
def _five_crops(
    cell: Cell, model: nn.Module, images: Any, preprocessing: Record, alignment: Alignment, options: Options
) -> dict[str, Tensor]:
    """What a user may do instead for pictures with several objects, at five times the cost: the plain model's logits
    on five crops, their mean and their maximum for each class."""
    assert not isinstance(cell.size, str)
    larger = tuple(round(FiveCrops.SCALE * side) for side in cell.size)
    dataset = FiveCrops(images, create_transform((3, *larger), **preprocessing), cell.size)
    size = max(1, options.batch_size // 5)
    columns = torch.as_tensor(alignment.columns)
    kept: list[Tensor] = []
    for crops, index in DataLoader(dataset, batch_size=size, num_workers=options.workers):
        with _autocast(options):
            logits = model(crops.flatten(0, 1).to(options.device))
        kept.append(logits.float().cpu()[:, columns].unflatten(0, (-1, 5))[index >= 0])
    every = torch.cat(kept)
    return {"five_crops_mean": every.mean(dim=1), "five_crops_max": every.amax(dim=1)}


def _results(cell: Cell, scored: Scored, options: Options, seconds: float) -> Record:
    """What the scores say for every setting of `options`."""
    scores, targets, facts = scored.scores, scored.targets, dict(scored.facts)
    groups = facts.pop("groups")
    combine = options.class_map.combine if options.class_map else COMBINE[0]
    metrics = _metrics(cell, options, targets)
    clock = [time.perf_counter()]

    def measured(logits: Tensor) -> dict[str, Evaluation]:
        return evaluate(logits if groups is None else combined(logits, groups, combine), targets, metrics)

    evaluations = {setting: measured(scores.logits(setting)) for setting in options.settings}
    names = list(evaluations[PLAIN])
    rows = np.arange(len(targets))
    grid = [
        {"lam": s.lam, "temperature": show_temperature(s)}
        | {name: _json(evaluations[s][name].value(rows)) for name in names}
        for s in options.settings
    ]
    clock.append(time.perf_counter())
    independent = cell.task != "mosaic" or cell.data.tilings is None
    seed = options.seed if independent else None
    comparisons = [
        comparison
        for name in names
        for comparison in _compare(name, {s: evaluations[s][name] for s in options.settings}, targets, seed)
    ]
    for rival, logits in scores.pooled.items():
        for name, evaluation in measured(logits).items():
            pair = {PLAIN: evaluations[PLAIN][name], DEFAULT: evaluation}
            comparison = statistics.fixed(name, pair, len(targets), seed)
            comparisons.append(replace(comparison, protocol=rival, settings=()))
    clock.append(time.perf_counter())
    metric_seconds, statistics_seconds = np.diff(clock).tolist()
    return facts | {
        "results": [_result(comparison) for comparison in comparisons],
        "all_settings": grid,
        "calibration": _calibration(scores, targets) if cell.task == "single" else None,
        "phases": {"score": seconds, "metrics": metric_seconds, "statistics": statistics_seconds},
    }


def scores_file(cell: Cell, options: Options) -> Path | None:
    """Where the scores of a cell are kept, whatever the settings: by everything else that determines them."""
    if options.scores is None:
        return None
    every = ("settings", "scores", "activation", "average_precision")
    key = {name: value for name, value in cell.key(options).items() if name not in every}
    return Path(options.scores) / record_path(Path(), key).with_suffix(".safetensors").name


def write_scores(file: Path, scored: Scored) -> None:
    """In half precision, which rounds logits to three digits; DataError where they do not fit into it."""
    tensors = {"base": scored.scores.base}
    tensors |= {f"attention.{temperature:g}": t for temperature, t in scored.scores.attention.items()}
    tensors |= {f"pooled.{name}": t for name, t in scored.scores.pooled.items()}
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise DataError(f"{file.name}: logits beyond 65504 do not fit into half precision; leave out --keep-scores.")
    metadata = {"facts": json.dumps(scored.facts), "dtype": str(scored.scores.dtype).removeprefix("torch.")}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    save_file(halves | {"targets": scored.targets.contiguous()}, temporary, metadata)
    os.replace(temporary, file)


def read_scores(file: Path | None, settings: Sequence[Setting]) -> Scored:
    """The scores that `--keep-scores` kept.

    Raises:
        DataError: there are none, or not of every temperature that the settings need.
    """
    if file is None or not file.is_file():
        raise DataError(f"no scores are kept at {file}: run the cell with --keep-scores first, on the same data.")
    with safe_open(file, "pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    targets = tensors.pop("targets")
    parts: dict[str, dict[str, Tensor]] = {"attention": {}, "pooled": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if rest:
            parts[part][rest] = tensor.float()
    attention = {float(name): tensor for name, tensor in parts["attention"].items()}
    wanted = {temperature for setting in settings for temperature in setting.temperature}
    if not wanted <= attention.keys():
        there = ", ".join(f"{temperature:g}" for temperature in sorted(attention))
        raise DataError(f"{file}: scores are kept for T {there}; expected --temperatures among them.")
    dtype = getattr(torch, metadata["dtype"])
    scores = Scores(tensors["base"].float(), attention, dtype, parts["pooled"])
    return Scored(scores, targets, json.loads(metadata["facts"]))


def _readable(batches: Iterable[Any], loader: Any, bad: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images that could be read; the indices of the others go to `bad`."""
    for images, targets, index in batches:
        good = index >= 0
        bad += (-1 - index[~good]).tolist()
        if good.all():
            yield images, targets
        elif good.any():
            yield images[good], targets[good]
    if len(bad) == len(loader.dataset):
        raise DataError(_bad_images(loader.dataset, bad))


def _bad_images(dataset: Any, bad: list[int]) -> str:
    shown = "; ".join(dataset.why_not(index) for index in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{len(bad)} of {len(dataset)} images cannot be read: {shown}{more}. Mend or remove them, or leave them out "
        "with --skip-bad-images."
    )


def _metrics(cell: Cell, options: Options, targets: Tensor) -> dict[str, Metric] | None:
    if cell.task == "real":
        return ANY_LABEL
    if targets.ndim == 1:
        return None
    voc = VOC2007 if options.average_precision == "11-point" else {}
    return MULTI_LABEL | voc | (SIGMOID if options.activation == "sigmoid" else {})


def _calibration(scores: Scores, targets: Tensor) -> Record:
    """Logits grow by about 1 + lam: what that does to probabilities, and what dividing by it mends."""
    wrapped = scores.logits(DEFAULT)
    logits = {"plain": scores.base, "fixed": wrapped, "fixed, logits / (1 + lam)": wrapped / (1 + DEFAULT.lam)}
    return {
        name: {metric: _json(value) for metric, value in calibration(values, targets).items()}
        for name, values in logits.items()
    }


def _load(cell: Cell, model: nn.Module, options: Options) -> tuple[Any, Record, Alignment]:
    """Loader, preprocessing and alignment; how an image becomes a tensor is timm's and the checkpoint's affair."""
    assert not isinstance(cell.size, str)
    data, size = cell.data, cell.size
    if cell.task != "single" and data.stream:
        raise NotApplicableError("a stream has no list of its images: it is scored by the task single alone")
    if cell.task == "single" and data.multilabel:
        raise NotApplicableError("the task single needs exactly one label for each image")
    if cell.task == "multilabel" and not data.multilabel:
        raise NotApplicableError(
            "the task multilabel needs several labels for each image: labels.csv with a column "
            "`labels`, COCO or VOC annotations"
        )
    if cell.task == "mosaic" and data.multilabel and data.tilings is None:
        raise NotApplicableError("mosaics are built from images with exactly one label each")
    if cell.task == "real":
        data = real_labels(data)
    labels = [range(len(data.classes))] if data.stream else data.labels
    if data.stream and not data.classes:  # labels without names are the head's own
        data = replace(data, classes=tuple(map(str, range(model.num_classes))))  # type: ignore[arg-type]
    alignment = align(data.classes, labels, model, options.class_map if cell.task == "multilabel" else None)
    requested = {"input_size": (3, *size), "crop_mode": options.crop_mode, "crop_pct": options.crop_pct}
    if cell.task == "mosaic":
        requested |= {"crop_mode": "squash", "crop_pct": 1.0}  # the mosaic has the right size already
    config = resolve_input_data_config(model, args=requested)
    dataset: Mosaics | Photographs | Streamed
    if data.stream:
        dataset = Streamed(data.stream, alignment)
    elif cell.grid:
        groups = tilings(data, cell.grid, options.seed)
        dataset = Mosaics(data, alignment, groups, cell.grid, size, config["interpolation"])
    else:
        dataset = Photographs(data, alignment)
    loader = create_loader(
        dataset,
        **config,
        batch_size=options.batch_size,
        num_workers=options.workers,
        persistent_workers=options.workers > 0,
        pin_memory=torch.device(options.device).type == "cuda",
        use_prefetcher=False,
    )
    return loader, {name: value for name, value in config.items() if name != "input_size"}, alignment


def _compare(name: str, grid: statistics.Grid, targets: Tensor, seed: int | None) -> Iterator[statistics.Comparison]:
    count = len(targets)
    yield statistics.fixed(name, grid, count, seed)
    if seed is not None and count >= 4:
        split = statistics.halves(targets.numpy() if targets.ndim == 1 else count, seed)
        yield statistics.crossfit(name, grid, split, seed)
    yield statistics.best(name, grid, count)
    yield from statistics.curve(name, grid, count, seed)


def _result(comparison: statistics.Comparison) -> Record:
    low, high = comparison.interval or (None, None)
    return {
        "metric": comparison.metric,
        "protocol": comparison.protocol,
        "lam": ";".join(f"{setting.lam:g}" for setting in comparison.settings),
        "temperature": ";".join(map(show_temperature, comparison.settings)),
        "baseline": _json(comparison.baseline),
        "value": _json(comparison.value),
        "gain": _json(comparison.gain),
        "ci_low": low,
        "ci_high": high,
        "p_value": None if comparison.p_value is None else _json(comparison.p_value),
        "test": comparison.test,
    }


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value


def environment(options: Options) -> Record:
    """Where and with what a record was made."""
    device = torch.device(options.device)
    packages: Sequence[str] = (
        "torch",
        "torchvision",
        "timm",
        "torchmetrics",
        "numpy",
        "scipy",
        "statsmodels",
        "pillow",
    )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in packages},
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "batch_size": options.batch_size,
    }


def _commit() -> str | None:
    """Commit of the checkout, with `-dirty` where it was changed; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
