"""One cell of a sweep: a checkpoint on one data set, task and image size. Scored once, measured for every setting."""

import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_loader, resolve_input_data_config
from torch import Tensor, nn

import timm_csra
from timm_csra.evaluation import statistics
from timm_csra.evaluation.metrics import evaluate
from timm_csra.evaluation.scoring import Setting, score

from .checkpoints import Checkpoint, weights_sha256
from .classes import NotApplicableError, align
from .datasets import ImageSet, Mosaics, Photographs, tilings
from .records import Record

TASKS = ("single", "multilabel", "mosaic")
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """How cells are run; everything here that can change a result is part of a record's key."""

    settings: tuple[Setting, ...]
    grid: int = 2
    crop_mode: str | None = None
    crop_pct: float | None = None
    batch_size: int = 64
    workers: int = 2
    device: str = "cpu"
    amp: str = "none"
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """What is measured. `size` is `(H, W)` in pixels, or a multiple of the checkpoint's own that is not known yet."""

    checkpoint: Checkpoint
    data: ImageSet
    task: str
    size: tuple[int, int] | str

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
            "grid": options.grid if self.task == "mosaic" else None,
            "settings": [show_setting(setting) for setting in options.settings],
            "crop_mode": options.crop_mode,
            "crop_pct": options.crop_pct,
            "seed": options.seed,
            "device": torch.device(options.device).type,
            "amp": options.amp,
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
    record: Record = {"status": "ok", "reason": None, "n": len(cell.data), "columns": None, "kind": None, "results": []}
    try:
        record |= _measure(cell, load(), options, track)
    except NotApplicableError as reason:
        record |= {"status": "not_applicable", "reason": str(reason)}
    except Exception as error:
        record |= {
            "status": "failed",
            "reason": f"{type(error).__name__}: {error}",
            "traceback": traceback.format_exc(),
        }
    key = cell.key(options)
    return {**key, **record, "key": key, "seconds": time.perf_counter() - started, "environment": environment(options)}


def _measure(cell: Cell, model: nn.Module, options: Options, track: Callable[[Iterable[Any]], Iterable[Any]]) -> Record:
    assert not isinstance(cell.size, str)
    if not model.num_classes:
        raise NotApplicableError("the checkpoint has no classifier (num_classes=0)")
    loader, preprocessing, columns = _load(cell, model, options)
    if len(loader.dataset) == 0:
        raise NotApplicableError(f"{len(cell.data)} images are too few for one mosaic of {options.grid}x{options.grid}")
    clock = [time.perf_counter()]
    scores, targets = score(
        model,
        track(loader),
        options.settings,
        columns=columns,
        device=options.device,
        amp_dtype=AMP[options.amp],
    )
    clock.append(time.perf_counter())
    evaluations = {setting: evaluate(scores.logits(setting), targets) for setting in options.settings}
    names = list(evaluations[options.settings[0]])
    rows = np.arange(len(targets))
    grid = [
        {"lam": s.lam, "temperature": show_temperature(s)}
        | {name: _json(evaluations[s][name].value(rows)) for name in names}
        for s in options.settings
    ]
    clock.append(time.perf_counter())
    results = [
        _result(comparison)
        for name in names
        for comparison in _compare(
            name, {s: evaluations[s][name] for s in options.settings}, cell, targets, options.seed
        )
    ]
    clock.append(time.perf_counter())
    return {
        "n": len(targets),
        "columns": len(columns),
        "kind": timm_csra.explain(model, cell.size).kind,
        "weights_sha256": weights_sha256(model),
        "preprocessing": preprocessing,
        "results": results,
        "all_settings": grid,
        "phases": dict(zip(("score", "metrics", "statistics"), np.diff(clock).tolist(), strict=True)),
    }


def _load(cell: Cell, model: nn.Module, options: Options) -> tuple[Any, Record, tuple[int, ...]]:
    """Loader, preprocessing and scored columns; how an image becomes a tensor is timm's and the checkpoint's affair."""
    assert not isinstance(cell.size, str)
    data, size = cell.data, cell.size
    if cell.task == "single" and data.multilabel:
        raise NotApplicableError("the task single needs exactly one label for each image")
    if cell.task == "multilabel" and not data.multilabel:
        raise NotApplicableError("the task multilabel needs labels.csv with a column `labels`")
    if cell.task == "mosaic" and data.multilabel and data.tilings is None:
        raise NotApplicableError("mosaics are built from images with exactly one label each")
    alignment = align(data.classes, data.labels, model)
    requested = {"input_size": (3, *size), "crop_mode": options.crop_mode, "crop_pct": options.crop_pct}
    if cell.task == "mosaic":
        requested |= {"crop_mode": "squash", "crop_pct": 1.0}  # the mosaic has the right size already
    config = resolve_input_data_config(model, args=requested)
    dataset: Mosaics | Photographs
    if cell.task == "mosaic":
        groups = tilings(data, options.grid, options.seed)
        dataset = Mosaics(data, alignment, groups, options.grid, size, config["interpolation"])
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
    return loader, {name: value for name, value in config.items() if name != "input_size"}, alignment.columns


def _compare(
    name: str, grid: statistics.Grid, cell: Cell, targets: Tensor, seed: int
) -> Iterator[statistics.Comparison]:
    count = len(targets)
    independent = cell.task != "mosaic" or cell.data.tilings is None
    yield statistics.fixed(name, grid, count, seed if independent else None)
    if independent and count >= 4:
        split = statistics.halves(targets.numpy() if targets.ndim == 1 else count, seed)
        yield statistics.crossfit(name, grid, split, seed)
    yield statistics.best(name, grid, count)


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
    }


def _json(value: float) -> float | None:
    return None if np.isnan(value) else value


def environment(options: Options) -> Record:
    """Where and with what a record was made."""
    device = torch.device(options.device)
    packages: Sequence[str] = ("torch", "torchvision", "timm", "torchmetrics", "numpy", "scipy", "pillow")
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
