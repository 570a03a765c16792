"""Measure what class-specific residual attention gains or loses, over pretrained checkpoints.

Each image runs once and serves every setting of lam and T. One JSON record for each (checkpoint, data, task, size)
goes to OUT/records, all of them to OUT/summary.csv and to the table on the terminal. Started again with the same
arguments, a sweep does only what is missing or failed.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.prompt import Confirm

from timm_csra.evaluation.scoring import settings_grid

from . import checkpoints, sample, sources
from .cells import AMP, TASKS, Cell, Options, failure, scores_file, show_size
from .checkpoints import Checkpoint, CheckpointError, find_checkpoints, unreachable_hub
from .classes import COMBINE, load_class_map
from .datasets import DataError, ImageSet
from .downloads import Downloads
from .engines import run_cells
from .estimate import estimate
from .expected import keep_expected
from .records import Record, read_record, record_path, write_record
from .sources import load_image_set
from .summary import headline, kept, write_summary
from .tables import print_headline, print_plan, print_records

EXAMPLES = """
examples:
  python -m benchmarks.sweep --sample
  python -m benchmarks.sweep --models 'resnet50*' --data imagenet/val --task single,mosaic --img-size 1x,2x
  python -m benchmarks.sweep --models local-dir:my-checkpoint --data photos --task multilabel --device cuda --amp bf16
  python -m benchmarks.sweep --models all --data coco/annotations/instances_val2017.json --task multilabel \\
      --class-map coco80-to-imagenet1k
