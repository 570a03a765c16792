"""Measure one cell: run each image once, for all settings. Every error becomes a record."""

import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import create_loader, resolve_input_data_config

from timm_csra import UnsupportedModelError

from ..data.classes import Alignment, Classifier, NotApplicableError
from ..data.datasets import DataError, tilings
from ..data.presented import Mosaics, Photographs, Streamed
from ..records.files import Record, now
from ..records.phases import Phases
from .agreement import choose, kept_choice
from .applicable import data_for_task, match_classes
from .caching import cache_images
from .cells import Cell, Options, show_size
from .environment import environment
from .kept import Scored, read_scores, scores_file, write_scores
from .loading import Loaded, collate, describe_bad_images, loaders
from .passes import BatchTooLargeError, Track, Turn, forward_passes, the_pass
from .results import results


@dataclass(frozen=True)
class Unfinished:
    """A cell whose images have been run. Any process can compute its metrics and intervals, without a device.

    Attributes:
        scored: the scores of the images.
        phases: the time of each phase so far.
        record: the fields of the record that are known.
        seconds: the time of the cell so far.
    """

    cell: Cell
    options: Options
    scored: Scored
    phases: Phases
    record: Record
    seconds: float

    def finished(self) -> Record:
        """Compute metrics and intervals, and return the record; an error becomes the record of a failed cell.

        One core computes them, because floating-point sums depend on the number of threads.
        """
        started, threads = time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            file = scores_file(self.cell, self.options)
            if file is not None and not self.options.rescore:
                with self.phases("disk"):
                    write_scores(file, self.scored)
            record = results(self.cell, self.scored, self.options, self.phases)
            record |= {"status": "ok", "reason": None}
            record |= {"phases": self.phases.seconds, "images_run": self.scored.images_run}
        except Exception as error:
            record = _failed(error)
        finally:
            torch.set_num_threads(threads)
        seconds = self.seconds + time.perf_counter() - started
        return _complete(self.cell, self.options, self.record | record, seconds)


def run_cell(
    cell: Cell,
    load: Callable[[], Loaded],
    options: Options,
    track: Track = iter,
) -> Record:
    """Measure one cell and return its record; see `begin_cell`."""
    begun = begin_cell(cell, load, options, track)
    return begun.finished() if isinstance(begun, Unfinished) else begun


def begin_cell(
    cell: Cell, load: Callable[[], Loaded], options: Options, track: Track = iter, turn: Turn = nullcontext
) -> Record | Unfinished:
    """Run the images of one cell. An error becomes a record with the status `not_applicable` or `failed` and a reason.

    Args:
        cell: the cell.
        load: loads the checkpoint; an error in it is one of the cell.
        options: how to measure it.
        track: wraps the batches, to show progress.
        turn: returns a context within which no other process uses the device.
    """
    started = time.perf_counter()
    # Here, because a process that is forked for the metrics must not query the GPU.
    record: Record = {"batch_size": options.batch_size, "environment": environment(options)}
    while True:
        phases = Phases()
        try:
            if options.rescore:
                scored = read_scores(scores_file(cell, options), options.settings)
                scored.facts["agreement"] = kept_choice(cell, scored.facts)
            else:
                with phases("load"):
                    loaded = _loaded(cell, load)
                scored = score_cell(cell, loaded, options, track, phases, turn)
            return Unfinished(cell, options, scored, phases, record, time.perf_counter() - started)
        except NotApplicableError as reason:
            record |= {"status": "not_applicable", "reason": str(reason)}
        except Exception as error:
            if isinstance(error, BatchTooLargeError) and options.batch_size > 1:
                print(f"out of memory at batch size {options.batch_size}: trying half of it", file=sys.stderr)
                options = replace(options, batch_size=options.batch_size // 2)
                record |= {"batch_size": options.batch_size}
                continue  # leaving `except` frees the traceback and the tensors that it refers to
            record |= _failed(error)
        return _complete(cell, options, record, time.perf_counter() - started)


def _failed(error: Exception) -> Record:
    told = error.__cause__ or error if isinstance(error, BatchTooLargeError) else error
    traceback.print_exception(error)
    text = "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": f"{type(told).__name__}: {told}", "traceback": text}


def failure(cell: Cell, options: Options, reason: str, seconds: float = 0.0) -> Record:
    """Return the record of a failed cell whose process could not make one."""
    return _complete(cell, options, {"status": "failed", "reason": reason}, seconds)


def refusal(cell: Cell, options: Options, reason: str) -> Record:
    """Return the record of a cell that is known not to apply before its checkpoint is loaded."""
    return _complete(cell, options, {"status": "not_applicable", "reason": reason}, 0.0)


def _complete(cell: Cell, options: Options, record: Record, seconds: float) -> Record:
    key = cell.key(options)
    nothing: Record = {"n": len(cell.data), "columns": None, "kind": None, "results": []}
    about: Record = {
        "requested": list(cell.requested),
        "own_size": show_size(cell.own) if cell.own else None,
        "where": cell.data.where,
        "finished": now(),
        "score_classes": options.score_classes,
        "seconds": seconds,
    }
    if "environment" not in record:
        about["environment"] = environment(options)
    return {**key, **nothing, **record, "key": key, **about}


