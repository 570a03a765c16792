"""Measure what class-specific residual attention gains or loses, over pretrained checkpoints.

Each image runs once, for all settings of lam and T. The sweep writes a JSON record for each cell, which is one
checkpoint, data set, task and image size, to OUT/records, and all results to OUT/summary.csv and to the terminal.
Started again with the same arguments, it skips cells that are finished; --retry-failed repeats those that failed.
"""

import argparse
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from rich.console import Console
from rich.prompt import Confirm

from timm_csra.accelerators import on_accelerator

from .arguments import EVERY_CELL, parser
from .asked import asked_calibration, asked_cells, asked_options, asked_what
from .checkpoints import find
from .checkpoints.downloads import Downloads
from .checkpoints.find import Checkpoint, CheckpointError
from .checkpoints.hub import unreachable_hub
from .data import sample
from .data.calibration import without_measured
from .data.datasets import DataError, ImageSet
from .engines.estimate import estimate
from .engines.local import Engine, EngineError, LocalEngine, Progress
from .engines.run import Run
from .records.files import Record
from .records.identity import Place, distinct_names
from .records.phases import where_the_time_went
from .reporting.expected import keep_expected, precision_notes
from .reporting.overview import print_overview, too_many
from .reporting.plan import TO_DO, Planned, is_long, print_plan
from .reporting.pooled import pooled, unpooled
from .reporting.push import choose, push, repository_clash
from .reporting.summary import Row, headline, kept, write_summary
from .reporting.tables import print_headline, print_pooled, print_prose, print_records
from .scoring.caching import wanted
from .scoring.cells import Cell, Options, show_size
from .workers import asked_answering, asked_jobs, asked_workers


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep.

    Returns 0; 1 if a cell failed or none has a result; 2 if the sweep could not start; 130 after Ctrl-C.
    """
    args = parser(__doc__ or "").parse_args(arguments)
    out = args.out or Path("results") / ("sample" if args.sample else "")
    screen, log = _console(), Console(stderr=True)
    try:
        options = asked_options(args, out)
        workers = asked_workers(args, options)
        models, data, tasks = asked_what(args)
        data = asked_calibration(args, data)
        missing = {} if args.rescore else _unavailable(models)
        with ThreadPoolExecutor(16) as pool:  # requests to the Hub
            hashes = list(pool.map(lambda model: model.fingerprint, models))
    except (CheckpointError, DataError, ValueError, TypeError) as error:
        return _refused(log, error)
    if missing and len(missing) == len(models):
        return _refused(log, _offline(missing))
    if missing:
        log.print(f"{_offline(missing)} Their cells are recorded as failed.", markup=False, highlight=False)
    for model, weights in zip(models, hashes, strict=True):
        if weights is None and model not in missing:
            missing[model] = (
                f"the hash of its weights is unknown ({model.why_unknown}), and without it its records cannot be "
                "distinguished from those of other weights. Run again when the Hub answers."
            )

    # Five crops need cells at the checkpoint's own size; cells at 2x have the plain model's figures for larger images.
    sizes = f"{args.img_size},1x,2x" if args.rivals else args.img_size
    cells = [cell for model in models for cell in asked_cells(model, sizes, data, tasks, missing, args.crop_pct)]
    run = Run(options, out, missing, args.retry_failed, log)
    if args.calibration_data and not args.rescore and any(run.state(cell)[0] == TO_DO for cell in cells):
        with log.status("Comparing the calibration pictures with the images of --data"):
            data = without_measured(data)
        cells = [cell for model in models for cell in asked_cells(model, sizes, data, tasks, missing, args.crop_pct)]
    ask = args.models == "all" and options.device == "cpu" and not args.yes
    if args.dry_run or ask:
        to_do = _plan(run, cells, args.dry_run, screen if args.dry_run else log)
        if args.dry_run or (to_do and not _confirmed(log, "No accelerator was found", "Run all of this on the CPU?")):
            return 0 if args.dry_run else 2
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return _refused(log, f"--out {out}: cannot be created: {error}")
    if options.cache_images:
        cached = wanted((cell for cell in cells if run.state(cell)[0] == TO_DO), options)
        if args.engine == "local" and cached.lacking > cached.free:  # nodes of a cluster have disks of their own
            return _refused(log, f"{cached} Make room, give another folder, or leave it out.")
        log.print(str(cached), markup=False, highlight=False, soft_wrap=True)
    if args.expected:
        try:
            keep_expected(args.expected, out)
        except ValueError as error:
            return _refused(log, error)
    records: dict[int, Record] = {}
    interrupted = False
    try:
        with Downloads(args.prefetch, args.free_cache) as downloads:
            for cell, record in run.records(cells, partial(_engine, args, workers, options, data), downloads):
                records[id(cell)] = record
    except EngineError as error:
        return _refused(log, error)
    except KeyboardInterrupt:
        interrupted = True
        log.print(f"Stopped after {len(records)} of {len(cells)} cells; start again to do the rest.")
    in_order = [records[id(cell)] for cell in cells if id(cell) in records]
    warn = partial(log.print, style="yellow", markup=False, highlight=False, soft_wrap=True)
    try:
        summary, folder = write_summary(out, warn)
    except ValueError as error:  # `expected.csv` was changed meanwhile
        return _refused(log, error)
    if present := [
        (cell, records[id(cell)]) for cell in cells if id(cell) in records and folder.replaced(records[id(cell)])
    ]:
        for cell, record in present:
            run.confirm(cell, record)
        summary, folder = write_summary(out, warn)
    mine, in_order = kept(folder.rows, in_order), folder.named(in_order)
    if too_many(in_order):
        print_headline(headline(mine), screen)
        print_pooled(pooled(mine), screen)
        print_overview(in_order, mine, out, screen)
    else:
        print_records(in_order, screen)
        print_headline(headline(mine), screen)
        print_pooled(pooled(mine), screen)
    for said in (*precision_notes(folder.counted), *folder.notes, *unpooled(mine)):
        print_prose(said, screen)
    if line := where_the_time_went(in_order):
        print_prose(line, screen)
    if args.sample:
        screen.print(sample.NOTE, style="bold", highlight=False)
    screen.print(f"{len(records)} records in {out / 'records'}, summary in {summary}", highlight=False, soft_wrap=True)
    if interrupted:
        return 130
    if args.push_best and not _pushed(cells, in_order, folder.rows, args, log, screen):
        return 1
    outcomes = {record["status"] for record in in_order}
    return 1 if "failed" in outcomes or "ok" not in outcomes else 0


def _refused(log: Console, why: object) -> int:
    """Print why the sweep could not start; returns its exit status."""
    log.print(f"benchmarks.sweep: {why}", markup=False, highlight=False, soft_wrap=True)
    return 2


def _engine(
    args: argparse.Namespace, workers: list[Options], options: Options, data: list[ImageSet], progress: Progress
) -> Engine:
    if args.engine == "local":
        exclusive = on_accelerator(options.device)
        return LocalEngine(workers, progress, take_turns=exclusive, answering=asked_answering(args, workers))
    try:
        from .engines.cluster import RayEngine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise EngineError("--engine ray needs Ray, which is not installed: pip install -e '.[ray]'") from None
    return RayEngine(options, args.address, args.cpus_per_cell, data, jobs=asked_jobs(args, options))


def _plan(run: Run, cells: list[Cell], shown: str | None, console: Console) -> int:
    """Print the estimated time of a sweep, and with `shown` what it would do; returns the number of cells to do."""
    build = not is_long(cells)
    states = [run.state(cell, build) for cell in cells]
    to_do = [cell for cell, (state, _) in zip(cells, states, strict=True) if state == TO_DO]
    if shown:
        names = distinct_names((cell.data.name, cell.data.where) for cell in cells)
        planned = [_planned(cell, names, *state) for cell, state in zip(cells, states, strict=True)]
        print_plan(planned, shown == EVERY_CELL, console)
        if not build and (other := sum(cell.size != cell.own for cell in to_do)):
            text = (
                f"{other} of them are not at the checkpoint's own size. Whether the model can be built for the size is"
            )
            print_prose(f"{text} checked when the checkpoint's turn comes, before its weights are downloaded.", console)
    console.print(str(estimate(to_do, run.options)), highlight=False, soft_wrap=True)
    if run.options.cache_images and shown:
        console.print(str(wanted(to_do, run.options)), markup=False, highlight=False, soft_wrap=True)
    return len(to_do)


def _planned(cell: Cell, names: Mapping[Place, str], state: str, reason: str | None) -> Planned:
    size = cell.size if isinstance(cell.size, str) else show_size(cell.size)
    data = names[cell.data.name, cell.data.where]
    return Planned(cell.checkpoint.name, data, cell.task_name, str(size), cell.images, state, reason)


def _confirmed(log: Console, what: str, question: str) -> bool:
    if not sys.stdin.isatty():
        log.print(f"{what}. Use --yes to confirm without a terminal.", highlight=False, soft_wrap=True)
        return False
    return Confirm.ask(f"{what}. {question}", console=log, default=False)


def _pushed(
    cells: list[Cell],
    records: list[Record],
    rows: list[Row],
    args: argparse.Namespace,
    log: Console,
    screen: Console,
) -> bool:
    """Push the chosen checkpoints; returns whether all of them have been pushed."""
    measured: dict[Checkpoint, list[Record]] = {}
    for cell, record in zip(cells, records, strict=True):
        measured.setdefault(cell.checkpoint, []).append(record)
    choices = choose(rows, measured)
    for choice in choices:
        screen.print(f"{choice} -> {choice.repository(args.push_best)}", highlight=False, markup=False, soft_wrap=True)
    if not choices:
        screen.print("Nothing to push: no checkpoint has a significant cross-fitted gain at its own size.")
        return True
    if clash := repository_clash(choices, args.push_best):
        log.print(clash, markup=False, highlight=False, soft_wrap=True)
        return False
    what = f"{len(choices)} of {len(measured)} checkpoints would be pushed to {constants.ENDPOINT}"
    if not args.yes and not _confirmed(log, what, "Push them?"):
        return False
    good = True
    for choice in choices:
        try:
            screen.print(f"pushed {push(choice, args.push_best)}", highlight=False, soft_wrap=True)
        except (HfHubHTTPError, HTTPError, ValueError) as error:  # continue with the other checkpoints
            good = False
            log.print(f"{choice.checkpoint.name}: not pushed: {error}", markup=False, highlight=False, soft_wrap=True)
    return good


def _unavailable(models: list[Checkpoint]) -> dict[Checkpoint, str]:
    """Return checkpoints that are neither local nor cached, with the reason, if the Hub cannot be reached."""
    absent = [model for model in models if not model.is_cached()]
    reason = unreachable_hub() if absent else None
    return dict.fromkeys(absent, f"not cached, and the Hub cannot be reached: {reason}") if reason else {}


def _offline(missing: dict[Checkpoint, str]) -> str:
    names = list(missing)
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0].name}{more} {missing[names[0]]}. Try --sample, --models {find.PYPI_EXAMPLE} or local-dir:PATH."


def _console() -> Console:
    """Return a console as wide as the terminal, or, for a file or pipe, wide enough for every column."""
    return Console() if sys.stdout.isatty() else Console(width=320)


if __name__ == "__main__":
    sys.exit(main())
