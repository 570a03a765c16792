"""Measure what class-specific residual attention gains or loses, over pretrained checkpoints.

Each image runs once and serves every setting of lam and T. One JSON record for each (checkpoint, data, task, size)
goes to OUT/records, all of them to OUT/summary.csv and to the table on the terminal. Started again with the same
arguments, a sweep does only what is missing or failed.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from timm_csra.evaluation.scoring import settings_grid

from . import checkpoints, sample
from .cells import AMP, TASKS, Cell, Options, run_cell
from .checkpoints import Checkpoint, CheckpointError, find_checkpoints, unreachable_hub
from .datasets import DataError, ImageSet, load_image_set
from .records import Record, read_record, record_path, write_record, write_summary
from .tables import print_records

EXAMPLES = """
examples:
  python -m benchmarks.sweep --sample
  python -m benchmarks.sweep --models 'resnet50*' --data imagenet/val --task single,mosaic --img-size 1x,2x
  python -m benchmarks.sweep --models local-dir:my-checkpoint --data photos --task multilabel --device cuda --amp bf16

data: an ImageFolder (one folder per class, named by synset or label), or a folder with images/, labels.csv (columns
`file`, and `label` with one index or `labels` with several separated by spaces) and classes.txt (`index name`).
"""


def main(arguments: list[str] | None = None) -> int:
    """Run a sweep. Returns 0; 1 where a cell failed; 2 where nothing could be started; 130 after Ctrl-C."""
    args = _parser().parse_args(arguments)
    out = args.out or Path("results") / ("sample" if args.sample else "")
    screen, log = _console(), Console(stderr=True)
    try:
        options = _options(args)
        models, data, tasks = _what(args)
        missing = _not_to_be_had(models)
    except (CheckpointError, DataError, ValueError, TypeError) as error:
        log.print(f"benchmarks.sweep: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    if missing and len(missing) == len(models):
        log.print(f"benchmarks.sweep: {_offline(missing)}", markup=False, highlight=False, soft_wrap=True)
        return 2
    if missing:
        log.print(f"{_offline(missing)} Their cells are recorded as failed.", markup=False, highlight=False)

    cells = [
        Cell(model, images, task, size)
        for model in models
        for size in _sizes(model, args.img_size, missing)
        for images in data
        for task in tasks
    ]
    records: list[Record] = []
    interrupted = False
    try:
        for record in _run(cells, options, out, missing, log):
            records.append(record)
    except KeyboardInterrupt:
        interrupted = True
        log.print(f"Stopped after {len(records)} of {len(cells)} cells; start again to do the rest.")
    summary = write_summary(out)
    print_records(records, screen)
    if args.sample:
        screen.print(sample.NOTE, style="bold", highlight=False)
    screen.print(f"{len(records)} records in {out / 'records'}, summary in {summary}", highlight=False, soft_wrap=True)
    if interrupted:
        return 130
    return 1 if any(record["status"] == "failed" for record in records) else 0


def _run(
    cells: list[Cell], options: Options, out: Path, missing: dict[Checkpoint, str], log: Console
) -> Iterator[Record]:
    """One record for each cell, read where it is finished and measured where it is not."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=log, transient=True) as progress:
        overall = progress.add_task("cells", total=len(cells))
        loaded = _Loaded(options.device)
        for cell in cells:
            path = record_path(out, cell.key(options))
            record = read_record(path)
            if record is None or record["status"] == "failed":
                images = progress.add_task(f"{cell.checkpoint.name} {cell.data.name} {cell.task}", total=None)
                track = partial(_track, progress, images)
                record = run_cell(cell, partial(loaded.get, cell, missing), options, track)
                progress.remove_task(images)
                write_record(path, record)
                if not log.is_terminal:  # a log file has no progress bar
                    log.print(
                        f"{path.stem}: {record['status']}, {record['seconds']:.1f} s", highlight=False, soft_wrap=True
                    )
            progress.advance(overall)
            yield record