def _loaded(cell: Cell, load: Callable[[], Loaded]) -> Loaded:
    try:
        return load()
    except (RuntimeError, ValueError) as error:
        if "size mismatch" in str(error) and cell.size != cell.checkpoint.input_size():
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            raise NotApplicableError(
                f"{len(lines)} weights do not fit the model built for another size than its own: {lines[0]}"
            ) from error
        raise


def score_cell(
    cell: Cell,
    loaded: Loaded,
    options: Options,
    track: Track = iter,
    phases: Phases | None = None,
    turn: Turn = nullcontext,
) -> Scored:
    """Run every image of a cell once, for all settings.

    `phases` gets the time of each phase; for `turn` see `begin_cell`.

    Raises:
        DataError: images cannot be read, and `options.skip_bad_images` is false.
        NotApplicableError: see `match_classes`.
        UnsupportedModelError: the model cannot be wrapped.
    """
    phases, options = phases or Phases(), cell.prepared(options)
    model, explanation = loaded.model, loaded.explanation
    with phases("load"):
        loader, preprocessing, alignment = load_images(cell, loaded, options)
    if explanation.unsupported:
        raise UnsupportedModelError(explanation.unsupported)
    if options.cache_images and cell.data.stream is None:
        with phases("cache"):
            cache_images(loader, cell.data, {**preprocessing, "input_size": (3, *loaded.size)}, options, cell.grid)
    passed, again = the_pass(cell, loaded, loader, preprocessing, alignment, options, track, phases, turn)
    scores = passed.of(alignment.columns)
    targets = loader.dataset.targets[passed.read] if passed.targets is None else passed.targets
    if passed.bad and not options.skip_bad_images:
        raise DataError(describe_bad_images(loader.dataset, passed.bad))
    if (missing := len(cell.data) - len(targets)) and cell.data.stream and len(cell.data):
        if not options.skip_bad_images:
            raise DataError(
                f"{cell.data.name}: found {len(targets)} images, expected {len(cell.data)}: timm's reader skips "
                "images that it cannot read (see the log). Repair them, or skip them with --skip-bad-images."
            )
        print(f"{missing} images of the stream could not be read", file=sys.stderr)
    pictures = cell.data.calibration is not None
    with phases("agreement"), forward_passes(), turn() if pictures else nullcontext():
        agreement = choose(cell.data.calibration, loaded, options, track)
    facts: Record = {
        "n": len(targets),
        "columns": alignment.count,
        "classes_left_out": list(alignment.left_out),
        "classes_from": alignment.classes_from,
        "weights_from": cell.checkpoint.weights_from,
        "groups": alignment.groups,
        "kind": explanation.kind,
        "head_classes": explanation.num_classes,
        "param_count": round(sum(weight.numel() for weight in model.parameters()) / 1e6, 2),
        "macs": explanation.macs,
        "extra_macs": explanation.extra_macs,
        "rival_macs": {name: 5 * explanation.macs for name in scores.pooled if name.startswith("five_crops")},
        "weights_sha256": loaded.weights_sha256,
        "preprocessing": preprocessing,
        "bad_images": [loader.dataset.name(index) for index in passed.bad],
        "missing_images": missing if cell.data.stream and len(cell.data) else 0,
        "cost": passed.cost,
        "device_seconds": None if again else passed.device_seconds,
        "agreement": agreement,
    }
    return Scored(scores, targets, facts, 0 if again else len(targets) + len(passed.bad))


def load_images(
    cell: Cell, loaded: Loaded, options: Options, own: Alignment | None = None
) -> tuple[Any, Record, Alignment]:
    """Return the loader, timm's data config, and the alignment of the data's classes with the head's.

    With an alignment of your `own`, the classes of the checkpoint's head do not matter.

    Raises:
        NotApplicableError: see `match_classes`.
    """
    model, size, options = loaded.model, loaded.size, cell.prepared(options)
    if own:
        data, alignment = data_for_task(cell), own
    else:
        # The number of logits, since the classifier may have been replaced. If it is unknown, `score_cell` raises.
        count = loaded.explanation.num_classes or int(model.num_classes)  # type: ignore[arg-type]
        data, alignment = match_classes(cell, options, Classifier.of(count, getattr(model, "pretrained_cfg", {})))
    config = resolve_input_data_config(model, args=cell.preparation(options))
    dataset: Mosaics | Photographs | Streamed
    if data.stream:
        dataset = Streamed(data.stream, alignment)
    elif cell.grid:
        groups = tilings(data, cell.grid, options.seed)
        dataset = Mosaics(data, alignment, groups, cell.grid, size, config["interpolation"])
    else:
        dataset = Photographs(data, alignment)
    workers = loaders(options, len(dataset), options.batch_size)
    loader = create_loader(
        dataset,
        **config,
        batch_size=options.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        pin_memory=torch.device(options.device).type == "cuda",
        use_prefetcher=False,
    )
    return loader, {name: value for name, value in config.items() if name != "input_size"}, alignment