"""

Task = tuple[str, int | None]  # a task, and the grid of a mosaic


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep. Returns 0; 1 where a cell failed; 2 where nothing could be started; 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    out = args.out or Path("results") / ("sample" if args.sample else "")
    screen, log = _console(), Console(stderr=True)
    try:
        options = _options(args, out)
        models, data, tasks = _what(args)
        missing = {} if args.rescore else _not_to_be_had(models)
        with ThreadPoolExecutor(16) as pool:  # the Hub is asked for the hashes of many checkpoints at once
            list(pool.map(lambda model: model.fingerprint, models))
    except (CheckpointError, DataError, ValueError, TypeError) as error:
        log.print(f"benchmarks.sweep: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    if missing and len(missing) == len(models):
        log.print(f"benchmarks.sweep: {_offline(missing)}", markup=False, highlight=False, soft_wrap=True)
        return 2
    if missing:
        log.print(f"{_offline(missing)} Their cells are recorded as failed.", markup=False, highlight=False)

    # A larger image is a rival at its own cost; its records hold the plain model's figures beside the wrapped one's.
    sizes = f"{args.img_size},2x" if args.rivals else args.img_size
    cells = [cell for model in models for cell in _cells(model, sizes, data, tasks, missing)]
    ask = args.models == "all" and options.device == "cpu" and not args.yes
    if args.dry_run or ask:
        states = [_state(cell, options, out, missing, args.retry_failed) for cell in cells]
        to_do = [cell for cell, state in zip(cells, states, strict=True) if state == "to do"]
        if args.dry_run:
            print_plan([(*_describe(cell), state) for cell, state in zip(cells, states, strict=True)], screen)
        (screen if args.dry_run else log).print(str(estimate(to_do, options)), highlight=False, soft_wrap=True)
        if args.dry_run or (to_do and not _confirmed(log)):
            return 0 if args.dry_run else 2
    if args.expected:
        try:
            keep_expected(args.expected, out)
        except ValueError as error:
            log.print(f"benchmarks.sweep: {error}", markup=False, highlight=False, soft_wrap=True)
            return 2
    records: dict[int, Record] = {}
    interrupted = False
    try:
        with Downloads(args.prefetch, args.free_cache) as downloads:
            for cell, record in _run(cells, options, out, missing, args.retry_failed, downloads, log):
                records[id(cell)] = record
    except KeyboardInterrupt:
        interrupted = True
        log.print(f"Stopped after {len(records)} of {len(cells)} cells; start again to do the rest.")
    in_order = [records[id(cell)] for cell in cells if id(cell) in records]
    summary, rows = write_summary(out)
    print_records(in_order, screen)
    print_headline(headline(kept(rows, in_order)), screen)
    if args.sample:
        screen.print(sample.NOTE, style="bold", highlight=False)
    screen.print(f"{len(records)} records in {out / 'records'}, summary in {summary}", highlight=False, soft_wrap=True)
    if interrupted:
        return 130
    return 1 if any(record["status"] == "failed" for record in in_order) else 0


def _state(cell: Cell, options: Options, out: Path, missing: dict[Checkpoint, str], retry_failed: bool) -> str:
    record = _finished(cell, options, out, retry_failed)
    if record is None:
        return "not to be had" if cell.checkpoint in missing else "to do"
    return "done" if record["status"] == "ok" else str(record["status"])


def _describe(cell: Cell) -> tuple[str, str, str, str, str]:
    size = cell.size if isinstance(cell.size, str) else show_size(cell.size)
    images = len(cell.data) // (cell.grid**2 if cell.grid else 1)
    return cell.checkpoint.name, cell.data.name, _task(cell), str(size), str(images)


def _confirmed(log: Console) -> bool:
    if not sys.stdin.isatty():
        log.print("No accelerator was found, and nobody can be asked: say --yes to run all checkpoints on the CPU.")
        return False
    return Confirm.ask("No accelerator was found. Run all of this on the CPU?", console=log, default=False)


def _run(
    cells: list[Cell],
    options: Options,
    out: Path,
    missing: dict[Checkpoint, str],
    retry_failed: bool,
    downloads: Downloads,
    log: Console,
) -> Iterator[tuple[Cell, Record]]:
    """One record for each cell, read where it is finished and measured where it is not.

    Another sweep may work in the same folder: each checkpoint is locked while its cells are computed. What is locked
    comes last, and what the other has finished by then is read.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    groups: dict[Checkpoint, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(cell.checkpoint, []).append(cell)
    waiting = list(groups)
    with Progress(*columns, console=log, transient=True) as progress:
        overall = progress.add_task("cells", total=len(cells))
        patience = 0.0
        while waiting:
            busy = []
            for place, checkpoint in enumerate(waiting):
                lock = FileLock(_lock_file(out, checkpoint))
                try:
                    lock.acquire(timeout=patience)
                except Timeout:
                    busy.append(checkpoint)
                    continue
                try:
                    to_do = []
                    for cell in groups[checkpoint]:
                        if (record := _finished(cell, options, out, retry_failed)) is None:
                            to_do.append(cell)
                        else:
                            progress.advance(overall)
                            yield cell, record
                    if to_do and checkpoint not in missing:
                        downloads.start(checkpoint, [c for c in waiting[place + 1 :] if c not in missing])
                    for cell, record in _measured(to_do, options, out, missing, progress, log):
                        progress.advance(overall)
                        yield cell, record
                    downloads.finish(checkpoint)
                finally:
                    lock.release()
            if busy and len(busy) == len(waiting) and not patience:
                log.print(f"Another sweep works on {', '.join(c.name for c in busy[:3])} in {out}: waiting for it.")
            patience = 1.0 if len(busy) == len(waiting) else 0.0
            waiting = busy


def _finished(cell: Cell, options: Options, out: Path, retry_failed: bool) -> Record | None:
    """The record of a cell for which nothing is left to do."""
    record = read_record(record_path(out, cell.key(options)))
    if record is None or (retry_failed and record["status"] == "failed"):
        return None
    file = scores_file(cell, options)
    scores_missing = record["status"] == "ok" and file is not None and not options.rescore and not file.is_file()
    return None if scores_missing else record


def _measured(
    to_do: list[Cell], options: Options, out: Path, missing: dict[Checkpoint, str], progress: Progress, log: Console
) -> Iterator[tuple[Cell, Record]]:
    """Cells of one checkpoint, measured in a process, and written."""
    if not to_do:
        return
    checkpoint = to_do[0].checkpoint
    if checkpoint in missing:
        reason = f"CheckpointError: not cached, and the Hub cannot be reached: {missing[checkpoint]}"
        new: Iterable[Record] = (failure(cell, options, reason) for cell in to_do)
    else:
        images = progress.add_task(checkpoint.name, total=None)

        def show(cell: Cell, done: int, total: int) -> None:
            progress.update(images, description=_title(cell), completed=done, total=total)

        new = run_cells(to_do, options, lambda cell: _log_file(out, cell, options), show)
    for cell, record in zip(to_do, new, strict=True):
        path = record_path(out, cell.key(options))
        write_record(path, record)
        if not log.is_terminal:  # a log file has no progress bar
            log.print(f"{path.stem}: {record['status']}, {record['seconds']:.1f} s", highlight=False, soft_wrap=True)
        yield cell, record
    if checkpoint not in missing:
        progress.remove_task(images)


def _title(cell: Cell) -> str:
    return f"{cell.checkpoint.name} {cell.data.name} {_task(cell)}"


def _task(cell: Cell) -> str:
    return f"{cell.task} {cell.grid}x{cell.grid}" if cell.grid else cell.task


def _lock_file(out: Path, checkpoint: Checkpoint) -> Path:
    folder = out / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hashlib.sha256(checkpoint.name.encode()).hexdigest()[:16]}.lock"