class _Loaded:
    """The one model in memory: neighbouring cells of a checkpoint and size share it."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._for: tuple[Checkpoint, Any] | None = None
        self._model: nn.Module | None = None

    def get(self, cell: Cell, missing: dict[Checkpoint, str]) -> nn.Module:
        if cell.checkpoint in missing:
            raise CheckpointError(f"not cached, and the Hub cannot be reached: {missing[cell.checkpoint]}")
        if isinstance(cell.size, str):  # it could not be asked for its size; now the reason comes out
            cell.checkpoint.input_size()
            raise CheckpointError(f"could not tell the input size at first; run again for {cell.size}")
        if self._model is None or self._for != (cell.checkpoint, cell.size):
            self._model, self._for = None, None  # free the last one first
            self._model = cell.checkpoint.create(cell.size).to(self.device)
            self._for = (cell.checkpoint, cell.size)
        return self._model


def _track(progress: Progress, task: Any, batches: Any) -> Iterable[Any]:
    progress.update(task, total=len(batches))
    for batch in batches:
        yield batch
        progress.advance(task)


def _what(args: argparse.Namespace) -> tuple[list[Checkpoint], list[ImageSet], list[str]]:
    """Checkpoints, data and tasks that the arguments name."""
    if args.sample:
        if args.data or args.task or args.limit:
            raise ValueError("--sample brings its own data and task; leave out --data, --task and --limit.")
        return find_checkpoints(args.models or "pypi:*"), [sample.load_sample()], ["mosaic"]
    if not args.models or not args.data:
        raise ValueError("expected --models and --data, or --sample (which needs no data and no network).")
    tasks = (args.task or "single").split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"--task: found {', '.join(unknown)}; expected some of {','.join(TASKS)}.")
    return find_checkpoints(args.models), [load_image_set(Path(root), args.limit) for root in args.data], tasks


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


def _sizes(model: Checkpoint, requests: str, missing: dict[Checkpoint, str]) -> list[tuple[int, int] | str]:
    """`1x,320` -> sizes in pixels; the request itself where the checkpoint cannot be asked."""
    parts = [part.strip() for part in requests.split(",")]
    if model in missing and model.source == "hf-hub":
        return list(parts)
    try:
        height, width = model.input_size()
    except Exception:  # run_cell asks again and records the reason
        return list(parts)
    sizes: dict[tuple[int, int] | str, None] = {}
    for part in parts:
        factor = float(part[:-1]) if part.endswith("x") else None
        sizes[(round(factor * height), round(factor * width)) if factor else (int(part), int(part))] = None
    return list(sizes)


def _options(args: argparse.Namespace) -> Options:
    temperatures = [tuple(_numbers("--temperatures", part, "+")) for part in args.temperatures.split(",")]
    lams = _numbers("--lams", args.lams, ",")
    if any(not re.fullmatch(r"\d+|\d*\.?\d+x", part.strip()) for part in args.img_size.split(",")):
        raise ValueError(f"--img-size: found {args.img_size!r}; expected pixels or multiples such as 224 or 1x,2x.")
    device = _device(args.device)
    return Options(
        settings=tuple(settings_grid(lams, temperatures)),
        grid=args.grid,
        crop_mode=args.crop_mode,
        crop_pct=args.crop_pct,
        batch_size=args.batch_size or (16 if device == "cpu" else 64),
        workers=args.workers,
        device=device,
        amp=args.amp,
        seed=args.seed,
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
    return Console() if sys.stdout.isatty() else Console(width=190)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--sample", action="store_true", help="the embedded default: three checkpoints and seven photographs"
    )
    what.add_argument("--models", metavar="SPEC", help=checkpoints.HELP)
    what.add_argument("--data", nargs="+", metavar="DIR", help="one or several sets of photographs, see below")
    what.add_argument("--task", metavar="TASKS", help=f"some of {','.join(TASKS)} (default: single)")
    what.add_argument("--limit", type=_positive, metavar="N", help="only the first N rows of the data")
    what.add_argument("--lams", default="0,0.02,0.05,0.1,0.2,0.3,0.5,1", help="default: %(default)s; 0 and 0.1 always")
    what.add_argument(
        "--temperatures", default="1,5,inf", help="1+inf is one setting of two heads (default: %(default)s)"
    )
    images = parser.add_argument_group("images", "from the checkpoint, unless given")
    images.add_argument(
        "--img-size", default="1x", help="pixels or multiples, e.g. 224 or 1x,2x (default: %(default)s)"
    )
    images.add_argument("--crop-mode", choices=("center", "squash", "border"))
    images.add_argument("--crop-pct", type=float, metavar="SHARE")
    images.add_argument(
        "--grid", type=_positive, default=2, metavar="G", help="mosaics of G x G (default: %(default)s)"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--out", type=Path, help="folder of records and summary (default: results, or results/sample)")
    how.add_argument("--batch-size", type=_positive, help="default: 64, on a CPU 16")
    how.add_argument("--workers", type=int, default=2, help="processes that read images (default: %(default)s)")
    how.add_argument("--device", default="auto", metavar="auto|cpu|cuda[:i]|mps|xpu", help="default: %(default)s")
    how.add_argument("--amp", choices=tuple(AMP), default="none", help="default: %(default)s")
    how.add_argument("--seed", type=int, default=0, help="of mosaics, halves and bootstrap (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