def _log_file(out: Path, cell: Cell, options: Options) -> Path:
    return out / "logs" / f"{record_path(out, cell.key(options)).stem}.log"


def _what(args: argparse.Namespace) -> tuple[list[Checkpoint], list[ImageSet], list[Task]]:
    """Checkpoints, data and tasks that the arguments name."""
    if args.sample:
        if args.data or args.task or args.limit:
            raise ValueError("--sample brings its own data and task; leave out --data, --task and --limit.")
        return find_checkpoints(args.models or "pypi:*"), [sample.load_sample()], [("mosaic", 2)]
    if not args.models or not args.data:
        raise ValueError("expected --models and --data, or --sample (which needs no data and no network).")
    tasks = (args.task or "single").split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"--task: found {', '.join(unknown)}; expected some of {','.join(TASKS)}.")
    data = [load_image_set(spec, args.limit, args.split, args.data_dir) for spec in args.data]
    grids = [int(part) for part in args.grid.split(",")]
    return find_checkpoints(args.models), data, [(t, g) for t in tasks for g in (grids if t == "mosaic" else [None])]


def _not_to_be_had(models: list[Checkpoint]) -> dict[Checkpoint, str]:
    """Checkpoints that are neither local nor cached, with the reason, where the Hub cannot be reached."""
    absent = [model for model in models if not model.is_cached()]
    reason = unreachable_hub() if absent else None
    return dict.fromkeys(absent, reason) if reason else {}


def _offline(missing: dict[Checkpoint, str]) -> str:
    names = list(missing)
    return (
        f"{names[0].name}{f' and {len(names) - 1} more' if len(names) > 1 else ''} not cached, and the Hub cannot be "
        f"reached ({missing[names[0]]}). Try --sample, --models {checkpoints.PYPI_EXAMPLE} or local-dir:PATH."
    )


def _cells(
    model: Checkpoint, requests: str, data: list[ImageSet], tasks: list[Task], missing: dict[Checkpoint, str]
) -> Iterator[Cell]:
    """What is measured on one checkpoint, sizes outermost: neighbours share the loaded model."""
    for size, requested in _sizes(model, requests, missing).items():
        for images in data:
            for task, grid in tasks:
                yield Cell(model, images, task, size, requested, grid)


def _sizes(model: Checkpoint, requests: str, missing: dict[Checkpoint, str]) -> dict[tuple[int, int] | str, str]:
    """`1x,320` -> sizes in pixels with their requests; the request itself where the checkpoint cannot be asked."""
    parts = [part.strip() for part in requests.split(",")]
    if model in missing and model.source == "hf-hub":
        return {part: part for part in parts}
    try:
        height, width = model.input_size()
    except Exception:  # run_cell asks again and records the reason
        return {part: part for part in parts}
    sizes: dict[tuple[int, int] | str, str] = {}
    for part in parts:
        factor = float(part[:-1]) if part.endswith("x") else None
        size = (round(factor * height), round(factor * width)) if factor else (int(part), int(part))
        sizes.setdefault(size, part)
    return sizes


def _options(args: argparse.Namespace, out: Path) -> Options:
    temperatures = [tuple(_numbers("--temperatures", part, "+")) for part in args.temperatures.split(",")]
    lams = _numbers("--lams", args.lams, ",")
    if any(not re.fullmatch(r"\d+|\d*\.?\d+x", part.strip()) for part in args.img_size.split(",")):
        raise ValueError(f"--img-size: found {args.img_size!r}; expected pixels or multiples such as 224 or 1x,2x.")
    if any(not re.fullmatch(r"[1-9]\d*", part) for part in args.grid.split(",")):
        raise ValueError(f"--grid: found {args.grid!r}; expected whole numbers such as 2 or 2,3.")
    device = _device(args.device)
    return Options(
        settings=tuple(settings_grid(lams, temperatures)),
        crop_mode=args.crop_mode,
        crop_pct=args.crop_pct,
        batch_size=args.batch_size or (16 if device == "cpu" else 64),
        workers=args.workers,
        device=device,
        amp=args.amp,
        seed=args.seed,
        activation=args.activation,
        average_precision=args.average_precision,
        class_map=load_class_map(args.class_map, args.class_scores) if args.class_map else None,
        skip_bad_images=args.skip_bad_images,
        scores=str(out / "scores") if args.keep_scores or args.rescore else None,
        rescore=args.rescore,
        rivals=args.rivals,
        time_plain=args.time_plain,
    )


def _numbers(option: str, text: str, separator: str) -> list[float]:
    try:
        return [float(part) for part in text.split(separator)]
    except ValueError:
        raise ValueError(f"{option}: found {text!r}; expected numbers separated by {separator!r}.") from None


def _device(name: str) -> str:
    if name != "auto":
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:  # torch says it in many ways
            raise ValueError(f"--device {name}: cannot be used here: {str(error).splitlines()[0]}") from error
        return name
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def _console() -> Console:
    """On a terminal its own width; in a file or pipe wide enough for every column."""
    return Console() if sys.stdout.isatty() else Console(width=230)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        epilog=EXAMPLES + sources.HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--sample", action="store_true", help="the embedded default: three checkpoints and seven photographs"
    )
    what.add_argument("--models", metavar="SPEC", help=checkpoints.HELP)
    what.add_argument("--data", nargs="+", metavar="DATA", help="one or several sets of photographs, see below")
    what.add_argument("--split", help="of torch/, hfds/ (default: validation) and VOC (default: test)")
    what.add_argument("--data-dir", metavar="DIR", help="where torch/ and hfds/ keep their files")
    what.add_argument("--task", metavar="TASKS", help=f"some of {','.join(TASKS)} (default: single)")
    what.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows of the data")
    what.add_argument("--lams", default="0,0.02,0.05,0.1,0.2,0.3,0.5,1", help="default: %(default)s; 0 and 0.1 always")
    what.add_argument(
        "--temperatures", default="1,5,inf", help="1+inf is one setting of two heads (default: %(default)s)"
    )
    what.add_argument(
        "--class-map",
        metavar="MAP",
        help="for multilabel: which synsets of the head stand for each class of the data, coco80-to-imagenet1k or a "
        "JSON file of its form",
    )
    what.add_argument(
        "--class-scores",
        choices=COMBINE,
        default=COMBINE[0],
        help="how several synsets become one score: the largest logit, or the log of the summed probabilities "
        "(default: %(default)s)",
    )
    what.add_argument(
        "--activation",
        choices=("softmax", "sigmoid"),
        default="softmax",
        help="sigmoid, for a head trained so, adds CF1 and OF1 at probability 0.5 (default: %(default)s)",
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
        help="also the plain model on five crops of a picture (mean, max), and at 2x, with what they cost",
    )
    images = parser.add_argument_group("images", "from the checkpoint, unless given")
    images.add_argument(
        "--img-size", default="1x", help="pixels or multiples, e.g. 224 or 1x,2x (default: %(default)s)"
    )
    images.add_argument("--crop-mode", choices=("center", "squash", "border"))
    images.add_argument("--crop-pct", type=float, metavar="SHARE")
    images.add_argument("--grid", default="2", metavar="G", help="mosaics of G x G, e.g. 2,3 (default: %(default)s)")
    images.add_argument(
        "--skip-bad-images", action="store_true", help="leave out what cannot be read, and say how many"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, help="folder of records and summary (default: results, or results/sample)")
    how.add_argument("--dry-run", action="store_true", help="say what would run, with sizes and an estimate, and stop")
    how.add_argument("--yes", action="store_true", help="do not ask before --models all without accelerator")
    how.add_argument(
        "--time-plain",
        action="store_true",
        help="also time a plain evaluation pass before and after each cell: the record's `cost` has the ratio",
    )
    how.add_argument("--retry-failed", action="store_true", help="measure again what has failed before")
    how.add_argument("--keep-scores", action="store_true", help="keep the logits of every T in OUT/scores (float16)")
    how.add_argument(
        "--rescore", action="store_true", help="new settings from kept scores, with no forward pass; same temperatures"
    )
    how.add_argument(
        "--expected",
        metavar="FILE_OR_URL",
        help="timm's results-imagenet.csv: lam = 0 on all 50,000 images must agree with it within 0.1 points of top-1, "
        "else the checkpoint is flagged and kept out of the counts",
    )
    how.add_argument("--prefetch", action="store_true", help="download the next checkpoint while one computes")
    how.add_argument("--free-cache", action="store_true", help="after its cells remove what this run has downloaded")
    how.add_argument("--batch-size", type=_positive, help="default: 64, on a CPU 16")
    how.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    how.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps|xpu", help="default: %(default)s")
    how.add_argument("--amp", choices=tuple(AMP), default="none", help="default: %(default)s")
    how.add_argument("--seed", type=int, default=0, help="of mosaics, halves and bootstrap (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
